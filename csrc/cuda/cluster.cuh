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

// What a block of the cluster has where this one has `own`, in shared memory. No block may end before the others have
// read. The barriers of a cluster keep their place among these reads.
struct OwnBlock {
  template <class T>
  __device__ __forceinline__ T operator()(const T& own) const {
    return own;
  }
};

struct OtherBlock {
  unsigned rank;

  __device__ __forceinline__ float operator()(const float& own) const {
    float value = own;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address(&own)));
#endif
    return value;
  }
  __device__ __forceinline__ float4 operator()(const float4& own) const {
    float4 v = own;
#if __CUDA_ARCH__ >= 900
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address(&own)));
#endif
    return v;
  }

 private:
  __device__ __forceinline__ uint32_t address(const void* own) const {
    uint32_t there = static_cast<uint32_t>(__cvta_generic_to_shared(own));
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(there) : "r"(rank));
#endif
    return there;
  }
};

// The sum over the cluster's blocks, in their order, of get(block), where block(own) reads. All reads come before the
// first addition: each takes some 200 cycles.
template <class Get>
__device__ __forceinline__ auto sum_of_cluster(const Get& get) {
  using Sum = decltype(get(OwnBlock{}));
  Sum total = {};
  const unsigned blocks = cluster_blocks();
  if (blocks == 1) {
    total += get(OwnBlock{});
    return total;
  }
  Sum of_block[kClusterBlocks];
#pragma unroll
  for (unsigned rank = 0; rank < kClusterBlocks; ++rank) {
    if (rank < blocks) of_block[rank] = get(OtherBlock{rank});
  }
#pragma unroll
  for (unsigned rank = 0; rank < kClusterBlocks; ++rank) {
    if (rank < blocks) total += of_block[rank];
  }
  return total;
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
