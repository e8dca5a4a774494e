// SPDX-License-Identifier: Apache-2.0
// DequantizeNf4 of nf4.h:  out[i] = kNf4Codes[code[i]] * absmax[i / block_size], in fp32, rounded once
//
// Bound by writing out. A thread turns a 32-bit word of 8 codes into a chunk. This is the simplest complete kernel here
// and the one to copy for a new one.
#include "kernels.h"
#include "nf4_chunk.cuh"

namespace peftkern {

constexpr int kDequantizeThreads = 256;
constexpr int kDequantizeChunks = 4;  // per thread: spreads the cost of filling the table

template <class T>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_nf4_kernel(DequantizeNf4 args, int block_size_log2) {
  __shared__ LaneTable table;
  table.fill();

  const bool packed_aligned = reinterpret_cast<uintptr_t>(args.packed) % 4 == 0;
  const bool out_aligned = chunks_aligned(args.out, 0);
  const int64_t first_chunk = static_cast<int64_t>(blockIdx.x) * kDequantizeThreads * kDequantizeChunks + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kDequantizeChunks; ++i) {
    const int64_t index = (first_chunk + i * kDequantizeThreads) * kChunk, valid = args.n - index;
    if (valid <= 0) break;
    const float absmax = args.absmax[index >> block_size_log2];  // a chunk never crosses a block: 8 divides block_size
    float v[kChunk];
    table.dequantize(load_codes(args.packed + index / 2, valid, packed_aligned), absmax, v);
    store_chunk(static_cast<T*>(args.out) + index, valid, out_aligned, v);
  }
}

cudaError_t launch_dequantize_nf4(const DequantizeNf4& args, cudaStream_t stream) {
  if (!valid_block_size(args.block_size)) return cudaErrorInvalidValue;
  if (args.n == 0) return cudaSuccess;
  int block_size_log2 = 0;
  while (int64_t{1} << block_size_log2 < args.block_size) ++block_size_log2;
  const int64_t blocks = ceil_div(args.n, kDequantizeThreads * kDequantizeChunks * kChunk);
  dispatch(args.out_dtype, [&](auto tag) {
    dequantize_nf4_kernel<decltype(tag)>
        <<<static_cast<unsigned>(blocks), kDequantizeThreads, 0, stream>>>(args, block_size_log2);
  });
  return cudaGetLastError();
}

}  // namespace peftkern
