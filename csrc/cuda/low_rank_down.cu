// SPDX-License-Identifier: Apache-2.0
// LowRankDown of low_rank.h:  out = alpha * drop(x) F^T
//
// Bound by reading x. A block takes 128 rows, 16 for each warp, 16 kTiles ranks and a part of the columns
// (down_tile.cuh), so F is read once for 128 rows. With few rows, blocks share the columns (parts.cuh).
#include "down_tile.cuh"
#include "grid_dependency.cuh"
#include "kernels.h"

namespace peftkern {

// A lane's rows, 8 apart.
template <class T>
struct NeighbouringRows {
  const T* x;  // the first of them
  int64_t warp_first, first, rows, columns;

  __device__ __forceinline__ bool none() const { return warp_first >= rows; }
  __device__ __forceinline__ bool inside(int i) const { return number(i) < rows; }
  __device__ __forceinline__ int64_t number(int i) const { return first + i * kTileRows; }
  __device__ __forceinline__ const T* data(int i) const { return x + i * kTileRows * columns; }
};

// At least 1 block: else ptxas aims at 128 registers on sm_120, and spills.
template <class T, int kTiles>
__global__ void __launch_bounds__(kDownThreads, 1) low_rank_down_kernel(LowRankDown args, int64_t parts) {
  using Tile = DownTile<T, kTiles>;
  __shared__ Tile tile;
  let_next_launch_start();

  const int64_t rank_tiles = (args.rank + Tile::kRanks - 1) / Tile::kRanks;
  const int64_t part = blockIdx.x % parts;
  const int64_t first_rank = blockIdx.x / parts % rank_tiles * Tile::kRanks;
  const int64_t tile_row = blockIdx.x / (parts * rank_tiles) * kDownRows;
  constexpr DownWarps warps = {3};
  const int64_t first_row = tile_row + warps.row(), lane_row = tile_row + warps.lane_row();

  const NeighbouringRows<T> rows = {static_cast<const T*>(args.x) + lane_row * args.columns, first_row, lane_row,
                                    args.rows, args.columns};
  typename Tile::Sums sum = {};
  tile.multiply(warps, rows, args.dropout, chunks_aligned(args.x, args.columns * sizeof(T)), args.factor, args.rank,
                args.rank, args.columns, first_rank, DownPart(args.columns, part, parts), sum);

  const PartMade made(part, parts);
  float* sums = made.is_all() ? args.out : args.workspace + made.index * args.rows * args.rank;
  float* out = sums + tile_row * args.rank + first_rank;
  const int count = static_cast<int>(min(static_cast<int64_t>(kDownRows), args.rows - tile_row));
  tile.for_each_total(sum, warps, args.alpha * args.dropout.scale, count, false, [&](int row, int rank, float total) {
    if (first_rank + rank < args.rank) out[row * args.rank + rank] = total;
  });
}

__global__ void __launch_bounds__(kPartThreads) low_rank_down_sum_kernel(LowRankDown args, PartsLeft left) {
  let_next_launch_start();
  sum_parts(part_element(), args.workspace, left, args.rows * args.rank, args.out, DType::f32);
}

static int64_t block_ranks(const LowRankDown& args) { return args.rank <= 16 ? 16 : args.rank <= 32 ? 32 : 64; }

static int64_t block_tiles(const LowRankDown& args) {
  return ceil_div(args.rank, block_ranks(args)) * ceil_div(args.rows, kDownRows);
}

int64_t low_rank_down_workspace(const LowRankDown& args) {
  const int64_t parts = part_count(block_tiles(args), args.columns);
  return parts > 1 ? parts * args.rows * args.rank : 0;
}

cudaError_t launch_low_rank_down(const LowRankDown& args, cudaStream_t stream) {
  if (args.rows == 0 || args.rank == 0) return cudaSuccess;
  const int64_t tiles = block_tiles(args), parts = part_count(tiles, args.columns);
  if (parts > 1 && !args.workspace) return cudaErrorInvalidValue;
  const Launch launch = {static_cast<unsigned>(tiles * parts), kDownThreads, stream};
  PartsLeft left(parts);
  const cudaError_t error = dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    switch (block_ranks(args)) {
      case 16: return launch_kernel(low_rank_down_kernel<T, 1>, launch, left, args, parts);
      case 32: return launch_kernel(low_rank_down_kernel<T, 2>, launch, left, args, parts);
      default: return launch_kernel(low_rank_down_kernel<T, 4>, launch, left, args, parts);
    }
  });
  if (error != cudaSuccess || left.parts == 1) return error;
  const unsigned sums = static_cast<unsigned>(ceil_div(args.rows * args.rank, kPartThreads));
  low_rank_down_sum_kernel<<<sums, kPartThreads, 0, stream>>>(args, left);
  return cudaGetLastError();
}

}  // namespace peftkern
