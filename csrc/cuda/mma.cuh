// SPDX-License-Identifier: Apache-2.0
// Tensor cores and what feeds them: asynchronous copies to shared memory, vector reads of it, pairs of 16-bit values,
// and the multiply-add of a warp. Instructions of sm_80, which every later architecture runs.
#pragma once
#include "chunk.cuh"

namespace peftkern {

// ---- shared memory, by 32-bit addresses

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global memory, of which the first `valid` are read and the others become 0.
__device__ __forceinline__ void copy_async(uint32_t target, const void* source, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest kGroups groups of this thread have arrived.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ __forceinline__ uint4 load_shared_uint4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ uint2 load_shared_uint2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
// 16 bits from each of two places, the first in the low half.
__device__ __forceinline__ uint32_t load_shared_pair(uint32_t first, uint32_t second) {
  uint16_t low, high;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(low) : "r"(first));
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(high) : "r"(second));
  return low | static_cast<uint32_t>(high) << 16;
}
__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ void store_shared_float(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}

// ---- threadIdx.x and blockIdx.x, read anew
//
// So what is computed from them after a loop takes no registers during it. A tile of 128 rows has none left.

__device__ __forceinline__ uint32_t thread_anew() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
__device__ __forceinline__ uint32_t block_anew() {
  uint32_t block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// ---- pairs of 16-bit values, `low` in the low half: the one that comes first in memory

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<bf16_t>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<f16_t>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Two fp32 values v as bf16 pairs with high + low = v (1 + e), |e| <= 2^-18. bf16 has the range of fp32, so nothing
// overflows that did not before; an infinity becomes a NaN.
__device__ __forceinline__ void split_pair(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack_pair<bf16_t>(first, second);
  low = pack_pair<bf16_t>(first - __uint_as_float(high << 16), second - __uint_as_float(high & 0xffff0000u));
}

// ---- the multiply-add of a warp: c[16 x 8] += a[16 x 16] b[16 x 8], sums in fp32
//
// With group = lane / 4 and member = lane % 4, a pair of k a register:
//   a0, a1: rows group, group + 8 at k 2 member;   a2, a3: the same rows at k 2 member + 8
//   b0, b1: column group at k 2 member, 2 member + 8
//   c[0], c[1]: row group, columns 2 member + 0, 1;   c[2], c[3]: row group + 8

template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<bf16_t>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                     uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<f16_t>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- four neighbouring values of a thread, as the low-rank part takes them

constexpr int kQuad = 4;

// `valid` values lie inside the row (negative and above 4 are fine). Those outside become 0 and are never touched.
template <class T>
__device__ __forceinline__ void load_quad(const T* source, int64_t valid, bool aligned, float (&v)[kQuad]) {
  struct alignas(kQuad * sizeof(T)) {
    T raw[kQuad];
  } quad;
  if (aligned && valid >= kQuad) {
    quad = *reinterpret_cast<const decltype(quad)*>(source);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) quad.raw[j] = j < valid ? source[j] : T{};
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j) v[j] = to_float(quad.raw[j]);
}

// Do all quads that start at multiples of 4 within rows of `row_bytes` begin on a boundary of their size?
template <class T>
__device__ __forceinline__ bool quads_aligned(const void* base, int64_t row_bytes) {
  return ((reinterpret_cast<uintptr_t>(base) | static_cast<uintptr_t>(row_bytes)) & (kQuad * sizeof(T) - 1)) == 0;
}

template <class T>
__device__ __forceinline__ void store_quad(T* target, int64_t valid, bool aligned, const float (&v)[kQuad]) {
  static_assert(sizeof(T) == 2);
  const uint2 pairs = {pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3])};
  if (aligned && valid >= kQuad) {
    // As one 64-bit value: nvcc makes two stores of a uint2 here.
    *reinterpret_cast<uint64_t*>(target) = pairs.x | static_cast<uint64_t>(pairs.y) << 32;
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const uint32_t pair = j < 2 ? pairs.x : pairs.y;
      if (j < valid) target[j] = {static_cast<uint16_t>(j % 2 ? pair >> 16 : pair)};
    }
  }
}

__device__ __forceinline__ void store_quad(float* target, int64_t valid, bool aligned, const float (&v)[kQuad]) {
  if (aligned && valid >= kQuad) {
    const uint32_t words[kQuad] = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                                   __float_as_uint(v[3])};
    store_16_bytes(target, words);
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (j < valid) target[j] = v[j];
    }
  }
}

// A quad as bf16 pairs, high + low as split_pair() has them.
struct SplitQuad {
  uint32_t high[2], low[2];
  __device__ __forceinline__ explicit SplitQuad(const float (&v)[kQuad]) {
    split_pair(v[0], v[1], high[0], low[0]);
    split_pair(v[2], v[3], high[1], low[1]);
  }
};

}  // namespace peftkern
