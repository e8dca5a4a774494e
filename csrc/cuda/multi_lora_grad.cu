// SPDX-License-Identifier: Apache-2.0
// MultiLoraGrad of multi_low_rank.h:  grad[a] = alpha_a * sum over the entries e of a of u[e]^T drop(x[order[e]])
//
// low_rank_grad.cu for each adapter: a block takes 16 kTiles ranks and 128 columns of one adapter and walks down all of
// its rows (grad_tile.cuh), which are neighbours in u and gathered from x. What is past the adapter's rank, or has no
// rows, becomes zero.
#include "../nf4.h"
#include "grad_tile.cuh"
#include "kernels.h"
#include "multi_lora.cuh"

namespace peftkern {

// Which rows of x belong to the entries first .. last - 1. Those of a stage come to shared memory one stage ahead, and
// from global memory two: else a warp would wait for a row's number before it could ask for the row.
class EntryRing {
 public:
  static constexpr int kRing = 2 * kGradRows;

  // All threads take part; ends with a barrier.
  __device__ __forceinline__ EntryRing(int64_t (&ring)[kRing], const int64_t* order, int64_t first, int64_t last)
      : ring_(ring), order_(order), last_(last) {
    fetch(first);
    put(first);
    fetch(first + kGradRows);
    __syncthreads();
  }

  __device__ __forceinline__ int64_t number(int64_t entry) const { return ring_[static_cast<uint32_t>(entry) % kRing]; }
  __device__ __forceinline__ void next(int64_t stage) {
    put(stage + kGradRows);
    fetch(stage + 2 * kGradRows);
  }

 private:
  __device__ __forceinline__ void fetch(int64_t stage) {
    const int64_t entry = stage + threadIdx.x;
    fetched_ = threadIdx.x < kGradRows && entry < last_ ? order_[entry] : 0;
  }
  __device__ __forceinline__ void put(int64_t stage) {
    if (threadIdx.x < kGradRows) ring_[(static_cast<uint32_t>(stage) + threadIdx.x) % kRing] = fetched_;
  }

  int64_t (&ring_)[kRing];
  const int64_t* order_;
  int64_t last_, fetched_;
};

template <class T, int kTiles>
__global__ void __launch_bounds__(kGradThreads) multi_lora_grad_kernel(MultiLoraGrad args) {
  using Tile = GradTile<T, kTiles>;
  __shared__ Tile shared;
  __shared__ int64_t ring[EntryRing::kRing];

  const int64_t rank_tiles = (args.rank + Tile::kRanks - 1) / Tile::kRanks;
  const int64_t column_tiles = (args.columns + kGradColumns - 1) / kGradColumns;
  const int64_t first_rank = blockIdx.x % rank_tiles * Tile::kRanks;
  const int64_t first_column = blockIdx.x / rank_tiles % column_tiles * kGradColumns;
  const int64_t adapter = blockIdx.x / (rank_tiles * column_tiles);
  const int64_t rank = rank_of(args.ranks, args.rank, adapter, args.groups.adapters);
  const int64_t first = args.groups.offsets[adapter];
  const int64_t last = first_rank < rank ? args.groups.offsets[adapter + 1] : first;

  typename Tile::Sums sum = {};
  EntryRing rows(ring, args.groups.order, first, last);
  shared.multiply(rows, args.dropout, static_cast<const T*>(args.x), args.columns, first_column, args.u, args.rank,
                  rank, first_rank, first, last, sum, [](const Chunk<T>&, const Chunk<T>&) {});

  const float scale = alpha_of(args.alphas, args.alpha, adapter, args.groups.adapters) * args.dropout.scale;
  const int64_t base = adapter * args.rank * args.columns;
  shared.for_each_total(sum, args.rank_major, args.rank - first_rank, args.columns - first_column,
                        [&](int r, int c, float total) {
                          const int64_t at = first_rank + r, column = first_column + c;
                          const int64_t index = args.rank_major ? at * args.columns + column : column * args.rank + at;
                          store_as(args.grad, args.grad_dtype, base + index, at < rank ? scale * total : 0.0f);
                        });
}

// Ranks of a block: as in low_rank_grad.cu.
static int64_t block_ranks(const MultiLoraGrad& args) { return args.rank <= 16 ? 16 : 32; }

cudaError_t launch_multi_lora_grad(const MultiLoraGrad& args, cudaStream_t stream) {
  // Not skipped without rows: the gradient is then zero, and has to be written.
  if (args.rank == 0 || args.columns == 0) return cudaSuccess;
  const int64_t tiles = ceil_div(args.rank, block_ranks(args)) * ceil_div(args.columns, kGradColumns);
  const unsigned blocks = static_cast<unsigned>(tiles * args.groups.adapters);
  dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    if (block_ranks(args) == 16) {
      multi_lora_grad_kernel<T, 1><<<blocks, kGradThreads, 0, stream>>>(args);
    } else {
      multi_lora_grad_kernel<T, 2><<<blocks, kGradThreads, 0, stream>>>(args);
    }
  });
  return cudaGetLastError();
}

}  // namespace peftkern
