// SPDX-License-Identifier: Apache-2.0
// LowRankUp of low_rank.h:  y = out_scale * (y + alpha * mask(u F)) + bias, in place or, without accumulate, with 0 for
// the second y; z receives y before the scale
//
// Bound by reading and writing y, which is touched exactly once, when the sum over the rank is complete in registers. A
// block makes a tile of 64 rows x 128 columns (up_tile.cuh); 128 rows would take more registers than two blocks of a
// multiprocessor have. With rank 0 the sum is empty and only the last part, the epilogue, remains.
#include "kernels.h"
#include "up_tile.cuh"

namespace peftkern {

constexpr int kUpRows = 64;

template <class T>
__global__ void __launch_bounds__(kUpThreads) low_rank_up_kernel(LowRankUp args) {
  __shared__ UpTile<kUpRows> tile;
  __shared__ SwizzledTile<2, kUpColumns> vectors;  // out_scale, bias

  const int64_t column_tiles = (args.columns + kUpColumns - 1) / kUpColumns;
  const int64_t first_column = blockIdx.x % column_tiles * kUpColumns;
  const int64_t first_row = blockIdx.x / column_tiles * kUpRows;
  const int64_t column = first_column + up_chunk() * kChunk, valid = args.columns - column;

  const float* const vector = threadIdx.x < kUpColumns ? args.out_scale : args.bias;
  const int64_t vector_column = first_column + threadIdx.x % kUpColumns;
  static_assert(kUpThreads == 2 * kUpColumns);
  if (vector) {
    vectors.at(threadIdx.x / kUpColumns, threadIdx.x % kUpColumns) =
        vector_column < args.columns ? vector[vector_column] : 0.0f;
  }
  if (args.rank == 0) __syncthreads();  // else the product has barriers

  typename UpTile<kUpRows>::Sums sum = {};
  tile.multiply(args.u + first_row * args.rank, args.rows - first_row, args.rank, args.rank, args.factor, args.columns,
                first_column, sum);
  if (valid <= 0) return;
  const float scale = args.alpha * args.dropout.scale;
  const uint64_t seed = load_seed(args.dropout);
  const bool y_aligned = chunks_aligned(args.y, args.columns * sizeof(T));
  const bool z_aligned = chunks_aligned(args.z, args.columns * sizeof(T));
  Chunk<T> y_chunk[tile.kThreadRows];  // all rows at once: four loads in flight
#pragma unroll
  for (int i = 0; i < tile.kThreadRows; ++i) {
    const int64_t row = first_row + up_row(i);
    y_chunk[i].load(static_cast<const T*>(args.y) + row * args.columns + column,
                    args.accumulate && row < args.rows ? valid : 0, y_aligned);
  }
  float out_scale[kChunk], bias[kChunk];
  if (args.out_scale) vectors.get_chunk(0, up_chunk(), out_scale);
  if (args.bias) vectors.get_chunk(1, up_chunk(), bias);
#pragma unroll
  for (int i = 0; i < tile.kThreadRows; ++i) {
    const int64_t row = first_row + up_row(i);
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
