// SPDX-License-Identifier: Apache-2.0
// The adapted linear layer on tensors, once for all devices: check, allocate, the library's product, the backend's
// low-rank kernels. The formula and its gradients are those of peftkern/reference.py:
//
//   y = out_scale * (x W^T + s * ((drop(x) A^T) * lam) B^T) + bias           W dense [out, in] or NF4
//
// with h = drop(x) A^T, u = h * lam, z = x W^T + s u B^T, and for the gradient q = g * out_scale:
//   dbias = sum g    dout_scale = sum g * z    dB = s q^T u    du = s q B    dlam = sum du * h    dh = du * lam
//   dA = dh^T drop(x)    dx = q W + mask * (dh A)
#pragma once
#include <tuple>

#include "base_product.h"
#include "low_rank.h"
#include "nf4_ops.h"
#include "tensors.h"

namespace peftkern {

// Which gradients adapted_linear_backward computes: bits of its `needs` argument.
enum Needs : int64_t { kNeedsX = 1, kNeedsA = 2, kNeedsB = 4, kNeedsLam = 8, kNeedsOutScale = 16, kNeedsBias = 32 };

// The arguments both directions share, and the one C++ copy of their contract.
struct Terms {
  Tensor weight;          // [out, in], or NF4: packed [ceil(out * in / 2)] uint8 with
  OptionalTensor absmax;  // [ceil(out * in / block_size)] float32
  int64_t block_size, in, out, rank = 0;
  OptionalTensor A, B, lam, out_scale;  // [rank, in], [out, rank], [rank], [out]
  double scaling;
  Dropout dropout;

  static void check_vector(const OptionalTensor& t, int64_t n, const char* argument) {
    if (!t) return;
    dtype_of(*t, argument);
    check_shape(*t, {n}, argument);
  }

  void check(const Tensor& x, const char* x_name, double dropout_p, const OptionalTensor& seed) {
    if (absmax) {
      check_nf4(weight, *absmax, element_count({out, in}, "weight"), block_size);
    } else {
      dtype_of(weight, "weight");
      check_shape(weight, {out, in}, "weight");
    }
    check_device(weight, x, "weight", x_name);
    PEFTKERN_CHECK(A.has_value() == B.has_value(), "A and B: expected both or neither");
    if (A) {
      PEFTKERN_CHECK(A->dim() == 2, "A: expected shape [r, ", in, "], got ", shape_string(A->sizes()));
      rank = A->size(0);
      dtype_of(*A, "A");
      dtype_of(*B, "B");
      check_shape(*A, {rank, in}, "A");
      check_shape(*B, {out, rank}, "B");
      check_device(*A, x, "A", x_name);
      check_device(*B, x, "B", x_name);
    }
    PEFTKERN_CHECK(!lam || A, "lam: expected A and B beside it");
    check_vector(lam, rank, "lam");
    check_vector(out_scale, out, "out_scale");
    if (lam) check_device(*lam, x, "lam", x_name);
    if (out_scale) check_device(*out_scale, x, "out_scale", x_name);
    PEFTKERN_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p: expected 0 <= p < 1, got ", dropout_p);
    if (dropout_p > 0.0 && rank > 0) {
      PEFTKERN_CHECK(seed.has_value(), "seed: expected an int64 tensor of one element with dropout_p > 0, got None");
      check_dtype(*seed, ScalarType::Long, "seed");
      PEFTKERN_CHECK(seed->numel() == 1, "seed: expected one element, got ", seed->numel());
      check_device(*seed, x, "seed", x_name);
      dropout = make_dropout(static_cast<const int64_t*>(seed->const_data_ptr()), dropout_p);
    }
  }

  // [out, in] in the dtype of the activations. NF4: all paths use these very bits.
  template <class Backend>
  Tensor dense_weight(const Backend& backend, ScalarType dtype) const {
    return absmax ? dequantize(backend, weight, *absmax, block_size, {out, in}, dtype) : to_dtype(weight, dtype);
  }
};

inline Factor factor(const Tensor& t, bool rank_major, const char* argument) {
  return {t.const_data_ptr(), dtype_of(t, argument), rank_major};
}

inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
inline const float* const_floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
inline const float* const_floats(const OptionalTensor& t) { return t ? const_floats(*t) : nullptr; }

// A small vector as the kernels take it.
inline OptionalTensor float_vector(const OptionalTensor& t) {
  return t ? OptionalTensor(dense(to_dtype(*t, ScalarType::Float))) : std::nullopt;
}

// A result in its final shape. Not a view: autograd forbids users to modify a view that a Function returns in place, as
// nn.ReLU(inplace=True) and `y += x` do.
inline Tensor reshaped(const Tensor& t, const std::vector<int64_t>& shape) {
  return call_aten("aten::_unsafe_view", "", t, shape);
}

// [..., n] as a dense matrix [rows, n], whatever of it is zero.
inline Tensor as_rows(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return dense(torch::stable::reshape(t, std::vector<int64_t>{rows, t.size(t.dim() - 1)}));
}

inline std::vector<int64_t> with_last_size(const Tensor& t, int64_t n) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = n;
  return shape;
}

