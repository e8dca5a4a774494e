// SPDX-License-Identifier: Apache-2.0
// AdaLoRA's rank allocation on the CPU: layers over threads, and the registration. The Gram matrices of the
// orthogonality term and their gradient are products with a low-rank factor, so the kernels of low_rank.h do them.
#include "../rank_allocation_ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "backend.h"
#include "convert.h"
#include "kernels.h"
#include "split.h"

namespace peftkern {

using cpu::kernels;
using cpu::KernelTable;
using torch::stable::parallel_for;

namespace {

constexpr int64_t kLayerWork = 1 << 16;  // for a thread: elements of an update, multiply-adds of a product

// f(i) or f(begin, end) over layers or factors of `work` in all.
int64_t grain(int64_t n, int64_t work) { return std::max<int64_t>(1, kLayerWork * n / std::max<int64_t>(work, 1)); }

// out = alpha * x F^T on this thread; F is [rank, columns].
void multiply_down(const KernelTable& k, const void* x, DType x_dtype, int64_t rows, int64_t columns,
                   const Factor& factor, int64_t rank, float alpha, float* out) {
  const LowRankDown args{.x = x,
                         .x_dtype = x_dtype,
                         .rows = rows,
                         .columns = columns,
                         .rank = rank,
                         .factor = factor,
                         .alpha = alpha,
                         .dropout = {},
                         .out = out};
  const int64_t ld = k.padded_rank(rank);
  std::vector<float> packed(static_cast<size_t>(cpu::round_up(columns, cpu::kMaxLanes) * ld));
  std::vector<float> scratch(static_cast<size_t>(cpu::kRowBlock * ld));
  k.pack_down(args, packed.data(), 0, columns);
  k.low_rank_down(args, packed.data(), scratch.data(), 0, rows);
}

template <class T>
std::vector<float> as_floats(const void* data, int64_t n) {
  std::vector<float> values(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = to_float(static_cast<const T*>(data)[i]);
  return values;
}

// D = A A^T or B^T B, less I
void gram(const KernelTable& k, const OrthogonalFactor& f, float* D) {
  if (f.rank_major) {
    multiply_down(k, f.data, f.dtype, f.rank, f.columns, {f.data, f.dtype, true}, f.rank, 1.0f, D);
  } else {
    std::vector<float> widened;
    dispatch(f.dtype, [&](auto tag) {
      using T = decltype(tag);
      if constexpr (sizeof(T) < sizeof(float)) widened = as_floats<T>(f.data, f.rank * f.columns);
    });
    const LowRankGrad args{.u = widened.empty() ? static_cast<const float*>(f.data) : widened.data(),
                           .x = f.data,
                           .x_dtype = f.dtype,
                           .rows = f.columns,
                           .columns = f.rank,
                           .rank = f.rank,
                           .alpha = 1.0f,
                           .dropout = {},
                           .grad = D,
                           .grad_dtype = DType::f32,
                           .rank_major = true};
    const int64_t padded = ceil_div(f.rank, cpu::kRowUnit) * cpu::kRowUnit;
    std::vector<float> scratch(static_cast<size_t>(padded * cpu::kColumnUnit));
    k.low_rank_grad(args, scratch.data(), 0, f.rank);
  }
  for (int64_t i = 0; i < f.rank; ++i) D[i * f.rank + i] -= 1.0f;
}

// grad = c D A or c B D
void gram_grad(const KernelTable& k, const OrthogonalFactor& f, const float* D, float c) {
  if (f.rank_major) {
    std::vector<float> u(D, D + f.rank * f.rank);
    std::memset(f.grad, 0, static_cast<size_t>(f.rank * f.columns) * (f.dtype == DType::f32 ? 4 : 2));
    const LowRankUp args{.u = u.data(),
                         .rows = f.rank,
                         .columns = f.columns,
                         .rank = f.rank,
                         .factor = {f.data, f.dtype, true},
                         .alpha = c,
                         .dropout = {},
                         .out_scale = nullptr,
                         .bias = nullptr,
                         .z = nullptr,
                         .y = f.grad,
                         .y_dtype = f.dtype};
    const int64_t ld = ceil_div(f.columns, cpu::kColumnUnit) * cpu::kColumnUnit;
    std::vector<float> packed(static_cast<size_t>(cpu::round_up(f.rank, cpu::kMaxLanes) * ld));
    k.pack_up(args, packed.data(), ld, 0, ld);
    k.low_rank_up(args, packed.data(), ld, 0, f.rank);
    return;
  }
  const Factor deviation{D, DType::f32, true};  // symmetric
  dispatch(f.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) == sizeof(float)) {
      multiply_down(k, f.data, f.dtype, f.columns, f.rank, deviation, f.rank, c, static_cast<float*>(f.grad));
    } else {
      std::vector<float> product(static_cast<size_t>(f.columns * f.rank));
      multiply_down(k, f.data, f.dtype, f.columns, f.rank, deviation, f.rank, c, product.data());
      T* grad = static_cast<T*>(f.grad);
      for (size_t i = 0; i < product.size(); ++i) grad[i] = from_float<T>(product[i]);
    }
  });
}

