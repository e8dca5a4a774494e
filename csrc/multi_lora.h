// SPDX-License-Identifier: Apache-2.0
// A linear layer with many adapters on tensors, once for all devices: check, allocate, the kernels of multi_low_rank.h
// beside the product with the weight (products.h). The formula and its gradients are those of peftkern/reference.py,
// with a = adapter of the row, and nothing but the base where there is none:
//
//   y = x W^T + s_a (drop(x) A_a^T) B_a^T + bias                     W dense [out, in] or NF4
//
// with h = drop(x) A_a^T, and for the gradient g, summed over the rows of each adapter where a parameter is its own:
//   dbias = sum g    dB_a = s_a g^T h    dh = s_a g B_a    dA_a = dh^T drop(x)    dx = g W + mask * (dh A_a)
#pragma once
#include <tuple>

#include "adapted_linear.h"
#include "multi_low_rank.h"

namespace peftkern {

// The plan in one int64 tensor: offsets [adapters + 2], order [rows], tiles [max_row_tiles, 2], cursor [adapters + 1].
inline int64_t plan_size(int64_t rows, int64_t adapters) {
  return adapters + 2 + rows + 2 * max_row_tiles(rows, adapters) + adapters + 1;
}

inline RowGroups row_groups(const Tensor& plan, int64_t rows, int64_t adapters) {
  const int64_t* offsets = static_cast<const int64_t*>(plan.const_data_ptr());
  return {offsets, offsets + adapters + 2, offsets + adapters + 2 + rows, rows, adapters};
}

// plan [plan_size] int64: rows sorted by adapter_index, which has an entry for each row or for each run of equally
// many.
template <class Backend>
Tensor multi_lora_plan(const Tensor& adapter_index, int64_t rows, int64_t adapters) {
  const ScalarType type = adapter_index.scalar_type();
  PEFTKERN_CHECK(type == ScalarType::Long || type == ScalarType::Int,
                 "adapter_index: expected dtype int32 or int64, got ", name_of(type));
  PEFTKERN_CHECK(adapters >= 1, "adapters: expected >= 1, got ", adapters);
  const int64_t indices = adapter_index.numel();
  PEFTKERN_CHECK(rows >= 0 && (indices ? rows % indices == 0 : rows == 0),
                 "adapter_index: expected an entry for each of ", rows, " rows, or for each item of the batch, got ",
                 indices);
  const Backend backend(adapter_index);
  const Tensor index = dense(to_dtype(adapter_index, ScalarType::Long));
  Tensor plan = empty(adapter_index, {plan_size(rows, adapters)}, ScalarType::Long);
  int64_t* offsets = static_cast<int64_t*>(plan.mutable_data_ptr());
  int64_t *order = offsets + adapters + 2, *tiles = order + rows;
  backend.multi_lora_plan({.index = static_cast<const int64_t*>(index.const_data_ptr()),
                           .indices = indices,
                           .rows = rows,
                           .adapters = adapters,
                           .offsets = offsets,
                           .order = order,
                           .tiles = tiles,
                           .cursor = tiles + 2 * max_row_tiles(rows, adapters)});
  return plan;
}

// What both directions share beside the base, checked.
struct Bank {
  Tensor A, B;                    // [adapters, rank, in], [adapters, out, rank], dense
  OptionalTensor ranks, scaling;  // [adapters] int32, float32; dense
  int64_t adapters, rank;
  RowGroups groups;
  float alpha;
  Dropout dropout;

  Bank(const Tensor& a, const Tensor& b, const OptionalTensor& some_ranks, const OptionalTensor& scalings,
       const Tensor& plan, double one_scaling, double dropout_p, const OptionalTensor& seed, const Terms& base,
       int64_t rows, const Tensor& x, const char* x_name)
      : A(a), B(b), ranks(some_ranks), scaling(scalings), alpha(static_cast<float>(one_scaling)) {
    dtype_of(A, "A");
    dtype_of(B, "B");
    PEFTKERN_CHECK(A.dim() == 3 && A.size(0) >= 1, "A: expected shape [adapters, r, ", base.in,
                   "] with at least one adapter, got ", shape_string(A.sizes()));
    adapters = A.size(0), rank = A.size(1);
    check_shape(A, {adapters, rank, base.in}, "A");
    check_shape(B, {adapters, base.out, rank}, "B");
    check_device(A, x, "A", x_name);
    check_device(B, x, "B", x_name);
    A = dense(A), B = dense(B);
    if (ranks) {
      check_dtype(*ranks, ScalarType::Int, "ranks");
      check_shape(*ranks, {adapters}, "ranks");
      check_device(*ranks, x, "ranks", x_name);
      ranks = dense(*ranks);
    }
    if (scaling) {
      check_dtype(*scaling, ScalarType::Float, "scaling");
      check_shape(*scaling, {adapters}, "scaling");
      check_device(*scaling, x, "scaling", x_name);
      scaling = dense(*scaling);
    }
    check_dtype(plan, ScalarType::Long, "plan");
    check_shape(plan, {plan_size(rows, adapters)}, "plan");
    check_device(plan, x, "plan", x_name);
    PEFTKERN_CHECK(plan.is_contiguous(), "plan: expected the tensor that multi_lora_plan made");
    groups = row_groups(plan, rows, adapters);
    dropout = checked_dropout(dropout_p, seed, rank, x, x_name);
  }

