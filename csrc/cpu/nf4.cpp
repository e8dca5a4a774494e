// SPDX-License-Identifier: Apache-2.0
// NF4 on the CPU: blocks over threads, the 8-bit absmax codes, and the registration.
#include "../nf4_ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "backend.h"
#include "kernels.h"
#include "large_buffers.h"

namespace peftkern {

using cpu::kernels;
using torch::stable::parallel_for;

namespace {

constexpr int64_t kElementsPerThread = 1 << 15;

int64_t blocks_per_thread(int64_t block_size) { return std::max<int64_t>(1, kElementsPerThread / block_size); }

// Fp32 midpoints of neighbouring dynamic codes; the code of a value is the number of midpoints below it.
std::array<float, 255> dynamic_midpoints() {
  std::array<float, 255> midpoints;
  for (size_t i = 0; i < midpoints.size(); ++i) midpoints[i] = (kDynamicCodes[i] + kDynamicCodes[i + 1]) / 2.0f;
  return midpoints;
}

}  // namespace

Tensor CpuBackend::empty_weight(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) const {
  size_t bytes = dtype == ScalarType::Float ? 4 : 2;
  std::vector<int64_t> strides(shape.size());
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = i + 1 < shape.size() ? strides[i + 1] * shape[i + 1] : 1;
    bytes *= static_cast<size_t>(shape[i]);
  }
  if (bytes < cpu::kLargeBuffer) return empty(like, shape, dtype);
  const auto give_back = [bytes](void* data) { cpu::give_buffer(data, bytes); };
  return torch::stable::from_blob(cpu::take_buffer(bytes), shape, strides, like.device(), dtype, give_back);
}

void CpuBackend::quantize_nf4(const QuantizeNf4& a) const {
  parallel_for(0, ceil_div(a.n, a.block_size), blocks_per_thread(a.block_size),
               [&](int64_t begin, int64_t end) { kernels().quantize_nf4(a, begin, end); });
}

void CpuBackend::dequantize_nf4(const DequantizeNf4& a) const {
  parallel_for(0, ceil_div(a.n, a.block_size), blocks_per_thread(a.block_size),
               [&](int64_t begin, int64_t end) { kernels().dequantize_nf4(a, begin, end); });
}

void CpuBackend::nf4_few_rows(const Nf4Product& a) const {
  const auto& k = kernels();
  const cpu::Buffer buffer(static_cast<size_t>(ceil_div(a.rows, cpu::kRowUnit) * cpu::kRowUnit * a.in) * sizeof(float));
  float* const packed_x = static_cast<float*>(buffer.data());
  k.pack_few_rows(a, packed_x);
  parallel_for(0, a.out, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(a.in, 1)),
               [&](int64_t begin, int64_t end) { k.nf4_few_rows(a, packed_x, begin, end); });
}

void CpuBackend::nf4_tiles(const Nf4Product& a, bool gradient) const {
  const auto& k = *(gradient ? kernels().nf4_gradient : kernels().nf4_forward)[static_cast<int>(a.x_dtype)];
  const int64_t columns = gradient ? a.in : a.out, depth = gradient ? a.out : a.in;
  const cpu::Buffer packed(k.packed_bytes(a));
  const int64_t panels = k.panels(a), panel_work = std::max<int64_t>(1, ceil_div(a.rows, panels) * depth);
  parallel_for(0, panels, std::max<int64_t>(1, 2 * kElementsPerThread / panel_work),
               [&](int64_t begin, int64_t end) { k.pack(a, packed.data(), begin, end); });
  const int64_t unit_work = std::max<int64_t>(1, cpu::kTileColumnUnit * depth);
  parallel_for(0, ceil_div(columns, cpu::kTileColumnUnit), std::max<int64_t>(1, kElementsPerThread / unit_work),
               [&](int64_t begin, int64_t end) {
                 const cpu::Buffer scratch(k.scratch_bytes(a));
                 k.columns(a, packed.data(), scratch.data(), begin * cpu::kTileColumnUnit,
                           std::min(end * cpu::kTileColumnUnit, columns));
               });
}

// absmax is 1/block_size of the weight, so plain code is enough here.
void CpuBackend::quantize_absmax(const QuantizeAbsmax& a) const {
  static const std::array<float, 255> midpoints = dynamic_midpoints();
  double total = 0.0;
  for (int64_t i = 0; i < a.n; ++i) total += a.absmax[i];
  const float offset = a.n ? static_cast<float>(total / static_cast<double>(a.n)) : 0.0f;
  *a.offset = offset;
  parallel_for(0, ceil_div(a.n, kNestedBlockSize), 16, [&](int64_t block0, int64_t block1) {
    for (int64_t block = block0; block < block1; ++block) {
      const int64_t begin = block * kNestedBlockSize, end = std::min(begin + kNestedBlockSize, a.n);
      float largest = 0.0f;
      for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(a.absmax[i] - offset));
      a.nested_absmax[block] = largest;
      const float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
      for (int64_t i = begin; i < end; ++i) {
        const float scaled = (a.absmax[i] - offset) * inverse;
        const auto at = std::lower_bound(midpoints.begin(), midpoints.end(), scaled);
        a.codes[i] = static_cast<uint8_t>(at - midpoints.begin());
      }
    }
  });
}

void CpuBackend::dequantize_absmax(const DequantizeAbsmax& a) const {
  parallel_for(0, a.n, kElementsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      a.absmax[i] = kDynamicCodes[a.codes[i]] * a.nested_absmax[i / kNestedBlockSize] + *a.offset;
  });
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
  m.impl("quantize_nf4", TORCH_BOX(&quantize_nf4<CpuBackend>));
  m.impl("dequantize_nf4", TORCH_BOX(&dequantize_nf4<CpuBackend>));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax<CpuBackend>));
  m.impl("dequantize_absmax", TORCH_BOX(&dequantize_absmax<CpuBackend>));
}

}  // namespace peftkern
