// SPDX-License-Identifier: Apache-2.0
// LowRankGrad of low_rank.h:  grad = alpha * u^T drop(x), in the layout and dtype of the factor, and the sums of the
// columns of x, where they are wanted: x is in registers, and a pass of its own would read it again
//
// Bound by reading x, which goes from global memory to registers and there, masked, into the tensor cores (tf32.cuh).
// A block takes 16 kTiles ranks, 128 columns and a slab of the rows, 64 rows a stage:
//
//               columns   0 .. 63     64 .. 127
//   rows 8 s .. 8 s + 7   warp s % 4  warp 4 + s % 4      for the steps s = 0 .. 7 of a stage
//
// In a step lane 4 g + t loads the columns 8 g .. 8 g + 7 of rows t and t + 4: its part of 8 products [ranks, 8 rows] x
// [8 rows, 8 columns], the n-th over the columns n, 8 + n, .. 56 + n. u is split once a block and kept in shared memory
// in the order in which lanes need it. The warps of a column then add up in a fixed order, and so do the slabs.
#include "chunk.cuh"
#include "kernels.h"
#include "parts.cuh"
#include "tf32.cuh"

namespace peftkern {

constexpr int kGradThreads = 256, kGradWarps = kGradThreads / 32;
constexpr int kGradRows = 64, kStepRows = 8, kGradSteps = kGradRows / kStepRows;
constexpr int kRowWarps = 4, kWarpSteps = kGradSteps / kRowWarps;
constexpr int kWarpColumns = 64, kGradColumns = kWarpColumns * kGradWarps / kRowWarps;
constexpr int kTileRanks = 16;
constexpr int64_t kSlabRows = 256;  // fewest: below, the parts of the sum would be more bytes than x is worth
static_assert(kGradSteps == kGradWarps, "a warp loads the u of one step");

// A warp's part of a tile of 16 ranks x 64 columns. The lanes of a store, at ranks g and columns 16 t, touch all banks
// once, as do those of the reads, at neighbouring columns or ranks.
constexpr int kPartFloats = kTileRanks * (kWarpColumns + 2);
__device__ __forceinline__ int part_index(bool rank_major, int rank, int column) {
  return rank_major ? rank * (kWarpColumns + 2) + (column ^ (column >> 5 & 1))
                    : column * kTileRanks + column / 16 * 8 + rank;
}

// The workspace: [slab][grad], then [slab][sums].
__device__ __forceinline__ float* slab_sums(const LowRankGrad& args, int64_t slabs, int64_t slab) {
  return args.workspace + slabs * args.rank * args.columns + slab * args.columns;
}

template <class T, int kTiles>
__global__ void __launch_bounds__(kGradThreads) low_rank_grad_kernel(LowRankGrad args, int64_t slabs) {
  __shared__ union {
    uint4 u[kGradSteps][kTiles][2][32];  // high and low parts
    float part[kGradWarps][kPartFloats];
  } shared;

  const int64_t rank_tiles = (args.rank + kTiles * kTileRanks - 1) / (kTiles * kTileRanks);
  const int64_t column_tiles = (args.columns + kGradColumns - 1) / kGradColumns;
  const int64_t first_rank = blockIdx.x % rank_tiles * (kTiles * kTileRanks);
  const int64_t first_column = blockIdx.x / rank_tiles % column_tiles * kGradColumns;
  const int64_t slab = blockIdx.x / (rank_tiles * column_tiles);
  const int64_t stages = (args.rows + kGradRows - 1) / kGradRows;
  const int64_t first_stage = stages * slab / slabs, last_stage = stages * (slab + 1) / slabs;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row_warp = warp % kRowWarps, column_warp = warp / kRowWarps;
  const int64_t column = first_column + column_warp * kWarpColumns + g * kChunk;

  const bool x_aligned = chunks_aligned(args.x, args.columns * sizeof(T));
  const uint64_t seed = load_seed(args.dropout);
  const T* x_data = static_cast<const T*>(args.x) + column;
  Chunk<T> x[kWarpSteps][2];
  float u[kTiles][4];
  const auto load = [&](int64_t stage) {
    const int64_t first_row = stage * kGradRows;
#pragma unroll
    for (int i = 0; i < kWarpSteps; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + (row_warp + i * kRowWarps) * kStepRows + t + half * 4;
        x[i][half].load(x_data + row * args.columns, row < args.rows ? args.columns - column : 0, x_aligned);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = first_row + warp * kStepRows + t + i / 2 * 4;
        const int64_t rank = first_rank + tile * kTileRanks + g + i % 2 * 8;
        u[tile][i] = row < args.rows && rank < args.rank ? args.u[row * args.rank + rank] : 0.0f;
      }
    }
  };

