// SPDX-License-Identifier: Apache-2.0
// The terms of an adapted linear layer, checked, and the few calls of the library that its ops share.
#pragma once
#include "low_rank.h"
#include "nf4_ops.h"
#include "tensors.h"

namespace peftkern {

inline Dropout checked_dropout(double dropout_p, const OptionalTensor& seed, int64_t rank, const Tensor& x,
                               const char* x_name) {
  PEFTKERN_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p: expected 0 <= p < 1, got ", dropout_p);
  if (dropout_p == 0.0 || rank == 0) return {};
  PEFTKERN_CHECK(seed.has_value(), "seed: expected an int64 tensor of one element with dropout_p > 0, got None");
  check_dtype(*seed, ScalarType::Long, "seed");
  PEFTKERN_CHECK(seed->numel() == 1, "seed: expected one element, got ", seed->numel());
  check_device(*seed, x, "seed", x_name);
  return make_dropout(static_cast<const int64_t*>(seed->const_data_ptr()), dropout_p);
}

inline std::optional<Nf4Scales> nf4_scales(const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
                                           const OptionalTensor& offset) {
  PEFTKERN_CHECK(absmax || !(nested_absmax || offset), "absmax: expected it beside nested_absmax and offset, got None");
  if (!absmax) return std::nullopt;
  return Nf4Scales{*absmax, nested_absmax, offset};
}

// The arguments both directions share, and the one C++ copy of their contract.
struct Terms {
  Tensor weight;                    // [out, in], or NF4: packed [ceil(out * in / 2)] uint8 with
  std::optional<Nf4Scales> absmax;  // the scales of its blocks
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
    dropout = checked_dropout(dropout_p, seed, rank, x, x_name);
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
  if (shape.size() == 2) return t;  // what as_rows made of it
  return call_aten("aten::_unsafe_view", "", t, shape);
}

// [..., n] as a dense matrix [rows, n], whatever of it is zero.
inline Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2) return dense(t);
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

// y += a b, in place: with out and self the same tensor the library copies nothing first. All of one dtype.
template <class Backend>
void add_product(Tensor& y, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(Backend::addmm()(y.get(), y.get(), a.get(), b.get(), 1.0, 1.0));
}

}  // namespace peftkern
