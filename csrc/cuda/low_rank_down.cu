// SPDX-License-Identifier: Apache-2.0
// LowRankDown of low_rank.h:  out = alpha * drop(x) F^T
//
// Bound by reading x. A block takes 128 rows, 16 for each warp, 16 kTiles ranks and a part of the columns
// (down_tile.cuh), so F is read once for 128 rows. With few rows, blocks share the columns and a second kernel adds
// their parts.
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
  const int64_t first_rank = blockIdx.x % rank_tiles * Tile::kRanks;
  const int64_t part = blockIdx.x / rank_tiles % parts;
  constexpr DownWarps warps = {3};
  const int64_t tile_row = blockIdx.x / (rank_tiles * parts) * kDownRows;
  const int64_t first_row = tile_row + warps.row(), lane_row = tile_row + warps.lane_row();

  const NeighbouringRows<T> rows = {static_cast<const T*>(args.x) + lane_row * args.columns, first_row, lane_row,
                                    args.rows, args.columns};
  typename Tile::Sums sum = {};
  tile.multiply(warps, rows, args.dropout, chunks_aligned(args.x, args.columns * sizeof(T)), args.factor, args.rank,
                args.rank, args.columns, first_rank, DownPart(args.columns, part, parts), sum);

  const float scale = parts > 1 ? 1.0f : args.alpha * args.dropout.scale;
  float* out = parts > 1 ? args.workspace + part * args.rows * args.rank : args.out;
  Tile::for_each(sum, [&](int warp_row, int tile_rank, float value) {
    const int64_t row = first_row + warp_row, rank = first_rank + tile_rank;
    if (row < args.rows && rank < args.rank) out[row * args.rank + rank] = scale * value;
  });
}

__global__ void __launch_bounds__(kPartThreads) low_rank_down_sum_kernel(LowRankDown args, int64_t parts) {
  let_next_launch_start();
  sum_parts(part_element(), args.workspace, parts, args.rows * args.rank, args.alpha * args.dropout.scale, args.out,
            DType::f32);
}

static int64_t block_ranks(const LowRankDown& args) { return args.rank <= 16 ? 16 : args.rank <= 32 ? 32 : 64; }

static int64_t block_tiles(const LowRankDown& args) {
  return ceil_div(args.rank, block_ranks(args)) * ceil_div(args.rows, kDownRows);
}

static int64_t down_parts(const LowRankDown& args) { return down_part_count(block_tiles(args), args.columns); }

int64_t low_rank_down_workspace(const LowRankDown& args) {
  const int64_t parts = down_parts(args);
  return parts > 1 ? parts * args.rows * args.rank : 0;
}

cudaError_t launch_low_rank_down(const LowRankDown& args, cudaStream_t stream) {
  if (args.rows == 0 || args.rank == 0) return cudaSuccess;
  const int64_t parts = down_parts(args);
  if (parts > 1 && !args.workspace) return cudaErrorInvalidValue;
  const unsigned blocks = static_cast<unsigned>(block_tiles(args) * parts);
  dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    switch (block_ranks(args)) {
      case 16: low_rank_down_kernel<T, 1><<<blocks, kDownThreads, 0, stream>>>(args, parts); break;
      case 32: low_rank_down_kernel<T, 2><<<blocks, kDownThreads, 0, stream>>>(args, parts); break;
      default: low_rank_down_kernel<T, 4><<<blocks, kDownThreads, 0, stream>>>(args, parts);
    }
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || parts == 1) return error;
  const unsigned sums = static_cast<unsigned>(ceil_div(args.rows * args.rank, kPartThreads));
  low_rank_down_sum_kernel<<<sums, kPartThreads, 0, stream>>>(args, parts);
  return cudaGetLastError();
}

}  // namespace peftkern
