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
  float* sums = nullptr;       // CUDA and 16-bit x alone, [columns] or null: receives ColumnSums::sums of x where kept
};

// q = g * scale, and over the rows the sums of g and of g * z, in one pass: of these what is not null
//         q, dbias, dout_scale with scale = out_scale        dh, dlam with g = du, scale = lam, z = h
struct ColumnSums {
  const void* g;  // [rows, columns], dtype
  DType dtype;    // of g, z and q
  int64_t rows, columns;
  const void* z = nullptr;       // as g; read for dots alone
  const float* scale = nullptr;  // [columns]; read for q alone
  void* q = nullptr;             // [rows, columns] or null: rounded once
  float* sums = nullptr;         // [columns] or null: sum over rows of g
  float* dots = nullptr;         // [columns] or null: sum over rows of g * z
  float* workspace = nullptr;    // CUDA alone: [column_sums_workspace(...)]
};

}  // namespace peftkern
