// SPDX-License-Identifier: Apache-2.0
// MultiLoraGrad of multi_low_rank.h:  grad[a] = alpha_a * sum over the entries e of a of u[e]^T drop(x[order[e]])
//
// low_rank_grad.cu for each adapter: a block owns 32 columns and kRanks ranks of one adapter and walks down its rows,
// which are neighbours in u and gathered from x. What is past the adapter's rank, or has no rows, becomes zero.
#include "../nf4.h"
#include "kernels.h"
#include "multi_lora.cuh"
#include "reduce.cuh"

namespace peftkern {

template <class T, int kRanks>
__global__ void __launch_bounds__(kReduceThreads) multi_lora_grad_kernel(MultiLoraGrad args) {
  __shared__ PartialSums<kRanks> partial;
  const int64_t rank_tiles = (args.rank + kRanks - 1) / kRanks;
  const int64_t column_tiles = (args.columns + kReduceColumns - 1) / kReduceColumns;
  const int64_t first_rank = blockIdx.x % rank_tiles * kRanks;
  const int64_t first_column = blockIdx.x / rank_tiles % column_tiles * kReduceColumns;
  const int64_t adapter = blockIdx.x / (rank_tiles * column_tiles);
  const int64_t column = first_column + threadIdx.x % kChunkLanes * kChunk;
  const int64_t rank = rank_of(args.ranks, args.rank, adapter, args.groups.adapters);
  const int64_t last = first_rank < rank ? args.groups.offsets[adapter + 1] : 0;

  const bool x_aligned = chunks_aligned(args.x, args.columns * sizeof(T));
  const bool u_aligned = chunks_aligned(args.u, args.rank * sizeof(float));
  const uint64_t seed = load_seed(args.dropout);
  const T* x_data = static_cast<const T*>(args.x) + column;
  Chunk<T> next_x;
  Chunk<float> next_u[kRanks / kChunk];
  int64_t next_row;
  const auto load = [&](int64_t entry) {
    const bool inside = entry < last;
    next_row = inside ? args.groups.order[entry] : 0;
    next_x.load(x_data + next_row * args.columns, inside ? args.columns - column : 0, x_aligned);
#pragma unroll
    for (int i = 0; i < kRanks / kChunk; ++i) {
      const int64_t at = first_rank + i * kChunk;
      next_u[i].load(args.u + entry * args.rank + at, inside ? rank - at : 0, u_aligned);
    }
  };

  float sum[kRanks][kChunk] = {};
  int64_t entry = args.groups.offsets[adapter] + threadIdx.x / kChunkLanes;
  load(entry);
  for (; entry < last; entry += kRowLanes) {
    float x[kChunk], u[kRanks];
    next_x.to_floats(x);
    const int64_t row = next_row;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) u[r] = next_u[r / kChunk].raw[r % kChunk];
    load(entry + kRowLanes);  // arrives during the work on this row
    drop_chunk(args.dropout, seed, row, column, x);
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sum[r][j] = fmaf(u[r], x[j], sum[r][j]);
    }
  }
  partial.add_lanes(sum);

  const float scale = alpha_of(args.alphas, args.alpha, adapter, args.groups.adapters) * args.dropout.scale;
  const int64_t base = adapter * args.rank * args.columns;
  for (int i = threadIdx.x; i < kRanks * kReduceColumns; i += kReduceThreads) {
    // neighbouring threads write neighbouring memory in either layout
    const int r = args.rank_major ? i / kReduceColumns : i % kRanks;
    const int c = args.rank_major ? i % kReduceColumns : i / kRanks;
    const int64_t at = first_rank + r, grad_column = first_column + c;
    if (at >= args.rank || grad_column >= args.columns) continue;
    const int64_t index = args.rank_major ? at * args.columns + grad_column : grad_column * args.rank + at;
    store_as(args.grad, args.grad_dtype, base + index, at < rank ? scale * partial.total(r, c) : 0.0f);
  }
}

template <class T, int kRanks>
static void launch_tiles(const MultiLoraGrad& args, cudaStream_t stream) {
  const int64_t tiles = ceil_div(args.rank, kRanks) * ceil_div(args.columns, kReduceColumns) * args.groups.adapters;
  multi_lora_grad_kernel<T, kRanks><<<static_cast<unsigned>(tiles), kReduceThreads, 0, stream>>>(args);
}

cudaError_t launch_multi_lora_grad(const MultiLoraGrad& args, cudaStream_t stream) {
  // Not skipped without rows: the gradient is then zero, and has to be written.
  if (args.rank == 0 || args.columns == 0) return cudaSuccess;
  dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    args.rank <= 8 ? launch_tiles<T, 8>(args, stream) : launch_tiles<T, 16>(args, stream);
  });
  return cudaGetLastError();
}

}  // namespace peftkern
