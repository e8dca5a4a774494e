// SPDX-License-Identifier: Apache-2.0
// fp32 tiles in shared memory, written and read 16 bytes at a time.
#pragma once
#include "../low_rank.h"
#include "chunk.cuh"

namespace peftkern {

// Padding, in floats: a chunk of 8 takes 12, so the 16-byte accesses of 8 lanes at neighbouring chunks touch all 32 banks
// once; a row takes 4 more, so the same holds for 8 lanes at neighbouring rows (the row stride is 4 modulo 8).
template <int kRows, int kColumns>
struct Tile {
  static_assert(kColumns % (2 * kChunk) == 0, "an odd number of chunks would make neighbouring rows share banks");
  static constexpr int kChunkStride = kChunk + 4;
  static constexpr int kRowStride = kColumns / kChunk * kChunkStride + 4;
  alignas(16) float data[kRows * kRowStride];

  __device__ float* chunk(int row, int chunk) { return data + row * kRowStride + chunk * kChunkStride; }
  __device__ float& at(int row, int column) { return chunk(row, column / kChunk)[column % kChunk]; }
  __device__ float4 quad(int row, int quad) {
    return *reinterpret_cast<const float4*>(chunk(row, quad / 2) + quad % 2 * 4);
  }
  __device__ void set_chunk(int row, int index, const float (&v)[kChunk]) {
    float4* target = reinterpret_cast<float4*>(chunk(row, index));
    target[0] = make_float4(v[0], v[1], v[2], v[3]);
    target[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
};

// The dtype of a factor is a run-time argument: it is read once per tile, while a template argument would triple the
// number of kernels.
__device__ __forceinline__ void load_factor_chunk(const Factor& factor, int64_t index, int64_t valid, bool aligned,
                                                  float (&v)[kChunk]) {
  switch (factor.dtype) {
    case DType::f32: load_chunk(static_cast<const float*>(factor.data) + index, valid, aligned, v); break;
    case DType::bf16: load_chunk(static_cast<const bf16_t*>(factor.data) + index, valid, aligned, v); break;
    case DType::f16: load_chunk(static_cast<const f16_t*>(factor.data) + index, valid, aligned, v); break;
  }
}

// tile[r][c] = F[first_rank + r][first_column + c] whatever the layout of F; zero outside of it. All threads take part.
template <int kThreads, int kRanks, int kColumns>
__device__ void load_factor_tile(const Factor& factor, int64_t rank, int64_t columns, int64_t first_rank,
                                 int64_t first_column, Tile<kRanks, kColumns>& tile) {
  const int64_t stride = factor.rank_major ? columns : rank;
  const bool aligned = chunks_aligned(factor.data, stride * (factor.dtype == DType::f32 ? 4 : 2));
  float v[kChunk];
  if (factor.rank_major) {
    constexpr int kChunks = kColumns / kChunk;
    for (int i = threadIdx.x; i < kRanks * kChunks; i += kThreads) {
      const int r = i / kChunks, chunk = i % kChunks;
      const int64_t row = first_rank + r, column = first_column + chunk * kChunk;
      load_factor_chunk(factor, row * stride + column, row < rank ? columns - column : 0, aligned, v);
      tile.set_chunk(r, chunk, v);
    }
  } else {
    constexpr int kChunks = kRanks / kChunk;
    for (int i = threadIdx.x; i < kColumns * kChunks; i += kThreads) {
      const int c = i / kChunks, r = i % kChunks * kChunk;
      const int64_t row = first_column + c, column = first_rank + r;
      load_factor_chunk(factor, row * stride + column, row < columns ? rank - column : 0, aligned, v);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) tile.at(r + j, c) = v[j];
    }
  }
}

}  // namespace peftkern
