// SPDX-License-Identifier: Apache-2.0
// How the CPU makes the products of csrc/products.h: best first, plainest last.
#pragma once
#include "../products.h"
#include "backend.h"
#include "dispatch.h"
#include "kernels.h"
#include "onednn.h"
#include "split.h"

namespace peftkern {

inline Nf4Product nf4_product(const Terms& t, const Tensor& x, const Tensor& packed, const Tensor& absmax,
                              const OptionalTensor& bias, Tensor& y) {
  return {.x = x.const_data_ptr(),
          .x_dtype = dtype_of(x, "x"),
          .rows = x.size(0),
          .in = t.in,
          .out = t.out,
          .packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
          .absmax = const_floats(absmax),
          .block_size = t.block_size,
          .bias = const_floats(bias),
          .y = y.mutable_data_ptr()};
}

inline Tensor tiles_base(const CpuBackend& backend, const ForwardProduct& p, const OptionalTensor& bias) {
  const Terms& t = p.terms;
  Tensor y = empty(p.x, {p.rows(), t.out}, p.x.scalar_type());
  backend.nf4_tiles(nf4_product(t, p.x, dense(t.weight), t.absmax->floats(backend), float_vector(bias), y), false);
  return y;
}

// Whole runs of 32 columns, so that none of them crosses a block.
template <class Product>
bool tiles_accept(const Product& p, const Tensor& x, const cpu::Nf4Tiles* const (&tiles)[kDTypes]) {
  const Terms& t = p.terms;
  return t.absmax && tiles[static_cast<int>(dtype_of(x, "x"))] && p.rows() > 0 && t.out > 0 && t.in > 0 &&
         t.in % cpu::kTileColumnUnit == 0;
}

inline Tensor few_rows_base(const CpuBackend& backend, const ForwardProduct& p, const OptionalTensor& bias) {
  const Terms& t = p.terms;
  Tensor y = empty(p.x, {p.rows(), t.out}, p.x.scalar_type());
  const Tensor packed = dense(t.weight), absmax = t.absmax->floats(backend);
  const OptionalTensor offset = float_vector(bias);
  backend.nf4_few_rows(nf4_product(t, p.x, packed, absmax, offset, y));
  return y;
}

// Measured on 2 cores of a Zen 4, 4096 x 4096, against the library's product of a weight dequantized first: bf16
// forward 41 and 41 ms for 512 rows, 6.0 and 7.2 for 64, 2.3 and 3.6 for 16; its gradient 43 and 43 ms for 512
// rows, 6.9 and 8.3 for 64; fp32 forward 83 and 102, gradient 85 and 100 for 512 rows. Without the bf16 dot product the
// alternative is MKL's fp32, which is at its peak on other machines than AMD's.
inline bool tiles_pay(const Tensor& x) {
  const std::string isa = cpu::kernels().name;
  return cpu::is_amd() || (x.scalar_type() == ScalarType::BFloat16 && (isa == "amx" || isa == "avx512bf16"));
}

// Up to so many rows nf4_few_rows can. Without tiles, where the library is the alternative, it pays up to 8: 2.3
// against 3.0 ms for 8 rows of 4096 x 4096, 3.4 against 2.7 for 12 (Xeon).
inline constexpr int64_t kMostFewNf4Rows = 80;
inline int64_t few_rows(const ForwardProduct& p) {
  constexpr int64_t kWithoutRuns = 8;
  const auto& tiles = cpu::kernels().nf4_forward;
  if (!tiles_accept(p, p.x, tiles) || !tiles_pay(p.x) || p.terms.block_size < 64) return kWithoutRuns;
  return tiles[static_cast<int>(dtype_of(p.x, "x"))]->from_rows(p.terms.in) - 1;
}

// A row's u [rank] and B [out, ld] and its scale; the first rank of each ld elements count.
struct RowTerm {
  const float* u;
  const void* factor;
  int64_t rank;
  float scale;
};

// y = x W^T + scale u B^T + bias in one pass over the weight. terms: of each entry, whose row is order's, or none.
inline Tensor few_rows_product(const CpuBackend& backend, const ForwardProduct& p, const std::vector<RowTerm>& rows,
                               int64_t ld, DType factor_dtype, const int64_t* order) {
  const Terms& t = p.terms;
  const int64_t padded = cpu::round_up(ld, cpu::kMaxLanes);
  std::vector<float> scaled(rows.size() * static_cast<size_t>(padded));  // zero past the rank
  std::vector<LowRankTerm> terms;
  for (const RowTerm& row : rows) {
    float* u = scaled.data() + static_cast<int64_t>(terms.size()) * padded;
    for (int64_t j = 0; j < row.rank; ++j) u[j] = row.scale * row.u[j];
    terms.push_back({u, row.factor, row.rank});
  }
  const Tensor weight = dense(t.weight);
  const OptionalTensor bias = float_vector(p.bias);
  Tensor y = empty(p.x, {p.rows(), t.out}, p.x.scalar_type());
  const DType dtype = dtype_of(y, "y");
  backend.few_rows({.x = p.x.const_data_ptr(),
                    .x_dtype = dtype,
                    .x_rows = order,
                    .rows = p.rows(),
                    .in = t.in,
                    .out = t.out,
                    .weight = weight.const_data_ptr(),
                    .weight_dtype = dtype,
                    .bias = const_floats(bias),
                    .terms = terms.empty() ? nullptr : terms.data(),
                    .factor_dtype = factor_dtype,
                    .factor_ld = ld,
                    .y_rows = order,
                    .y = y.mutable_data_ptr(),
                    .y_dtype = dtype,
                    .y_ld = t.out});
  return y;
}

inline Tensor few_rows_forward(const CpuBackend& backend, const ForwardProduct& p) {
  const Terms& t = p.terms;
  std::vector<RowTerm> rows;
  const OptionalTensor b = p.u ? OptionalTensor(dense(*t.B)) : std::nullopt;
  for (int64_t i = 0; p.u && i < p.rows(); ++i)
    rows.push_back({const_floats(*p.u) + i * t.rank, b->const_data_ptr(), t.rank, static_cast<float>(t.scaling)});
  return few_rows_product(backend, p, rows, t.rank, b ? dtype_of(*b, "B") : DType::f32, nullptr);
}

Tensor few_rows_mixed(const CpuBackend& backend, const ForwardProduct& p, const MultiLoraUp& up);

// With a LoRA term of 16 float32 ranks, 2 cores of a Zen 4, times as fast as the next way: bf16 1.6 to 2.0 for 1 to 8
// rows of 576 x 576 and 1.3 to 3.0 of 4096 x 4096, 1.1 to 1.7 for 16 and 0.9 to 1.2 for 32; fp32 (oneDNN) 1.0 to 2.0
// for up to 8, 0.9 for 16; fp16 0.9 to 1.6 for 1, 1.6 to 3.0 for 4 to 32. Beyond 8 rows autotune decides. Not with lam:
// its sums go through ranks lane by lane, and a rank whose lam is 0 has to leave without changing a bit.
inline bool few_rows_accept(const ForwardProduct& p) {
  constexpr int64_t kMostRows = 32;
  const Terms& t = p.terms;
  return !t.absmax && t.weight.scalar_type() == p.x.scalar_type() && p.rows() > 0 && p.rows() <= kMostRows &&
         t.in > 0 && t.out > 0 && !t.out_scale && !t.lam && !p.z;
}

inline Tensor onednn_base(const CpuBackend& backend, const ForwardProduct& p, const OptionalTensor& bias) {
  return onednn_linear(p.x, p.terms.dense_weight(backend, p.x.scalar_type()), float_vector(bias));
}

template <class Product>
bool onednn_accepts(const Product& p, const Tensor& x) {
  return x.scalar_type() == ScalarType::Float && p.rows() > 0 && p.terms.in > 0 && p.terms.out > 0 && has_onednn();
}

// F.linear in fp32 is MKL, which on AMD is slow, and whose small sums depend on the number of threads. On 2 cores of a
// Zen 4, oneDNN against it: 81 against 108 ms for 512 rows of 4096 x 4096, 20 against 25 for 512 of 2048 x 2048, 3.1
// against 7.8 for 4 of 4096 x 4096; q W of one row is slower (6.0 against 3.0), and a call costs 10 us more.
template <class Product>
bool onednn_pays(const Product&) {
  return cpu::is_amd();
}

// The product by the kernel of the low-rank one, with the weight as its factor: [out, in], or [in, out] if transposed.
inline Tensor small_product(const CpuBackend& backend, const Tensor& x, const Tensor& weight, bool transposed) {
  const int64_t columns = weight.size(transposed ? 0 : 1), rank = weight.size(transposed ? 1 : 0);
  Tensor y = empty(x, {x.size(0), rank}, ScalarType::Float);
  backend.low_rank_down({.x = x.const_data_ptr(),
                         .x_dtype = DType::f32,
                         .rows = x.size(0),
                         .columns = columns,
                         .rank = rank,
                         .factor = factor(weight, !transposed, "weight"),
                         .alpha = 1.0f,
                         .dropout = {},
                         .out = floats(y)});
  return y;
}

inline Tensor small_base(const CpuBackend& backend, const ForwardProduct& p, const OptionalTensor&) {
  return small_product(backend, p.x, dense(p.terms.dense_weight(backend, ScalarType::Float)), false);
}

template <class Product>
bool small_accepts(const Product& p, const Tensor& x) {
  return x.scalar_type() == ScalarType::Float && p.rows() > 0 && p.terms.in > 0 && p.terms.out > 0;
}

// 4 rows of 64 x 64 take 16 us, with oneDNN 23, with MKL 12; the factor is repacked in each call, 1 to 2 ns a weight.
template <class Product>
bool small_pays(const Product& p) {
  return cpu::is_amd() && p.terms.in * p.terms.out <= 1 << 13 && p.rows() <= 256;
}

// library_accumulate is behind library, so only autotune takes it: oneDNN reads y back as slowly as we do. 0.97 to 1.05
// times as fast for 8 to 1024 rows of 576 to 4096 columns, bf16, fp32 and NF4, on 2 cores of an AMD EPYC.
inline constexpr Way<CpuBackend, ForwardProduct> kCpuForward[] = {
    {"nf4_few_rows",
     [](const ForwardProduct& p) {
       const Terms& t = p.terms;
       return t.absmax && p.rows() > 0 && p.rows() <= kMostFewNf4Rows && t.in > 0 && t.in % t.block_size == 0;
     },
     [](const CpuBackend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, few_rows_base); },
     [](const ForwardProduct& p) { return p.rows() <= few_rows(p); }},
    {"nf4_tiles", [](const ForwardProduct& p) { return tiles_accept(p, p.x, cpu::kernels().nf4_forward); },
     [](const CpuBackend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, tiles_base); },
     [](const ForwardProduct& p) { return tiles_pay(p.x); }},
    {"few_rows", few_rows_accept, few_rows_forward, [](const ForwardProduct& p) { return p.rows() <= cpu::kFewRows; },
     few_rows_mixed},
    {"small", [](const ForwardProduct& p) { return small_accepts(p, p.x); },
     [](const CpuBackend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, small_base, false); },
     small_pays<ForwardProduct>},
    {"onednn", [](const ForwardProduct& p) { return onednn_accepts(p, p.x); },
     [](const CpuBackend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, onednn_base); },
     onednn_pays<ForwardProduct>},
    kLibraryForward<CpuBackend>,
    kLibraryAccumulateForward<CpuBackend>,
};

