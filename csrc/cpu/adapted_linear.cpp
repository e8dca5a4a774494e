// SPDX-License-Identifier: Apache-2.0
// adapted_linear on the CPU: the low-rank kernels over threads, and the registration.
#include "../adapted_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "backend.h"
#include "kernels.h"
#include "products.h"
#include "split.h"

namespace peftkern {

using cpu::kColumnUnit;
using cpu::kernels;
using cpu::kRowUnit;
using cpu::round_up;
using cpu::split;

void CpuBackend::low_rank_down(const LowRankDown& a) const {
  const auto& k = kernels();
  if (a.rows <= cpu::kFewRows && a.factor.rank_major && a.alpha == 1.0f && !a.dropout.threshold) {
    return few_rows({.x = a.x,
                     .x_dtype = a.x_dtype,
                     .x_rows = nullptr,
                     .rows = a.rows,
                     .in = a.columns,
                     .out = a.rank,
                     .weight = a.factor.data,
                     .weight_dtype = a.factor.dtype,
                     .bias = nullptr,
                     .terms = nullptr,
                     .factor_dtype = DType::f32,
                     .factor_ld = 0,
                     .y_rows = nullptr,
                     .y = a.out,
                     .y_dtype = DType::f32,
                     .y_ld = a.rank});
  }
  const int64_t ld = k.padded_rank(a.rank);
  std::vector<float> packed(static_cast<size_t>(round_up(a.columns, cpu::kMaxLanes) * ld));
  split(a.columns, kColumnUnit, static_cast<double>(ld),
        [&](int64_t begin, int64_t end) { k.pack_down(a, packed.data(), begin, end); });
  split(a.rows, kRowUnit, static_cast<double>(a.columns * ld), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(cpu::kRowBlock * ld));
    k.low_rank_down(a, packed.data(), scratch.data(), begin, end);
  });
}

void CpuBackend::low_rank_up(const LowRankUp& a) const {
  const auto& k = kernels();
  const int64_t ld = round_up(a.columns, kColumnUnit);
  std::vector<float> packed(static_cast<size_t>(round_up(a.rank, cpu::kMaxLanes) * ld));
  split(ld, kColumnUnit, static_cast<double>(a.rank),
        [&](int64_t begin, int64_t end) { k.pack_up(a, packed.data(), ld, begin, end); });
  split(a.rows, kRowUnit, static_cast<double>(a.columns * (a.rank + 1)),
        [&](int64_t begin, int64_t end) { k.low_rank_up(a, packed.data(), ld, begin, end); });
}

void CpuBackend::low_rank_grad(const LowRankGrad& a) const {
  const auto& k = kernels();
  split(a.columns, kColumnUnit, static_cast<double>(a.rows * a.rank), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(round_up(a.rank, kRowUnit) * kColumnUnit));
    k.low_rank_grad(a, scratch.data(), begin, end);
  });
}

void CpuBackend::column_sums(const ColumnSums& a) const {
  split(a.columns, kColumnUnit, static_cast<double>(a.rows),
        [&](int64_t begin, int64_t end) { kernels().column_sums(a, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
  add_product_names<CpuBackend, ForwardProduct>("forward");
  add_product_names<CpuBackend, GradientProduct>("gradient");
  m.impl("adapted_linear", TORCH_BOX(&adapted_linear<CpuBackend>));
  m.impl("adapted_linear_backward", TORCH_BOX(&adapted_linear_backward<CpuBackend>));
  m.impl("product_ways", TORCH_BOX(&product_ways<CpuBackend>));
}

}  // namespace peftkern
