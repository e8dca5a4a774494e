// SPDX-License-Identifier: Apache-2.0
// Storage dtypes to and from fp32, the only dtype the kernels compute in. Narrowing rounds once, to nearest even.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../dtypes.h"

namespace peftkern {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16_t v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ __forceinline__ float to_float(f16_t v) { return __half2float(__ushort_as_half(v.bits)); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16_t from_float<bf16_t>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
__device__ __forceinline__ f16_t from_float<f16_t>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}

// For the few values per block whose dtype is not worth a template argument.
__device__ __forceinline__ void store_as(void* base, DType dtype, int64_t index, float v) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(base)[index] = v; break;
    case DType::bf16: static_cast<bf16_t*>(base)[index] = from_float<bf16_t>(v); break;
    case DType::f16: static_cast<f16_t*>(base)[index] = from_float<f16_t>(v); break;
  }
}

// dispatch() of dtypes.h inside a kernel, for layers of different dtypes in one launch.
template <class F>
__device__ __forceinline__ void device_dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: f(float{}); break;
    case DType::bf16: f(bf16_t{}); break;
    case DType::f16: f(f16_t{}); break;
  }
}

}  // namespace peftkern
