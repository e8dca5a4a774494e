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
__device__ float load_as_own(unsigned address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// Every block adds up what all blocks of its cluster have. The first barrier publishes the values, the last one keeps
// them where they are until all have read.
__global__ void sum_of_blocks(const float* x, float* y) {
  __shared__ float values[64];
  const unsigned t = threadIdx.x, blocks = cluster_blocks();
  float sum = 0;
#ifdef BUG_UNWRITTEN
  if (t != 5)
#endif
    values[t] = x[blockIdx.x * 64 + t];  // <- BUG_NO_BARRIER, BUG_BLOCK_BARRIER, BUG_RELAXED_ARRIVE
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
  sum += load_float(address_of(values + t, blocks));  // <- BUG_RANK_TOO_HIGH
#elif defined BUG_PAST_THE_END
  sum += load_float(address_of(values + t + 1, blocks - 1));  // <- BUG_PAST_THE_END
#elif defined BUG_MAPPED_TWICE
  unsigned address = address_of(values + t, 0);
  asm("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
  sum += load_float(address);  // <- BUG_MAPPED_TWICE
#elif defined BUG_PLAIN_LOAD
  sum += load_as_own(address_of(values + t, 0));  // <- BUG_PLAIN_LOAD
#endif
  for (unsigned rank = 0; rank < blocks; ++rank) {
    sum += load_float(address_of(values + t, rank));  // <- BUG_NO_BARRIER, BUG_BLOCK_BARRIER, BUG_RELAXED_ARRIVE
  }
#if defined BUG_LAST_RELAXED
  arrive_relaxed();
  wait();
#elif !defined BUG_NO_LAST_BARRIER
  cluster_sync();
#endif
  y[blockIdx.x * 64 + t] = sum;
}  // <- BUG_NO_LAST_BARRIER, BUG_LAST_RELAXED

// Each round a block writes into the next one's memory what it has got from the one before, so that after `rounds` of
// them y is x of the block that lies so far behind. Between the halves of the barrier there is work of its own.
__global__ void pass_on(const int* x, int* y, int rounds) {
  __shared__ int inbox[64];
  const unsigned t = threadIdx.x, blocks = cluster_blocks(),
                 next = address_of(inbox + t, (cluster_rank() + 1) % blocks);
  int value = x[blockIdx.x * 64 + t];
  arrive_relaxed();  // all blocks have started
#ifndef BUG_MAY_NOT_HAVE_STARTED
  wait();
#endif
  for (int round = 0; round < rounds; ++round) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(next), "r"(value) : "memory");
#ifdef BUG_MAY_NOT_HAVE_STARTED
    if (round == 0) wait();
#endif
    arrive();
    const int steps = round + 1;
    wait();
    value = inbox[t];  // <- BUG_NO_SECOND_BARRIER
#ifndef BUG_NO_SECOND_BARRIER
    cluster_sync();
#endif
    y[blockIdx.x * 64 + t] = value + 1000 * steps;
  }
}

// Wide loads, and an atomic.
__global__ void wide(const float4* x, float4* y, int* counts) {
  __shared__ float4 values[32];
  __shared__ int arrivals;
  const unsigned t = threadIdx.x, other = cluster_blocks() - 1 - cluster_rank();
  values[t] = x[blockIdx.x * 32 + t];
  if (t == 0) arrivals = 0;
  cluster_sync();
  float4 v;
  unsigned long long low;
  const unsigned address = address_of(values + t, other);
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  asm volatile("ld.shared::cluster.u64 %0, [%1 + 0];" : "=l"(low) : "r"(address) : "memory");
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2 + 8];" : "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], 1;" ::"r"(address_of(&arrivals, 0)) : "memory");
  v.x = __uint_as_float(static_cast<unsigned>(low));
  cluster_sync();
  y[blockIdx.x * 32 + t] = v;
  if (t == 0) counts[blockIdx.x] = arrivals;
}

// A block that ends counts as arrived: the others do not wait for it.
__global__ void early_end(int* y) {
  if (cluster_rank() == 0) return;
  cluster_sync();
  y[blockIdx.x * 32 + threadIdx.x] = 1;
}

// What a block wrote to global memory before the barrier, too, is ordered before what the others do after it.
__global__ void through_global(const float* x, float* y, float* z) {
  const unsigned t = blockIdx.x * 32 + threadIdx.x;
  y[t] = x[t];  // <- BUG_BLOCK_BARRIER
#ifdef BUG_BLOCK_BARRIER
  __syncthreads();
#else
  cluster_sync();
#endif
  z[t] = y[t ^ 32];  // <- BUG_BLOCK_BARRIER
}
