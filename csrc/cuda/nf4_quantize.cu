// SPDX-License-Identifier: Apache-2.0
// QuantizeNf4 of nf4.h:  absmax = max |w| of each block, code = number of thresholds below w / absmax, two codes a byte
//
// Bound by reading w. A thread quantizes a chunk of 8 elements to one 32-bit word; a block of elements belongs to
// block_size / 8 neighbouring lanes, at most a warp, which then takes several chunks each.
//
// The codes are those of bitsandbytes' CPU path: w * (1 / absmax) with IEEE division, except that the last block, if it
// is shorter, divides. (Its CUDA path approximates the reciprocal; near a threshold its codes may differ.)
#include "kernels.h"
#include "reduce.cuh"

namespace peftkern {

constexpr int kQuantizeThreads = 256;

// nf4_code of nf4.h as a binary search over registers: each comparison keeps the upper or the lower half of the
// candidates. No clamp to [-1, 1] is needed: all thresholds lie inside. Zero, hence the padding too, gets code 7.
__device__ __forceinline__ uint32_t nf4_code_on_device(float scaled) {
  float candidates[15] = {PEFTKERN_NF4_THRESHOLDS};
  uint32_t code = 0;
#pragma unroll
  for (int half = 8; half > 0; half /= 2) {
    const bool above = scaled > candidates[half - 1];
    code += above ? half : 0;
#pragma unroll
    for (int i = 0; i < half - 1; ++i) candidates[i] = above ? candidates[half + i] : candidates[i];
  }
  return code;
}

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_nf4_kernel(QuantizeNf4 args, int lanes_log2) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kQuantizeThreads + threadIdx.x;
  const int lanes = 1 << lanes_log2;
  const int64_t block = thread >> lanes_log2;
  const int64_t first = block * args.block_size + (thread & (lanes - 1)) * kChunk;
  const int chunks = static_cast<int>(args.block_size / kChunk) >> lanes_log2;  // of this thread
  const int64_t chunk_step = lanes * kChunk;
  const T* w = static_cast<const T*>(args.w);
  const bool w_aligned = chunks_aligned(w, 0);
  const bool packed_aligned = reinterpret_cast<uintptr_t>(args.packed) % 4 == 0;

  // Threads past the end of w stay for the shuffles; they see zeros. Backwards, so that the chunk that is needed first
  // afterwards is still in registers (up to block size 256 it is the only one).
  float v[kChunk];
  uint32_t max_bits = 0;
  for (int i = chunks - 1; i >= 0; --i) {
    const int64_t index = first + i * chunk_step;
    load_chunk(w + index, args.n - index, w_aligned, v);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) max_bits = max(max_bits, magnitude_bits(v[j]));
  }
  const float absmax = __uint_as_float(max_of_lanes(max_bits, lanes));
  const float divisor = absmax < kMinAbsmax ? kMinAbsmax : absmax, reciprocal = __fdiv_rn(1.0f, divisor);
  const bool divide = (block + 1) * args.block_size > args.n;
  if ((thread & (lanes - 1)) == 0 && first < args.n) args.absmax[block] = divide ? divisor : absmax;

  for (int i = 0; i < chunks; ++i) {
    const int64_t index = first + i * chunk_step, valid = args.n - index;
    if (valid <= 0) break;
    if (i > 0) load_chunk(w + index, valid, w_aligned, v);
    if (divide) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[j] = __fdiv_rn(v[j], divisor);
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[j] = __fmul_rn(v[j], reciprocal);
    }
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      word |= nf4_code_on_device(v[j]) << (j / 2 * 8 + (j % 2 == 0 ? 4 : 0));  // even elements to the high nibble
    }
    uint8_t* packed = args.packed + index / 2;
    if (packed_aligned && valid >= kChunk) {
      *reinterpret_cast<uint32_t*>(packed) = word;
    } else {
      for (int byte = 0; byte < 4 && 2 * byte < valid; ++byte) packed[byte] = static_cast<uint8_t>(word >> (8 * byte));
    }
  }
}

cudaError_t launch_quantize_nf4(const QuantizeNf4& args, cudaStream_t stream) {
  if (!valid_block_size(args.block_size)) return cudaErrorInvalidValue;
  if (args.n == 0) return cudaSuccess;
  int lanes_log2 = 2;  // the smallest block, 32 elements, has 4 chunks
  while (lanes_log2 < 5 && (kChunk << lanes_log2) < args.block_size) ++lanes_log2;
  const int64_t threads = ceil_div(args.n, args.block_size) << lanes_log2;
  dispatch(args.w_dtype, [&](auto tag) {
    quantize_nf4_kernel<decltype(tag)>
        <<<static_cast<unsigned>(ceil_div(threads, kQuantizeThreads)), kQuantizeThreads, 0, stream>>>(args, lanes_log2);
  });
  return cudaGetLastError();
}

}  // namespace peftkern
