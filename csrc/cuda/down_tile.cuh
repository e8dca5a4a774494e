// SPDX-License-Identifier: Apache-2.0
// The product drop(x) F^T of a tile of rows x 16 kTiles ranks, over a range of columns, by a block of 256 threads
//
// x goes from global memory to registers and there, masked, into the tensor cores (tf32.cuh). A warp takes 16 rows.
// Where there are fewer than 128, warps share rows, and take turns in the columns.
//
//   a group:   lane 4 g + t loads the columns 8 t .. 8 t + 7 of rows g and 8 + g: two Philox calls, and its part of 4
//              products [ranks, 8 columns] x [8 columns, 8 rows] for each of the two; the s-th is over the columns 2 s,
//              2 s + 1, 8 + 2 s, .. 24 + 2 s + 1, in F as in x
//   a stage of 8 / kTiles groups:   every warp loads F for 16 ranks of a group, splits it and puts it into shared
//              memory in the order in which lanes need it
//
// The products are [ranks, rows]: so a tile of 8 rows is enough for a small batch. Neighbouring blocks may share the
// columns (parts.cuh).
#pragma once
#include "../low_rank.h"
#include "../nf4.h"
#include "chunk.cuh"
#include "parts.cuh"
#include "tf32.cuh"

namespace peftkern {

constexpr int kDownThreads = 256, kDownWarps = kDownThreads / 32;
constexpr int kTileRows = 8, kWarpTiles = 2;
constexpr int kWarpRows = kTileRows * kWarpTiles, kDownRows = kWarpRows * kDownWarps;
constexpr int kGroupColumns = 32, kGroupSteps = 4;
constexpr int kTurnGroups = 2;         // of a warp at once: with half of that in flight it would wait
constexpr int64_t kPartColumns = 256;  // of the parts of blocks that share columns: multiples of this; whole stages

// The columns of one of `parts` parts.
struct DownPart {
  int64_t first, last;

  __device__ __forceinline__ DownPart(int64_t columns, int64_t part, int64_t parts) {
    const int64_t units = (columns + kPartColumns - 1) / kPartColumns;
    first = units * part / parts * kPartColumns;
    last = min(units * (part + 1) / parts * kPartColumns, columns);
  }
};

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

  // Of F's `ranks` ranks only the first `used` count; the others become 0 and are never touched.
  __device__ __forceinline__ void load(const Factor& factor, int64_t ranks, int64_t used, int64_t columns,
                                       int64_t first_rank, int64_t first_column) {
    const int lane = threadIdx.x % 32;
    const int64_t rank0 = first_rank + tile() * kTileRanks, column0 = first_column + group() * kGroupColumns;
    const int64_t stride = factor.rank_major ? columns : ranks;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t rank = rank0 + (factor.rank_major ? lane / 4 : 0) + half * 8;
      const int64_t column = column0 + (factor.rank_major ? lane % 4 * kChunk : lane);
      const int64_t index = factor.rank_major ? rank * columns + column : column * ranks + rank;
      const bool inside = rank < used && column < columns;
      const int64_t valid = !inside ? 0 : factor.rank_major ? columns - column : used - rank;
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

// How the warps share a tile: 2^rows_log2 of them have rows of their own.
struct DownWarps {
  int rows_log2;

  // The first row of this warp, and of those that its lane 4 g + t reads, g and 8 + g.
  __device__ __forceinline__ int row() const { return (threadIdx.x / 32 & ((1 << rows_log2) - 1)) * kWarpRows; }
  __device__ __forceinline__ int lane_row() const { return row() + threadIdx.x % 32 / 4; }
  // The place of this warp among those of the same rows, and their number.
  __device__ __forceinline__ int turn() const { return rows_log2 == 3 ? 0 : threadIdx.x / 32 >> rows_log2; }
  __device__ __forceinline__ int turns() const { return kDownWarps >> rows_log2; }
};

template <class T, int kTiles>
struct DownTile {
  static constexpr int kRanks = kTiles * kTileRanks;
  static constexpr int kGroups = SplitFactor<kTiles>::kGroups, kStageColumns = kGroups * kGroupColumns;
  static_assert(kPartColumns % kStageColumns == 0);
  using Sums = float[kTiles][kWarpTiles][4];

  union {
    SplitFactor<kTiles> factor;
    float part[kDownRows * kRanks];
  };

  // For so many rows; a stage has turns for so many warps.
  __device__ __forceinline__ static DownWarps warps(int64_t rows) {
    return {rows > 64 || kGroups == 1 * kTurnGroups ? 3 : rows > 32 || kGroups == 2 * kTurnGroups ? 2 : 1};
  }

  // sum += drop(x) F^T. Rows says where the lane's two rows are: none() if the whole warp has none, and for both
  // inside(i), data(i) and, to mask it, number(i). Of F's `ranks` ranks the first `used` count. All threads take part.
  template <class Rows>
  __device__ __forceinline__ void multiply(const DownWarps& warps, const Rows& rows, const Dropout& dropout,
                                           bool x_aligned, const Factor& source, int64_t ranks, int64_t used,
                                           int64_t columns, int64_t first_rank, const DownPart& part, Sums& sum) {
    const int t = threadIdx.x % 4;
    const bool exact = source.dtype != DType::f32;  // TF32 holds the factor: its low parts are zero
    const uint64_t seed = load_seed(dropout);
    Chunk<T> x[kTurnGroups][kWarpTiles];
    const auto load = [&](int64_t column) {
#pragma unroll
      for (int group = 0; group < kTurnGroups; ++group, column += kGroupColumns) {
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) {
          x[group][i].load(rows.data(i) + t * kChunk + column, rows.inside(i) ? part.last - column - t * kChunk : 0,
                           x_aligned);
        }
      }
    };

    FactorShare<kTiles> share;
    share.load(source, ranks, used, columns, first_rank, part.first);
    load(part.first + warps.turn() * kTurnGroups * kGroupColumns);
    for (int64_t stage = part.first; stage < part.last; stage += kStageColumns) {
      __syncthreads();  // the F of the stage before is used up
      share.store(source.rank_major, factor);
      __syncthreads();
      if (stage + kStageColumns < part.last) {
        share.load(source, ranks, used, columns, first_rank, stage + kStageColumns);
      }
      if (rows.none()) continue;
#pragma unroll 1
      for (int first = warps.turn() * kTurnGroups; first < kGroups; first += warps.turns() * kTurnGroups) {
        const int64_t column = stage + first * kGroupColumns;
        Chunk<T> now[kTurnGroups][kWarpTiles];
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) now[0][i] = x[0][i], now[1][i] = x[1][i];
        load(column + warps.turns() * kTurnGroups * kGroupColumns);  // arrives during the work on these
#pragma unroll
        for (int group = 0; group < kTurnGroups; ++group) {
#pragma unroll
          for (int i = 0; i < kWarpTiles; ++i) {
            drop_chunk(dropout, seed, rows.number(i), column + group * kGroupColumns + t * kChunk, now[group][i].raw);
          }
        }
        if (exact) {
          add_products<true>(now, first, sum);
        } else {
          add_products<false>(now, first, sum);
        }
      }
    }
  }

