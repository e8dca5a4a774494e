// SPDX-License-Identifier: Apache-2.0
// A sum made by several blocks: each makes a part of it. The parts are added in their order, 8 by 8, and these sums in
// theirs: on sm_90 and later by a cluster of blocks, through shared memory (cluster.cuh); elsewhere, and the sums of 8
// if there are several, through a workspace, by a second kernel. The bits are the same.
#pragma once
#include "../nf4.h"
#include "convert.cuh"
#include "launch.cuh"

namespace peftkern {

constexpr int kPartThreads = 256;
constexpr int64_t kPartBlocks = 256;  // about two blocks for each multiprocessor of the largest GPUs

// One for each thread of the grid.
__device__ __forceinline__ int64_t part_element() {
  return static_cast<int64_t>(blockIdx.x) * kPartThreads + threadIdx.x;
}

// How many parts a sum over `terms` may have, so that it is worth it: below 256 terms they would be more bytes than x;
// and with more than 8 of them a second launch comes after them.
inline int64_t most_parts(int64_t terms) {
  constexpr int64_t kFewest = 256, kFewestOfMany = 1024;
  const int64_t few = terms / kFewest, many = terms / kFewestOfMany / kClusterBlocks * kClusterBlocks;
  return few < 1 ? 1 : few <= kClusterBlocks ? few : many > kClusterBlocks ? many : kClusterBlocks;
}

// How many give enough blocks, where `tiles` blocks do for one part. A function of the shape and of `blocks` alone, as
// is then the order of the sum.
inline int64_t part_count(int64_t tiles, int64_t terms, int64_t blocks = kPartBlocks) {
  const int64_t wanted = tiles ? blocks / tiles : 1, most = most_parts(terms);
  const int64_t parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
  return parts > kClusterBlocks ? parts / kClusterBlocks * kClusterBlocks : parts;
}

// What of a sum a block makes, or its cluster.
struct PartMade {
  int64_t index, left;  // of so many that are left to be added

  __device__ __forceinline__ PartMade(int64_t part, int64_t parts)
      : index(part / cluster_blocks()), left(parts / cluster_blocks()) {}
  __device__ __forceinline__ bool is_all() const { return left == 1; }
};

// Neighbouring sums of a thread.
template <int kCount>
struct Sums {
  float v[kCount] = {};

  __device__ __forceinline__ void operator+=(const Sums& more) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += more.v[i];
  }
};

// sum of get(part), a Sums<kCount>, in this order
template <int kCount, class Get>
__device__ __forceinline__ Sums<kCount> sum_of_parts(const PartsLeft& left, const Get& get) {
  Sums<kCount> total, sum;
#pragma unroll 8
  for (int part = 0, last = left.together - 1; part < left.parts; ++part) {
    sum += get(part);
    if (part == last) total += sum, sum = {}, last += left.together;
  }
  total += sum;
  return total;
}

// out[i] = sum over p of workspace[p][i], for one i; nothing past the last one.
__device__ __forceinline__ void sum_parts(int64_t i, const float* workspace, const PartsLeft& left, int64_t n,
                                          void* out, DType dtype) {
  if (i >= n) return;
  const Sums<1> total = sum_of_parts<1>(left, [&](int64_t part) { return Sums<1>{{workspace[part * n + i]}}; });
  store_as(out, dtype, i, total.v[0]);
}

}  // namespace peftkern
