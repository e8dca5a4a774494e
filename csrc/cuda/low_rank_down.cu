// SPDX-License-Identifier: Apache-2.0
// out = alpha * drop(x) F^T                                                                   (LowRankDown in low_rank.h)
//
// A product with a few output columns: bound by reading x while rank is small. A block makes a tile of 32 rows x kRanks. It
// walks along the columns, and each step brings 64 columns of x (masked, as fp32) and of F to shared memory. As a tile
// has fewer outputs than the block has threads to spare, the threads also split the columns of each step into slices,
// which are added in slice order at the end. Ranks above 32 take several tiles; they are neighbours in the grid, so x is
// then read from L2.
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

  const int load_row = threadIdx.x / (kDownColumns / kChunk), load_chunk_index = threadIdx.x % (kDownColumns / kChunk);
  const int row_group = threadIdx.x % kRowGroups, rank_group = threadIdx.x / kRowGroups % kRankGroups;
  const int slice = threadIdx.x / (kRowGroups * kRankGroups);

  const int64_t x_row = first_row + load_row;
  const T* x = static_cast<const T*>(args.x) + x_row * args.columns;
  const bool x_aligned = chunks_aligned(args.x, args.columns * sizeof(T));
  const uint64_t seed = load_seed(args.dropout);

  float sum[kDownThreadRows][kDownThreadRanks] = {};
  for (int64_t first_column = 0; first_column < args.columns; first_column += kDownColumns) {
    const int64_t column = first_column + load_chunk_index * kChunk;
    float v[kChunk];
    load_chunk(x + column, x_row < args.rows ? args.columns - column : 0, x_aligned, v);
    drop_chunk(args.dropout, seed, x_row, column, v);
    shared.tile.x.set_chunk(load_row, load_chunk_index, v);
    load_factor_tile<kDownThreads>(args.factor, args.rank, args.columns, first_rank, first_column, shared.tile.factor);
    __syncthreads();
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
