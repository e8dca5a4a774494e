// SPDX-License-Identifier: Apache-2.0
// NF4 codes to fp32 weights, a chunk of 8 from a 32-bit word.
#pragma once
#include "../nf4.h"
#include "chunk.cuh"

namespace peftkern {

// A copy of the codes for each lane, in its own bank.
struct LaneTable {
  float data[16][32];

  // By all threads; ends with a barrier.
  __device__ __forceinline__ void fill() {
    constexpr float kCodes[16] = {PEFTKERN_NF4_CODES};
    if (threadIdx.x < 32) {
#pragma unroll
      for (int code = 0; code < 16; ++code) data[code][threadIdx.x] = kCodes[code];
    }
    __syncthreads();
  }

  // The weights of a chunk of packed codes: even elements from the high nibble.
  __device__ __forceinline__ void dequantize(uint32_t codes, float absmax, float (&v)[kChunk]) const {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      v[j] = __fmul_rn(data[codes >> (j / 2 * 8 + (j % 2 == 0 ? 4 : 0)) & 15][threadIdx.x % 32], absmax);
    }
  }
};

// The packed codes of a chunk, of which `valid` are there. aligned: to 4 bytes.
__device__ __forceinline__ uint32_t load_codes(const uint8_t* packed, int64_t valid, bool aligned) {
  if (aligned && valid >= kChunk) return *reinterpret_cast<const uint32_t*>(packed);
  uint32_t codes = 0;
  for (int byte = 0; byte < 4 && 2 * byte < valid; ++byte) codes |= static_cast<uint32_t>(packed[byte]) << (8 * byte);
  return codes;
}

}  // namespace peftkern
