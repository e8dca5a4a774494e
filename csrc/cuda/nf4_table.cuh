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
  const uint32_t shifted = byte == 0 ? word << 7 : word >> (8 * byte - 7);
  uint32_t entry;
  float2 codes;
  // (shifted & 0x7f80) | lane, as the one instruction it is: ptxas otherwise makes two of it and of the mask of lane
  asm("lop3.b32 %0, %1, 0x7f80, %2, 0xea;" : "=r"(entry) : "r"(shifted), "r"(lane));
  // Not volatile: the table does not change while it is used, so the read may move freely.
  asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(codes.x), "=f"(codes.y) : "r"(table + entry));
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

// A double-quantized absmax. Two roundings, as dequantize_absmax.
__device__ __forceinline__ float decode_absmax(uint8_t code, float nested_absmax, float offset) {
  return __fadd_rn(__fmul_rn(kDynamicTable[code], nested_absmax), offset);
}

// absmax of a block of a weight.
__device__ __forceinline__ float absmax_of(const Nf4Matrix& weight, int64_t block) {
  if (weight.absmax) return weight.absmax[block];
  return decode_absmax(weight.codes[block], weight.nested_absmax[block / kNestedBlockSize], *weight.offset);
}

// Walks along the absmax of a row of a weight, a kernel's argument. Offsets into the row are 32-bit, and what is the
// same for all threads stays in the argument, so that a step of a product costs few instructions and registers.
class AbsmaxRow {
 public:
  // From the flat element `element` on.
  __device__ __forceinline__ AbsmaxRow(const Nf4Matrix& weight, int block_size_log2, int64_t element)
      : weight_(weight), block_size_log2_(block_size_log2) {
    const int64_t group = (element >> block_size_log2) / kNestedBlockSize, block = group * kNestedBlockSize;
    group_ = static_cast<uint32_t>(group);
    k_ = static_cast<uint32_t>(element - (block << block_size_log2));
    if (weight.absmax) {
      blocks_ = weight.absmax + block;
    } else {
      blocks_ = weight.codes + block;
    }
  }

  // Of the block that holds the next element, and of the one that holds the k-th from there; the second only if `both`.
  __device__ __forceinline__ void get(float& first, float& second, uint32_t k, bool both) const {
    const uint32_t block = k_ >> block_size_log2_, next = (k_ + k) >> block_size_log2_;
    if (weight_.absmax) {
      first = static_cast<const float*>(blocks_)[block];
      if (both) second = static_cast<const float*>(blocks_)[next];
    } else {
      const float offset = *weight_.offset;
      first = dequantized(block, offset);
      if (both) second = dequantized(next, offset);
    }
  }

  __device__ __forceinline__ void advance(uint32_t k) { k_ += k; }

 private:
  __device__ __forceinline__ float dequantized(uint32_t block, float offset) const {
    const float nested = weight_.nested_absmax[group_ + block / static_cast<uint32_t>(kNestedBlockSize)];
    return decode_absmax(static_cast<const uint8_t*>(blocks_)[block], nested, offset);
  }

  const Nf4Matrix& weight_;
  const int block_size_log2_;
  const void* blocks_;  // absmax or codes, from a multiple of 256 blocks on
  uint32_t group_;      // the number of that 256
  uint32_t k_;          // elements from there
};

}  // namespace peftkern