inline Tensor times(const Tensor& a, const Tensor& b) { return call_aten("aten::mul", "Tensor", a, b); }

// The library's products. Autocast may be on around us and return its own dtype, so the result is brought back.
inline Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return dense(to_dtype(call_aten("aten::linear", "", x, weight, bias), x.scalar_type()));
}
inline Tensor product(const Tensor& a, const Tensor& b) {
  return dense(to_dtype(call_aten("aten::mm", "", a, b), a.scalar_type()));
}

// How y0 = x W^T + bias is made: the first row that accepts. set_base_product() forces one, for tests and benchmarks.
template <class Backend>
struct BaseProduct {
  const char* name;
  bool (*accepts)(const Terms&, int64_t rows);
  Tensor (*make)(const Backend&, const Terms&, const Tensor& x, const OptionalTensor& bias);
};

template <class Backend>
Tensor few_rows_product(const Backend& backend, const Terms& t, const Tensor& x, const OptionalTensor& bias) {
  Tensor y = empty(x, {x.size(0), t.out}, x.scalar_type());
  const Tensor packed = dense(t.weight), absmax = dense(*t.absmax);
  const OptionalTensor offset = float_vector(bias);
  if constexpr (Backend::kFewRows > 0) {
    backend.nf4_few_rows({.x = x.const_data_ptr(),
                          .x_dtype = dtype_of(x, "x"),
                          .rows = x.size(0),
                          .in = t.in,
                          .out = t.out,
                          .packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
                          .absmax = const_floats(absmax),
                          .block_size = t.block_size,
                          .bias = const_floats(offset),
                          .y = y.mutable_data_ptr()});
  }
  return y;
}

template <class Backend>
Tensor library_product(const Backend& backend, const Terms& t, const Tensor& x, const OptionalTensor& bias) {
  const ScalarType dtype = x.scalar_type();
  return linear(x, t.dense_weight(backend, dtype), bias ? OptionalTensor(to_dtype(*bias, dtype)) : std::nullopt);
}

template <class Backend>
constexpr BaseProduct<Backend> kBaseProducts[] = {
    {"nf4_few_rows",
     [](const Terms& t, int64_t rows) {
       return t.absmax && rows > 0 && rows <= Backend::kFewRows && t.in > 0 && t.in % t.block_size == 0;
     },
     few_rows_product<Backend>},
    {"library", [](const Terms&, int64_t) { return true; }, library_product<Backend>},
};

template <class Backend>
Tensor base_product(const Backend& backend, const Terms& t, const Tensor& x, const OptionalTensor& bias) {
  const std::string forced = forced_base_product();
  for (const auto& row : kBaseProducts<Backend>) {
    if (!forced.empty() && forced != row.name) continue;
    if (row.accepts(t, x.size(0))) return row.make(backend, t, x, bias);
  }
  fail("base product: \"", forced, "\" is forced and takes no ", x.size(0), " rows of this weight");
}

