// SPDX-License-Identifier: Apache-2.0
// ColumnSums of low_rank.h:  out[c] = sum over rows of g[., c] * z[., c], or of g[., c]
//
// Bound by reading g and z once. The work is laid out as reduce.cuh describes.
#include "kernels.h"
#include "reduce.cuh"

namespace peftkern {

constexpr int kRowsInFlight = 4;  // per thread: there is no arithmetic to hide the latency behind

template <class T>
__global__ void __launch_bounds__(kReduceThreads) column_sums_kernel(ColumnSums args) {
  __shared__ PartialSums<1> partial;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kReduceColumns;
  const int64_t column = first_column + threadIdx.x % kChunkLanes * kChunk, valid = args.columns - column;
  const bool g_aligned = chunks_aligned(args.g, args.columns * sizeof(T));
  const bool z_aligned = chunks_aligned(args.z, args.columns * sizeof(T));

  float sum[1][kChunk] = {};
  for (int64_t first = threadIdx.x / kChunkLanes; first < args.rows; first += kRowsInFlight * kRowLanes) {
    Chunk<T> g_chunk[kRowsInFlight], z_chunk[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = first + i * kRowLanes, index = row * args.columns + column;
      g_chunk[i].load(static_cast<const T*>(args.g) + index, row < args.rows ? valid : 0, g_aligned);
      if (args.z) z_chunk[i].load(static_cast<const T*>(args.z) + index, row < args.rows ? valid : 0, z_aligned);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      float g[kChunk], z[kChunk];
      g_chunk[i].to_floats(g);
      if (args.z) z_chunk[i].to_floats(z);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sum[0][j] = args.z ? fmaf(g[j], z[j], sum[0][j]) : sum[0][j] + g[j];
    }
  }
  partial.add_lanes(sum);

  if (threadIdx.x < kReduceColumns && first_column + threadIdx.x < args.columns) {
    args.out[first_column + threadIdx.x] = partial.total(0, threadIdx.x);
  }
}

cudaError_t launch_column_sums(const ColumnSums& args, cudaStream_t stream) {
  // Not skipped without rows: the sums are then zero, and have to be written.
  if (args.columns == 0) return cudaSuccess;
  const int64_t tiles = ceil_div(args.columns, kReduceColumns);
  dispatch(args.g_dtype, [&](auto tag) {
    column_sums_kernel<decltype(tag)><<<static_cast<unsigned>(tiles), kReduceThreads, 0, stream>>>(args);
  });
  return cudaGetLastError();
}

}  // namespace peftkern
