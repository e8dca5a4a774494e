// SPDX-License-Identifier: Apache-2.0
// SquaredRowNorms and DoraNorm of dora_norm.h
//
//   out[n] = sum over c of W[n, c]^2                      bound by reading W, once for a frozen weight
//   norm[n] = sqrt(w2[n] + s sum_i B[n, i] (2 P[i, n] + s sum_j G[j, i] B[n, j]))
//
// A warp makes a row in both. In the first its lanes take chunks of 8, in the second ranks i: they read G along its
// rows, and B[n, j] is one address for all of them. Each lane's terms are added in order, the lanes by a tree: the
// result depends on the shape alone. Sums are in fp64, also where a GPU has one fp64 unit for 64 of fp32: the first
// kernel runs once for a frozen weight, the second has rank^2 terms a row.
#include "kernels.h"
#include "nf4_chunk.cuh"
#include "reduce.cuh"

namespace peftkern {

constexpr int kNormThreads = 256;
constexpr int kNormRows = kNormThreads / 32;

__device__ __forceinline__ void add_squares(const float (&v)[kChunk], double& sum) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) sum = fma(static_cast<double>(v[j]), static_cast<double>(v[j]), sum);
}

template <class T>
__global__ void __launch_bounds__(kNormThreads) squared_row_norms_kernel(SquaredRowNorms args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormRows + threadIdx.x / 32;
  if (row >= args.rows) return;
  const T* w = static_cast<const T*>(args.weight) + row * args.columns;
  const bool aligned = chunks_aligned(args.weight, args.columns * sizeof(T));
  double sum = 0.0;
  for (int64_t column = threadIdx.x % 32 * kChunk; column < args.columns; column += 32 * kChunk) {
    float v[kChunk];
    load_chunk(w + column, args.columns - column, aligned, v);
    add_squares(v, sum);
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) args.out[row] = sum;
}

// Chunks of the flattened weight, as none of them crosses a block; of those at the ends of a row a part is another's.
__global__ void __launch_bounds__(kNormThreads)
    squared_nf4_row_norms_kernel(SquaredRowNorms args, int block_size_log2) {
  __shared__ LaneTable table;
  table.fill();

  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormRows + threadIdx.x / 32;
  if (row >= args.rows) return;
  const int lane = threadIdx.x % 32;
  const uint8_t* packed = static_cast<const uint8_t*>(args.weight);
  const bool packed_aligned = reinterpret_cast<uintptr_t>(packed) % 4 == 0;
  const int64_t begin = row * args.columns, end = begin + args.columns;
  double sum = 0.0;
  for (int64_t index = (begin / kChunk + lane) * kChunk; index < end; index += 32 * kChunk) {
    float v[kChunk];
    table.dequantize(load_codes(packed + index / 2, args.rows * args.columns - index, packed_aligned),
                     args.absmax[index >> block_size_log2], v);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (index + j < begin || index + j >= end) v[j] = 0.0f;
    }
    add_squares(v, sum);
  }
  sum = sum_of_warp(sum);
  if (lane == 0) args.out[row] = sum;
}

cudaError_t launch_squared_row_norms(const SquaredRowNorms& args, cudaStream_t stream) {
  if (args.absmax && !valid_block_size(args.block_size)) return cudaErrorInvalidValue;
  if (args.rows == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(ceil_div(args.rows, kNormRows));
  if (args.absmax) {
    int block_size_log2 = 0;
    while (int64_t{1} << block_size_log2 < args.block_size) ++block_size_log2;
    squared_nf4_row_norms_kernel<<<blocks, kNormThreads, 0, stream>>>(args, block_size_log2);
  } else {
    dispatch(args.dtype,
             [&](auto tag) { squared_row_norms_kernel<decltype(tag)><<<blocks, kNormThreads, 0, stream>>>(args); });
  }
  return cudaGetLastError();
}

template <class T>
__global__ void __launch_bounds__(kNormThreads) dora_norm_kernel(DoraNorm args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormRows + threadIdx.x / 32;
  if (row >= args.rows) return;
  const T* b = static_cast<const T*>(args.B) + row * args.rank;
  double sum = 0.0;
  for (int64_t i = threadIdx.x % 32; i < args.rank; i += 32) {
    double quadratic = 0.0;
    for (int64_t j = 0; j < args.rank; ++j)
      quadratic = fma(args.G[j * args.rank + i], static_cast<double>(to_float(b[j])), quadratic);
    const double cross = 2.0 * args.P[i * args.rows + row];
    sum = fma(args.scaling * to_float(b[i]), fma(args.scaling, quadratic, cross), sum);
  }
  sum = args.w2[row] + sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) args.norm[row] = sum <= 0.0 ? 0.0f : static_cast<float>(sqrt(sum));  // a NaN stays one
}

cudaError_t launch_dora_norm(const DoraNorm& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(ceil_div(args.rows, kNormRows));
  dispatch(args.B_dtype, [&](auto tag) { dora_norm_kernel<decltype(tag)><<<blocks, kNormThreads, 0, stream>>>(args); });
  return cudaGetLastError();
}

}  // namespace peftkern
