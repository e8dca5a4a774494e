// SPDX-License-Identifier: Apache-2.0
// The adapted linear layer on tensors, once for all devices: check, allocate, the low-rank
// kernels around the product with the weight (products.h). The formula and its gradients are those of
// peftkern/reference.py:
//
//   y = out_scale * (x W^T + s * ((drop(x) A^T) * lam) B^T) + bias           W dense [out, in] or NF4
//
// with h = drop(x) A^T, u = h * lam, z = x W^T + s u B^T, and for the gradient q = g * out_scale:
//   dbias = sum g    dout_scale = sum g * z    dB = s q^T u    du = s q B    dlam = sum du * h    dh = du * lam
//   dA = dh^T drop(x)    dx = q W + mask * (dh A)
#pragma once
#include <vector>

#include "products.h"

namespace peftkern {

// Which gradients adapted_linear_backward computes: bits of its `needs` argument.
enum Needs : int64_t { kNeedsX = 1, kNeedsA = 2, kNeedsB = 4, kNeedsLam = 8, kNeedsOutScale = 16, kNeedsBias = 32 };

// y [..., out], then h [rows, rank] float32 if save_h, then z [rows, out] if save_z. A list: an empty tensor for what
// was not asked for costs 2 us to make, wrap and free.
template <class Backend>
std::vector<Tensor> adapted_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& absmax,
                                   const OptionalTensor& nested_absmax, const OptionalTensor& offset,
                                   int64_t block_size, int64_t out_features, const OptionalTensor& A,
                                   const OptionalTensor& B, const OptionalTensor& lam, const OptionalTensor& out_scale,
                                   const OptionalTensor& bias, double scaling, double dropout_p,
                                   const OptionalTensor& seed, bool save_h, bool save_z) {
  const DType x_dtype = dtype_of(x, "x");
  PEFTKERN_CHECK(x.dim() >= 1, "x: expected shape [..., in_features], got a scalar");
  PEFTKERN_CHECK(out_features >= 0, "out_features: expected >= 0, got ", out_features);
  PEFTKERN_CHECK(absmax || weight.dim() != 2 || weight.size(1) == x.size(x.dim() - 1), "x: expected shape [..., ",
                 weight.size(1), "] for weight ", shape_string(weight.sizes()), ", got ", shape_string(x.sizes()));
  Terms t{weight,
          nf4_scales(absmax, nested_absmax, offset),
          block_size,
          x.size(x.dim() - 1),
          out_features,
          0,
          A,
          B,
          lam,
          out_scale,
          scaling,
          {}};
  t.check(x, "x", dropout_p, seed);
  Terms::check_vector(bias, t.out, "bias");
  if (bias) check_device(*bias, x, "bias", "x");

  const Backend backend(x);
  const Tensor input = as_rows(x);
  const int64_t rows = input.size(0);
  const std::vector<int64_t> shape = with_last_size(x, t.out);

  OptionalTensor h, z, u;
  if (save_h || (rows && t.rank)) h = empty(x, {rows, t.rank}, ScalarType::Float);
  if (save_z) z = empty(x, {rows, t.out}, x.scalar_type());
  if (rows && t.rank) {
    const Tensor a_dense = dense(*t.A);
    backend.low_rank_down({.x = input.const_data_ptr(),
                           .x_dtype = x_dtype,
                           .rows = rows,
                           .columns = t.in,
                           .rank = t.rank,
                           .factor = factor(a_dense, true, "A"),
                           .alpha = 1.0f,
                           .dropout = t.dropout,
                           .out = floats(*h)});
    u = lam ? times(*h, *float_vector(lam)) : *h;
  }
  const Tensor y = make(backend, ForwardProduct{t, input, u, bias, rows ? z : std::nullopt});
  std::vector<Tensor> results{reshaped(y, shape)};
  if (save_h) results.push_back(*h);
  if (save_z) results.push_back(*z);
  return results;
}

