// SPDX-License-Identifier: Apache-2.0
// Orthogonality and OrthogonalityGrad of rank_allocation.h:  D = A A^T - I or B^T B - I,  norm = ||D||_F,
//   value = mean of the norms or sum of their squares;  grad = c D A or c B D
//
// The factor is read once for each 16 ranks of D. Ranks are small (12 is AdaLoRA's default), so D is a thread block's
// work and there are as many blocks as factors: 420 in a model of 210 layers.
#include "convert.cuh"
#include "kernels.h"
#include "reduce.cuh"
#include "table.cuh"

namespace peftkern {

constexpr int kGramRanks = 16;    // of a tile of D; a thread an element
constexpr int kGramColumns = 64;  // of the factor, at a time
constexpr int kGramThreads = kGramRanks * kGramRanks;
constexpr int kGradColumns = 128;  // of a thread block, one a thread
constexpr int kGradRanks = 16;     // that a thread holds at a time

using FactorTable = Table<OrthogonalFactor>;

__host__ __device__ inline int64_t rank_tiles(int64_t rank) { return (rank + kGramRanks - 1) / kGramRanks; }

struct GramBlocks {
  __host__ __device__ int64_t operator()(const OrthogonalFactor& f) const {
    return rank_tiles(f.rank) * rank_tiles(f.rank);
  }
};
struct FactorBlocks {
  __host__ __device__ int64_t operator()(const OrthogonalFactor&) const { return 1; }
};
struct GradBlocks {
  __host__ __device__ int64_t operator()(const OrthogonalFactor& f) const {
    return f.rank == 0 ? 0 : (f.columns + kGradColumns - 1) / kGradColumns;
  }
};

// Element (rank, column) of a factor in either layout.
template <class T>
__device__ __forceinline__ float element(const OrthogonalFactor& f, int64_t rank, int64_t column) {
  return to_float(static_cast<const T*>(f.data)[f.rank_major ? rank * f.columns + column : column * f.rank + rank]);
}

// + 1: the 16 rows that half a warp reads at one column lie in different banks.
using GramTile = float[kGramRanks][kGramColumns + 1];

// Neighbouring threads take neighbouring memory.
template <class T>
__device__ __forceinline__ void load_tile(const OrthogonalFactor& f, int64_t rank0, int64_t column0, GramTile& tile) {
  for (int i = threadIdx.x; i < kGramRanks * kGramColumns; i += kGramThreads) {
    const int r = f.rank_major ? i / kGramColumns : i % kGramRanks;
    const int c = f.rank_major ? i % kGramColumns : i / kGramRanks;
    const bool inside = rank0 + r < f.rank && column0 + c < f.columns;
    tile[r][c] = inside ? element<T>(f, rank0 + r, column0 + c) : 0.0f;
  }
}

__global__ void __launch_bounds__(kGramThreads, 4)
    gram_kernel(Orthogonality args, const __grid_constant__ FactorTable table) {
  __shared__ GramTile left, right;
  int64_t block;
  const OrthogonalFactor& f = table.items[find_item(table, GramBlocks(), block)];
  const int64_t rank0 = block / rank_tiles(f.rank) * kGramRanks, rank1 = block % rank_tiles(f.rank) * kGramRanks;
  const int i = threadIdx.x / kGramRanks, j = threadIdx.x % kGramRanks;
  float sum[4] = {};  // four chains: no sum waits for the one before, and each is shorter
  for (int64_t column0 = 0; column0 < f.columns; column0 += kGramColumns) {
    device_dispatch(f.dtype, [&](auto tag) {
      load_tile<decltype(tag)>(f, rank0, column0, left);
      load_tile<decltype(tag)>(f, rank1, column0, right);
    });
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < kGramColumns; c += 4) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] = fmaf(left[i][c + k], right[j][c + k], sum[k]);
    }
    __syncthreads();
  }
  const int64_t row = rank0 + i, column = rank1 + j;
  if (row < f.rank && column < f.rank) {
    const float product = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    args.deviations[f.deviation + row * f.rank + column] = row == column ? product - 1.0f : product;
  }
}

// In fp64, as on the CPU: a thread a sum, then the lanes, then the warps.
__device__ __forceinline__ double block_sum(double sum) {
  __shared__ double partial[kGramThreads / 32];
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  double total = 0.0;
  for (int warp = 0; warp < kGramThreads / 32; ++warp) total += partial[warp];
  return total;
}

