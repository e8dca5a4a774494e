// SPDX-License-Identifier: Apache-2.0
// MultiLoraDown of multi_low_rank.h:  out[e] = alpha_a * drop(x[order[e]]) F_a^T
//
// low_rank_down.cu over gathered rows: a block makes a tile of up to 32 entries of one adapter x kRanks outputs, and
// its threads split the columns of a step into slices, whose sums are added in slice order. An adapter's factor is read
// once for each tile of its rows. Tiles past an adapter's rank, and those of the rows without one, write their zeros.
#include "../nf4.h"
#include "kernels.h"
#include "multi_lora.cuh"

namespace peftkern {

constexpr int kDownThreads = 256;
constexpr int kDownColumns = 64;
constexpr int kDownRows = static_cast<int>(kRowTile);
constexpr int kDownThreadRows = 4, kDownThreadRanks = 4;  // 16 outputs a thread: 8 reads of 16 bytes feed 64 FMAs
static_assert(kDownRows * kDownColumns == kDownThreads * kChunk, "a thread loads one chunk of x per step");

template <class T, int kRanks>
__global__ void __launch_bounds__(kDownThreads) multi_lora_down_kernel(MultiLoraDown args) {
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
  const RowTile rows(args.groups, blockIdx.x / rank_tiles);
  if (rows.adapter < 0) return;
  const int64_t rank = rank_of(args.factors.ranks, args.rank, rows.adapter, args.groups.adapters);
  const int64_t columns = first_rank < rank ? args.columns : 0;
  const Factor source = factor_of(args.factors, columns ? rows.adapter : 0, args.rank, args.columns);

  const int load_row = threadIdx.x / (kDownColumns / kChunk);
  const int load_column = threadIdx.x % (kDownColumns / kChunk) * kChunk;
  const int row_group = threadIdx.x % kRowGroups, rank_group = threadIdx.x / kRowGroups % kRankGroups;
  const int slice = threadIdx.x / (kRowGroups * kRankGroups);

  const bool inside = rows.first + load_row < rows.last;
  const int64_t x_row = inside ? args.groups.order[rows.first + load_row] : 0;
  const T* x_data = static_cast<const T*>(args.x) + x_row * args.columns;
  const bool x_aligned = chunks_aligned(args.x, args.columns * sizeof(T));
  const uint64_t seed = load_seed(args.dropout);

  Chunk<T> x;
  FactorChunk<kRanks, kDownColumns> factor;
  static_assert(factor.kThreads <= kDownThreads);
  const auto load = [&](int64_t first_column) {
    const int64_t column = first_column + load_column;
    x.load(x_data + column, inside ? columns - column : 0, x_aligned);
    factor.load(source, args.rank, args.columns, first_rank, first_column, rank);
  };

  float sum[kDownThreadRows][kDownThreadRanks] = {};
  if (columns) load(0);
  for (int64_t first_column = 0; first_column < columns; first_column += kDownColumns) {
    float v[kChunk];
    x.to_floats(v);
    drop_chunk(args.dropout, seed, x_row, first_column + load_column, v);
    shared.tile.x.set_chunk(load_row, load_column / kChunk, v);
    factor.store(source.rank_major, shared.tile.factor);
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
  const float scale = alpha_of(args.alphas, args.alpha, rows.adapter, args.groups.adapters) * args.dropout.scale;
  for (int i = threadIdx.x; i < kDownRows * kRanks; i += kDownThreads) {
    const int64_t entry = rows.first + i / kRanks, r = first_rank + i % kRanks;
    if (entry >= rows.last || r >= args.rank) continue;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) total += shared.partial[s][i / kRanks][i % kRanks];
    args.out[entry * args.rank + r] = r < rank ? scale * total : 0.0f;
  }
}

template <class T, int kRanks>
static void launch_tiles(const MultiLoraDown& args, cudaStream_t stream) {
  const int64_t tiles = ceil_div(args.rank, kRanks) * max_row_tiles(args.groups.rows, args.groups.adapters);
  multi_lora_down_kernel<T, kRanks><<<static_cast<unsigned>(tiles), kDownThreads, 0, stream>>>(args);
}

cudaError_t launch_multi_lora_down(const MultiLoraDown& args, cudaStream_t stream) {
  if (args.groups.rows == 0 || args.rank == 0) return cudaSuccess;
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
