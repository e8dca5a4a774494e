// SPDX-License-Identifier: Apache-2.0
// LowRankGrad of low_rank.h:  grad = alpha * u^T drop(x), in the layout and dtype of the factor, and the sums of the
// columns of x, where they are wanted: x is in registers, and a pass of its own would read it again
//
// Bound by reading x. A block takes 16 kTiles ranks, 128 columns and a slab of the rows (grad_tile.cuh). Neighbouring
// blocks have the slabs of a sum (parts.cuh).
#include "grad_tile.cuh"
#include "kernels.h"
#include "parts.cuh"

namespace peftkern {

// The workspace: [part][grad], then [part][sums].
__device__ __forceinline__ float* part_sums(const LowRankGrad& args, int64_t parts, int64_t part) {
  return args.workspace + parts * args.rank * args.columns + part * args.columns;
}

// Rows of u and x are the same.
struct SameRows {
  __device__ __forceinline__ void next(int64_t) const {}
  __device__ __forceinline__ int64_t number(int64_t row) const { return row; }
};

// Two blocks on a multiprocessor where that takes no spills. ptxas left alone tries it for fp32, too, and spills.
template <class T, int kTiles>
__global__ void __launch_bounds__(kGradThreads, sizeof(T) == 2 && kTiles == 1 ? 2 : 1)
    low_rank_grad_kernel(LowRankGrad args, int64_t slabs) {
  using Tile = GradTile<T, kTiles>;
  __shared__ Tile shared;

  const int64_t rank_tiles = (args.rank + Tile::kRanks - 1) / Tile::kRanks;
  const int64_t slab = blockIdx.x % slabs;
  const int64_t first_rank = blockIdx.x / slabs % rank_tiles * Tile::kRanks;
  const int64_t first_column = blockIdx.x / (slabs * rank_tiles) * kGradColumns;
  const int64_t stages = (args.rows + kGradRows - 1) / kGradRows;
  const int64_t first_row = stages * slab / slabs * kGradRows;
  const int64_t last_row = min(stages * (slab + 1) / slabs * kGradRows, args.rows);

  // Not of fp32: on sm_90 the registers would leave room for one block instead of two.
  const bool wants_sums = sizeof(T) == 2 && args.sums && first_rank == 0;
  float column_sum[kChunk] = {};
  typename Tile::Sums sum = {};
  SameRows rows;
  shared.multiply(rows, args.dropout, static_cast<const T*>(args.x), args.columns, first_column, args.u, args.rank,
                  args.rank, first_rank, first_row, last_row, sum, [&](const Chunk<T>& a, const Chunk<T>& b) {
                    if (wants_sums) {
#pragma unroll
                      for (int n = 0; n < kChunk; ++n) column_sum[n] += to_float(a.raw[n]) + to_float(b.raw[n]);
                    }
                  });

  const PartMade made(slab, slabs);
  if (wants_sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kChunk; ++n) {
      column_sum[n] += __shfl_xor_sync(0xffffffff, column_sum[n], 1);
      column_sum[n] += __shfl_xor_sync(0xffffffff, column_sum[n], 2);
      if (t == n / 2) shared.part[warp][g * kChunk + n] = column_sum[n];  // all four have it
    }
    cluster_sync();
    const ClusterShare share(kGradColumns);
    const unsigned c = share.first + threadIdx.x;
    if (c < share.last && first_column + c < args.columns) {
      const float total =
          Tile::total_of(c, 1.0f, [&](int w, const auto& block) { return block(shared.part[w][c % kWarpColumns]); });
      (made.is_all() ? args.sums : part_sums(args, made.left, made.index))[first_column + c] = total;
    }
  }

  float* workspace = args.workspace + made.index * args.rank * args.columns;
  shared.for_each_total(sum, args.rank_major, args.rank - first_rank, args.columns - first_column,
                        args.alpha * args.dropout.scale, false, [&](int r, int c, float total) {
                          const int64_t rank = first_rank + r, column = first_column + c;
                          const int64_t index =
                              args.rank_major ? rank * args.columns + column : column * args.rank + rank;
                          if (made.is_all()) {
                            store_as(args.grad, args.grad_dtype, index, total);
                          } else {
                            workspace[index] = total;
                          }
                        });
}

__global__ void __launch_bounds__(kPartThreads) low_rank_grad_sum_kernel(LowRankGrad args, PartsLeft left) {
  const int64_t n = args.rank * args.columns, i = part_element();
  sum_parts(i, args.workspace, left, n, args.grad, args.grad_dtype);
  if (args.sums && i >= n) {
    sum_parts(i - n, part_sums(args, left.parts, 0), left, args.columns, args.sums, DType::f32);
  }
}

// Ranks of a block: 64 would spill.
static int64_t block_ranks(const LowRankGrad& args) { return args.rank <= 16 ? 16 : 32; }

static int64_t block_tiles(const LowRankGrad& args) {
  return ceil_div(args.rank, block_ranks(args)) * ceil_div(args.columns, kGradColumns);
}

static int64_t slab_count(const LowRankGrad& args) { return part_count(block_tiles(args), args.rows); }

static int64_t grad_outputs(const LowRankGrad& args) { return (args.rank + (args.sums ? 1 : 0)) * args.columns; }

int64_t low_rank_grad_workspace(const LowRankGrad& args) {
  const int64_t slabs = slab_count(args);
  return slabs > 1 ? slabs * grad_outputs(args) : 0;
}

cudaError_t launch_low_rank_grad(const LowRankGrad& args, cudaStream_t stream) {
  // Not skipped without rows: the gradient is then zero, and has to be written.
  if (args.rank == 0 || args.columns == 0) return cudaSuccess;
  const int64_t slabs = slab_count(args);
  if ((slabs > 1 && !args.workspace) || (args.sums && args.x_dtype == DType::f32)) return cudaErrorInvalidValue;
  const Launch launch = {static_cast<unsigned>(block_tiles(args) * slabs), kGradThreads, stream};
  PartsLeft left(slabs);
  const cudaError_t error = dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    return block_ranks(args) == 16 ? launch_kernel(low_rank_grad_kernel<T, 1>, launch, left, args, slabs)
                                   : launch_kernel(low_rank_grad_kernel<T, 2>, launch, left, args, slabs);
  });
  if (error != cudaSuccess || left.parts == 1) return error;
  const unsigned sums = static_cast<unsigned>(ceil_div(grad_outputs(args), kPartThreads));
  low_rank_grad_sum_kernel<<<sums, kPartThreads, 0, stream>>>(args, left);
  return cudaGetLastError();
}

}  // namespace peftkern
