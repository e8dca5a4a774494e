// SPDX-License-Identifier: Apache-2.0
// LowRankDown of low_rank.h:  out = alpha * drop(x) F^T
//
// Bound by reading x, which goes from global memory to registers and there, masked, into the tensor cores (tf32.cuh). A
// block takes 128 rows, 16 for each warp, 16 kTiles ranks and a part of the columns, so F is read once for 128 rows.
//
//   a group of 32 columns:   lane 4 g + t loads the columns 8 t .. 8 t + 7 of rows g and 8 + g: two Philox calls, and
//                            its part of 4 products [ranks, 8 columns] x [8 columns, 8 rows] for each of the two; the
//                            s-th is over the columns 2 s, 2 s + 1, 8 + 2 s, .. 24 + 2 s + 1, in F as in x
//   a stage of 8 / kTiles groups:   every warp loads F for 16 ranks of a group, splits it and puts it into shared
//   memory
//                            in the order in which lanes need it
//
// The products are [ranks, rows]: so a tile of 8 rows is enough for a small batch. With few rows, blocks share the
// columns and a second kernel adds their parts.
#include "../nf4.h"
#include "grid_dependency.cuh"
#include "kernels.h"
#include "parts.cuh"
#include "tf32.cuh"
#include "tile.cuh"

namespace peftkern {

constexpr int kDownThreads = 256, kDownWarps = kDownThreads / 32;
constexpr int kTileRanks = 16, kTileRows = 8, kWarpTiles = 2;
constexpr int kWarpRows = kTileRows * kWarpTiles, kDownRows = kWarpRows * kDownWarps;
constexpr int kGroupColumns = 32, kGroupSteps = 4;
constexpr int64_t kPartColumns = 256;  // of the parts of blocks that share columns: multiples of this; whole stages

// F of a stage, split. A lane reads the 16 bytes of its place in [high or low][group][step][tile]; the padding keeps
// the stores of a column-major F, 8 bytes a lane, off each other's banks.
template <int kTiles>
struct SplitFactor {
  static constexpr int kGroups = kDownWarps / kTiles;
  static constexpr int kStepFloats = kTiles * 32 * 4 + 8;
  alignas(16) uint32_t data[2][kGroups][kGroupSteps][kStepFloats];

  __device__ __forceinline__ uint4 get(int part, int group, int step, int tile, int lane) const {
    return *reinterpret_cast<const uint4*>(&data[part][group][step][(tile * 32 + lane) * 4]);
  }
};

// A lane's share of a stage on its way there: two chunks of a group's 32 columns x 16 ranks, either the 8 columns of
// ranks g and g + 8, or all ranks of one column.
template <int kTiles>
struct FactorShare {
  float v[2][kChunk];

  __device__ __forceinline__ void load(const LowRankDown& args, int64_t first_rank, int64_t first_column) {
    const Factor& factor = args.factor;
    const int lane = threadIdx.x % 32;
    const int64_t rank0 = first_rank + tile() * kTileRanks, column0 = first_column + group() * kGroupColumns;
    const int64_t stride = factor.rank_major ? args.columns : args.rank;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t rank = rank0 + (factor.rank_major ? lane / 4 : 0) + half * 8;
      const int64_t column = column0 + (factor.rank_major ? lane % 4 * kChunk : lane);
      const int64_t index = factor.rank_major ? rank * args.columns + column : column * args.rank + rank;
      const bool inside = rank < args.rank && column < args.columns;
      const int64_t valid = !inside ? 0 : factor.rank_major ? args.columns - column : args.rank - rank;
      device_dispatch(factor.dtype, [&](auto tag) {
        using F = decltype(tag);
        load_chunk(static_cast<const F*>(factor.data) + index, valid, chunks_aligned(factor.data, stride * sizeof(F)),
                   v[half]);
      });
    }
  }