// Of dx [..., in] in the dtype of grad; dA, dB, dlam, dout_scale in that of their parameter; dbias [out] float32, as
// the dtype of bias is not known here: those that `needs` asks for, in this order. x is read only for dA, h for dB and
// dlam, z for dout_scale.
template <class Backend>
std::vector<Tensor> adapted_linear_backward(const Tensor& grad, const OptionalTensor& x, const Tensor& weight,
                                            const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
                                            const OptionalTensor& offset, int64_t block_size, int64_t in_features,
                                            const OptionalTensor& h, const OptionalTensor& z, const OptionalTensor& A,
                                            const OptionalTensor& B, const OptionalTensor& lam,
                                            const OptionalTensor& out_scale, double scaling, double dropout_p,
                                            const OptionalTensor& seed, int64_t needs) {
  const DType grad_dtype = dtype_of(grad, "grad");
  PEFTKERN_CHECK(grad.dim() >= 1, "grad: expected shape [..., out_features], got a scalar");
  Terms t{weight,
          nf4_scales(absmax, nested_absmax, offset),
          block_size,
          in_features,
          grad.size(grad.dim() - 1),
          0,
          A,
          B,
          lam,
          out_scale,
          scaling,
          {}};
  t.check(grad, "grad", dropout_p, seed);

  const Backend backend(grad);
  const ScalarType dtype = grad.scalar_type();
  const Tensor g = as_rows(grad);
  const int64_t rows = g.size(0);
  const std::vector<int64_t> shape = with_last_size(grad, t.in);

  const auto type_of = [&](const OptionalTensor& like) { return like ? like->scalar_type() : ScalarType::Float; };
  const auto vector = [&](bool wanted, int64_t n) {
    return wanted ? OptionalTensor(empty(grad, {n}, ScalarType::Float)) : std::nullopt;
  };
  // values * scale, in one pass with those sums and dots of ColumnSums that are given; without scale values itself.
  const auto scaled = [&](const Tensor& values, const OptionalTensor& scale, OptionalTensor sums, OptionalTensor dots,
                          const OptionalTensor& z) {
    if (!scale && !sums && !dots) return values;
    const OptionalTensor factors = float_vector(scale), other = dots ? OptionalTensor(dense(*z)) : std::nullopt;
    Tensor q = scale ? empty(grad, {rows, values.size(1)}, values.scalar_type()) : values;
    backend.column_sums({.g = values.const_data_ptr(),
                         .dtype = dtype_of(values, "grad"),
                         .rows = rows,
                         .columns = values.size(1),
                         .z = other ? other->const_data_ptr() : nullptr,
                         .scale = const_floats(factors),
                         .q = scale ? q.mutable_data_ptr() : nullptr,
                         .sums = sums ? floats(*sums) : nullptr,
                         .dots = dots ? floats(*dots) : nullptr});
    return q;
  };

  OptionalTensor dx, dA, dB, dlam, dout_scale, dbias;
  if (needs & kNeedsB) dB = empty(grad, {t.out, t.rank}, type_of(B));
  const bool makes_dB = dB && dB->numel();
  // dbias rides along in q, and where dB reads g itself in dB.
  const bool bias_rides =
      Backend::kGradSums && (needs & kNeedsBias) && makes_dB && !out_scale && dtype != ScalarType::Float;
  if (needs & kNeedsOutScale) {
    PEFTKERN_CHECK(z && out_scale, "z and out_scale: expected both for the gradient of out_scale");
    check_shape(*z, {rows, t.out}, "z");
    check_dtype(*z, dtype, "z");
  }
  dbias = vector(needs & kNeedsBias, t.out);
  dout_scale = vector(needs & kNeedsOutScale, t.out);
  const bool needs_q = needs & (kNeedsX | kNeedsA | kNeedsB | kNeedsLam);
  const Tensor q = scaled(g, needs_q ? out_scale : std::nullopt, bias_rides ? std::nullopt : dbias, dout_scale, z);
  if (dout_scale) dout_scale = to_dtype(*dout_scale, out_scale->scalar_type());
  const float s = static_cast<float>(scaling);
  if (needs & (kNeedsB | kNeedsLam)) {
    PEFTKERN_CHECK(h.has_value() && A.has_value(), "h, A and B: expected them for the gradients of B and lam");
    check_shape(*h, {rows, t.rank}, "h");
    check_dtype(*h, ScalarType::Float, "h");
  }
  if (makes_dB) {
    const Tensor u = lam ? times(*h, *float_vector(lam)) : dense(*h);
    backend.low_rank_grad({.u = const_floats(u),
                           .x = q.const_data_ptr(),
                           .x_dtype = grad_dtype,
                           .rows = rows,
                           .columns = t.out,
                           .rank = t.rank,
                           .alpha = s,
                           .dropout = {},
                           .grad = dB->mutable_data_ptr(),
                           .grad_dtype = dtype_of(*dB, "B"),
                           .rank_major = false,
                           .sums = bias_rides ? floats(*dbias) : nullptr});
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
    dlam = vector(needs & kNeedsLam, t.rank);
    dh = scaled(du, needs & (kNeedsX | kNeedsA) ? lam : std::nullopt, std::nullopt, dlam, h);
    if (dlam) dlam = to_dtype(*dlam, lam->scalar_type());
  }
  if (needs & kNeedsLam && !dlam) dlam = empty(grad, {t.rank}, type_of(lam));  // rank 0
  if (needs & kNeedsA) dA = empty(grad, {t.rank, t.in}, type_of(A));
  if (dA && dA->numel()) {
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
                           .grad = dA->mutable_data_ptr(),
                           .grad_dtype = dtype_of(*dA, "A"),
                           .rank_major = true});
  }
  if (needs & kNeedsX) dx = reshaped(make(backend, GradientProduct{t, q, dh}), shape);
  std::vector<Tensor> gradients;
  for (const OptionalTensor& gradient : {dx, dA, dB, dlam, dout_scale, dbias})
    if (gradient) gradients.push_back(*gradient);
  return gradients;
}

// The ways {forward, gradient} of x [rows, in] and grad [rows, out], of which nothing is read, where nothing is timed.
template <class Backend>
std::vector<std::string> product_ways(const Tensor& x, const Tensor& grad, const Tensor& weight,
                                      const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
                                      const OptionalTensor& offset, int64_t block_size, const OptionalTensor& A,
                                      const OptionalTensor& B, const OptionalTensor& lam,
                                      const OptionalTensor& out_scale) {
  Terms t{weight,
          nf4_scales(absmax, nested_absmax, offset),
          block_size,
          x.size(1),
          grad.size(1),
          0,
          A,
          B,
          lam,
          out_scale,
          1.0,
          {}};
  t.check(x, "x", 0.0, std::nullopt);
  const Backend backend(x);                            // whose device is the current one from here on
  const OptionalTensor u = t.rank ? A : std::nullopt;  // whether there is one is all that counts
  return {way_by_rule<Backend>(ForwardProduct{t, x, u, std::nullopt, std::nullopt}).name,
          way_by_rule<Backend>(GradientProduct{t, grad, u}).name};
}

}  // namespace peftkern
