// SPDX-License-Identifier: Apache-2.0
// MultiLoraPlan of multi_low_rank.h: a stable counting sort of the rows by adapter, and the tiles of the result
//
// One block: the rows of a batch are few beside the layer's work, and one launch costs less than three. Only integers,
// so the atomics of the histogram give the same result in any order. The block walks over the rows in ascending order;
// within a step a thread finds its place among the rows of its adapter by looking at those before it.
#include "../nf4.h"
#include "kernels.h"

namespace peftkern {

constexpr int kPlanThreads = 256;

// The sum of the values of the threads before this one; total: of all. All threads take part.
__device__ int64_t exclusive_sum(int64_t value, int64_t* shared, int64_t& total) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int distance = 1; distance < kPlanThreads; distance *= 2) {
    const int64_t before = threadIdx.x >= distance ? shared[threadIdx.x - distance] : 0;
    __syncthreads();
    shared[threadIdx.x] += before;
    __syncthreads();
  }
  total = shared[kPlanThreads - 1];
  const int64_t result = shared[threadIdx.x] - value;
  __syncthreads();
  return result;
}

__global__ void __launch_bounds__(kPlanThreads) multi_lora_plan_kernel(MultiLoraPlan args) {
  __shared__ int64_t sums[kPlanThreads];
  __shared__ int64_t keys[kPlanThreads];
  const int64_t groups = args.adapters + 1, run = args.indices > 0 ? args.rows / args.indices : 1;
  const auto group_of = [&](int64_t row) {
    const int64_t index = args.index[row / run];
    return index >= 0 && index < args.adapters ? index : args.adapters;
  };

  for (int64_t g = threadIdx.x; g < groups; g += kPlanThreads) args.cursor[g] = 0;
  __syncthreads();
  for (int64_t row = threadIdx.x; row < args.rows; row += kPlanThreads) {
    atomicAdd(reinterpret_cast<unsigned long long*>(args.cursor + group_of(row)), 1ull);
  }
  __syncthreads();

  // counts -> offsets and tiles
  int64_t entries = 0, tiles = 0;  // of the groups before
  for (int64_t first = 0; first < groups; first += kPlanThreads) {
    const int64_t g = first + threadIdx.x;
    const int64_t count = g < groups ? args.cursor[g] : 0, count_tiles = (count + kRowTile - 1) / kRowTile;
    int64_t all_entries, all_tiles;
    const int64_t entry = entries + exclusive_sum(count, sums, all_entries);
    const int64_t tile = tiles + exclusive_sum(count_tiles, sums, all_tiles);
    if (g < groups) args.offsets[g] = args.cursor[g] = entry;
    for (int64_t i = 0; i < count_tiles; ++i) {
      args.tiles[2 * (tile + i)] = g;
      args.tiles[2 * (tile + i) + 1] = entry + i * kRowTile;
    }
    entries += all_entries;
    tiles += all_tiles;
  }
  if (threadIdx.x == 0) args.offsets[groups] = entries;
  const int64_t bound = args.rows / kRowTile + groups;  // max_row_tiles
  for (int64_t i = tiles + threadIdx.x; i < bound; i += kPlanThreads) {
    args.tiles[2 * i] = -1;
    args.tiles[2 * i + 1] = 0;
  }

  for (int64_t first = 0; first < args.rows; first += kPlanThreads) {
    const int64_t row = first + threadIdx.x, key = row < args.rows ? group_of(row) : -1;
    keys[threadIdx.x] = key;
    __syncthreads();  // keys, and the cursors of before
    int before = 0;
    bool last = true;
    for (int t = 0; t < kPlanThreads; ++t) {
      const bool same = keys[t] == key;
      before += same && t < threadIdx.x;
      last = last && !(same && t > threadIdx.x);
    }
    const int64_t entry = key < 0 ? 0 : args.cursor[key] + before;
    if (key >= 0) args.order[entry] = row;
    __syncthreads();
    if (key >= 0 && last) args.cursor[key] = entry + 1;
  }
}

cudaError_t launch_multi_lora_plan(const MultiLoraPlan& args, cudaStream_t stream) {
  multi_lora_plan_kernel<<<1, kPlanThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace peftkern
