// SPDX-License-Identifier: Apache-2.0
// QuantizeAbsmax and DequantizeAbsmax of nf4.h: double quantization of absmax, in blocks of 256
//
//   offset = mean(absmax);  nested_absmax = max |absmax - offset| of each block
//   code   = number of midpoints of neighbouring kDynamicCodes below (absmax - offset) * (1 / nested_absmax)
//   absmax ~ kDynamicCodes[code] * nested_absmax + offset
//
// Bound by memory. Thread blocks sum up parts of absmax, and all blocks of the next kernel add these up for the mean,
// in the same order. In fp64, so that the order hardly matters to the fp32 result.
//
// A warp takes a block of 256: a lane 4 neighbouring values of each half, so that a request is one piece of memory.
#include "kernels.h"
#include "mma.cuh"
#include "reduce.cuh"

namespace peftkern {

constexpr int kAbsmaxThreads = 256;
constexpr int kAbsmaxWarps = kAbsmaxThreads / 32;
constexpr int kHalf = 32 * kQuad;
static_assert(kNestedBlockSize == 2 * kHalf, "a warp takes one block");
static_assert(kAbsmaxThreads == 256, "a thread makes one midpoint");

constexpr int kSumQuads = 4;  // of a thread at once: so many loads are in flight
constexpr int64_t kPartValues = kAbsmaxThreads * kSumQuads * kQuad;
constexpr int64_t kMaxParts = 64;

// kDynamicCodes[code], computed from its definition with the roundings of torch, which made it: reading the table would
// cost every thread block 1 KB, and look-ups in shared memory as many turns as lanes meet in a bank.
//   |code - 127| = 2^i + k, k < 2^i:   10^(i - 6) times the mean of b[k] and b[k + 1], b = linspace(0.1, 1, 2^i + 1)
// 0 and 1, of codes 127 and 255, are what lies below the first of these and above the last.
__device__ __forceinline__ float dynamic_code(int code) {
  constexpr float kPowers[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  const int m = abs(code - 127), i = 31 - __clz(min(max(m, 1), 64));
  float power = kPowers[0];
#pragma unroll
  for (int j = 1; j < 7; ++j) power = i >= j ? kPowers[j] : power;
  const auto linspace = [](float at) { return at <= 0.5f ? fmaf(0.9f, at, 0.1f) : fmaf(-0.9f, 1.0f - at, 1.0f); };
  const float step = __int_as_float((127 - i) << 23), at = fmaf(static_cast<float>(m), step, -1.0f);  // step: 2^-i
  const float magnitude = __saturatef(power * (0.5f * (linspace(at) + linspace(at + step))));
  return code < 127 ? -magnitude : magnitude;
}

// Entry 8 c + r of a sorted table in row r, column c: requests of a warp stay in one row, whose words are in different
// banks. + 4: and neighbouring threads put neighbouring entries into different banks.
using Midpoints = float[8][32 + 4];

// How many of the 255 are below v.
__device__ __forceinline__ uint32_t count_below(float v, const Midpoints& midpoints) {
  uint32_t column = 0, count = 0;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) column += midpoints[7][column + step - 1] < v ? step : 0;
#pragma unroll
  for (int row = 0; row < 7; ++row) count += midpoints[row][column] < v;
  return 8 * column + count;
}

__global__ void __launch_bounds__(kAbsmaxThreads) absmax_sum_kernel(QuantizeAbsmax args) {
  __shared__ double of_warp[kAbsmaxWarps];
  const bool aligned = quads_aligned<float>(args.absmax, 0);
  double sum = 0.0;
  for (int64_t first = blockIdx.x * kPartValues; first < args.n; first += gridDim.x * kPartValues) {
    float v[kSumQuads][kQuad];
#pragma unroll
    for (int i = 0; i < kSumQuads; ++i) {
      const int64_t at = first + (i * kAbsmaxThreads + threadIdx.x) * kQuad;
      load_quad(args.absmax + at, args.n - at, aligned, v[i]);
    }
#pragma unroll
    for (int i = 0; i < kSumQuads; ++i) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) sum += static_cast<double>(v[i][j]);
    }
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int warp = 0; warp < kAbsmaxWarps; ++warp) total += of_warp[warp];
    args.workspace[blockIdx.x] = total;
  }
}

