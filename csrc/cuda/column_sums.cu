// SPDX-License-Identifier: Apache-2.0
// out[c] = sum over rows of g[., c] * z[., c], or of g[., c]                                   (ColumnSums in low_rank.h)
//
// Bound by reading g and z once. The work is laid out as reduce.cuh describes.
#include "kernels.h"
#include "reduce.cuh"

namespace peftkern {

template <class T>
__global__ void __launch_bounds__(kReduceThreads) column_sums_kernel(ColumnSums args) {
  __shared__ PartialSums<1> partial;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kReduceColumns;
  const int64_t column = first_column + threadIdx.x % kChunkLanes * kChunk, valid = args.columns - column;
  const bool g_aligned = chunks_aligned(args.g, args.columns * sizeof(T));
  const bool z_aligned = chunks_aligned(args.z, args.columns * sizeof(T));

  float sum[1][kChunk] = {};
#pragma unroll 4  // four rows in flight per thread: there is no arithmetic to hide the latency behind
  for (int64_t row = threadIdx.x / kChunkLanes; row < args.rows; row += kRowLanes) {
    const int64_t index = row * args.columns + column;
    float g[kChunk], z[kChunk] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    load_chunk(static_cast<const T*>(args.g) + index, valid, g_aligned, g);
    if (args.z) load_chunk(static_cast<const T*>(args.z) + index, valid, z_aligned, z);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) sum[0][j] = fmaf(g[j], z[j], sum[0][j]);
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