int64_t work(const OrthogonalFactor* factors, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += factors[i].rank * factors[i].rank * factors[i].columns;
  return total;
}

}  // namespace

void CpuBackend::update_importance(const ImportanceUpdate& a) const {
  int64_t rank = 0, elements = 0;
  for (int64_t i = 0; i < a.layer_count; ++i) {
    rank = std::max(rank, a.layers[i].rank);
    elements += a.layers[i].rank * (a.layers[i].in + a.layers[i].out);
  }
  parallel_for(0, a.layer_count, grain(a.layer_count, elements), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(rank * (cpu::kMaxLanes + 1)));
    kernels().update_importance(a, scratch.data(), begin, end);
  });
}

// A few thousand scores: a selection takes 20 us.
void CpuBackend::rank_mask(const RankMask& a) const {
  const int64_t pruned = a.triplets - a.budget;
  if (pruned <= 0 || a.budget <= 0) {
    std::fill(a.keep, a.keep + a.triplets, static_cast<uint8_t>(pruned <= 0));
    return;
  }
  std::vector<uint32_t> keys(static_cast<size_t>(a.triplets));
  std::transform(a.scores, a.scores + a.triplets, keys.begin(), score_key);
  std::vector<uint32_t> sorted = keys;
  std::nth_element(sorted.begin(), sorted.begin() + (pruned - 1), sorted.end());
  const uint32_t threshold = sorted[static_cast<size_t>(pruned - 1)];
  const auto above = std::count_if(keys.begin(), keys.end(), [&](uint32_t key) { return key > threshold; });
  int64_t ties = a.exact ? a.budget - above : 0;  // how many that tie stay
  for (int64_t i = 0; i < a.triplets; ++i) {
    const uint32_t key = keys[static_cast<size_t>(i)];
    a.keep[i] = key > threshold || (key == threshold && ties-- > 0);
  }
}

void CpuBackend::mask_ranks(const MaskRanks& a) const {
  for (int64_t i = 0; i < a.layer_count; ++i) {
    const TripletLayer& layer = a.layers[i];
    dispatch(layer.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t j = 0; j < layer.rank; ++j)
        if (!a.keep[layer.first + j]) static_cast<T*>(layer.E)[j] = T{};
    });
  }
}

void CpuBackend::orthogonality(const Orthogonality& a) const {
  const auto& k = kernels();
  parallel_for(0, a.factor_count, grain(a.factor_count, work(a.factors, a.factor_count)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const OrthogonalFactor& f = a.factors[i];
                   float* D = a.deviations + f.deviation;
                   double square = 0.0;
                   if (f.rank) gram(k, f, D);
                   for (int64_t e = 0; e < f.rank * f.rank; ++e) square += static_cast<double>(D[e]) * D[e];
                   a.norms[i] = static_cast<float>(std::sqrt(square));
                 }
               });
  double value = 0.0;
  for (int64_t i = 0; i < a.factor_count; ++i)
    value += a.squared ? static_cast<double>(a.norms[i]) * a.norms[i] : a.norms[i];
  *a.value = static_cast<float>(a.squared ? value : value / static_cast<double>(a.factor_count));
}

void CpuBackend::orthogonality_grad(const OrthogonalityGrad& a) const {
  const auto& k = kernels();
  parallel_for(0, a.factor_count, grain(a.factor_count, work(a.factors, a.factor_count)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const OrthogonalFactor& f = a.factors[i];
                   const float mean = 2.0f / static_cast<float>(a.factor_count), norm = a.norms[i];
                   const float c = *a.upstream * (a.squared ? 4.0f : norm > 0.0f ? mean / norm : 0.0f);
                   if (f.rank) gram_grad(k, f, a.deviations + f.deviation, c);
                 }
               });
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
  m.impl("update_importance_", TORCH_BOX(&update_importance_lists<CpuBackend>));
  m.impl("update_importance_table_", TORCH_BOX(&update_importance_table<CpuBackend>));
  m.impl("rank_mask", TORCH_BOX(&rank_mask<CpuBackend>));
  m.impl("mask_ranks_", TORCH_BOX(&mask_ranks_list<CpuBackend>));
  m.impl("mask_ranks_table_", TORCH_BOX(&mask_ranks_table<CpuBackend>));
  m.impl("orthogonality", TORCH_BOX(&orthogonality<CpuBackend>));
  m.impl("orthogonality_backward", TORCH_BOX(&orthogonality_backward<CpuBackend>));
}

}  // namespace peftkern