// y [..., out]; h [rows, rank] float32 if save_h, else [0]; z [rows, out] if save_z, else [0].
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> adapted_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& absmax,
                                                  int64_t block_size, int64_t out_features, const OptionalTensor& A,
                                                  const OptionalTensor& B, const OptionalTensor& lam,
                                                  const OptionalTensor& out_scale, const OptionalTensor& bias,
                                                  double scaling, double dropout_p, const OptionalTensor& seed,
                                                  bool save_h, bool save_z) {
  const DType x_dtype = dtype_of(x, "x");
  PEFTKERN_CHECK(x.dim() >= 1, "x: expected shape [..., in_features], got a scalar");
  PEFTKERN_CHECK(out_features >= 0, "out_features: expected >= 0, got ", out_features);
  PEFTKERN_CHECK(absmax || weight.dim() != 2 || weight.size(1) == x.size(x.dim() - 1), "x: expected shape [..., ",
                 weight.size(1), "] for weight ", shape_string(weight.sizes()), ", got ", shape_string(x.sizes()));
  Terms t{weight, absmax, block_size, x.size(x.dim() - 1), out_features, 0, A, B, lam, out_scale, scaling, {}};
  t.check(x, "x", dropout_p, seed);
  Terms::check_vector(bias, t.out, "bias");
  if (bias) check_device(*bias, x, "bias", "x");

  const Backend backend(x);
  const ScalarType dtype = x.scalar_type();
  const Tensor input = as_rows(x);
  const int64_t rows = input.size(0);
  const std::vector<int64_t> shape = with_last_size(x, t.out);

  // bias rides in the epilogue of the base product unless out_scale has to come between
  const bool late_bias = out_scale.has_value();
  Tensor y = base_product(backend, t, input, late_bias ? std::nullopt : bias);

  Tensor h = empty(x, save_h ? std::vector<int64_t>{rows, t.rank} : std::vector<int64_t>{0}, ScalarType::Float);
  Tensor z = empty(x, save_z ? std::vector<int64_t>{rows, t.out} : std::vector<int64_t>{0}, dtype);
  if (rows && (t.rank || out_scale || save_z)) {
    Tensor u = h;
    OptionalTensor b_dense;
    if (t.rank) {
      const Tensor a_dense = dense(*t.A);
      b_dense = dense(*t.B);
      if (!save_h) u = empty(x, {rows, t.rank}, ScalarType::Float);
      backend.low_rank_down({.x = input.const_data_ptr(),
                             .x_dtype = x_dtype,
                             .rows = rows,
                             .columns = t.in,
                             .rank = t.rank,
                             .factor = factor(a_dense, true, "A"),
                             .alpha = 1.0f,
                             .dropout = t.dropout,
                             .out = floats(u)});
      if (lam) u = times(u, *float_vector(lam));
    }
    const OptionalTensor scale = float_vector(out_scale);
    const OptionalTensor late = late_bias ? float_vector(bias) : std::nullopt;
    const Factor b_factor = b_dense ? factor(*b_dense, false, "B") : Factor{nullptr, DType::f32, false};
    backend.low_rank_up({.u = t.rank ? const_floats(u) : nullptr,
                         .rows = rows,
                         .columns = t.out,
                         .rank = t.rank,
                         .factor = b_factor,
                         .alpha = static_cast<float>(scaling),
                         .dropout = {},
                         .out_scale = const_floats(scale),
                         .bias = const_floats(late),
                         .z = save_z ? z.mutable_data_ptr() : nullptr,
                         .y = y.mutable_data_ptr(),
                         .y_dtype = x_dtype});
  }
  return {reshaped(y, shape), h, z};
}

