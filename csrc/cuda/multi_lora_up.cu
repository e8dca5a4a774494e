// SPDX-License-Identifier: Apache-2.0
// MultiLoraUp of multi_low_rank.h:  y[order[e]] += alpha_a * mask(u[e] F_a), in place
//
// low_rank_up.cu over scattered rows: a block makes a tile of up to 32 entries of one adapter x 128 columns, a thread
// one chunk in each of 2 rows. A row belongs to one adapter, so y is read and written once, by one thread an element,
// and rows without adapter are not touched.
#include "../nf4.h"
#include "kernels.h"
#include "multi_lora.cuh"

namespace peftkern {

constexpr int kUpThreads = 256;
constexpr int kUpRows = static_cast<int>(kRowTile), kUpColumns = 128, kUpRanks = 16;
constexpr int kUpChunks = kUpColumns / kChunk;
constexpr int kUpRowGroups = kUpThreads / kUpChunks;
constexpr int kUpThreadRows = kUpRows / kUpRowGroups;

template <class T>
__global__ void __launch_bounds__(kUpThreads) multi_lora_up_kernel(MultiLoraUp args) {
  __shared__ Tile<kUpRows, kUpRanks> u_tile;
  __shared__ Tile<kUpRanks, kUpColumns> factor_tile;

  const int64_t column_tiles = (args.columns + kUpColumns - 1) / kUpColumns;
  const int64_t first_column = blockIdx.x % column_tiles * kUpColumns;
  const RowTile rows(args.groups, blockIdx.x / column_tiles);
  if (rows.adapter < 0) return;
  const int64_t rank = rank_of(args.factors.ranks, args.rank, rows.adapter, args.groups.adapters);
  if (rank == 0) return;  // no adapter, or an empty one
  const Factor source = factor_of(args.factors, rows.adapter, args.rank, args.columns);
  const int chunk = threadIdx.x % kUpChunks, row_group = threadIdx.x / kUpChunks;

  float sum[kUpThreadRows][kChunk] = {};
  const bool u_aligned = chunks_aligned(args.u, args.rank * sizeof(float));
  for (int64_t first_rank = 0; first_rank < rank; first_rank += kUpRanks) {
    for (int i = threadIdx.x; i < kUpRows * (kUpRanks / kChunk); i += kUpThreads) {
      const int r = i / (kUpRanks / kChunk), rank_chunk = i % (kUpRanks / kChunk);
      const int64_t entry = rows.first + r, at = first_rank + rank_chunk * kChunk;
      float v[kChunk];
      load_chunk(args.u + entry * args.rank + at, entry < rows.last ? rank - at : 0, u_aligned, v);
      u_tile.set_chunk(r, rank_chunk, v);
    }
    FactorChunk<kUpRanks, kUpColumns> factor;
    static_assert(factor.kThreads <= kUpThreads);
    factor.load(source, args.rank, args.columns, first_rank, first_column, rank);
    factor.store(source.rank_major, factor_tile);
    __syncthreads();
#pragma unroll
    for (int quad = 0; quad < kUpRanks / 4; ++quad) {
      float u[kUpThreadRows][4];
#pragma unroll
      for (int i = 0; i < kUpThreadRows; ++i) {
        const float4 v = u_tile.quad(row_group + i * kUpRowGroups, quad);
        u[i][0] = v.x, u[i][1] = v.y, u[i][2] = v.z, u[i][3] = v.w;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int r = quad * 4 + k;
        const float4 low = factor_tile.quad(r, chunk * 2), high = factor_tile.quad(r, chunk * 2 + 1);
        const float f[kChunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < kUpThreadRows; ++i) {
#pragma unroll
          for (int j = 0; j < kChunk; ++j) sum[i][j] = fmaf(u[i][k], f[j], sum[i][j]);
        }
      }
    }
    __syncthreads();
  }

  const int64_t column = first_column + chunk * kChunk, valid = args.columns - column;
  if (valid <= 0) return;
  const float scale = alpha_of(args.alphas, args.alpha, rows.adapter, args.groups.adapters) * args.dropout.scale;
  const uint64_t seed = load_seed(args.dropout);
  const bool y_aligned = chunks_aligned(args.y, args.columns * sizeof(T));
  int64_t row[kUpThreadRows];
  Chunk<T> y_chunk[kUpThreadRows];  // all rows at once, so that the loads are in flight together
#pragma unroll
  for (int i = 0; i < kUpThreadRows; ++i) {
    const int64_t entry = rows.first + row_group + i * kUpRowGroups;
    row[i] = entry < rows.last ? args.groups.order[entry] : -1;
    y_chunk[i].load(static_cast<const T*>(args.y) + row[i] * args.columns + column, row[i] >= 0 ? valid : 0, y_aligned);
  }
#pragma unroll
  for (int i = 0; i < kUpThreadRows; ++i) {
    if (row[i] < 0) break;
    float y[kChunk];
    y_chunk[i].to_floats(y);
    drop_chunk(args.dropout, seed, row[i], column, sum[i]);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) y[j] = fmaf(scale, sum[i][j], y[j]);
    store_chunk(static_cast<T*>(args.y) + row[i] * args.columns + column, valid, y_aligned, y);
  }
}

cudaError_t launch_multi_lora_up(const MultiLoraUp& args, cudaStream_t stream) {
  if (args.groups.rows == 0 || args.columns == 0 || args.rank == 0) return cudaSuccess;
  const int64_t tiles = ceil_div(args.columns, kUpColumns) * max_row_tiles(args.groups.rows, args.groups.adapters);
  dispatch(args.y_dtype, [&](auto tag) {
    multi_lora_up_kernel<decltype(tag)><<<static_cast<unsigned>(tiles), kUpThreads, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace peftkern
