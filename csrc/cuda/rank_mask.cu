// SPDX-License-Identifier: Apache-2.0
// RankMask and MaskRanks of rank_allocation.h: keep[j] = key of score j above the (triplets - budget)-th smallest;
// E[j] = 0 where keep[j] is 0
//
// A radix select in one thread block: four passes over the scores, each finds 8 more bits of the threshold from a
// histogram in shared memory (integer counts, so that the order of the atomics does not matter). A model has a few
// thousand scores. Nothing is read back: what the host knows is the budget.
#include "convert.cuh"
#include "kernels.h"
#include "table.cuh"

namespace peftkern {

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kMaskThreads = 128;
constexpr int kBins = 256;
constexpr int kLaneBins = kBins / 32;

struct Selected {
  uint32_t key;    // the digits found so far
  uint32_t rank;   // which of the keys with these digits it is, from 1
  uint32_t equal;  // how many keys have them
};

// One warp: in which bin is the rank-th smallest?
__device__ __forceinline__ void select_bin(const uint32_t (&histogram)[kBins], int shift, Selected& selected) {
  const int lane = threadIdx.x;
  uint32_t count[kLaneBins], sum = 0;
#pragma unroll
  for (int i = 0; i < kLaneBins; ++i) sum += count[i] = histogram[lane * kLaneBins + i];
  uint32_t up_to = sum;  // inclusive, over the lanes
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffff, up_to, distance);
    if (lane >= distance) up_to += other;
  }
  const uint32_t rank = selected.rank;
  const bool found = up_to >= rank && up_to - sum < rank;
  __syncwarp();  // every lane has read the rank
  if (!found) return;
  uint32_t before = up_to - sum;
#pragma unroll
  for (int i = 0; i < kLaneBins; ++i) {
    if (before < rank && rank <= before + count[i]) {
      selected.key |= static_cast<uint32_t>(lane * kLaneBins + i) << shift;
      selected.rank = rank - before;
      selected.equal = count[i];
    }
    before += count[i];
  }
}

// Sum of `flag` over the threads before this one, and over all.
__device__ __forceinline__ uint32_t count_before(bool flag, uint32_t (&counts)[kSelectWarps], uint32_t& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t ballot = __ballot_sync(0xffffffff, flag);
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  uint32_t before = __popc(ballot & ((1u << lane) - 1));
  all = 0;
#pragma unroll 4
  for (int i = 0; i < kSelectWarps; ++i) {
    if (i < warp) before += counts[i];
    all += counts[i];
  }
  __syncthreads();
  return before;
}

__global__ void __launch_bounds__(kSelectThreads) rank_mask_kernel(RankMask args) {
  __shared__ uint32_t histogram[kBins], counts[kSelectWarps];
  __shared__ Selected selected;
  const int64_t pruned = args.triplets - args.budget;
  if (pruned <= 0 || args.budget <= 0) {
    for (int64_t i = threadIdx.x; i < args.triplets; i += kSelectThreads) args.keep[i] = pruned <= 0;
    return;
  }
  if (threadIdx.x == 0) selected = {0, static_cast<uint32_t>(pruned), 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < kBins) histogram[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t key = selected.key, mask = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
    for (int64_t i = threadIdx.x; i < args.triplets; i += kSelectThreads) {
      const uint32_t candidate = score_key(args.scores[i]);
      if ((candidate & mask) == key) atomicAdd(&histogram[candidate >> shift & (kBins - 1)], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) select_bin(histogram, shift, selected);
    __syncthreads();
  }
  const uint32_t threshold = selected.key;
  int64_t ties = args.exact ? selected.equal - selected.rank : 0;  // how many that tie stay, the first ones
  for (int64_t first = 0; first < args.triplets; first += kSelectThreads) {
    const int64_t i = first + threadIdx.x;
    const uint32_t key = i < args.triplets ? score_key(args.scores[i]) : 0;
    const bool tie = i < args.triplets && key == threshold;
    uint32_t all = 0, before = 0;
    if (args.exact) before = count_before(tie, counts, all);
    if (i < args.triplets) args.keep[i] = key > threshold || (tie && before < ties);
    ties -= all;
  }
}

struct LayerBlocks {
  __host__ __device__ int64_t operator()(const TripletLayer& layer) const {
    return (layer.rank + kMaskThreads - 1) / kMaskThreads;
  }
};

__global__ void __launch_bounds__(kMaskThreads)
    mask_ranks_kernel(MaskRanks args, const __grid_constant__ Table<TripletLayer> table) {
  int64_t block;
  const TripletLayer& layer = table.items[find_item(table, LayerBlocks(), block)];
  const int64_t j = block * kMaskThreads + threadIdx.x;
  if (j < layer.rank && !args.keep[layer.first + j]) store_as(layer.E, layer.dtype, j, 0.0f);
}

cudaError_t launch_rank_mask(const RankMask& args, cudaStream_t stream) {
  if (args.triplets > INT32_MAX) return cudaErrorInvalidValue;
  if (args.triplets == 0) return cudaSuccess;
  rank_mask_kernel<<<1, kSelectThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_mask_ranks(const MaskRanks& args, cudaStream_t stream) {
  return for_each_table(args.layers, args.layer_count, LayerBlocks(),
                        [&](const Table<TripletLayer>& table, unsigned blocks) {
                          mask_ranks_kernel<<<blocks, kMaskThreads, 0, stream>>>(args, table);
                        });
}

}  // namespace peftkern
