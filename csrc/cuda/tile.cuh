// SPDX-License-Identifier: Apache-2.0
// fp32 tiles in shared memory, written and read 16 bytes at a time.
#pragma once
#include "../low_rank.h"
#include "chunk.cuh"

namespace peftkern {

// Without padding: quads trade places, so that no bank is asked twice by 8 lanes with neighbouring chunks of a
// row, by lanes with 32 columns of a row, or with 16 columns of rows r and r + 8.
template <int kRows, int kColumns>
struct SwizzledTile {
  alignas(16) float data[kRows][kColumns];

  __device__ static int place(int row, int quad) { return (quad ^ (quad >> 3 & 1) ^ (row >> 3 & 1) << 2) * 4; }
  __device__ float& at(int row, int column) { return data[row][place(row, column / 4) + column % 4]; }
  __device__ void get_chunk(int row, int index, float (&v)[kChunk]) const {
    const float4 low = *reinterpret_cast<const float4*>(&data[row][place(row, 2 * index)]);
    const float4 high = *reinterpret_cast<const float4*>(&data[row][place(row, 2 * index + 1)]);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }
  __device__ void set_chunk(int row, int index, const float (&v)[kChunk]) {
    *reinterpret_cast<float4*>(&data[row][place(row, 2 * index)]) = make_float4(v[0], v[1], v[2], v[3]);
    *reinterpret_cast<float4*>(&data[row][place(row, 2 * index + 1)]) = make_float4(v[4], v[5], v[6], v[7]);
  }
};

// A thread's share, one chunk, of a tile of F on its way to shared memory. The tile is rank-major whatever the layout
// of F: tile[r][c] = F[first_rank + r, first_column + c], zero outside of F. Surplus threads have no share.
template <int kRanks, int kColumns>
struct FactorChunk {
  static constexpr int kThreads = kRanks * kColumns / kChunk;
  float v[kChunk];

  // Of F's `rank` ranks only the first `used` count; the others become 0 and are never touched. The dtype is a run-time
  // argument: F is small, and a template argument would triple the number of kernels.
  __device__ __forceinline__ void load(const Factor& factor, int64_t rank, int64_t columns, int64_t first_rank,
                                       int64_t first_column, int64_t used) {
    if (threadIdx.x >= kThreads) return;
    const int64_t r = first_rank + (factor.rank_major ? rank_major_row() : column_major_row());
    const int64_t c = first_column + (factor.rank_major ? rank_major_column() : column_major_column());
    const int64_t stride = factor.rank_major ? columns : rank;
    const int64_t index = factor.rank_major ? r * columns + c : c * rank + r;
    int64_t valid = factor.rank_major ? columns - c : used - r;
    if (r >= used || c >= columns) valid = 0;
    switch (factor.dtype) {
      case DType::f32: load_as<float>(factor.data, index, valid, stride); break;
      case DType::bf16: load_as<bf16_t>(factor.data, index, valid, stride); break;
      case DType::f16: load_as<f16_t>(factor.data, index, valid, stride); break;
    }
  }

  __device__ __forceinline__ void store(bool rank_major, SwizzledTile<kRanks, kColumns>& tile) const {
    if (threadIdx.x >= kThreads) return;
    if (rank_major) {
      tile.set_chunk(rank_major_row(), rank_major_column() / kChunk, v);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) tile.at(column_major_row() + j, column_major_column()) = v[j];
    }
  }

 private:
  // Neighbouring threads take neighbouring memory: chunks along the columns, or along the ranks.
  __device__ static int rank_major_row() { return threadIdx.x / (kColumns / kChunk); }
  __device__ static int rank_major_column() { return threadIdx.x % (kColumns / kChunk) * kChunk; }
  __device__ static int column_major_row() { return threadIdx.x % (kRanks / kChunk) * kChunk; }
  __device__ static int column_major_column() { return threadIdx.x / (kRanks / kChunk); }

  template <class T>
  __device__ __forceinline__ void load_as(const void* base, int64_t index, int64_t valid, int64_t stride) {
    load_chunk(static_cast<const T*>(base) + index, valid, chunks_aligned(base, stride * sizeof(T)), v);
  }
};

}  // namespace peftkern
