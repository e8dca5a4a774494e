// SPDX-License-Identifier: Apache-2.0
// The product u F of a tile of kRows rows x 128 columns, by a block of 256 threads. A thread makes one chunk in each of
// kRows / 16 rows, and keeps its sums over the whole rank in registers:
//
//   chunk = thread % 16    rows = thread / 16 + 16 i
#pragma once
#include "mma.cuh"
#include "tile.cuh"

namespace peftkern {

constexpr int kUpThreads = 256;
constexpr int kUpColumns = 128, kUpRanks = 16;
constexpr int kUpChunks = kUpColumns / kChunk;
constexpr int kUpRowGroups = kUpThreads / kUpChunks;

__device__ __forceinline__ int up_chunk() { return threadIdx.x % kUpChunks; }
__device__ __forceinline__ int up_row(int i) { return threadIdx.x / kUpChunks + i * kUpRowGroups; }

template <int kRows>
struct UpTile {
  static constexpr int kThreadRows = kRows / kUpRowGroups;
  using Sums = float[kThreadRows][kChunk];

  static constexpr int kUpQuads = kUpRanks / kQuad;
  static_assert(kRows * kUpQuads <= kUpThreads, "a thread brings one quad of u");

  alignas(16) float u[kRows][kUpRanks];  // a warp reads two rows at a time, which are broadcast
  SwizzledTile<kUpRanks, kUpColumns> factor;

  // sum += u F. `from`: u of the first row, of `rows` that exist, each with u_stride ranks. Of F's u_stride ranks the
  // first `rank` count. All threads take part; ends with a barrier unless rank is 0.
  __device__ __forceinline__ void multiply(const float* from, int64_t rows, int64_t u_stride, int64_t rank,
                                           const Factor& source, int64_t columns, int64_t first_column, Sums& sum) {
    const bool u_aligned = quads_aligned<float>(from, u_stride * sizeof(float));
    for (int64_t first_rank = 0; first_rank < rank; first_rank += kUpRanks) {
      if (const int r = threadIdx.x / kUpQuads, quad = threadIdx.x % kUpQuads; r < kRows) {
        const int64_t at = first_rank + quad * kQuad;
        float v[kQuad];
        load_quad(from + r * u_stride + at, r < rows ? rank - at : 0, u_aligned, v);
        *reinterpret_cast<float4*>(&u[r][quad * kQuad]) = make_float4(v[0], v[1], v[2], v[3]);
      }
      FactorChunk<kUpRanks, kUpColumns> chunk;
      static_assert(chunk.kThreads <= kUpThreads);
      chunk.load(source, u_stride, columns, first_rank, first_column, rank);
      chunk.store(source.rank_major, factor);
      __syncthreads();
#pragma unroll
      for (int quad = 0; quad < kUpQuads; ++quad) {
        float v[kThreadRows][kQuad];
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
          const float4 four = *reinterpret_cast<const float4*>(&u[up_row(i)][quad * kQuad]);
          v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
        }
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          float f[kChunk];
          factor.get_chunk(quad * kQuad + k, up_chunk(), f);
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
            for (int j = 0; j < kChunk; ++j) sum[i][j] = fmaf(v[i][k], f[j], sum[i][j]);
          }
        }
      }
      __syncthreads();
    }
  }
};

}  // namespace peftkern