  __device__ __forceinline__ void store(bool rank_major, SplitFactor<kTiles>& target) const {
    const int lane = threadIdx.x % 32;
    Tf32Parts parts[2][kChunk];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) parts[half][j] = split_tf32(v[half][j]);
    }
    auto& high = target.data[0][group()];
    auto& low = target.data[1][group()];
    if (rank_major) {
#pragma unroll
      for (int step = 0; step < kGroupSteps; ++step) {
        const Tf32Parts &a = parts[0][2 * step], &b = parts[1][2 * step];
        const Tf32Parts &c = parts[0][2 * step + 1], &d = parts[1][2 * step + 1];
        const int place = (tile() * 32 + lane) * 4;
        *reinterpret_cast<uint4*>(&high[step][place]) = make_uint4(a.high, b.high, c.high, d.high);
        *reinterpret_cast<uint4*>(&low[step][place]) = make_uint4(a.low, b.low, c.low, d.low);
      }
    } else {
      const int step = lane % kChunk / 2;
#pragma unroll
      for (int g = 0; g < 8; ++g) {
        const int place = (tile() * 32 + g * 4 + lane / kChunk) * 4 + lane % 2 * 2;
        *reinterpret_cast<uint2*>(&high[step][place]) = make_uint2(parts[0][g].high, parts[1][g].high);
        *reinterpret_cast<uint2*>(&low[step][place]) = make_uint2(parts[0][g].low, parts[1][g].low);
      }
    }
  }

 private:
  __device__ static int tile() { return threadIdx.x / 32 % kTiles; }
  __device__ static int group() { return threadIdx.x / 32 / kTiles; }
};

// At least 1 block: else ptxas aims at 128 registers on sm_120, and spills.
template <class T, int kTiles>
__global__ void __launch_bounds__(kDownThreads, 1) low_rank_down_kernel(LowRankDown args, int64_t parts) {
  constexpr int kGroups = SplitFactor<kTiles>::kGroups, kStageColumns = kGroups * kGroupColumns;
  static_assert(kPartColumns % kStageColumns == 0);
  __shared__ SplitFactor<kTiles> shared;
  let_next_launch_start();

  const int64_t rank_tiles = (args.rank + kTiles * kTileRanks - 1) / (kTiles * kTileRanks);
  const int64_t first_rank = blockIdx.x % rank_tiles * (kTiles * kTileRanks);
  const int64_t part = blockIdx.x / rank_tiles % parts;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first_row = blockIdx.x / (rank_tiles * parts) * kDownRows + warp * kWarpRows;
  const int64_t units = (args.columns + kPartColumns - 1) / kPartColumns;
  const int64_t first_column = units * part / parts * kPartColumns;
  const int64_t last_column = min(units * (part + 1) / parts * kPartColumns, args.columns);

  const bool x_aligned = chunks_aligned(args.x, args.columns * sizeof(T));
  const bool exact = args.factor.dtype != DType::f32;  // TF32 holds the factor: its low parts are zero
  const uint64_t seed = load_seed(args.dropout);
  const T* x_data = static_cast<const T*>(args.x) + (first_row + g) * args.columns + t * kChunk;
  Chunk<T> x[2][kWarpTiles];  // two groups: with half of that in flight a warp would wait
  const auto load = [&](int64_t column) {
#pragma unroll
    for (int group = 0; group < 2; ++group, column += kGroupColumns) {
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        const bool inside = first_row + g + i * kTileRows < args.rows;
        x[group][i].load(x_data + i * kTileRows * args.columns + column, inside ? last_column - column - t * kChunk : 0,
                         x_aligned);
      }
    }
  };

  FactorShare<kTiles> factor;
  float sum[kTiles][kWarpTiles][4] = {};
  factor.load(args, first_rank, first_column);
  load(first_column);
  for (int64_t stage = first_column; stage < last_column; stage += kStageColumns) {
    __syncthreads();  // the F of the stage before is used up
    factor.store(args.factor.rank_major, shared);
    __syncthreads();
    if (stage + kStageColumns < last_column) factor.load(args, first_rank, stage + kStageColumns);
    if (first_row >= args.rows) continue;
#pragma unroll 1
    for (int pair = 0; pair < kGroups; pair += 2) {
      const int64_t column = stage + pair * kGroupColumns;
      Chunk<T> now[2][kWarpTiles];
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) now[0][i] = x[0][i], now[1][i] = x[1][i];
      load(column + 2 * kGroupColumns);  // arrives during the work on these
#pragma unroll
      for (int group = 0; group < 2; ++group) {
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
          drop_chunk(args.dropout, seed, first_row + g + i * kTileRows, column + group * kGroupColumns + t * kChunk,
                     now[group][i].raw);
        }
#pragma unroll
        for (int step = 0; step < kGroupSteps; ++step) {
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint4 high = shared.get(0, pair + group, step, tile, lane);
            const uint4 low = exact ? high : shared.get(1, pair + group, step, tile, lane);
#pragma unroll
            for (int i = 0; i < kWarpTiles; ++i) {
              mma_split<T>(sum[tile][i], high, low, exact, split_tf32(now[group][i].raw[2 * step]),
                           split_tf32(now[group][i].raw[2 * step + 1]));
            }
          }
        }
      }
    }
  }

  const float scale = parts > 1 ? 1.0f : args.alpha * args.dropout.scale;
  float* out = parts > 1 ? args.workspace + part * args.rows * args.rank : args.out;
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first_row + i * kTileRows + 2 * t + j % 2;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int64_t rank = first_rank + tile * kTileRanks + g + j / 2 * 8;
        if (row < args.rows && rank < args.rank) out[row * args.rank + rank] = scale * sum[tile][i][j];
      }
    }
  }
}

