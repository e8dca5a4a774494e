// SPDX-License-Identifier: Apache-2.0
// Blocks of a cluster that use each other's shared memory. Marks as in memory.cu. sm_90 and later.

__device__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ unsigned cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
__device__ void arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ void arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
}

// Where the block `rank` has what lies at `own`.
__device__ unsigned address_of(const void* own, unsigned rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank));
  return address;
}
__device__ float load_float(unsigned address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");  // <- BUG_UNWRITTEN
  return value;
}
__device__ void store_int(unsigned address, int value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ float load_as_own(unsigned address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

#ifndef STRIDE
#define STRIDE 1
#endif

// Every block adds up what all blocks of its cluster have. The first barrier publishes the values, the last one keeps
// them where they are until all have read.
__global__ void sum_of_blocks(const float* x, float* y) {
  __shared__ float values[64 * STRIDE];
  const unsigned t = threadIdx.x, blocks = cluster_blocks();
  float *own = values + t * STRIDE, sum = 0;
#ifdef BUG_UNWRITTEN
  if (t != 5)
#endif
    *own = x[blockIdx.x * 64 + t];  // <- BUG_NO_BARRIER, BUG_BLOCK_BARRIER, BUG_RELAXED_ARRIVE
#if defined BUG_BLOCK_BARRIER
  __syncthreads();
#elif defined BUG_RELAXED_ARRIVE
  arrive_relaxed();
  wait();
#elif defined BUG_ARRIVES_TWICE
  arrive();
  arrive();  // <- BUG_ARRIVES_TWICE
  wait();
#elif defined BUG_WAITS_FIRST
  wait();  // <- BUG_WAITS_FIRST
  arrive();
  wait();
#elif defined BUG_HALF_A_WARP
  if (t >= 16) arrive();  // <- BUG_HALF_A_WARP
  wait();
#elif defined BUG_ONE_WARP_WAITS_ELSEWHERE
  if (t < 32) __syncthreads();  // <- BUG_ONE_WARP_WAITS_ELSEWHERE
  cluster_sync();
#elif !defined BUG_NO_BARRIER
  arrive();
  wait();
#endif
#if defined BUG_RANK_TOO_HIGH
  sum += load_float(address_of(own, blocks));  // <- BUG_RANK_TOO_HIGH
#elif defined BUG_PAST_THE_END
  sum += load_float(address_of(own + 1, blocks - 1));  // <- BUG_PAST_THE_END
#elif defined BUG_MAPPED_TWICE
  unsigned address = address_of(own, 0);
  asm("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
  sum += load_float(address);  // <- BUG_MAPPED_TWICE
#elif defined BUG_PLAIN_LOAD
  sum += load_as_own(address_of(own, 0));  // <- BUG_PLAIN_LOAD
#endif
  for (unsigned rank = 0; rank < blocks; ++rank) {
    sum += load_float(address_of(own, rank));  // <- BUG_NO_BARRIER, BUG_BLOCK_BARRIER, BUG_RELAXED_ARRIVE
  }
#if defined BUG_LAST_RELAXED
  arrive_relaxed();
  wait();
#elif !defined BUG_NO_LAST_BARRIER
  cluster_sync();
#endif
  y[blockIdx.x * 64 + t] = sum;
}  // <- BUG_NO_LAST_BARRIER, BUG_LAST_RELAXED

// Each round a block writes into the next one's memory what it got from the one before.
__global__ void pass_on(const int* x, int* y, int rounds) {
  __shared__ int inbox[64];
  const unsigned t = threadIdx.x, next = address_of(inbox + t, (cluster_rank() + 1) % cluster_blocks());
  int value = x[blockIdx.x * 64 + t];
#ifndef BUG_MAY_NOT_HAVE_STARTED
  arrive_relaxed();  // all have started
  wait();
#endif
  for (int round = 0; round < rounds; ++round) {
    store_int(next, value);  // <- BUG_MAY_NOT_HAVE_STARTED, BUG_NO_SECOND_BARRIER
    cluster_sync();
    value = inbox[t];  // <- BUG_NO_SECOND_BARRIER
#ifndef BUG_NO_SECOND_BARRIER
    cluster_sync();
#endif
  }
  y[blockIdx.x * 64 + t] = value;
}

// Wide loads, and an atomic.
__global__ void wide(const float4* x, float4* y, unsigned* counts) {
  __shared__ float4 values[32];
  __shared__ unsigned count;
  const unsigned t = threadIdx.x, rank = cluster_rank();
  values[t] = x[blockIdx.x * 32 + t];
  if (t == 0) count = 0;
  cluster_sync();
  float4 v;
  unsigned long long half;
  const unsigned address = address_of(values + t, cluster_blocks() - 1 - rank);
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  asm volatile("ld.shared::cluster.u64 %0, [%1 + 8];" : "=l"(half) : "r"(address) : "memory");
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], 1;" ::"r"(address_of(&count, 0)) : "memory");
  v.x = __uint_as_float(half), v.y = __uint_as_float(half >> 32);
  cluster_sync();
  y[blockIdx.x * 32 + t] = v;
  if (t == 0 && rank == 0) counts[blockIdx.x / cluster_blocks()] = count;
}

// A block that has ended counts as arrived: the others do not wait for it.
__global__ void early_end(int* y) {
  if (cluster_rank() == 0) return;
  cluster_sync();
  y[blockIdx.x * 32 + threadIdx.x] = cluster_rank();
}

// What a block wrote to global memory before the barrier is ordered before what the others do after it.
__global__ void through_global(const float* x, float* y, float* z) {
  const unsigned t = blockIdx.x * 32 + threadIdx.x, rank = cluster_rank();
  y[t] = x[t];  // <- BUG_NOT_PUBLISHED
#ifdef BUG_NOT_PUBLISHED
  __syncthreads();
#else
  cluster_sync();
#endif
  z[t] = y[t + ((rank + 1) % cluster_blocks() - rank) * 32];  // <- BUG_NOT_PUBLISHED
}

// One thread tells for its cluster that all of it has written; the blocks of the last cluster add up what all wrote.
__global__ void last_cluster_sum(const float* x, float* partial, unsigned* counter, float* y, unsigned clusters) {
  __shared__ float is_last;
  const unsigned t = threadIdx.x, rank = cluster_rank(), blocks = cluster_blocks();
  partial[blockIdx.x * 32 + t] = x[blockIdx.x * 32 + t];  // <- BUG_NO_FENCE
  cluster_sync();
  if (rank == 0 && t == 0) {
#ifndef BUG_NO_FENCE
    __threadfence();
#endif
    is_last = atomicAdd(counter, 1) == clusters - 1;
  }
  cluster_sync();
  const bool last = load_float(address_of(&is_last, 0));
  cluster_sync();
  if (!last) return;
  float sum = 0;
  for (unsigned i = rank; i < clusters * blocks; i += blocks) sum += partial[i * 32 + t];  // <- BUG_NO_FENCE
  y[rank * 32 + t] = sum;
}

// May overlap with the launch that writes `filled` (grid_dependency.cu).
__global__ void after_fill(const float* filled, float* y) {
  cluster_sync();
#ifdef BUG_ONE_BLOCK_WAITS
  if (cluster_rank() == 0)
#endif
    asm volatile("griddepcontrol.wait;" ::: "memory");
  y[blockIdx.x * 32 + threadIdx.x] = filled[threadIdx.x];  // <- BUG_ONE_BLOCK_WAITS
}

__global__ void meet() { cluster_sync(); }
