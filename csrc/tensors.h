// SPDX-License-Identifier: Apache-2.0
// The little that the ops need from torch's stable ABI beyond what its headers offer: named checks and calls of aten.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dtypes.h"

namespace peftkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws what Python sees as a RuntimeError. Not STD_TORCH_CHECK: that puts the file of the build machine before the
// text.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

#define PEFTKERN_CHECK(condition, ...) \
  do {                                 \
    if (!(condition)) {                \
      ::peftkern::fail(__VA_ARGS__);   \
    }                                  \
  } while (false)

template <class Sizes>
std::string shape_string(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// The product of the sizes, which a damaged file may have made larger than any memory.
inline int64_t element_count(const std::vector<int64_t>& shape, const char* argument) {
  int64_t n = 1;
  for (int64_t size : shape) {
    PEFTKERN_CHECK(size >= 0 && !__builtin_mul_overflow(n, size, &n) && n <= (int64_t{1} << 60), argument,
                   ": expected sizes >= 0 of at most 2^60 elements, got ", shape_string(shape));
  }
  return n;
}

inline const char* name_of(ScalarType t) { return torch::headeronly::toString(t); }

inline DType dtype_of(const Tensor& t, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: fail(argument, ": expected dtype float32, bfloat16 or float16, got ", name_of(t.scalar_type()));
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

// A function of a library that torch has loaded, or null: what the stable ABI lacks, without linking to that library.
template <class Function>
Function library_function(const char* library, const char* name) {
  void* loaded = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
  return loaded ? reinterpret_cast<Function>(dlsym(loaded, name)) : nullptr;
}

// The library's out = beta * self + alpha * a b, which the stable ABI cannot call: it passes no scalars.
using Addmm = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a, AtenTensorHandle b,
                                 double beta, double alpha);

// By the C call: new_empty is boxed for the dispatcher, and a call makes up to seven of these.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * (shape[i] > 1 ? shape[i] : 1);
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  static_cast<int32_t>(dtype), device, like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace peftkern
