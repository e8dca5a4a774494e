// SPDX-License-Identifier: Apache-2.0
// Rules of waiting for each other, within a warp and within a block. Marks as in memory.cu.
#include <assert.h>
#include <stdio.h>

__device__ void barrier_arrive(int barrier) { asm volatile("bar.arrive %0, 128;" ::"r"(barrier) : "memory"); }
__device__ void barrier_sync(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }

// Lanes swap values through shared memory: __syncwarp orders them.
__global__ void warp_exchange(const int* x, int* y) {
  __shared__ int values[64];
  int t = threadIdx.x;
  values[t] = x[t];  // <- BUG_NO_SYNCWARP
#ifndef BUG_NO_SYNCWARP
  __syncwarp();
#endif
  y[t] = values[t ^ 1];  // <- BUG_NO_SYNCWARP
}

// Sum of a block: shuffles, one partial sum a warp, a barrier, shuffles of the first warp.
__global__ void block_sum(const float* x, float* total) {
  __shared__ float partial[8];
  float v = x[threadIdx.x];
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;  // <- BUG_NO_BARRIER
#ifndef BUG_NO_BARRIER
  __syncthreads();
#endif
#ifdef BUG_DIVERGENT_SHUFFLE
  if (threadIdx.x < 17) {
#else
  if (threadIdx.x < 32) {
#endif
    v = threadIdx.x < 8 ? partial[threadIdx.x] : 0;  // <- BUG_NO_BARRIER
#ifdef BUG_MASK_WITHOUT_SELF
    v += __shfl_xor_sync(0xfffffffeu, v, 16);  // <- BUG_MASK_WITHOUT_SELF
#endif
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);  // <- BUG_DIVERGENT_SHUFFLE
    if (threadIdx.x == 0) partial[0] = v;
  }
  __syncthreads();
  if (threadIdx.x == 255) *total = partial[0];
}

// A shuffle may only read from lanes of its mask.
__global__ void shuffle_half(const int* x, int* y) {
  int t = threadIdx.x, v = x[t];
  y[t] = -1;
#ifdef BUG_LANE_OUTSIDE_THE_MASK
  if (t < 16) y[t] = __shfl_sync(0xffff, v, t + 8);  // <- BUG_LANE_OUTSIDE_THE_MASK
#else
  if (t < 16) y[t] = __shfl_sync(0xffff, v, t ^ 8);
#endif
}

// All threads that still run must come to the same barrier.
__global__ void one_barrier(int* y) {
  __shared__ int values[64];
  int t = threadIdx.x;
  values[t] = t;
#ifdef BUG_TWO_BARRIERS
  if (t & 1) {
    __syncthreads();  // <- BUG_TWO_BARRIERS
    y[t] = values[t ^ 1];
  } else {
    values[t] += 1;
    __syncthreads();  // <- BUG_TWO_BARRIERS
    y[t] = values[t ^ 1] * 2;
  }
#else
  __syncthreads();
  y[t] = values[t ^ 1];
#endif
}

// Threads that have returned do not count.
__global__ void early_exit(int* y, int n) {
  __shared__ int values[128];
  int t = threadIdx.x;
  if (t >= n) return;
  values[t] = t;
  __syncthreads();
  y[t] = values[n - 1 - t];
}

// Two warps produce and go on, two consume: named barrier 1 of 128 threads.
__global__ void produce_consume(const int* x, int* y) {
  __shared__ int values[64];
  int t = threadIdx.x;
  if (t < 64) {
    values[t] = x[t];
#ifdef BUG_WRONG_BARRIER
    barrier_arrive(2);
#else
    barrier_arrive(1);
#endif
  } else {
    barrier_sync(1);  // <- BUG_WRONG_BARRIER
    y[t - 64] = values[127 - t];
  }
}

// Barriers that count and vote.
__global__ void voting_barriers(const int* x, int* y) {
  int t = threadIdx.x;
  int count = __syncthreads_count(x[t] > 0);
  int any = __syncthreads_or(x[t] > 5), all = __syncthreads_and(x[t] < 100);
  y[t] = count + 1000 * !!any + 10000 * !!all;
}

// A lock that lanes of the same warp fight for: every lane must make progress.
__device__ int lock_word;
__global__ void spin_lock(int* counter) {
  for (bool waiting = true; waiting;) {
    if (atomicCAS(&lock_word, 0, 1) == 0) {
      *reinterpret_cast<volatile int*>(counter) += 1;
      __threadfence();
      atomicExch(&lock_word, 0);
      waiting = false;
    }
  }
}

// A lock that nobody gives back: the step limit ends the launch.
__global__ void endless(volatile int* flag) {
  while (*flag == 0) {  // <- step limit
  }
}

__global__ void asserts(const int* x, int* y) {
  int t = threadIdx.x;
  assert(x[t] < 100);  // <- assert
  if (x[t] == 50) printf("x[%d] = %d\n", t, x[t]);
  y[t] = x[t];
}

// The warp's other collectives.
__global__ void collectives(const int* x, unsigned* y) {
  unsigned t = threadIdx.x, v = x[t];
  y[t * 6 + 0] = __ballot_sync(~0u, v & 1);
  y[t * 6 + 1] = __any_sync(~0u, v == 7);
  y[t * 6 + 2] = __match_any_sync(~0u, v);
  y[t * 6 + 3] = __reduce_add_sync(~0u, v);
  y[t * 6 + 4] = __shfl_up_sync(~0u, v, 3, 16);
  y[t * 6 + 5] = __reduce_max_sync(~0u, v);
}