  const int32_t* rank_data() const { return ranks ? static_cast<const int32_t*>(ranks->const_data_ptr()) : nullptr; }
  FactorBank a_factors() const { return {A.const_data_ptr(), dtype_of(A, "A"), true, rank_data()}; }
  FactorBank b_factors() const { return {B.const_data_ptr(), dtype_of(B, "B"), false, rank_data()}; }
};

// y [..., out]; h [rows, rank] float32, in the order of the plan, if save_h, else [0].
template <class Backend>
std::tuple<Tensor, Tensor> multi_lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& absmax,
                                             const OptionalTensor& nested_absmax, const OptionalTensor& offset,
                                             int64_t block_size, int64_t out_features, const Tensor& A, const Tensor& B,
                                             const Tensor& plan, const OptionalTensor& ranks,
                                             const OptionalTensor& scalings, const OptionalTensor& bias, double scaling,
                                             double dropout_p, const OptionalTensor& seed, bool save_h) {
  const DType x_dtype = dtype_of(x, "x");
  PEFTKERN_CHECK(x.dim() >= 1, "x: expected shape [..., in_features], got a scalar");
  PEFTKERN_CHECK(out_features >= 0, "out_features: expected >= 0, got ", out_features);
  PEFTKERN_CHECK(absmax || weight.dim() != 2 || weight.size(1) == x.size(x.dim() - 1), "x: expected shape [..., ",
                 weight.size(1), "] for weight ", shape_string(weight.sizes()), ", got ", shape_string(x.sizes()));
  Terms t{weight,       nf4_scales(absmax, nested_absmax, offset),
          block_size,   x.size(x.dim() - 1),
          out_features, 0,
          {},           {},
          {},           {},
          1.0,          {}};
  t.check(x, "x", 0.0, std::nullopt);
  Terms::check_vector(bias, t.out, "bias");
  if (bias) check_device(*bias, x, "bias", "x");
  const Tensor input = as_rows(x);
  const int64_t rows = input.size(0);
  const Bank bank(A, B, ranks, scalings, plan, scaling, dropout_p, seed, t, rows, x, "x");

  const Backend backend(x);
  backend.check_ranks(bank.rank_data(), bank.adapters, bank.rank);
  const ForwardProduct base{t, input, std::nullopt, bias, std::nullopt};
  const std::vector<int64_t> shape = with_last_size(x, t.out);
  const std::vector<int64_t> h_shape{rows, bank.rank};
  Tensor h = empty(x, save_h ? h_shape : std::vector<int64_t>{0}, ScalarType::Float);
  if (!rows || !bank.rank) return {reshaped(make(backend, base), shape), h};
  Tensor u = save_h ? h : empty(x, h_shape, ScalarType::Float);
  backend.multi_lora_down({.x = input.const_data_ptr(),
                           .x_dtype = x_dtype,
                           .groups = bank.groups,
                           .columns = t.in,
                           .rank = bank.rank,
                           .factors = bank.a_factors(),
                           .alphas = nullptr,
                           .alpha = 1.0f,
                           .dropout = bank.dropout,
                           .out = floats(u)});
  const Tensor y = make_mixed(backend, base,
                              {.u = const_floats(u),
                               .groups = bank.groups,
                               .columns = t.out,
                               .rank = bank.rank,
                               .factors = bank.b_factors(),
                               .alphas = const_floats(bank.scaling),
                               .alpha = bank.alpha,
                               .dropout = {},
                               .y = nullptr,
                               .y_dtype = x_dtype});
  return {reshaped(y, shape), h};
}