__global__ void __launch_bounds__(kAbsmaxThreads) quantize_absmax_kernel(QuantizeAbsmax args, int parts) {
  __shared__ Midpoints midpoints;
  __shared__ float mean;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kAbsmaxWarps + warp;
  const int64_t index = block * kNestedBlockSize + lane * kQuad, valid = args.n - index;
  const bool absmax_aligned = quads_aligned<float>(args.absmax, 0);
  const bool codes_aligned = reinterpret_cast<uintptr_t>(args.codes) % 4 == 0;
  float v[2][kQuad];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_quad(args.absmax + index + half * kHalf, valid - half * kHalf, absmax_aligned, v[half]);
  }

  const int code = threadIdx.x;  // of the last one nothing is read
  midpoints[code % 8][code / 8] = __fmul_rn(0.5f, __fadd_rn(dynamic_code(code), dynamic_code(code + 1)));
  if (warp == 0) {
    double sum = 0.0;
    for (int part = lane; part < parts; part += 32) sum += args.workspace[part];
    sum = sum_of_warp(sum);
    if (lane == 0) {
      mean = args.n == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(args.n));
      if (blockIdx.x == 0) *args.offset = mean;
    }
  }
  __syncthreads();

  const float offset = mean;
  uint32_t max_bits = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
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
    for (int j = 0; j < kQuad; ++j) word |= count_below(__fmul_rn(v[half][j], reciprocal), midpoints) << (8 * j);
    uint8_t* codes = args.codes + index + half * kHalf;
    const int64_t left = valid - half * kHalf;
    if (codes_aligned && left >= kQuad) {
      *reinterpret_cast<uint32_t*>(codes) = word;
    } else {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        if (j < left) codes[j] = static_cast<uint8_t>(word >> (8 * j));
      }
    }
  }
}

__global__ void __launch_bounds__(kAbsmaxThreads) dequantize_absmax_kernel(DequantizeAbsmax args) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kAbsmaxWarps + threadIdx.x / 32;
  const int64_t index = block * kNestedBlockSize + threadIdx.x % 32 * kQuad, valid = args.n - index;
  if (valid <= 0) return;
  const bool codes_aligned = reinterpret_cast<uintptr_t>(args.codes) % 4 == 0;
  const bool absmax_aligned = quads_aligned<float>(args.absmax, 0);
  const float nested_absmax = args.nested_absmax[block], offset = *args.offset;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t left = valid - half * kHalf;
    const uint8_t* codes = args.codes + index + half * kHalf;
    uint32_t word = 0;
    if (codes_aligned && left >= kQuad) {
      word = *reinterpret_cast<const uint32_t*>(codes);
    } else {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) word |= j < left ? static_cast<uint32_t>(codes[j]) << (8 * j) : 0;
    }
    float v[kQuad];
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      // Two roundings, as bitsandbytes: a fused multiply-add would differ in the last bit.
      v[j] = __fadd_rn(__fmul_rn(dynamic_code(word >> (8 * j) & 255), nested_absmax), offset);
    }
    store_quad(args.absmax + index + half * kHalf, left, absmax_aligned, v);
  }
}

int64_t quantize_absmax_workspace(const QuantizeAbsmax& args) {
  const int64_t parts = ceil_div(args.n, kPartValues);
  return parts < kMaxParts ? parts : kMaxParts;
}

cudaError_t launch_quantize_absmax(const QuantizeAbsmax& args, cudaStream_t stream) {
  const int64_t parts = quantize_absmax_workspace(args);
  if (parts > 0) {
    if (!args.workspace) return cudaErrorInvalidValue;
    absmax_sum_kernel<<<static_cast<unsigned>(parts), kAbsmaxThreads, 0, stream>>>(args);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  // Without values, one block for the offset.
  const int64_t thread_blocks = args.n == 0 ? 1 : ceil_div(args.n, kAbsmaxWarps * kNestedBlockSize);
  quantize_absmax_kernel<<<static_cast<unsigned>(thread_blocks), kAbsmaxThreads, 0, stream>>>(args, parts);
  return cudaGetLastError();
}

cudaError_t launch_dequantize_absmax(const DequantizeAbsmax& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  const int64_t thread_blocks = ceil_div(args.n, kAbsmaxWarps * kNestedBlockSize);
  dequantize_absmax_kernel<<<static_cast<unsigned>(thread_blocks), kAbsmaxThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace peftkern