__global__ void __launch_bounds__(kPartThreads) low_rank_down_sum_kernel(LowRankDown args, int64_t parts) {
  let_next_launch_start();
  sum_parts(part_element(), args.workspace, parts, args.rows * args.rank, args.alpha * args.dropout.scale, args.out,
            DType::f32);
}

static int64_t block_ranks(const LowRankDown& args) { return args.rank <= 16 ? 16 : args.rank <= 32 ? 32 : 64; }

static int64_t block_tiles(const LowRankDown& args) {
  return ceil_div(args.rank, block_ranks(args)) * ceil_div(args.rows, kDownRows);
}

static int64_t down_parts(const LowRankDown& args) {
  return part_count(block_tiles(args), ceil_div(args.columns, kPartColumns));
}

int64_t low_rank_down_workspace(const LowRankDown& args) {
  const int64_t parts = down_parts(args);
  return parts > 1 ? parts * args.rows * args.rank : 0;
}

cudaError_t launch_low_rank_down(const LowRankDown& args, cudaStream_t stream) {
  if (args.rows == 0 || args.rank == 0) return cudaSuccess;
  const int64_t parts = down_parts(args);
  if (parts > 1 && !args.workspace) return cudaErrorInvalidValue;
  const unsigned blocks = static_cast<unsigned>(block_tiles(args) * parts);
  dispatch(args.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    switch (block_ranks(args)) {
      case 16: low_rank_down_kernel<T, 1><<<blocks, kDownThreads, 0, stream>>>(args, parts); break;
      case 32: low_rank_down_kernel<T, 2><<<blocks, kDownThreads, 0, stream>>>(args, parts); break;
      default: low_rank_down_kernel<T, 4><<<blocks, kDownThreads, 0, stream>>>(args, parts);
    }
  });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || parts == 1) return error;
  const unsigned sums = static_cast<unsigned>(ceil_div(args.rows * args.rank, kPartThreads));
  low_rank_down_sum_kernel<<<sums, kPartThreads, 0, stream>>>(args, parts);
  return cudaGetLastError();
}

}  // namespace peftkern