// dx [..., in] in the dtype of grad; dA, dB whole, in that of their parameter; dbias [out] float32; [0] where `needs`
// (bits kNeedsX, kNeedsA, kNeedsB, kNeedsBias) does not ask. x is read only for dA, h for dB.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> multi_lora_linear_backward(
    const Tensor& grad, const OptionalTensor& x, const Tensor& weight, const OptionalTensor& absmax,
    const OptionalTensor& nested_absmax, const OptionalTensor& offset, int64_t block_size, int64_t in_features,
    const OptionalTensor& h, const Tensor& A, const Tensor& B, const Tensor& plan, const OptionalTensor& ranks,
    const OptionalTensor& scalings, double scaling, double dropout_p, const OptionalTensor& seed, int64_t needs) {
  const DType grad_dtype = dtype_of(grad, "grad");
  PEFTKERN_CHECK(grad.dim() >= 1, "grad: expected shape [..., out_features], got a scalar");
  Terms t{weight,
          nf4_scales(absmax, nested_absmax, offset),
          block_size,
          in_features,
          grad.size(grad.dim() - 1),
          0,
          {},
          {},
          {},
          {},
          1.0,
          {}};
  t.check(grad, "grad", 0.0, std::nullopt);
  const ScalarType dtype = grad.scalar_type();
  const Tensor g = as_rows(grad);
  const int64_t rows = g.size(0);
  const Bank bank(A, B, ranks, scalings, plan, scaling, dropout_p, seed, t, rows, grad, "grad");
  const std::vector<int64_t> shape = with_last_size(grad, t.in);

  const Backend backend(grad);
  backend.check_ranks(bank.rank_data(), bank.adapters, bank.rank);
  const auto needed = [&](Needs what, const std::vector<int64_t>& size, ScalarType type) {
    return empty(grad, needs & what ? size : std::vector<int64_t>{0}, type);
  };
  Tensor dx = needed(kNeedsX, shape, dtype);
  Tensor dA = needed(kNeedsA, {bank.adapters, bank.rank, t.in}, A.scalar_type());
  Tensor dB = needed(kNeedsB, {bank.adapters, t.out, bank.rank}, B.scalar_type());
  Tensor dbias = needed(kNeedsBias, {t.out}, ScalarType::Float);

  if (needs & kNeedsBias) {
    backend.column_sums(
        {.g = g.const_data_ptr(), .dtype = grad_dtype, .rows = rows, .columns = t.out, .sums = floats(dbias)});
  }
  if ((needs & kNeedsB) && dB.numel()) {
    PEFTKERN_CHECK(h.has_value(), "h: expected it for the gradient of B");
    check_shape(*h, {rows, bank.rank}, "h");
    check_dtype(*h, ScalarType::Float, "h");
    const Tensor u = dense(*h);
    backend.multi_lora_grad({.u = const_floats(u),
                             .x = g.const_data_ptr(),
                             .x_dtype = grad_dtype,
                             .groups = bank.groups,
                             .columns = t.out,
                             .rank = bank.rank,
                             .ranks = bank.rank_data(),
                             .alphas = const_floats(bank.scaling),
                             .alpha = bank.alpha,
                             .dropout = {},
                             .grad = dB.mutable_data_ptr(),
                             .grad_dtype = dtype_of(dB, "B"),
                             .rank_major = false});
  }

  OptionalTensor dh;
  if (bank.rank && (needs & (kNeedsX | kNeedsA))) {
    Tensor down = empty(grad, {rows, bank.rank}, ScalarType::Float);
    if (rows) {
      backend.multi_lora_down({.x = g.const_data_ptr(),
                               .x_dtype = grad_dtype,
                               .groups = bank.groups,
                               .columns = t.out,
                               .rank = bank.rank,
                               .factors = bank.b_factors(),
                               .alphas = const_floats(bank.scaling),
                               .alpha = bank.alpha,
                               .dropout = {},
                               .out = floats(down)});
    }
    dh = down;
  }
  if ((needs & kNeedsA) && dA.numel()) {
    PEFTKERN_CHECK(x.has_value(), "x: expected it for the gradient of A");
    check_shape(*x, shape, "x");
    check_dtype(*x, dtype, "x");
    const Tensor input = as_rows(*x);
    backend.multi_lora_grad({.u = const_floats(*dh),
                             .x = input.const_data_ptr(),
                             .x_dtype = dtype_of(input, "x"),
                             .groups = bank.groups,
                             .columns = t.in,
                             .rank = bank.rank,
                             .ranks = bank.rank_data(),
                             .alphas = nullptr,
                             .alpha = 1.0f,
                             .dropout = bank.dropout,
                             .grad = dA.mutable_data_ptr(),
                             .grad_dtype = dtype_of(dA, "A"),
                             .rank_major = true});
  }
  if (needs & kNeedsX) {
    const GradientProduct base{t, g, std::nullopt};
    dx = reshaped(dh && rows ? make_mixed(backend, base,
                                          {.u = const_floats(*dh),
                                           .groups = bank.groups,
                                           .columns = t.in,
                                           .rank = bank.rank,
                                           .factors = bank.a_factors(),
                                           .alphas = nullptr,
                                           .alpha = 1.0f,
                                           .dropout = bank.dropout,
                                           .y = nullptr,
                                           .y_dtype = grad_dtype})
                             : make(backend, base),
                  shape);
  }
  return {dx, dA, dB, dbias};
}

}  // namespace peftkern
