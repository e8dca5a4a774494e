// SPDX-License-Identifier: Apache-2.0
// What the low-rank kernels compute, in raw pointers. Both backends implement these four, and everything in
// peftkern/ops/adapted_linear.py is made of them and the products of csrc/products.h.
// Torch-free. All matrices are dense and row-major; all sums are in fp32 and in an order that depends on the shape and
// not on the number of threads, so results are repeatable to the bit.
#pragma once
#include "dropout.h"
#include "dtypes.h"

namespace peftkern {

// A low-rank factor of a [columns] wide activation: lora_A is [rank, columns], lora_B is [columns, rank].
struct Factor {
  const void* data;
  DType dtype;
  bool rank_major;  // true: [rank, columns] (A);  false: [columns, rank] (B)
};

// out = alpha * drop(x) F^T               h = drop(x) A^T  and  du = s * q B
struct LowRankDown {
  const void* x;  // [rows, columns], x_dtype
  DType x_dtype;
  int64_t rows, columns, rank;
  Factor factor;
  float alpha;
  Dropout dropout;
  float* out;                  // [rows, rank]
  float* workspace = nullptr;  // CUDA alone: [low_rank_down_workspace(...)]
};

// y = out_scale * (y + alpha * mask(u F)) + bias, in place          y0 + s * u B^T  and  dx = q W + mask * (dh A)
// mask(t) is drop(t): t / (1 - p) where kept, else 0. z, if given, receives y before out_scale and bias.
// Without accumulate the y on the right is 0, and y is only written.
struct LowRankUp {
  const float* u;  // [rows, rank]
  int64_t rows, columns, rank;
  Factor factor;
  float alpha;
  Dropout dropout;
  const float* out_scale;  // [columns] or null
  const float* bias;       // [columns] or null
  void* z;                 // [rows, columns], y_dtype, or null
  void* y;                 // [rows, columns], y_dtype
  DType y_dtype;
  bool accumulate = true;
};

// grad = alpha * u^T drop(x), stored in the layout and dtype of the factor     dA = dh^T drop(x)  and  dB = s * q^T u
struct LowRankGrad {
  const float* u;  // [rows, rank]
  const void* x;   // [rows, columns], x_dtype
  DType x_dtype;
  int64_t rows, columns, rank;
  float alpha;
  Dropout dropout;
  void* grad;  // [rank, columns] if rank_major, else [columns, rank]
  DType grad_dtype;
  bool rank_major;
  float* workspace = nullptr;  // CUDA alone: [low_rank_grad_workspace(...)]
  float* sums = nullptr;       // CUDA and 16-bit x alone, [columns] or null: receives ColumnSums of x where kept
};

// out[c] = sum over rows of g[., c] * z[., c] (z null: of g)        dbias, dout_scale, and dlam with g = du, z = h
struct ColumnSums {
  const void* g;  // [rows, columns], g_dtype
  const void* z;  // the same, or null
  DType g_dtype;
  int64_t rows, columns;
  float* out;  // [columns]
};

}  // namespace peftkern
