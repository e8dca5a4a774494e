// SPDX-License-Identifier: Apache-2.0
// Sums over rows, for outputs that keep the columns. A block owns 32 columns: 4 neighbouring lanes hold one row's 4
// chunks (64 contiguous bytes of a 16-bit dtype) and the 64 groups of lanes walk down the rows. The partial sums then
// meet in a fixed order, first within a warp, then across the warps and the blocks of a cluster, so the result depends
// on the shape alone.
#pragma once
#include "chunk.cuh"
#include "cluster.cuh"

namespace peftkern {

constexpr int kReduceThreads = 256;
constexpr int kReduceWarps = kReduceThreads / 32;
constexpr int kChunkLanes = 4;
constexpr int kRowLanes = kReduceThreads / kChunkLanes;
constexpr int kReduceColumns = kChunkLanes * kChunk;

template <int kSums>
struct PartialSums {
  float data[kReduceWarps][kSums][kReduceColumns + 1];  // + 1: also read down a column, by neighbouring lanes

  // sum[s][j] of every thread -> data. All threads of the cluster take part; ends with a barrier.
  __device__ void add_lanes(const float (&sum)[kSums][kChunk]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        float total = sum[s][j];
#pragma unroll
        for (int distance = kChunkLanes; distance < 32; distance *= 2) {
          total += __shfl_xor_sync(0xffffffff, total, distance);
        }
        if (lane < kChunkLanes) data[warp][s][lane * kChunk + j] = total;
      }
    }
    cluster_sync();
  }

  // Over the warps, and over the blocks of the cluster.
  __device__ float total(int s, int column) const {
    return sum_of_cluster([&](const auto& block) {
      float total = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kReduceWarps; ++warp) total += block(data[warp][s][column]);
      return total;
    });
  }
};

// In all lanes, by the same tree.
__device__ __forceinline__ double sum_of_warp(double v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffff, v, distance);
  return v;
}

// Largest of the `lanes` (a power of two) neighbouring lanes. On the bits of |v|: as integers they are ordered like the
// values, with infinity and NaN on top, so neither can get lost.
__device__ __forceinline__ uint32_t max_of_lanes(uint32_t bits, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) {
    bits = max(bits, __shfl_xor_sync(0xffffffff, bits, distance));
  }
  return bits;
}

__device__ __forceinline__ uint32_t magnitude_bits(float v) { return __float_as_uint(v) & 0x7fffffff; }

}  // namespace peftkern
