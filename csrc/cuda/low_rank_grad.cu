// SPDX-License-Identifier: Apache-2.0
// LowRankGrad of low_rank.h:  grad = alpha * u^T drop(x), in the layout and dtype of the factor
//
// A block owns 32 columns and kRanks ranks and walks down all rows, its threads side by side (reduce.cuh). A thread
// keeps kRanks x 8 sums in registers and reads x and u straight from global memory: each value feeds 8 or more FMAs,
// the 4 lanes of a row share u in L1, and there is no barrier in the loop.
#include "kernels.h"
#include "reduce.cuh"

namespace peftkern {

template <class T, int kRanks>
__global__ void __launch_bounds__(kReduceThreads) low_rank_grad_kernel(LowRankGrad args) {
  __shared__ PartialSums<kRanks> partial;
  const int64_t rank_tiles = (args.rank + kRanks - 1) / kRanks;
  const int64_t first_rank = blockIdx.x % rank_tiles * kRanks;
  const int64_t first_column = blockIdx.x / rank_tiles * kReduceColumns;
  const int64_t column = first_column + threadIdx.x % kChunkLanes * kChunk;

  const bool x_aligned = chunks_aligned(args.x, args.columns * sizeof(T));
  const bool u_aligned = chunks_aligned(args.u, args.rank * sizeof(float));
  const uint64_t seed = load_seed(args.dropout);
  const T* x_data = static_cast<const T*>(args.x) + column;
  Chunk<T> next_x;
  Chunk<float> next_u[kRanks / kChunk];
  const auto load = [&](int64_t row) {
    const bool inside = row < args.rows;
    next_x.load(x_data + row * args.columns, inside ? args.columns - column : 0, x_aligned);
#pragma unroll
    for (int i = 0; i < kRanks / kChunk; ++i) {
      const int64_t rank = first_rank + i * kChunk;
      next_u[i].load(args.u + row * args.rank + rank, inside ? args.rank - rank : 0, u_aligned);
    }
  };

  float sum[kRanks][kChunk] = {};
  int64_t row = threadIdx.x / kChunkLanes;
  load(row);
  for (; row < args.rows; row += kRowLanes) {
    float x[kChunk], u[kRanks];
    next_x.to_floats(x);
#pragma unroll
    for (int r = 0; r < kRanks; ++r) u[r] = next_u[r / kChunk].raw[r % kChunk];
    load(row + kRowLanes);  // arrives during the work on this row
    drop_chunk(args.dropout, seed, row, column, x);
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sum[r][j] = fmaf(u[r], x[j], sum[r][j]);
    }
  }
  partial.add_lanes(sum);

  const float scale = args.alpha * args.dropout.scale;
  for (int i = threadIdx.x; i < kRanks * kReduceColumns; i += kReduceThreads) {
    // Neighbouring threads write neighbouring elements in either layout.
    const int r = args.rank_major ? i / kReduceColumns : i % kRanks;
    const int c = args.rank_major ? i % kReduceColumns : i / kRanks;
    const int64_t rank = first_rank + r, grad_column = first_column + c;
    if (rank >= args.rank || grad_column >= args.columns) continue;
    const int64_t index = args.rank_major ? rank * args.columns + grad_column : grad_column * args.rank + rank;
    store_as(args.grad, args.grad_dtype, index, scale * partial.total(r, c));
  }
}

template <class T, int kRanks>
static void launch_tiles(const LowRankGrad& args, cudaStream_t stream) {
  const int64_t tiles = ceil_div(args.rank, kRanks) * ceil_div(args.columns, kReduceColumns);
  low_rank_grad_kernel<T, kRanks><<<static_cast<unsigned>(tiles), kReduceThreads, 0, stream>>>(args);
}

cudaError_t launch_low_rank_grad(const LowRankGrad& args, cudaStream_t stream) {
  // Not skipped without rows: the gradient is then zero, and has to be written.
  if (args.rank == 0 || args.columns == 0) return cudaSuccess;
  dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    args.rank <= 8 ? launch_tiles<T, 8>(args, stream) : launch_tiles<T, 16>(args, stream);
  });
  return cudaGetLastError();
}

}  // namespace peftkern