// dx [..., in] in the dtype of grad; dA, dB, dlam, dout_scale in that of their parameter; dbias [out] float32, as the
// dtype of bias is not known here; [0] where `needs` does not ask.
// x is read only for dA, h for dB and dlam, z for dout_scale.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapted_linear_backward(
    const Tensor& grad, const OptionalTensor& x, const Tensor& weight, const OptionalTensor& absmax, int64_t block_size,
    int64_t in_features, const OptionalTensor& h, const OptionalTensor& z, const OptionalTensor& A,
    const OptionalTensor& B, const OptionalTensor& lam, const OptionalTensor& out_scale, double scaling,
    double dropout_p, const OptionalTensor& seed, int64_t needs) {
  const DType grad_dtype = dtype_of(grad, "grad");
  PEFTKERN_CHECK(grad.dim() >= 1, "grad: expected shape [..., out_features], got a scalar");
  Terms t{weight, absmax, block_size, in_features, grad.size(grad.dim() - 1), 0, A, B, lam, out_scale, scaling, {}};
  t.check(grad, "grad", dropout_p, seed);

  const Backend backend(grad);
  const ScalarType dtype = grad.scalar_type();
  const Tensor g = as_rows(grad);
  const int64_t rows = g.size(0);
  const std::vector<int64_t> shape = with_last_size(grad, t.in);

  const auto needed = [&](Needs what, const std::vector<int64_t>& size, ScalarType type) {
    return empty(grad, needs & what ? size : std::vector<int64_t>{0}, type);
  };
  const auto type_of = [&](const OptionalTensor& like) { return like ? like->scalar_type() : ScalarType::Float; };
  const auto column_sums = [&](const Tensor& values, const OptionalTensor& factors, int64_t columns) {
    Tensor sums = empty(grad, {columns}, ScalarType::Float);
    backend.column_sums({.g = values.const_data_ptr(),
                         .z = factors ? factors->const_data_ptr() : nullptr,
                         .g_dtype = dtype_of(values, "grad"),
                         .rows = rows,
                         .columns = columns,
                         .out = floats(sums)});
    return sums;
  };

  Tensor dx = needed(kNeedsX, shape, dtype);
  Tensor dA = needed(kNeedsA, {t.rank, t.in}, type_of(A));
  Tensor dB = needed(kNeedsB, {t.out, t.rank}, type_of(B));
  Tensor dlam = needed(kNeedsLam, {t.rank}, type_of(lam));
  Tensor dout_scale = needed(kNeedsOutScale, {t.out}, type_of(out_scale));
  Tensor dbias = needed(kNeedsBias, {t.out}, ScalarType::Float);

  if (needs & kNeedsBias) dbias = column_sums(g, std::nullopt, t.out);
  if (needs & kNeedsOutScale) {
    PEFTKERN_CHECK(z && out_scale, "z and out_scale: expected both for the gradient of out_scale");
    check_shape(*z, {rows, t.out}, "z");
    check_dtype(*z, dtype, "z");
    dout_scale = to_dtype(column_sums(g, dense(*z), t.out), out_scale->scalar_type());
  }

  const Tensor q = out_scale ? dense(to_dtype(times(g, *float_vector(out_scale)), dtype)) : g;
  const float s = static_cast<float>(scaling);
  if (needs & (kNeedsB | kNeedsLam)) {
    PEFTKERN_CHECK(h.has_value() && A.has_value(), "h, A and B: expected them for the gradients of B and lam");
    check_shape(*h, {rows, t.rank}, "h");
    check_dtype(*h, ScalarType::Float, "h");
  }
  if ((needs & kNeedsB) && dB.numel()) {
    const Tensor u = lam ? times(*h, *float_vector(lam)) : dense(*h);
    backend.low_rank_grad({.u = const_floats(u),
                           .x = q.const_data_ptr(),
                           .x_dtype = grad_dtype,
                           .rows = rows,
                           .columns = t.out,
                           .rank = t.rank,
                           .alpha = s,
                           .dropout = {},
                           .grad = dB.mutable_data_ptr(),
                           .grad_dtype = dtype_of(dB, "B"),
                           .rank_major = false});
  }

  OptionalTensor dh;
  if (t.rank && (needs & (kNeedsX | kNeedsA | kNeedsLam))) {
    Tensor du = empty(grad, {rows, t.rank}, ScalarType::Float);
    const Tensor b_dense = dense(*B);
    if (rows) {
      backend.low_rank_down({.x = q.const_data_ptr(),
                             .x_dtype = grad_dtype,
                             .rows = rows,
                             .columns = t.out,
                             .rank = t.rank,
                             .factor = factor(b_dense, false, "B"),
                             .alpha = s,
                             .dropout = {},
                             .out = floats(du)});
    }
    if (needs & kNeedsLam) dlam = to_dtype(column_sums(du, dense(*h), t.rank), lam->scalar_type());
    dh = lam ? times(du, *float_vector(lam)) : du;
  }
  if ((needs & kNeedsA) && dA.numel()) {
    PEFTKERN_CHECK(x.has_value(), "x: expected it for the gradient of A");
    check_shape(*x, shape, "x");
    check_dtype(*x, dtype, "x");
    const Tensor input = as_rows(*x);
    backend.low_rank_grad({.u = const_floats(*dh),
                           .x = input.const_data_ptr(),
                           .x_dtype = dtype_of(input, "x"),
                           .rows = rows,
                           .columns = t.in,
                           .rank = t.rank,
                           .alpha = 1.0f,
                           .dropout = t.dropout,
                           .grad = dA.mutable_data_ptr(),
                           .grad_dtype = dtype_of(dA, "A"),
                           .rank_major = true});
  }
  if (needs & kNeedsX) {
    dx = product(q, t.dense_weight(backend, dtype));
    if (dh && rows) {
      const Tensor a_dense = dense(*A);
      backend.low_rank_up({.u = const_floats(*dh),
                           .rows = rows,
                           .columns = t.in,
                           .rank = t.rank,
                           .factor = factor(a_dense, true, "A"),
                           .alpha = 1.0f,
                           .dropout = t.dropout,
                           .out_scale = nullptr,
                           .bias = nullptr,
                           .z = nullptr,
                           .y = dx.mutable_data_ptr(),
                           .y_dtype = grad_dtype});
    }
    dx = reshaped(dx, shape);
  }
  return {dx, dA, dB, dlam, dout_scale, dbias};
}

}  // namespace peftkern