__global__ void __launch_bounds__(kGramThreads, 4)
    deviation_norm_kernel(Orthogonality args, const __grid_constant__ FactorTable table) {
  const OrthogonalFactor& f = table.items[blockIdx.x];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < f.rank * f.rank; i += kGramThreads) {
    const double d = static_cast<double>(args.deviations[f.deviation + i]);
    sum += d * d;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) args.norms[table.first + blockIdx.x] = static_cast<float>(sqrt(sum));
}

__global__ void __launch_bounds__(kGramThreads) orthogonality_value_kernel(Orthogonality args) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < args.factor_count; i += kGramThreads) {
    const double norm = static_cast<double>(args.norms[i]);
    sum += args.squared ? norm * norm : norm;
  }
  sum = block_sum(sum);
  if (threadIdx.x > 0) return;
  const double count = args.squared || args.factor_count == 0 ? 1.0 : static_cast<double>(args.factor_count);
  *args.value = static_cast<float>(sum / count);
}

// A thread has a column of the factor and kGradRanks sums; D comes through shared memory, where all threads of a warp
// read the same element.
template <class T>
__device__ __forceinline__ void factor_grad(const OrthogonalFactor& f, const float* D, float scale, int64_t column,
                                            float (&tile)[kGradRanks][kGramColumns]) {
  for (int64_t rank0 = 0; rank0 < f.rank; rank0 += kGradRanks) {
    float sum[kGradRanks] = {};
    for (int64_t k0 = 0; k0 < f.rank; k0 += kGramColumns) {
      const int width = static_cast<int>(f.rank - k0 < kGramColumns ? f.rank - k0 : kGramColumns);
      for (int i = threadIdx.x; i < kGradRanks * kGramColumns; i += kGradColumns) {
        const int r = i / kGramColumns, k = i % kGramColumns;
        tile[r][k] = rank0 + r < f.rank && k < width ? D[(rank0 + r) * f.rank + k0 + k] : 0.0f;
      }
      __syncthreads();
      for (int k = 0; column < f.columns && k < width; ++k) {
        const float x = element<T>(f, k0 + k, column);
#pragma unroll
        for (int r = 0; r < kGradRanks; ++r) sum[r] = fmaf(tile[r][k], x, sum[r]);
      }
      __syncthreads();
    }
    T* grad = static_cast<T*>(f.grad);
#pragma unroll
    for (int r = 0; r < kGradRanks; ++r) {
      const int64_t rank = rank0 + r;
      if (column >= f.columns || rank >= f.rank) break;
      grad[f.rank_major ? rank * f.columns + column : column * f.rank + rank] = from_float<T>(scale * sum[r]);
    }
  }
}

__global__ void __launch_bounds__(kGradColumns)
    orthogonality_grad_kernel(OrthogonalityGrad args, const __grid_constant__ FactorTable table) {
  __shared__ float tile[kGradRanks][kGramColumns];
  int64_t block;
  const int index = find_item(table, GradBlocks(), block);
  const OrthogonalFactor& f = table.items[index];
  const float mean = 2.0f / static_cast<float>(args.factor_count), norm = args.norms[table.first + index];
  const float scale = *args.upstream * (args.squared ? 4.0f : norm > 0.0f ? mean / norm : 0.0f);
  const int64_t column = block * kGradColumns + threadIdx.x;
  device_dispatch(f.dtype,
                  [&](auto tag) { factor_grad<decltype(tag)>(f, args.deviations + f.deviation, scale, column, tile); });
}

cudaError_t launch_orthogonality(const Orthogonality& args, cudaStream_t stream) {
  cudaError_t error =
      for_each_table(args.factors, args.factor_count, GramBlocks(), [&](const FactorTable& table, unsigned blocks) {
        gram_kernel<<<blocks, kGramThreads, 0, stream>>>(args, table);
      });
  if (error != cudaSuccess) return error;
  error =
      for_each_table(args.factors, args.factor_count, FactorBlocks(), [&](const FactorTable& table, unsigned blocks) {
        deviation_norm_kernel<<<blocks, kGramThreads, 0, stream>>>(args, table);
      });
  if (error != cudaSuccess) return error;
  orthogonality_value_kernel<<<1, kGramThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_orthogonality_grad(const OrthogonalityGrad& args, cudaStream_t stream) {
  return for_each_table(args.factors, args.factor_count, GradBlocks(), [&](const FactorTable& table, unsigned blocks) {
    orthogonality_grad_kernel<<<blocks, kGradColumns, 0, stream>>>(args, table);
  });
}

}  // namespace peftkern
