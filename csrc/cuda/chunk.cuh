// SPDX-License-Identifier: Apache-2.0
// The unit of memory access: 8 consecutive elements per thread, as fp32 in registers. 8 because one Philox call masks 8
// columns, 8 elements of a 16-bit dtype are one 16-byte access, and 8 NF4 codes are one 32-bit word.
#pragma once
#include "../dropout.h"
#include "convert.cuh"

namespace peftkern {

constexpr int kChunk = kDropoutChunk;

// Do all chunks that start at multiples of 8 within rows of `row_bytes` begin on a 16-byte boundary?
__device__ __forceinline__ bool chunks_aligned(const void* base, int64_t row_bytes) {
  return ((reinterpret_cast<uintptr_t>(base) | static_cast<uintptr_t>(row_bytes)) & 15) == 0;
}

// 8 elements as they are stored. Loading does no arithmetic, so a thread does not wait for the values until it uses
// them.
template <class T>
struct alignas(16) Chunk {
  T raw[kChunk];

  // `valid` elements lie inside the row (negative and above 8 are fine). Those outside become 0 and are never touched.
  __device__ __forceinline__ void load(const T* source, int64_t valid, bool aligned) {
    if (aligned && valid >= kChunk) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(raw) / 16); ++i) {
        reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(source)[i];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) raw[j] = j < valid ? source[j] : T{};
    }
  }

  __device__ __forceinline__ void to_floats(float (&v)[kChunk]) const {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) v[j] = to_float(raw[j]);
  }
};

template <class T>
__device__ __forceinline__ void load_chunk(const T* source, int64_t valid, bool aligned, float (&v)[kChunk]) {
  Chunk<T> chunk;
  chunk.load(source, valid, aligned);
  chunk.to_floats(v);
}

// In so many words: nvcc makes up to four stores of one of a uint4 where another path stores less.
__device__ __forceinline__ void store_16_bytes(void* target, const uint32_t* words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

template <class T>
__device__ __forceinline__ void store_chunk(T* target, int64_t valid, bool aligned, const float (&v)[kChunk]) {
  if (aligned && valid >= kChunk) {
    uint32_t words[kChunk * sizeof(T) / 4];
#pragma unroll
    for (int i = 0; i < static_cast<int>(kChunk * sizeof(T) / 4); ++i) {
      if constexpr (sizeof(T) == 2) {
        words[i] = from_float<T>(v[2 * i]).bits | static_cast<uint32_t>(from_float<T>(v[2 * i + 1]).bits) << 16;
      } else {
        words[i] = __float_as_uint(v[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < static_cast<int>(kChunk * sizeof(T) / 16); ++i) {
      store_16_bytes(target + i * 16 / sizeof(T), words + 4 * i);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j < valid) target[j] = from_float<T>(v[j]);
    }
  }
}

// Reads the seed once per thread. It lives on the device, so that a captured graph draws a new mask on every replay.
__device__ __forceinline__ uint64_t load_seed(const Dropout& dropout) {
  return dropout.threshold == 0 ? 0 : static_cast<uint64_t>(*dropout.seed);
}

// keep_bits of dropout.h for the chunk at (row, column), as masks: the low half of mask[i] is all ones if column 2 i of
// the chunk is kept, the high half if column 2 i + 1 is, else 0. Bit 15 of (lane | 0x8000) - threshold says "kept".
__device__ __forceinline__ void keep_masks(const Dropout& dropout, uint64_t seed, int64_t row, int64_t column,
                                           uint32_t (&mask)[kChunk / 2]) {
  const PhiloxWords words = philox(seed, row, static_cast<uint32_t>(column / kChunk));
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const uint32_t kept = (words.word[i] | 0x80008000u) - dropout.threshold * 0x10001u;
    asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(mask[i]) : "r"(kept));  // the sign of bytes 1, 1, 3, 3
  }
}

// Zeroes the dropped columns of the chunk at (row, column), as fp32 or as they are stored. The factor 1 / (1 - p) of
// the others is dropout.scale, which every caller folds into alpha.
template <class T>
__device__ __forceinline__ void drop_chunk(const Dropout& dropout, uint64_t seed, int64_t row, int64_t column,
                                           T (&v)[kChunk]) {
  if (dropout.threshold == 0) return;
  uint32_t mask[kChunk / 2];
  keep_masks(dropout, seed, row, column, mask);
  uint32_t* words = reinterpret_cast<uint32_t*>(v);
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    if constexpr (sizeof(T) == 2) {
      words[i] &= mask[i];
    } else {
      words[2 * i] &= __byte_perm(mask[i], 0, 0x1010);
      words[2 * i + 1] &= __byte_perm(mask[i], 0, 0x3232);
    }
  }
}

}  // namespace peftkern
