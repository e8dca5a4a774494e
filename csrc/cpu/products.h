// SPDX-License-Identifier: Apache-2.0
// How the CPU makes the products of csrc/products.h: best first, plainest last.
#pragma once
#include "../products.h"
#include "backend.h"
#include "dispatch.h"
#include "kernels.h"
#include "onednn.h"

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
bool tiles_accept(const Product& p, const Tensor& x, const cpu::Nf4Tiles* tiles) {
  const Terms& t = p.terms;
  return tiles && t.absmax && x.scalar_type() == ScalarType::BFloat16 && p.rows() > 0 && t.out > 0 && t.in > 0 &&
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

// Up to so many rows nf4_few_rows beats dequantizing for the library: 0.60 against 2.49 ms for 1 row of 4096 x 4096,
// 2.3 against 3.0 for 8, 3.4 against 2.7 for 12; and tiles: 0.73 against 1.06 for 2 rows, but 1.5 against 1.1 for 4.
inline int64_t few_rows(bool has_tiles) { return has_tiles ? 2 : 8; }

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

inline constexpr Way<CpuBackend, ForwardProduct> kCpuForward[] = {
    {"nf4_few_rows",
     [](const ForwardProduct& p) {
       const Terms& t = p.terms;
       return t.absmax && p.rows() > 0 && p.rows() <= few_rows(tiles_accept(p, p.x, cpu::kernels().nf4_forward)) &&
              t.in > 0 && t.in % t.block_size == 0;
     },
     [](const CpuBackend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, few_rows_base); }},
    {"nf4_tiles", [](const ForwardProduct& p) { return tiles_accept(p, p.x, cpu::kernels().nf4_forward); },
     [](const CpuBackend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, tiles_base); }},
    {"small", [](const ForwardProduct& p) { return small_accepts(p, p.x); },
     [](const CpuBackend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, small_base, false); },
     small_pays<ForwardProduct>},
    {"onednn", [](const ForwardProduct& p) { return onednn_accepts(p, p.x); },
     [](const CpuBackend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, onednn_base); },
     onednn_pays<ForwardProduct>},
    kLibraryForward<CpuBackend>,
};

inline constexpr Way<CpuBackend, GradientProduct> kCpuGradient[] = {
    {"nf4_tiles", [](const GradientProduct& p) { return tiles_accept(p, p.q, cpu::kernels().nf4_gradient); },
     [](const CpuBackend& backend, const GradientProduct& p) {
       const Terms& t = p.terms;
       Tensor dx = empty(p.q, {p.rows(), t.in}, p.q.scalar_type());
       backend.nf4_tiles(nf4_product(t, p.q, dense(t.weight), t.absmax->floats(backend), std::nullopt, dx), true);
       return add_low_rank(backend, p, dx);
     }},
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