  // each(row, rank of the tile, total) for the first `rows` rows, where the sums of warps of the same rows meet, and,
  // each times scale, those of the cluster's blocks; if no block of it made any, zeros. All threads take part.
  template <class Each>
  __device__ __forceinline__ void for_each_total(const Sums& sum, const DownWarps& warps, float scale, int rows,
                                                 bool nothing, const Each& each) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp_row = threadIdx.x / 32 * kWarpRows;
    if (!nothing) {
      __syncthreads();  // the last F is used up
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            part[place(warp_row + i * kTileRows + 2 * t + j % 2, tile * kTileRanks + g + j / 2 * 8)] = sum[tile][i][j];
          }
        }
      }
      cluster_sync();
    }
    const ClusterShare share(rows, kRanks < 32 ? 32 / kRanks : 1);
    const int rank = threadIdx.x % kRanks;
    for (unsigned row = share.first + threadIdx.x / kRanks; row < share.last; row += kDownThreads / kRanks) {
      const auto of_block = [&](const auto& block) {
        float total = 0.0f;
        for (int turn = 0; turn < warps.turns(); ++turn) {
          total += block(part[place((turn << warps.rows_log2) * kWarpRows + row, rank)]);
        }
        return scale * total;
      };
      each(row, rank, nothing ? 0.0f : sum_of_cluster(of_block));
    }
    if (!nothing) cluster_sync();  // all have read
  }

 private:
  // Of a turn, from this group on.
  template <bool kExact>
  __device__ __forceinline__ void add_products(const Chunk<T> (&x)[kTurnGroups][kWarpTiles], int first,
                                               Sums& sum) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int group = 0; group < kTurnGroups; ++group) {
#pragma unroll
      for (int step = 0; step < kGroupSteps; ++step) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint4 high = factor.get(0, first + group, step, tile, lane);
          const uint4 low = kExact ? high : factor.get(1, first + group, step, tile, lane);
#pragma unroll
          for (int i = 0; i < kWarpTiles; ++i) {
            mma_split<T>(sum[tile][i], high, low, kExact, split_tf32(x[group][i].raw[2 * step]),
                         split_tf32(x[group][i].raw[2 * step + 1]));
          }
        }
      }
    }
  }

  // Without padding, and no bank is asked twice by the lanes of a store, at ranks g of rows 2 t, nor by 32 neighbours.
  __device__ static int place(int row, int rank) { return (row * kRanks + rank) ^ row / 2 % 4 * 8; }
};

}  // namespace peftkern
