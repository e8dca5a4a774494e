// SPDX-License-Identifier: Apache-2.0
// LowRankUp of low_rank.h:  y = out_scale * (y + alpha * mask(u F)) + bias, in place or, without accumulate, with 0 for
// the second y; z receives y before the scale
//
// Bound by reading and writing y, which is touched exactly once, when the sum over the rank is complete in registers. A
// block makes a tile of 64 rows x 128 columns; a thread makes one chunk in each of 4 rows. With rank 0 the sum is empty
// and only the last part, the epilogue, remains.
#include "kernels.h"
#include "tile.cuh"

namespace peftkern {

constexpr int kUpThreads = 256;
constexpr int kUpRows = 64, kUpColumns = 128, kUpRanks = 16;
constexpr int kUpChunks = kUpColumns / kChunk;
constexpr int kUpRowGroups = kUpThreads / kUpChunks;
constexpr int kUpThreadRows = kUpRows / kUpRowGroups;

template <class T>
__global__ void __launch_bounds__(kUpThreads) low_rank_up_kernel(LowRankUp args) {
  __shared__ Tile<kUpRows, kUpRanks> u_tile;
  __shared__ Tile<kUpRanks, kUpColumns> factor_tile;

  const int64_t column_tiles = (args.columns + kUpColumns - 1) / kUpColumns;
  const int64_t first_column = blockIdx.x % column_tiles * kUpColumns;
  const int64_t first_row = blockIdx.x / column_tiles * kUpRows;
  const int chunk = threadIdx.x % kUpChunks, row_group = threadIdx.x / kUpChunks;

  float sum[kUpThreadRows][kChunk] = {};
  const bool u_aligned = chunks_aligned(args.u, args.rank * sizeof(float));
  for (int64_t first_rank = 0; first_rank < args.rank; first_rank += kUpRanks) {
    for (int i = threadIdx.x; i < kUpRows * (kUpRanks / kChunk); i += kUpThreads) {
      const int r = i / (kUpRanks / kChunk), rank_chunk = i % (kUpRanks / kChunk);
      const int64_t row = first_row + r, rank = first_rank + rank_chunk * kChunk;
      float v[kChunk];
      load_chunk(args.u + row * args.rank + rank, row < args.rows ? args.rank - rank : 0, u_aligned, v);
      u_tile.set_chunk(r, rank_chunk, v);
    }
    FactorChunk<kUpRanks, kUpColumns> factor;
    static_assert(factor.kThreads <= kUpThreads);
    factor.load(args.factor, args.rank, args.columns, first_rank, first_column);
    factor.store(args.factor.rank_major, factor_tile);
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
        const int rank = quad * 4 + k;
        const float4 low = factor_tile.quad(rank, chunk * 2), high = factor_tile.quad(rank, chunk * 2 + 1);
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
  const float scale = args.alpha * args.dropout.scale;
  const uint64_t seed = load_seed(args.dropout);
  const bool y_aligned = chunks_aligned(args.y, args.columns * sizeof(T));
  const bool z_aligned = chunks_aligned(args.z, args.columns * sizeof(T));
  float out_scale[kChunk], bias[kChunk];
  if (args.out_scale) load_chunk(args.out_scale + column, valid, chunks_aligned(args.out_scale, 0), out_scale);
  if (args.bias) load_chunk(args.bias + column, valid, chunks_aligned(args.bias, 0), bias);
  Chunk<T> y_chunk[kUpThreadRows];  // all rows at once: four loads in flight
#pragma unroll
  for (int i = 0; i < kUpThreadRows; ++i) {
    const int64_t row = first_row + row_group + i * kUpRowGroups;
    y_chunk[i].load(static_cast<const T*>(args.y) + row * args.columns + column,
                    args.accumulate && row < args.rows ? valid : 0, y_aligned);
  }
#pragma unroll
  for (int i = 0; i < kUpThreadRows; ++i) {
    const int64_t row = first_row + row_group + i * kUpRowGroups;
    if (row >= args.rows) break;
    const int64_t index = row * args.columns + column;
    float y[kChunk];
    y_chunk[i].to_floats(y);
    drop_chunk(args.dropout, seed, row, column, sum[i]);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) y[j] = fmaf(scale, sum[i][j], y[j]);
    if (args.z) store_chunk(static_cast<T*>(args.z) + index, valid, z_aligned, y);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      // Two roundings whatever the compiler flags, as on the CPU.
      if (args.out_scale) y[j] = __fmul_rn(y[j], out_scale[j]);
      if (args.bias) y[j] = __fadd_rn(y[j], bias[j]);
    }
    store_chunk(static_cast<T*>(args.y) + index, valid, y_aligned, y);
  }
}

cudaError_t launch_low_rank_up(const LowRankUp& args, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return cudaSuccess;
  const int64_t tiles = ceil_div(args.columns, kUpColumns) * ceil_div(args.rows, kUpRows);
  dispatch(args.y_dtype, [&](auto tag) {
    low_rank_up_kernel<decltype(tag)><<<static_cast<unsigned>(tiles), kUpThreads, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace peftkern
