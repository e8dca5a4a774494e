// SPDX-License-Identifier: Apache-2.0
// The norms of the rows of W + s B A (DoRA: Liu et al. 2024, arXiv 2402.09353, equation 5), in raw pointers, without
// that matrix:
//
//   norm[n]^2 = |W[n]|^2 + 2 s B[n] . P[., n] + s^2 B[n] G B[n]^T       P = A W^T [rank, out], G = A A^T [rank, rank]
//
// The terms may cancel, so all of it is in fp64 but P, a forward product of rank rows (products.h) summed in fp32:
// what its rounding leaves is derived in peftkern/ops/dora_norm.py. Torch-free.
#pragma once
#include "dtypes.h"
#include "low_rank.h"

namespace peftkern {

// out[n] = sum over c of W[n, c]^2, in fp64 of fp32 values: NF4 codes times absmax are not rounded to 16 bits.
struct SquaredRowNorms {
  const void* weight;   // [rows, columns] of dtype, or NF4: packed [ceil(rows * columns / 2)] with
  const float* absmax;  // [ceil(rows * columns / block_size)], else null
  DType dtype;
  int64_t block_size, rows, columns;
  double* out;  // [rows]
};

struct DoraNorm {
  const double* w2;  // [rows] of SquaredRowNorms
  const float* P;    // [rank, rows]
  const double* G;   // [rank, rank], symmetric
  const void* B;     // [rows, rank]
  DType B_dtype;
  int64_t rows, rank;
  double scaling;
  float* norm;  // [rows]
};

}  // namespace peftkern
