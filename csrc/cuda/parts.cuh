// SPDX-License-Identifier: Apache-2.0
// A sum made by several blocks: each writes its part to a workspace, a second kernel adds the parts in their order.
#pragma once
#include "../nf4.h"
#include "convert.cuh"

namespace peftkern {

constexpr int kPartThreads = 256;
constexpr int64_t kPartBlocks = 256;  // about two blocks for each multiprocessor of the largest GPUs

// One for each thread of the grid.
__device__ __forceinline__ int64_t part_element() {
  return static_cast<int64_t>(blockIdx.x) * kPartThreads + threadIdx.x;
}

// How many parts give enough blocks, where `tiles` blocks do for one part, and there are at most max_parts. A function
// of the shape alone, as is then the order of the sum.
inline int64_t part_count(int64_t tiles, int64_t max_parts) {
  const int64_t wanted = tiles ? kPartBlocks / tiles : 1;
  return wanted < 1 || max_parts < 1 ? 1 : wanted < max_parts ? wanted : max_parts;
}

// out[i] = scale * sum over p of workspace[p][i], for one i; nothing past the last one.
__device__ __forceinline__ void sum_parts(int64_t i, const float* workspace, int64_t parts, int64_t n, float scale,
                                          void* out, DType dtype) {
  if (i >= n) return;
  float total = 0.0f;
#pragma unroll 8
  for (int64_t part = 0; part < parts; ++part) total += workspace[part * n + i];
  store_as(out, dtype, i, scale * total);
}

}  // namespace peftkern
