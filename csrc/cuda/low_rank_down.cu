// SPDX-License-Identifier: Apache-2.0
// LowRankDown of low_rank.h:  out = alpha * drop(x) F^T
//
// A product with a few output columns: bound by reading x while rank is small. A block makes a tile of 32 rows x kRanks
// outputs. It walks along the columns; a step brings 64 columns of x (masked, as fp32) and of F to shared memory. 16
// outputs a thread would leave most threads idle, so they also split the columns of a step into slices, whose sums are
// added in slice order at the end. Ranks above 32 take several tiles, neighbours in the grid, so that x comes from L2.
#include "kernels.h"
#include "tile.cuh"

namespace peftkern {

constexpr int kDownThreads = 256;
constexpr int kDownRows = 32, kDownColumns = 64;
constexpr int kDownThreadRows = 4, kDownThreadRanks = 4;  // 16 outputs a thread: 8 reads of 16 bytes feed 64 FMAs
static_assert(kDownRows * kDownColumns == kDownThreads * kChunk, "a thread loads one chunk of x per step");

template <class T, int kRanks>
__global__ void __launch_bounds__(kDownThreads) low_rank_down_kernel(LowRankDown args) {
  constexpr int kRowGroups = kDownRows / kDownThreadRows, kRankGroups = kRanks / kDownThreadRanks;
  constexpr int kSlices = kDownThreads / (kRowGroups * kRankGroups);
  __shared__ union {
    struct {
      Tile<kDownRows, kDownColumns> x;
      Tile<kRanks, kDownColumns> factor;
    } tile;
    float partial[kSlices][kDownRows][kRanks];
  } shared;

  const int64_t rank_tiles = (args.rank + kRanks - 1) / kRanks;
  const int64_t first_rank = blockIdx.x % rank_tiles * kRanks;
  const int64_t first_row = blockIdx.x / rank_tiles * kDownRows;

  const int load_row = threadIdx.x / (kDownColumns / kChunk);
  const int load_column = threadIdx.x % (kDownColumns / kChunk) * kChunk;
  const int row_group = threadIdx.x % kRowGroups, rank_group = threadIdx.x / kRowGroups % kRankGroups;
  const int slice = threadIdx.x / (kRowGroups * kRankGroups);

  const int64_t x_row = first_row + load_row;
  const T* x_data = static_cast<const T*>(args.x) + x_row * args.columns;
  const bool x_aligned = chunks_aligned(args.x, args.columns * sizeof(T));
  const uint64_t seed = load_seed(args.dropout);

  Chunk<T> x;
  FactorChunk<kRanks, kDownColumns> factor;
  static_assert(factor.kThreads <= kDownThreads);
  const auto load = [&](int64_t first_column) {
    const int64_t column = first_column + load_column;
    x.load(x_data + column, x_row < args.rows ? args.columns - column : 0, x_aligned);
    factor.load(args.factor, args.rank, args.columns, first_rank, first_column);
  };

  float sum[kDownThreadRows][kDownThreadRanks] = {};
  load(0);
  for (int64_t first_column = 0; first_column < args.columns; first_column += kDownColumns) {
    float v[kChunk];
    x.to_floats(v);
    drop_chunk(args.dropout, seed, x_row, first_column + load_column, v);
    shared.tile.x.set_chunk(load_row, load_column / kChunk, v);
    factor.store(args.factor.rank_major, shared.tile.factor);
    __syncthreads();
    load(first_column + kDownColumns);  // for the next step; it arrives during this one
#pragma unroll
    for (int quad = slice; quad < kDownColumns / 4; quad += kSlices) {
      // A thread's rows and ranks are strided, so that the lanes of a warp read neighbouring ones.
      float4 x_quad[kDownThreadRows], factor_quad[kDownThreadRanks];
#pragma unroll
      for (int i = 0; i < kDownThreadRows; ++i) x_quad[i] = shared.tile.x.quad(row_group + i * kRowGroups, quad);
#pragma unroll
      for (int j = 0; j < kDownThreadRanks; ++j) {
        factor_quad[j] = shared.tile.factor.quad(rank_group + j * kRankGroups, quad);
      }
#pragma unroll
      for (int i = 0; i < kDownThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kDownThreadRanks; ++j) {
          sum[i][j] = fmaf(x_quad[i].x, factor_quad[j].x, sum[i][j]);
          sum[i][j] = fmaf(x_quad[i].y, factor_quad[j].y, sum[i][j]);
          sum[i][j] = fmaf(x_quad[i].z, factor_quad[j].z, sum[i][j]);
          sum[i][j] = fmaf(x_quad[i].w, factor_quad[j].w, sum[i][j]);
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kDownThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kDownThreadRanks; ++j) {
      shared.partial[slice][row_group + i * kRowGroups][rank_group + j * kRankGroups] = sum[i][j];
    }
  }
  __syncthreads();
  const float scale = args.alpha * args.dropout.scale;
  for (int i = threadIdx.x; i < kDownRows * kRanks; i += kDownThreads) {
    const int64_t row = first_row + i / kRanks, rank = first_rank + i % kRanks;
    if (row >= args.rows || rank >= args.rank) continue;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) total += shared.partial[s][i / kRanks][i % kRanks];
    args.out[row * args.rank + rank] = scale * total;
  }
}

template <class T, int kRanks>
static void launch_tiles(const LowRankDown& args, cudaStream_t stream) {
  const int64_t tiles = ceil_div(args.rank, kRanks) * ceil_div(args.rows, kDownRows);
  low_rank_down_kernel<T, kRanks><<<static_cast<unsigned>(tiles), kDownThreads, 0, stream>>>(args);
}

cudaError_t launch_low_rank_down(const LowRankDown& args, cudaStream_t stream) {
  if (args.rows == 0 || args.rank == 0) return cudaSuccess;
  dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    if (args.rank <= 8) {
      launch_tiles<T, 8>(args, stream);
    } else if (args.rank <= 16) {
      launch_tiles<T, 16>(args, stream);
    } else {
      launch_tiles<T, 32>(args, stream);
    }
  });
  return cudaGetLastError();
}

}  // namespace peftkern
