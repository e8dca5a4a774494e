// SPDX-License-Identifier: Apache-2.0
// QuantizeAbsmax and DequantizeAbsmax of nf4.h: double quantization of absmax, in blocks of 256
//
//   offset = mean(absmax);  nested_absmax = max |absmax - offset| of each block
//   code   = number of midpoints of neighbouring kDynamicCodes below (absmax - offset) * (1 / nested_absmax)
//   absmax ~ kDynamicCodes[code] * nested_absmax + offset
//
// Small arrays (one value per NF4 block), so these kernels are plain. One thread block takes the mean: that fixes the
// order of summation without a workspace. In fp64, so that the order hardly matters to the fp32 result.
#include "kernels.h"
#include "nf4_table.cuh"
#include "reduce.cuh"

namespace peftkern {

constexpr int kMeanThreads = 1024;
constexpr int kAbsmaxThreads = 256;
constexpr int kAbsmaxWarps = kAbsmaxThreads / 32;
constexpr int kHalf = 32 * kQuad;
static_assert(kNestedBlockSize == 2 * kHalf, "a warp quantizes one block");
static_assert(kAbsmaxThreads == 256, "a thread fills one entry of a table");

__global__ void __launch_bounds__(kMeanThreads) absmax_mean_kernel(QuantizeAbsmax args) {
  __shared__ double partial[kMeanThreads / 32];
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < args.n; i += kMeanThreads) sum += static_cast<double>(args.absmax[i]);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int warp = 0; warp < kMeanThreads / 32; ++warp) total += partial[warp];
    *args.offset = args.n == 0 ? 0.0f : static_cast<float>(total / static_cast<double>(args.n));
  }
}

__global__ void __launch_bounds__(kAbsmaxThreads) quantize_absmax_kernel(QuantizeAbsmax args) {
  __shared__ float midpoints[255];
  if (threadIdx.x < 255) {
    midpoints[threadIdx.x] = __fmul_rn(0.5f, __fadd_rn(kDynamicTable[threadIdx.x], kDynamicTable[threadIdx.x + 1]));
  }
  __syncthreads();

  // A lane takes 4 neighbouring values of each half of the block, so that a request of a warp is one piece of memory.
  const int lane = threadIdx.x % 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kAbsmaxWarps + threadIdx.x / 32;
  const int64_t index = block * kNestedBlockSize + lane * kQuad, valid = args.n - index;
  const bool absmax_aligned = quads_aligned<float>(args.absmax, 0);
  const bool codes_aligned = reinterpret_cast<uintptr_t>(args.codes) % 4 == 0;
  const float offset = *args.offset;
  float v[2][kQuad];
  uint32_t max_bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_quad(args.absmax + index + half * kHalf, valid - half * kHalf, absmax_aligned, v[half]);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      v[half][j] = __fsub_rn(v[half][j], offset);
      if (half * kHalf + j < valid) max_bits = max(max_bits, magnitude_bits(v[half][j]));
    }
  }
  const float nested_absmax = __uint_as_float(max_of_lanes(max_bits, 32));
  if (lane == 0 && valid > 0) args.nested_absmax[block] = nested_absmax;

  // All values of a block with nested_absmax 0 are 0; so is then their quotient, whose code is that of 0.0.
  const float reciprocal = nested_absmax == 0.0f ? 0.0f : __fdiv_rn(1.0f, nested_absmax);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const float scaled = __fmul_rn(v[half][j], reciprocal);
      uint32_t code = 0;
#pragma unroll
      for (int step = 128; step > 0; step /= 2) code += midpoints[code + step - 1] < scaled ? step : 0;
      word |= code << (8 * j);
    }
    uint8_t* codes = args.codes + index + half * kHalf;
    const int64_t left = valid - half * kHalf;
    if (codes_aligned && left >= kQuad) {
      *reinterpret_cast<uint32_t*>(codes) = word;
    } else {
      for (int j = 0; j < kQuad && j < left; ++j) codes[j] = static_cast<uint8_t>(word >> (8 * j));
    }
  }
}

__global__ void __launch_bounds__(kAbsmaxThreads) dequantize_absmax_kernel(DequantizeAbsmax args) {
  __shared__ float table[256];
  table[threadIdx.x] = kDynamicTable[threadIdx.x];
  __syncthreads();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAbsmaxThreads + threadIdx.x;
  if (i >= args.n) return;
  // Two roundings, as bitsandbytes: a fused multiply-add would differ in the last bit.
  args.absmax[i] = __fadd_rn(__fmul_rn(table[args.codes[i]], args.nested_absmax[i / kNestedBlockSize]), *args.offset);
}

cudaError_t launch_quantize_absmax(const QuantizeAbsmax& args, cudaStream_t stream) {
  absmax_mean_kernel<<<1, kMeanThreads, 0, stream>>>(args);
  if (args.n > 0) {
    const int64_t thread_blocks = ceil_div(ceil_div(args.n, kNestedBlockSize), kAbsmaxWarps);
    quantize_absmax_kernel<<<static_cast<unsigned>(thread_blocks), kAbsmaxThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t launch_dequantize_absmax(const DequantizeAbsmax& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  const int64_t thread_blocks = ceil_div(args.n, kAbsmaxThreads);
  dequantize_absmax_kernel<<<static_cast<unsigned>(thread_blocks), kAbsmaxThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace peftkern
