// SPDX-License-Identifier: Apache-2.0
// DoRA's norms on tensors, once for all devices: check, allocate, call the backend. What is computed: dora_norm.h.
#pragma once
#include "dora_norm.h"
#include "products.h"

namespace peftkern {

// weight [out, in], dense or NF4 -> float64 [out]
template <class Backend>
Tensor squared_row_norms(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
                         const OptionalTensor& offset, int64_t block_size, int64_t out_features, int64_t in_features) {
  Terms t{weight,       nf4_scales(absmax, nested_absmax, offset),
          block_size,   in_features,
          out_features, 0,
          std::nullopt, std::nullopt,
          std::nullopt, std::nullopt,
          1.0,          {}};
  t.check(weight, "weight", 0.0, std::nullopt);
  const Backend backend(weight);
  const Tensor data = dense(weight);
  const OptionalTensor scales = t.absmax ? OptionalTensor(t.absmax->floats(backend)) : std::nullopt;
  Tensor out = empty(weight, {t.out}, ScalarType::Double);
  const SquaredRowNorms args{.weight = data.const_data_ptr(),
                             .absmax = const_floats(scales),
                             .dtype = t.absmax ? DType::f32 : dtype_of(weight, "weight"),
                             .block_size = block_size,
                             .rows = t.out,
                             .columns = t.in,
                             .out = static_cast<double*>(out.mutable_data_ptr())};
  if (t.out) backend.squared_row_norms(args);
  return out;
}

// P = A W^T, float32 [r, out]. CUDA has a kernel for 16-bit A and W: csrc/cuda/dora_norm.cpp. dtype: what both may be
// rounded to.
template <class Backend>
Tensor dora_product(const Backend& backend, const Terms& base, const Tensor& A, ScalarType /*dtype*/) {
  const Tensor a = dense(to_dtype(A, ScalarType::Float));
  return make(backend, ForwardProduct{base, a, std::nullopt, std::nullopt, std::nullopt});
}

// w2: squared_row_norms of the weight; dtype: float32, or that of a 16-bit layer -> float32 [out]
template <class Backend>
Tensor dora_norm(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
                 const OptionalTensor& offset, int64_t block_size, const Tensor& A, const Tensor& B, const Tensor& w2,
                 double scaling, ScalarType dtype) {
  PEFTKERN_CHECK(A.dim() == 2 && B.dim() == 2, "A and B: expected shapes [r, in] and [out, r], got ",
                 shape_string(A.sizes()), " and ", shape_string(B.sizes()));
  Terms t{weight,
          nf4_scales(absmax, nested_absmax, offset),
          block_size,
          A.size(1),
          B.size(0),
          0,
          A,
          B,
          std::nullopt,
          std::nullopt,
          scaling,
          {}};
  t.check(A, "A", 0.0, std::nullopt);
  check_dtype(w2, ScalarType::Double, "w2");
  check_shape(w2, {t.out}, "w2");
  check_device(w2, A, "w2", "A");

  const Backend backend(A);
  const Tensor b = dense(B), squares = dense(w2);
  Terms base = t;
  base.A = base.B = std::nullopt;
  base.rank = 0;
  const Tensor P = dora_product(backend, base, A, dtype);
  const Tensor a64 = to_dtype(A, ScalarType::Double);
  const Tensor G = product(a64, call_aten("aten::t", "", a64));
  Tensor norm = empty(A, {t.out}, ScalarType::Float);
  const DoraNorm args{.w2 = static_cast<const double*>(squares.const_data_ptr()),
                      .P = const_floats(P),
                      .G = static_cast<const double*>(G.const_data_ptr()),
                      .B = b.const_data_ptr(),
                      .B_dtype = dtype_of(b, "B"),
                      .rows = t.out,
                      .rank = t.rank,
                      .scaling = scaling,
                      .norm = floats(norm)};
  if (t.out) backend.dora_norm(args);
  return norm;
}

}  // namespace peftkern
