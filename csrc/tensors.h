// SPDX-License-Identifier: Apache-2.0
// The little that the ops need from torch's stable ABI beyond what its headers offer: named checks and calls of aten.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "dtypes.h"

namespace peftkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define PEFTKERN_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

template <class Sizes>
std::string shape_string(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline const char* name_of(ScalarType t) { return torch::headeronly::toString(t); }

inline DType dtype_of(const Tensor& t, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      PEFTKERN_CHECK(false, argument, ": expected dtype float32, bfloat16 or float16, got ", name_of(t.scalar_type()));
      return DType::f32;
  }
}

inline void check_dtype(const Tensor& t, ScalarType expected, const char* argument) {
  PEFTKERN_CHECK(t.scalar_type() == expected, argument, ": expected dtype ", name_of(expected), ", got ",
                 name_of(t.scalar_type()));
}

inline void check_shape(const Tensor& t, const std::vector<int64_t>& expected, const char* argument) {
  const auto got = t.sizes();
  bool equal = got.size() == expected.size();
  for (size_t i = 0; equal && i < expected.size(); ++i) equal = got[i] == expected[i];
  PEFTKERN_CHECK(equal, argument, ": expected shape ", shape_string(expected), ", got ", shape_string(got));
}

inline void check_device(const Tensor& t, const Tensor& reference, const char* argument, const char* reference_name) {
  PEFTKERN_CHECK(t.is_cpu() == reference.is_cpu() && t.get_device_index() == reference.get_device_index(), argument,
                 ": expected the device of ", reference_name, ", got a tensor on another device");
}

template <class... Args>
Tensor call_aten(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace peftkern
