// SPDX-License-Identifier: Apache-2.0
// Rules of memory, one kernel each. A BUG_ macro breaks the rule; the line that a report must name is marked with it.
#include <stdint.h>

// y[i] = 2 x[i]: the smallest kernel there is.
__global__ void twice(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
#ifdef BUG_ONE_PAST_THE_END
  if (i > n) return;
#else
  if (i >= n) return;
#endif
  y[i] = 2.f * x[i];  // <- BUG_ONE_PAST_THE_END
}

// The same, through y: what it reads back is on the chip. Broken it takes 4 bytes of every sector of x, or a workspace.
__global__ void twice_through_y(const float* x, volatile float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
#ifdef BUG_SPREAD_OUT
  y[i] = x[8 * i];
#else
  y[i] = x[i];
#endif
#ifdef BUG_WORKSPACE
  volatile float* part = y + n;
#else
  volatile float* part = y;
#endif
  part[i] = 2.f * y[i];
  y[i] = part[i];
}

// Four values a thread, with 16-byte accesses.
__global__ void twice_by_four(const float* x, float* y, int n) {
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i + 4 > n) return;
#ifdef BUG_OFF_THE_16_BYTES
  const float* from = x + (i ? i - 1 : 0);
#else
  const float* from = x + i;
#endif
  float4 v = *reinterpret_cast<const float4*>(from);  // <- BUG_OFF_THE_16_BYTES
  *reinterpret_cast<float4*>(y + i) = make_float4(2.f * v.x, 2.f * v.y, 2.f * v.z, 2.f * v.w);
}

// A table in shared memory that every thread reads: written in full, then a barrier.
__constant__ float squares[16] = {0, 1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121, 144, 169, 196, 225};
__global__ void look_up(const uint8_t* codes, float* y, int n) {
  __shared__ float table[16];
#ifdef BUG_ONE_ENTRY_SHORT
  if (threadIdx.x < 15) table[threadIdx.x] = squares[threadIdx.x];
#else
  if (threadIdx.x < 16) table[threadIdx.x] = squares[threadIdx.x];  // <- BUG_NO_BARRIER
#endif
#ifndef BUG_NO_BARRIER
  __syncthreads();
#endif
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = table[codes[i] & 15];  // <- BUG_NO_BARRIER BUG_ONE_ENTRY_SHORT
}

// An array in local memory, indexed at run time.
__global__ void local_array(const int* index, int* y) {
  int values[8];
#ifdef BUG_HALF_OF_THE_ARRAY
  for (int i = 0; i < 4; ++i) values[i ^ index[32]] = i * i;
#else
  for (int i = 0; i < 8; ++i) values[i ^ index[32]] = i * i;
#endif
  y[threadIdx.x] = values[index[threadIdx.x]];  // <- BUG_HALF_OF_THE_ARRAY
}

// Read through the read-only cache (__restrict__): nobody may write x during the launch. Called in place it is broken.
__global__ void reversed(float* y, const float* __restrict__ x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[n - 1 - i] * 2.f;  // <- in place
}

// A histogram of all blocks in global memory.
__global__ void histogram(const int* x, int* bins, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
#ifdef BUG_NO_ATOMIC
  bins[x[i]] += 1;  // <- BUG_NO_ATOMIC
#else
  atomicAdd(&bins[x[i]], 1);
#endif
}

// The same in shared memory: cleared, counted, read.
__global__ void shared_histogram(const int* x, int* bins, int n) {
  __shared__ int counts[32];
  if (threadIdx.x < 32) counts[threadIdx.x] = 0;  // <- BUG_NO_BARRIER_AFTER_CLEAR
#ifndef BUG_NO_BARRIER_AFTER_CLEAR
  __syncthreads();
#endif
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
#ifdef BUG_PLAIN_SHARED_ADD
    counts[x[i]] += 1;  // <- BUG_PLAIN_SHARED_ADD
#else
    atomicAdd(&counts[x[i]], 1);  // <- BUG_NO_BARRIER_AFTER_CLEAR
#endif
  }
  __syncthreads();
  if (threadIdx.x < 32) bins[threadIdx.x] = counts[threadIdx.x];
}

// The last block to finish adds up what all blocks wrote: a fence, then an atomic.
__device__ unsigned blocks_done;
__global__ void last_block_sum(const float* x, float* partial, float* total) {
  if (threadIdx.x) return;
  partial[blockIdx.x] = x[blockIdx.x] * 2.f;  // <- BUG_NO_FENCE
#ifndef BUG_NO_FENCE
  __threadfence();
#endif
  if (atomicAdd(&blocks_done, 1) != gridDim.x - 1) return;
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += partial[i];  // <- BUG_NO_FENCE
  *total = sum;
  blocks_done = 0;
}

// Every thread of every block stores the same value: a race by the letter, reported as a kind of its own.
__global__ void same_value(int* flag) { *flag = 1; }

// Dimensions: a launch's coordinates as the kernel sees them.
__global__ void coordinates(int* y) {
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  y[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

// A struct by value, with padding, and a dynamic shared array behind a static one.
struct Scale {
  float factor;
  int64_t n;
  const float* x;
  float* y;
};
__global__ void by_struct(Scale args, int8_t sign) {
  __shared__ float fixed[3];
  extern __shared__ float dynamic[];
  fixed[0] = args.factor;
  int i = threadIdx.x;
  if (i < args.n) {
    dynamic[i] = args.x[i];
    args.y[i] = dynamic[i] * fixed[0] * sign;
  }
}

// Access patterns whose cost is known: the stride in floats, in global and in shared memory.
__global__ void strided(const float* x, float* y, int stride) {
  extern __shared__ float row[];
  row[threadIdx.x * stride] = x[threadIdx.x * stride];
  __syncthreads();
  y[threadIdx.x] = row[(threadIdx.x ^ 1) * stride];
}
