// SPDX-License-Identifier: Apache-2.0
// MultiLoraUp of multi_low_rank.h:  y[order[e]] += alpha_a * mask(u[e] F_a), in place
//
// low_rank_up.cu over scattered rows: a block makes a tile of up to 32 entries of one adapter x 128 columns. A row
// belongs to one adapter, so y is read and written once, by one thread an element, and rows without adapter are not
// touched.
#include "../nf4.h"
#include "kernels.h"
#include "multi_lora.cuh"
#include "up_tile.cuh"

namespace peftkern {

constexpr int kUpRows = static_cast<int>(kRowTile);

// At least 3 blocks: else ptxas aims at 4 on sm_120, and spills.
template <class T>
__global__ void __launch_bounds__(kUpThreads, 3) multi_lora_up_kernel(MultiLoraUp args) {
  __shared__ UpTile<kUpRows> tile;

  const int64_t column_tiles = (args.columns + kUpColumns - 1) / kUpColumns;
  const int64_t first_column = blockIdx.x % column_tiles * kUpColumns;
  const RowTile rows(args.groups, blockIdx.x / column_tiles);
  if (rows.adapter < 0) return;
  const int64_t rank = rank_of(args.factors.ranks, args.rank, rows.adapter, args.groups.adapters);
  if (rank == 0) return;  // no adapter, or an empty one
  const Factor source = factor_of(args.factors, rows.adapter, args.rank, args.columns);

  typename UpTile<kUpRows>::Sums sum = {};
  tile.multiply(args.u + rows.first * args.rank, rows.last - rows.first, args.rank, rank, source, args.columns,
                first_column, sum);

  const int64_t column = first_column + up_chunk() * kChunk, valid = args.columns - column;
  if (valid <= 0) return;
  const float scale = alpha_of(args.alphas, args.alpha, rows.adapter, args.groups.adapters) * args.dropout.scale;
  const uint64_t seed = load_seed(args.dropout);
  const bool y_aligned = chunks_aligned(args.y, args.columns * sizeof(T));
  int64_t row[tile.kThreadRows];
  Chunk<T> y_chunk[tile.kThreadRows];  // all rows at once, so that the loads are in flight together
#pragma unroll
  for (int i = 0; i < tile.kThreadRows; ++i) {
    const int64_t entry = rows.first + up_row(i);
    row[i] = entry < rows.last ? args.groups.order[entry] : -1;
    y_chunk[i].load(static_cast<const T*>(args.y) + row[i] * args.columns + column, row[i] >= 0 ? valid : 0, y_aligned);
  }
#pragma unroll
  for (int i = 0; i < tile.kThreadRows; ++i) {
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
  const int64_t tiles = ceil_div(args.columns, kUpColumns) * most_row_tiles(args.groups);
  dispatch(args.y_dtype, [&](auto tag) {
    multi_lora_up_kernel<decltype(tag)><<<static_cast<unsigned>(tiles), kUpThreads, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace peftkern