inline constexpr Way<CpuBackend, GradientProduct> kCpuGradient[] = {
    {"nf4_tiles", [](const GradientProduct& p) { return tiles_accept(p, p.q, cpu::kernels().nf4_gradient); },
     [](const CpuBackend& backend, const GradientProduct& p) {
       const Terms& t = p.terms;
       Tensor dx = empty(p.q, {p.rows(), t.in}, p.q.scalar_type());
       backend.nf4_tiles(nf4_product(t, p.q, dense(t.weight), t.absmax->floats(backend), std::nullopt, dx), true);
       return add_low_rank(backend, p, dx);
     },
     [](const GradientProduct& p) { return tiles_pay(p.q); }},
    {"small", [](const GradientProduct& p) { return small_accepts(p, p.q); },
     [](const CpuBackend& backend, const GradientProduct& p) {
       const Tensor weight = dense(p.terms.dense_weight(backend, p.q.scalar_type()));
       return add_low_rank(backend, p, small_product(backend, p.q, weight, true));
     },
     small_pays<GradientProduct>},
    {"onednn", [](const GradientProduct& p) { return onednn_accepts(p, p.q); },
     [](const CpuBackend& backend, const GradientProduct& p) {
       const Tensor weight = p.terms.dense_weight(backend, p.q.scalar_type());
       return add_low_rank(backend, p, onednn_linear(p.q, torch::stable::transpose(weight, 0, 1), std::nullopt));
     },
     onednn_pays<GradientProduct>},
    kLibraryGradient<CpuBackend>,
    kLibraryAccumulateGradient<CpuBackend>,
};

template <>
inline std::span<const Way<CpuBackend, ForwardProduct>> ways() {
  return kCpuForward;
}
template <>
inline std::span<const Way<CpuBackend, GradientProduct>> ways() {
  return kCpuGradient;
}

}  // namespace peftkern
