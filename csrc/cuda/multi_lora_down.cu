// SPDX-License-Identifier: Apache-2.0
// MultiLoraDown of multi_low_rank.h:  out[e] = alpha_a * drop(x[order[e]]) F_a^T
//
// low_rank_down.cu over gathered rows: a block makes a tile of up to 128 entries of one adapter x 16 kTiles ranks over
// a part of the columns (down_tile.cuh). An adapter's factor is read once for each tile of its rows: with tiles of 32,
// splitting it would be more work than the product. Tiles past an adapter's rank, and those of the rows without one,
// write their zeros.
#include "down_tile.cuh"
#include "kernels.h"
#include "multi_lora.cuh"

namespace peftkern {

// A lane's rows of x: those of its entries. Their numbers stay in shared memory, as only the masks need them again.
template <class T>
struct EntryRows {
  const int64_t* numbers;
  const T* x[kWarpTiles];
  bool is_inside[kWarpTiles], is_none;

  __device__ __forceinline__ EntryRows(const MultiLoraDown& args, int count, const int64_t* tile_numbers,
                                       const DownWarps& warps)
      : numbers(tile_numbers + warps.lane_row()), is_none(warps.row() >= count) {
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      x[i] = static_cast<const T*>(args.x) + number(i) * args.columns;
      is_inside[i] = warps.lane_row() + i * kTileRows < count;
    }
  }

  __device__ __forceinline__ bool none() const { return is_none; }
  __device__ __forceinline__ bool inside(int i) const { return is_inside[i]; }
  __device__ __forceinline__ int64_t number(int i) const { return numbers[i * kTileRows]; }
  __device__ __forceinline__ const T* data(int i) const { return x[i]; }
};

// Two blocks on a multiprocessor where that takes no spills. ptxas left alone tries it for 64 ranks, too, and spills.
template <class T, int kTiles>
__global__ void __launch_bounds__(kDownThreads, sizeof(T) == 2 && kTiles < 4 ? 2 : 1)
    multi_lora_down_kernel(MultiLoraDown args, unsigned parts) {
  using Tile = DownTile<T, kTiles>;
  __shared__ Tile tile;
  __shared__ int64_t numbers[kDownRows];

  const unsigned rank_tiles = static_cast<unsigned>((args.rank + Tile::kRanks - 1) / Tile::kRanks);
  const unsigned part = blockIdx.x % parts;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.x / parts % rank_tiles) * Tile::kRanks;
  const RowTile<kDownRows> rows(args.groups, blockIdx.x / (rank_tiles * parts));
  if (rows.adapter < 0) return;
  const int64_t rank = rank_of(args.factors.ranks, args.rank, rows.adapter, args.groups.adapters);
  const int count = static_cast<int>(rows.last - rows.first);
  const DownWarps warps = Tile::warps(count);

  typename Tile::Sums sum = {};
  if (first_rank < rank) {
    if (const int i = threadIdx.x; i < kDownRows) numbers[i] = i < count ? args.groups.order[rows.first + i] : 0;
    __syncthreads();
    tile.multiply(warps, EntryRows<T>(args, count, numbers, warps), args.dropout,
                  chunks_aligned(args.x, args.columns * sizeof(T)),
                  factor_of(args.factors, rows.adapter, args.rank, args.columns), args.rank, rank, args.columns,
                  first_rank, DownPart(args.columns, part, parts), sum);
  }

  const float scale = alpha_of(args.alphas, args.alpha, rows.adapter, args.groups.adapters) * args.dropout.scale;
  const PartMade made(part, parts);
  float* sums = made.is_all() ? args.out : args.workspace + made.index * args.groups.rows * args.rank;
  float* out = sums + rows.first * args.rank + first_rank;
  tile.for_each_total(sum, warps, scale, count, first_rank >= rank, [&](int row, int tile_rank, float total) {
    const int64_t r = first_rank + tile_rank;
    if (r < args.rank) out[row * args.rank + tile_rank] = r < rank ? total : 0.0f;
  });
}

__global__ void __launch_bounds__(kPartThreads) multi_lora_down_sum_kernel(MultiLoraDown args, PartsLeft left) {
  sum_parts(part_element(), args.workspace, left, args.groups.rows * args.rank, args.out, DType::f32);
}

static int64_t block_ranks(const MultiLoraDown& args) { return args.rank <= 16 ? 16 : args.rank <= 32 ? 32 : 64; }

// How many give enough blocks with work. Of those launched up to three in four have none.
static int64_t down_parts(const MultiLoraDown& args) {
  return part_count(ceil_div(args.rank, block_ranks(args)) * most_row_tiles(args.groups, kDownRows), args.columns);
}

int64_t multi_lora_down_workspace(const MultiLoraDown& args) {
  const int64_t parts = down_parts(args);
  return parts > 1 ? parts * args.groups.rows * args.rank : 0;
}

cudaError_t launch_multi_lora_down(const MultiLoraDown& args, cudaStream_t stream) {
  if (args.groups.rows == 0 || args.rank == 0) return cudaSuccess;
  const int64_t parts = down_parts(args);
  if (parts > 1 && !args.workspace) return cudaErrorInvalidValue;
  const int64_t tiles = ceil_div(args.rank, block_ranks(args)) * most_row_tiles(args.groups);
  const Launch launch = {static_cast<unsigned>(tiles * parts), kDownThreads, stream};
  PartsLeft left(parts);
  const cudaError_t error = dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    const unsigned count = static_cast<unsigned>(parts);
    switch (block_ranks(args)) {
      case 16: return launch_kernel(multi_lora_down_kernel<T, 1>, launch, left, args, count);
      case 32: return launch_kernel(multi_lora_down_kernel<T, 2>, launch, left, args, count);
      default: return launch_kernel(multi_lora_down_kernel<T, 4>, launch, left, args, count);
    }
  });
  if (error != cudaSuccess || left.parts == 1) return error;
  const unsigned sums = static_cast<unsigned>(ceil_div(args.groups.rows * args.rank, kPartThreads));
  multi_lora_down_sum_kernel<<<sums, kPartThreads, 0, stream>>>(args, left);
  return cudaGetLastError();
}

}  // namespace peftkern
