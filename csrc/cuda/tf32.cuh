// SPDX-License-Identifier: Apache-2.0
// fp32 products on tensor cores. TF32 keeps 11 bits of significand and the range of fp32, so a bf16 or fp16 value is a
// TF32 value, and an fp32 value is the sum of two to 22 bits:
//
//   a b = a_high b_high + a_high b_low + a_low b_high        a_low b_low, below 2^-22 of a b, is left out
//
// Any range works, as it would not with fp16 parts, and three bf16 parts would be needed for as many bits. The sums are
// fp32. An infinite fp32 operand gives NaN (inf - inf in its low part).
#pragma once
#include "convert.cuh"

namespace peftkern {

__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

struct Tf32Parts {
  uint32_t high, low;
};

template <class T>
__device__ __forceinline__ Tf32Parts split_tf32(T v) {
  if constexpr (sizeof(T) == 2) return {__float_as_uint(to_float(v)), 0};
  const uint32_t high = to_tf32(to_float(v));
  return {high, to_tf32(to_float(v) - __uint_as_float(high))};
}

constexpr int kTileRanks = 16;  // of a product: the low-rank kernels put ranks at the rows of a

// sum [16, 8] += a [16, 8] b [8, 8] over a warp. Lane 4 g + t holds
//   a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)       b: (t, g) (t + 4, g)
//   sum: (g, 2 t) (g, 2 t + 1) (g + 8, 2 t) (g + 8, 2 t + 1)
__device__ __forceinline__ void mma_tf32(float (&sum)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// The same on split operands, small terms first. T: what b was split from; a_exact: a_low is zero, and not read.
template <class T>
__device__ __forceinline__ void mma_split(float (&sum)[4], const uint4& a_high, const uint4& a_low, bool a_exact,
                                          const Tf32Parts& b0, const Tf32Parts& b1) {
  if constexpr (sizeof(T) == 4) mma_tf32(sum, a_high, b0.low, b1.low);
  if (!a_exact) mma_tf32(sum, a_low, b0.high, b1.high);
  mma_tf32(sum, a_high, b0.high, b1.high);
}

}  // namespace peftkern
