// SPDX-License-Identifier: Apache-2.0
// The products with an NF4 weight that one CUDA kernel makes with everything that rides along, in raw pointers: weights
// are looked up, rounded to the dtype of the activations as DequantizeNf4 rounds them, and never written to memory.
// Torch-free. All matrices are dense and row-major.
#pragma once
#include "low_rank.h"
#include "nf4.h"

namespace peftkern {

// A weight [out, in] as it is stored: packed codes, and one fp32 absmax per block of the flattened weight, either as it
// is or double-quantized (QuantizeAbsmax).
struct Nf4Matrix {
  const uint8_t* packed;       // [out, in / 2]
  const float* absmax;         // [ceil(out * in / block_size)], or null and instead:
  const uint8_t* codes;        // [ceil(out * in / block_size)]
  const float* nested_absmax;  // [ceil(of that / 256)]
  const float* offset;         // [1]
  int64_t out, in, block_size;
};

// y = out_scale * (x W^T + alpha * u F^T) + bias;  z, if given, receives y before out_scale and bias
struct Nf4Forward {
  const void* x;  // [rows, in], bf16 or f16; 16-byte aligned, as weight.packed; in % 64 == 0
  DType x_dtype;
  int64_t rows;
  Nf4Matrix weight;
  const float* u;  // [rows, rank]
  int64_t rank;
  Factor factor;  // lora_B, [out, rank]
  float alpha;
  const float* out_scale;  // [out] or null
  const float* bias;       // [out] or null
  void* z;                 // [rows, out], x_dtype, or null
  void* y;                 // [rows, out]
  DType y_dtype;           // x_dtype or f32
  int64_t splits;          // of the sum over in, each by thread blocks of its own; at least 1
  float* workspace;        // [nf4_forward_workspace(args)], null if splits is 1
  bool overlap = false;    // the launch before this one writes neither x nor the weight: start while it runs (sm_90)
};

// dx = q W + mask * (dh F)
struct Nf4Gradient {
  const void* q;  // [rows, out], bf16 or f16; 16-byte aligned, as weight.packed; out % 8 == 0, in % 64 == 0
  DType q_dtype;
  int64_t rows;
  Nf4Matrix weight;
  const float* dh;  // [rows, rank]
  int64_t rank;
  Factor factor;  // lora_A, [rank, in]
  Dropout dropout;
  void* dx;  // [rows, in], q_dtype
};

}  // namespace peftkern
