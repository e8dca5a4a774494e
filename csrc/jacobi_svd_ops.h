// SPDX-License-Identifier: Apache-2.0
// The Jacobi SVD on tensors, once for all devices: check, allocate, call the backend. What is computed: jacobi_svd.h.
#pragma once
#include <tuple>

#include "jacobi_svd.h"
#include "tensors.h"

namespace peftkern {

// matrices: float64 [batch, n, n], entries below 1 -> vectors [batch, n, n], a left singular vector a row; values
// [batch, n], in no order; sweeps int32 [batch], more than kMaxJacobiSweeps where it did not converge.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> jacobi_svd(const Tensor& matrices) {
  check_dtype(matrices, ScalarType::Double, "matrices");
  PEFTKERN_CHECK(matrices.dim() == 3 && matrices.size(1) == matrices.size(2),
                 "matrices: expected shape [batch, n, n], got ", shape_string(matrices.sizes()));
  const int64_t batch = matrices.size(0), n = matrices.size(1);
  PEFTKERN_CHECK(n <= kMaxJacobiSize, "matrices: expected n <= ", kMaxJacobiSize, ", got ",
                 shape_string(matrices.sizes()));
  Tensor vectors = empty(matrices, {batch, n, n}, ScalarType::Double);
  torch::stable::copy_(vectors, torch::stable::transpose(matrices, 1, 2));
  Tensor values = empty(matrices, {batch, n}, ScalarType::Double);
  Tensor sweeps = empty(matrices, {batch}, ScalarType::Int);
  const JacobiSvd args{.vectors = static_cast<double*>(vectors.mutable_data_ptr()),
                       .values = static_cast<double*>(values.mutable_data_ptr()),
                       .sweeps = static_cast<int32_t*>(sweeps.mutable_data_ptr()),
                       .batch = batch,
                       .n = n};
  if (batch) Backend(matrices).jacobi_svd(args);
  return {vectors, values, sweeps};
}

}  // namespace peftkern
