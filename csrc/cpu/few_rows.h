// SPDX-License-Identifier: Apache-2.0
// A product of a few rows with a dense weight, and with it a low-rank term that each row may choose. Torch-free.
#pragma once
#include "../dtypes.h"

namespace peftkern {

// u F^T of one row.
struct LowRankTerm {
  const float* u;      // [ld rounded up to kMaxLanes], zero from rank on
  const void* factor;  // [out, ld]
  int64_t rank;        // how many of the ld count; 0: no term
};

// y = x W^T + u F^T + bias
struct FewRows {
  const void* x;  // [rows of x, in]
  DType x_dtype;
  const int64_t* x_rows;  // [rows]: which row of x each is; null: the same
  int64_t rows, in, out;
  const void* weight;  // [out, in]
  DType weight_dtype;
  const float* bias;         // [out] or null
  const LowRankTerm* terms;  // [rows] or null
  DType factor_dtype;
  int64_t factor_ld;
  const int64_t* y_rows;  // as x_rows, of y
  void* y;                // [rows of y, y_ld]
  DType y_dtype;
  int64_t y_ld;
};

}  // namespace peftkern
