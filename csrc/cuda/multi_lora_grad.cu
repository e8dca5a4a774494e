// SPDX-License-Identifier: Apache-2.0
// MultiLoraGrad of multi_low_rank.h:  grad[a] = alpha_a * sum over the entries e of a of u[e]^T drop(x[order[e]])
//
// low_rank_grad.cu for each adapter: a block takes 16 kTiles ranks, 128 columns and a slab of the rows of one adapter
// (grad_tile.cuh), which are neighbours in u and gathered from x. How many rows it has, only the device knows, but not
// in how many slabs they are divided (parts.cuh). What is past the adapter's rank, or has no rows, becomes zero.
#include "../nf4.h"
#include "grad_tile.cuh"
#include "kernels.h"
#include "multi_lora.cuh"
#include "parts.cuh"

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
__global__ void __launch_bounds__(kGradThreads) multi_lora_grad_kernel(MultiLoraGrad args, int64_t slabs) {
  using Tile = GradTile<T, kTiles>;
  __shared__ Tile shared;
  __shared__ int64_t ring[EntryRing::kRing];

  const int64_t rank_tiles = (args.rank + Tile::kRanks - 1) / Tile::kRanks;
  const int64_t column_tiles = (args.columns + kGradColumns - 1) / kGradColumns;
  const int64_t slab = blockIdx.x % slabs, tile = blockIdx.x / slabs;
  const int64_t first_rank = tile % rank_tiles * Tile::kRanks;
  const int64_t first_column = tile / rank_tiles % column_tiles * kGradColumns;
  const int64_t adapter = tile / (rank_tiles * column_tiles);
  const int64_t rank = rank_of(args.ranks, args.rank, adapter, args.groups.adapters);
  const int64_t entries = args.groups.offsets[adapter], end = args.groups.offsets[adapter + 1];
  const int64_t stages = first_rank < rank ? (end - entries + kGradRows - 1) / kGradRows : 0;
  const int64_t first = entries + stages * slab / slabs * kGradRows;
  const int64_t last = min(entries + stages * (slab + 1) / slabs * kGradRows, end);

  typename Tile::Sums sum = {};
  EntryRing rows(ring, args.groups.order, first, last);
  shared.multiply(rows, args.dropout, static_cast<const T*>(args.x), args.columns, first_column, args.u, args.rank,
                  rank, first_rank, first, last, sum, [](const Chunk<T>&, const Chunk<T>&) {});

  const float scale = alpha_of(args.alphas, args.alpha, adapter, args.groups.adapters) * args.dropout.scale;
  const int64_t base = adapter * args.rank * args.columns;
  const PartMade made(slab, slabs);
  float* part = args.workspace + made.index * args.groups.adapters * args.rank * args.columns;
  shared.for_each_total(sum, args.rank_major, args.rank - first_rank, args.columns - first_column, scale, stages == 0,
                        [&](int r, int c, float total) {
                          const int64_t at = first_rank + r, column = first_column + c;
                          const int64_t index =
                              base + (args.rank_major ? at * args.columns + column : column * args.rank + at);
                          const float value = at < rank ? total : 0.0f;
                          if (made.is_all()) {
                            store_as(args.grad, args.grad_dtype, index, value);
                          } else {
                            part[index] = value;
                          }
                        });
}

__global__ void __launch_bounds__(kPartThreads) multi_lora_grad_sum_kernel(MultiLoraGrad args, PartsLeft left) {
  const int64_t n = args.groups.adapters * args.rank * args.columns;
  sum_parts(part_element(), args.workspace, left, n, args.grad, args.grad_dtype);
}

// Ranks of a block: as in low_rank_grad.cu.
static int64_t block_ranks(const MultiLoraGrad& args) { return args.rank <= 16 ? 16 : 32; }

static int64_t block_tiles(const MultiLoraGrad& args) {
  return ceil_div(args.rank, block_ranks(args)) * ceil_div(args.columns, kGradColumns) * args.groups.adapters;
}

// As if one adapter had all rows: the others then cost little.
static int64_t slab_count(const MultiLoraGrad& args) { return part_count(block_tiles(args), args.groups.rows); }

int64_t multi_lora_grad_workspace(const MultiLoraGrad& args) {
  const int64_t slabs = slab_count(args);
  return slabs > 1 ? slabs * args.groups.adapters * args.rank * args.columns : 0;
}

cudaError_t launch_multi_lora_grad(const MultiLoraGrad& args, cudaStream_t stream) {
  // Not skipped without rows: the gradient is then zero, and has to be written.
  if (args.rank == 0 || args.columns == 0 || args.groups.adapters == 0) return cudaSuccess;
  const int64_t slabs = slab_count(args);
  if (slabs > 1 && !args.workspace) return cudaErrorInvalidValue;
  const Launch launch = {static_cast<unsigned>(block_tiles(args) * slabs), kGradThreads, stream};
  PartsLeft left(slabs);
  const cudaError_t error = dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    return block_ranks(args) == 16 ? launch_kernel(multi_lora_grad_kernel<T, 1>, launch, left, args, slabs)
                                   : launch_kernel(multi_lora_grad_kernel<T, 2>, launch, left, args, slabs);
  });
  if (error != cudaSuccess || left.parts == 1) return error;
  const unsigned sums = static_cast<unsigned>(ceil_div(args.groups.adapters * args.rank * args.columns, kPartThreads));
  multi_lora_grad_sum_kernel<<<sums, kPartThreads, 0, stream>>>(args, left);
  return cudaGetLastError();
}

}  // namespace peftkern
