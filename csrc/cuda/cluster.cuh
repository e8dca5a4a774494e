// SPDX-License-Identifier: Apache-2.0
// Thread-block clusters, sm_90 and later: neighbouring blocks that run at the same time and read each other's shared
// memory. Blocks that share a sum add its parts there: these never reach global memory, and wait for no other launch.
// Code for older architectures, and a launch without clusters, has blocks that are each a cluster of their own.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace peftkern {

// The most that every GPU with clusters takes.
constexpr int kClusterBlocks = 8;

__device__ __forceinline__ unsigned cluster_blocks() {
  unsigned blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return blocks;
}

// Of this block, in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// __syncthreads() of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  if (cluster_blocks() > 1) {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// What the block `rank` of the cluster has where this one has `own`, in shared memory. No block may end before the
// others have read.
__device__ __forceinline__ float load_of_block(const float& own, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  float value;
  asm volatile(
      "{ .reg .b32 address;\n\t"
      "mapa.shared::cluster.u32 address, %1, %2;\n\t"
      "ld.shared::cluster.f32 %0, [address]; }"
      : "=f"(value)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(&own))), "r"(rank)
      : "memory");
  return value;
#else
  return own;
#endif
}
__device__ __forceinline__ float4 load_of_block(const float4& own, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  float4 v;
  asm volatile(
      "{ .reg .b32 address;\n\t"
      "mapa.shared::cluster.u32 address, %4, %5;\n\t"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [address]; }"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(&own))), "r"(rank)
      : "memory");
  return v;
#else
  return own;
#endif
}

// Of n results of a cluster those that this block makes: whole units, so that its warps ask memory for whole sectors.
struct ClusterShare {
  unsigned first, last;

  __device__ __forceinline__ explicit ClusterShare(unsigned n, unsigned unit = 32) {
    const unsigned units = (n + unit - 1) / unit, rank = cluster_rank(), blocks = cluster_blocks();
    first = units * rank / blocks * unit, last = min(units * (rank + 1) / blocks * unit, n);
  }
};

}  // namespace peftkern
