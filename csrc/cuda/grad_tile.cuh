// SPDX-License-Identifier: Apache-2.0
// The product u^T drop(x) of 16 kTiles ranks x 128 columns, over a range of rows, by a block of 256 threads
//
// x goes from global memory to registers and there, masked, into the tensor cores (tf32.cuh). The block walks down the
// rows, 64 a stage:
//
//               columns   0 .. 63     64 .. 127
//   rows 8 s .. 8 s + 7   warp s % 4  warp 4 + s % 4      for the steps s = 0 .. 7 of a stage
//
// In a step lane 4 g + t loads the columns 8 g .. 8 g + 7 of rows t and t + 4: its part of 8 products [ranks, 8 rows] x
// [8 rows, 8 columns], the n-th over the columns n, 8 + n, .. 56 + n. u is split once a block and kept in shared memory
// in the order in which lanes need it. The warps of a column, and the blocks of a cluster, then add up in a fixed
// order.
#pragma once
#include "chunk.cuh"
#include "cluster.cuh"
#include "tf32.cuh"

namespace peftkern {

constexpr int kGradThreads = 256, kGradWarps = kGradThreads / 32;
constexpr int kGradRows = 64, kStepRows = 8, kGradSteps = kGradRows / kStepRows;
constexpr int kRowWarps = 4, kWarpSteps = kGradSteps / kRowWarps;
constexpr int kWarpColumns = 64, kGradColumns = kWarpColumns * kGradWarps / kRowWarps;
static_assert(kGradSteps == kGradWarps, "a warp loads the u of one step");

template <class T, int kTiles>
struct GradTile {
  static constexpr int kRanks = kTiles * kTileRanks;
  // A warp's part of a tile of 16 ranks x 64 columns.
  static constexpr int kPartFloats = kTileRanks * (kWarpColumns + 2);
  using Sums = float[kTiles][kChunk][4];

  union {
    uint4 u[kGradSteps][kTiles][2][32];  // high and low parts
    float part[kGradWarps][kPartFloats];
  };

  // sum += u^T drop(x) over the rows first .. last - 1 of `from`, [., ranks], of whose ranks those below `used` count.
  // Rows says which row of x belongs to one of u: number(row), asked for after next(stage) for the stage before, with
  // barriers around it. also(a, b) is given all of x, masked. All threads take part.
  template <class Rows, class Also>
  __device__ __forceinline__ void multiply(Rows& rows, const Dropout& dropout, const T* x_base, int64_t columns,
                                           int64_t first_column, const float* from, int64_t ranks, int64_t used,
                                           int64_t first_rank, int64_t first, int64_t last, Sums& sum,
                                           const Also& also) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp % kRowWarps, column_warp = warp / kRowWarps;
    const int64_t column = first_column + column_warp * kWarpColumns + g * kChunk;

    const bool x_aligned = chunks_aligned(x_base, columns * sizeof(T));
    const uint64_t seed = load_seed(dropout);
    const T* x_data = x_base + column;
    Chunk<T> x[kWarpSteps][2];
    float v[kTiles][4];
    const auto load = [&](int64_t stage) {
#pragma unroll
      for (int i = 0; i < kWarpSteps; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = stage + (row_warp + i * kRowWarps) * kStepRows + t + half * 4;
          x[i][half].load(x_data + rows.number(row) * columns, row < last ? columns - column : 0, x_aligned);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = stage + warp * kStepRows + t + i / 2 * 4;
          const int64_t rank = first_rank + tile * kTileRanks + g + i % 2 * 8;
          v[tile][i] = row < last && rank < used ? from[row * ranks + rank] : 0.0f;
        }
      }
    };

    if (first < last) load(first);
    for (int64_t stage = first; stage < last; stage += kGradRows) {
      __syncthreads();  // the u of the stage before is used up
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        Tf32Parts parts[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) parts[i] = split_tf32(v[tile][i]);
        u[warp][tile][0][lane] = make_uint4(parts[0].high, parts[1].high, parts[2].high, parts[3].high);
        u[warp][tile][1][lane] = make_uint4(parts[0].low, parts[1].low, parts[2].low, parts[3].low);
      }
      rows.next(stage);
      __syncthreads();
      Chunk<T> now[kWarpSteps][2];
#pragma unroll
      for (int i = 0; i < kWarpSteps; ++i) now[i][0] = x[i][0], now[i][1] = x[i][1];
      if (stage + kGradRows < last) load(stage + kGradRows);  // arrives during the work on this stage
#pragma unroll
      for (int i = 0; i < kWarpSteps; ++i) {
        const int step = row_warp + i * kRowWarps;
        const int64_t row = stage + step * kStepRows + t;
        drop_chunk(dropout, seed, rows.number(row), column, now[i][0].raw);
        drop_chunk(dropout, seed, rows.number(row + 4), column, now[i][1].raw);
        also(now[i][0], now[i][1]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint4 high = u[step][tile][0][lane], low = u[step][tile][1][lane];
#pragma unroll
          for (int n = 0; n < kChunk; ++n) {
            mma_split<T>(sum[tile][n], high, low, false, split_tf32(now[i][0].raw[n]), split_tf32(now[i][1].raw[n]));
          }
        }
      }
    }
  }

  // The sum of get(warp, block) for a column's warps, and, each times scale, those of the cluster's blocks.
  template <class Get>
  __device__ __forceinline__ static float total_of(int column, float scale, const Get& get) {
    return sum_of_cluster([&](const auto& block) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kRowWarps; ++w) total += get(column / kWarpColumns * kRowWarps + w, block);
      return scale * total;
    });
  }

  // each(rank, column, total) for those of the tile below `ranks` and `columns`, where these sums meet; without rows,
  // and that in all blocks of the cluster, zeros. Neighbouring threads get neighbouring elements in either layout. All
  // threads take part.
  template <class Each>
  __device__ __forceinline__ void for_each_total(const Sums& sum, bool rank_major, int64_t ranks, int64_t columns,
                                                 float scale, bool no_rows, const Each& each) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (!no_rows) {
        cluster_sync();
#pragma unroll
        for (int n = 0; n < kChunk; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            part[warp][place(rank_major, g + i / 2 * 8, 16 * t + i % 2 * 8 + n)] = sum[tile][n][i];
          }
        }
        cluster_sync();
      }
      const ClusterShare share(kTileRanks * kGradColumns);
      for (unsigned i = share.first + threadIdx.x; i < share.last; i += kGradThreads) {
        const int r = rank_major ? i / kGradColumns : i % kTileRanks;
        const int c = rank_major ? i % kGradColumns : i / kTileRanks;
        if (tile * kTileRanks + r >= ranks || c >= columns) continue;
        const auto sum_of = [&](int w, const auto& block) {
          return block(part[w][place(rank_major, r, c % kWarpColumns)]);
        };
        each(tile * kTileRanks + r, c, no_rows ? 0.0f : total_of(c, scale, sum_of));
      }
    }
    if (!no_rows) cluster_sync();  // all have read
  }

 private:
  // In a warp's part. The lanes of a store, at ranks g and columns 16 t, touch all banks once, as do those of the
  // reads, at neighbouring columns or ranks.
  __device__ static int place(bool rank_major, int rank, int column) {
    return rank_major ? rank * (kWarpColumns + 2) + (column ^ (column >> 5 & 1))
                      : column * kTileRanks + column / 16 * 8 + rank;
  }
};

}  // namespace peftkern
