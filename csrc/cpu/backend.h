// SPDX-License-Identifier: Apache-2.0
// The CPU as csrc/adapted_linear.h and csrc/nf4_ops.h see it. CudaBackend has the same members.
#pragma once
#include "../jacobi_svd.h"
#include "../low_rank.h"
#include "../nf4.h"
#include "../rank_allocation.h"
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
  // Up to so many rows nf4_few_rows beats dequantizing for the library: 0.60 against 2.49 ms for 1 row of 4096 x 4096,
  // 2.3 against 3.0 for 8, 3.4 against 2.7 for 12.
  static constexpr int64_t kFewRows = 8;
  void nf4_few_rows(const Nf4FewRows&) const;
  void quantize_absmax(const QuantizeAbsmax&) const;
  void dequantize_absmax(const DequantizeAbsmax&) const;

  void jacobi_svd(const JacobiSvd&) const;

  static constexpr int64_t kScoreParts = 0;  // one thread sums a column of B
  void update_importance(const ImportanceUpdate&) const;
  void rank_mask(const RankMask&) const;
  void mask_ranks(const MaskRanks&) const;
  void orthogonality(const Orthogonality&) const;
  void orthogonality_grad(const OrthogonalityGrad&) const;
};

}  // namespace peftkern
