// SPDX-License-Identifier: Apache-2.0
// NF4 weights inside a product: a byte of packed codes to two weights, and the absmax of a block.
#pragma once
#include "../nf4_product.h"
#include "mma.cuh"

namespace peftkern {

// Both codes of every byte as fp32, so that one 64-bit read of shared memory serves two weights and absmax is applied
// exactly as dequantize_nf4 does. 16 copies: the lanes of each half of a warp, which shared memory serves at a time,
// have banks of their own, whatever the bytes are.
//
//   byte b, copy c:   b * 128 + c * 8:  fp32 code of the high nibble (the even element), fp32 code of the low nibble
constexpr int kByteTableCopies = 16;
constexpr int kByteTableBytes = 256 * kByteTableCopies * static_cast<int>(sizeof(float2));

static __device__ const float kNf4Table[16] = {PEFTKERN_NF4_CODES};

// By `threads` threads; the table is complete after the next barrier. Aligned to 128 bytes.
__device__ __forceinline__ void fill_byte_table(uint8_t* table, int thread, int threads) {
  for (int i = thread; i < 256 * kByteTableCopies / 2; i += threads) {
    const int byte = i / (kByteTableCopies / 2);
    const float even = kNf4Table[byte >> 4], odd = kNf4Table[byte & 15];
    reinterpret_cast<float4*>(table)[i] = make_float4(even, odd, even, odd);
  }
}

// Offset of the calling lane's copy, to be added to that of a byte's entry.
__device__ __forceinline__ uint32_t byte_table_lane() {
  return threadIdx.x % kByteTableCopies * static_cast<uint32_t>(sizeof(float2));
}

// The two codes of a byte of a word. `table`: its shared address; `byte`: 0 to 3, known at compile time.
__device__ __forceinline__ float2 look_up(uint32_t table, uint32_t lane, uint32_t word, int byte) {
  const uint32_t entry = (byte == 0 ? word << 7 : word >> (8 * byte - 7)) & 0x7f80u;
  float2 codes;
  // Not volatile: the table never changes, so the read may move freely.
  asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(codes.x), "=f"(codes.y) : "r"(table + (entry | lane)));
  return codes;
}

// The two weights of a byte of a word, bit for bit those of dequantize_nf4.
template <class T>
__device__ __forceinline__ uint32_t dequantize_pair(uint32_t table, uint32_t lane, uint32_t word, int byte,
                                                    float absmax) {
  const float2 codes = look_up(table, lane, word, byte);
  return pack_pair<T>(__fmul_rn(codes.x, absmax), __fmul_rn(codes.y, absmax));
}

// In global memory, where neighbouring threads read it in one request.
static __device__ const float kDynamicTable[256] = {PEFTKERN_DYNAMIC_CODES};

// absmax of the block that holds the flat element `index`.
struct Absmax {
  const Nf4Matrix& weight;
  int block_size_log2;
  float offset;

  __device__ __forceinline__ Absmax(const Nf4Matrix& weight, int block_size_log2)
      : weight(weight), block_size_log2(block_size_log2), offset(weight.absmax ? 0.0f : *weight.offset) {}

  __device__ __forceinline__ float operator()(int64_t index) const {
    const int64_t block = index >> block_size_log2;
    if (weight.absmax) return weight.absmax[block];
    // Two roundings, as dequantize_absmax.
    return __fadd_rn(__fmul_rn(kDynamicTable[weight.codes[block]], weight.nested_absmax[block / kNestedBlockSize]),
                     offset);
  }
};

}  // namespace peftkern
