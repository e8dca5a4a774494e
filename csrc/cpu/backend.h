// SPDX-License-Identifier: Apache-2.0
// The CPU as csrc/adapted_linear.h and csrc/nf4_ops.h see it. CudaBackend has the same members.
#pragma once
#include "../low_rank.h"
#include "../nf4.h"
#include "../tensors.h"

namespace peftkern {

class CpuBackend {
 public:
  explicit CpuBackend(const Tensor&) {}

  // An uninitialised dense weight on the device of like; large ones come from a cache (large_buffers.h).
  Tensor empty_weight(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) const;

  void low_rank_down(const LowRankDown&) const;
  void low_rank_up(const LowRankUp&) const;
  void low_rank_grad(const LowRankGrad&) const;
  void column_sums(const ColumnSums&) const;

  void quantize_nf4(const QuantizeNf4&) const;
  void dequantize_nf4(const DequantizeNf4&) const;
  void nf4_few_rows(const Nf4Product&) const;
  void nf4_tiles(const Nf4Product&, bool gradient) const;  // y = x W^T + bias, or y = x W
  void quantize_absmax(const QuantizeAbsmax&) const;
  void dequantize_absmax(const DequantizeAbsmax&) const;
};

}  // namespace peftkern