  float sum[kTiles][kChunk][4] = {};
  // Not of fp32: on sm_90 the registers would leave room for one block instead of two.
  const bool wants_sums = sizeof(T) == 2 && args.sums && first_rank == 0;
  float column_sum[kChunk] = {};
  if (first_stage < last_stage) load(first_stage);
  for (int64_t stage = first_stage; stage < last_stage; ++stage) {
    __syncthreads();  // the u of the stage before is used up
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      Tf32Parts parts[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[i] = split_tf32(u[tile][i]);
      shared.u[warp][tile][0][lane] = make_uint4(parts[0].high, parts[1].high, parts[2].high, parts[3].high);
      shared.u[warp][tile][1][lane] = make_uint4(parts[0].low, parts[1].low, parts[2].low, parts[3].low);
    }
    __syncthreads();
    Chunk<T> now[kWarpSteps][2];
#pragma unroll
    for (int i = 0; i < kWarpSteps; ++i) now[i][0] = x[i][0], now[i][1] = x[i][1];
    if (stage + 1 < last_stage) load(stage + 1);  // arrives during the work on this stage
#pragma unroll
    for (int i = 0; i < kWarpSteps; ++i) {
      const int step = row_warp + i * kRowWarps;
      const int64_t row = stage * kGradRows + step * kStepRows + t;
      drop_chunk(args.dropout, seed, row, column, now[i][0].raw);
      drop_chunk(args.dropout, seed, row + 4, column, now[i][1].raw);
      if (wants_sums) {
#pragma unroll
        for (int n = 0; n < kChunk; ++n) column_sum[n] += to_float(now[i][0].raw[n]) + to_float(now[i][1].raw[n]);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 high = shared.u[step][tile][0][lane], low = shared.u[step][tile][1][lane];
#pragma unroll
        for (int n = 0; n < kChunk; ++n) {
          mma_split<T>(sum[tile][n], high, low, false, split_tf32(now[i][0].raw[n]), split_tf32(now[i][1].raw[n]));
        }
      }
    }
  }

  if (wants_sums) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kChunk; ++n) {
      column_sum[n] += __shfl_xor_sync(0xffffffff, column_sum[n], 1);
      column_sum[n] += __shfl_xor_sync(0xffffffff, column_sum[n], 2);
      if (t == n / 2) shared.part[warp][g * kChunk + n] = column_sum[n];  // all four have it
    }
    __syncthreads();
    const int c = threadIdx.x;
    if (c < kGradColumns && first_column + c < args.columns) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kRowWarps; ++w) total += shared.part[c / kWarpColumns * kRowWarps + w][c % kWarpColumns];
      (slabs > 1 ? slab_sums(args, slabs, slab) : args.sums)[first_column + c] = total;
    }
  }

  const float scale = args.alpha * args.dropout.scale;
  float* workspace = args.workspace + slab * args.rank * args.columns;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kChunk; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared.part[warp][part_index(args.rank_major, g + i / 2 * 8, 16 * t + i % 2 * 8 + n)] = sum[tile][n][i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTileRanks * kGradColumns; i += kGradThreads) {
      // Neighbouring threads write neighbouring elements in either layout.
      const int r = args.rank_major ? i / kGradColumns : i % kTileRanks;
      const int c = args.rank_major ? i % kGradColumns : i / kTileRanks;
      const int64_t rank = first_rank + tile * kTileRanks + r, grad_column = first_column + c;
      if (rank >= args.rank || grad_column >= args.columns) continue;
      const int place = part_index(args.rank_major, r, c % kWarpColumns);
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kRowWarps; ++w) total += shared.part[c / kWarpColumns * kRowWarps + w][place];
      const int64_t index = args.rank_major ? rank * args.columns + grad_column : grad_column * args.rank + rank;
      if (slabs > 1) {
        workspace[index] = total;
      } else {
        store_as(args.grad, args.grad_dtype, index, scale * total);
      }
    }
  }
}

__global__ void __launch_bounds__(kPartThreads) low_rank_grad_sum_kernel(LowRankGrad args, int64_t slabs) {
  const int64_t n = args.rank * args.columns, i = part_element();
  sum_parts(i, args.workspace, slabs, n, args.alpha * args.dropout.scale, args.grad, args.grad_dtype);
  if (args.sums && i >= n)
    sum_parts(i - n, slab_sums(args, slabs, 0), slabs, args.columns, 1.0f, args.sums, DType::f32);
}

// Ranks of a block: 64 would spill.
static int64_t block_ranks(const LowRankGrad& args) { return args.rank <= 16 ? 16 : 32; }

static int64_t block_tiles(const LowRankGrad& args) {
  return ceil_div(args.rank, block_ranks(args)) * ceil_div(args.columns, kGradColumns);
}

static int64_t slab_count(const LowRankGrad& args) { return part_count(block_tiles(args), args.rows / kSlabRows); }

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
  const unsigned blocks = static_cast<unsigned>(block_tiles(args) * slabs);
  dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    if (block_ranks(args) == 16) {
      low_rank_grad_kernel<T, 1><<<blocks, kGradThreads, 0, stream>>>(args, slabs);
    } else {
      low_rank_grad_kernel<T, 2><<<blocks, kGradThreads, 0, stream>>>(args, slabs);
    }
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || slabs == 1) return error;
  const unsigned sums = static_cast<unsigned>(ceil_div(grad_outputs(args), kPartThreads));
  low_rank_grad_sum_kernel<<<sums, kPartThreads, 0, stream>>>(args, slabs);
  return cudaGetLastError();
}

}  // namespace peftkern
