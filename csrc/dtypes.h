// SPDX-License-Identifier: Apache-2.0
// The storage dtypes every kernel accepts, and the one place where a run-time dtype becomes a template argument.
// Torch-free: kernels and nvcc include this.
#pragma once
#include <cstddef>
#include <cstdint>

// Before a function that kernels of both devices call.
#ifdef __CUDACC__
#define PEFTKERN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PEFTKERN_HOST_DEVICE inline
#endif

namespace peftkern {

enum class DType : int32_t { f32, bf16, f16 };
constexpr int kDTypes = 3;

// 16-bit storage types. The arithmetic is always fp32; conversions live with the vector code of each backend.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

// dispatch(dtype, [&](auto tag) { using T = decltype(tag); ... });
template <class F>
auto dispatch(DType t, F&& f) {
  switch (t) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16_t{});
    case DType::f16: break;
  }
  return f(f16_t{});
}

}  // namespace peftkern
