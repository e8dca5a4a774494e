// SPDX-License-Identifier: Apache-2.0
// The CPU as csrc/adapted_linear.h and csrc/nf4_ops.h see it. CudaBackend has the same members.
#pragma once
#include <functional>
#include <string>

#include "../dora_norm.h"
#include "../jacobi_svd.h"
#include "../low_rank.h"
#include "../multi_low_rank.h"
#include "../nf4.h"
#include "../rank_allocation.h"
#include "../tensors.h"
#include "few_rows.h"

namespace peftkern {

class CpuBackend {
 public:
  explicit CpuBackend(const Tensor&) {}

  // An uninitialised dense weight on the device of like; large ones come from a cache (large_buffers.h).
  Tensor empty_weight(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) const;

  // For the timing of products.h: what was timed where, whether this is a moment for it, and what a call takes, in
  // seconds, the median of a few from cold caches. like: a tensor on the device.
  std::string identity() const;
  bool may_time() const { return true; }
  double seconds(const Tensor& like, const std::function<void()>& call) const;

  static Addmm addmm() {
    static const auto function = library_function<Addmm>("libtorch_cpu.so", "aoti_torch_cpu_addmm_out");
    return function;
  }

  void few_rows(const FewRows&) const;
  void low_rank_down(const LowRankDown&) const;
  void low_rank_up(const LowRankUp&) const;
  void low_rank_grad(const LowRankGrad&) const;
  void column_sums(const ColumnSums&) const;

  void check_ranks(const int32_t* ranks, int64_t adapters, int64_t rank) const;  // throws for one out of range
  void multi_lora_plan(const MultiLoraPlan&) const;                              // throws for an index out of range
  void multi_lora_down(const MultiLoraDown&) const;
  void multi_lora_up(const MultiLoraUp&) const;
  void multi_lora_grad(const MultiLoraGrad&) const;

  void quantize_nf4(const QuantizeNf4&) const;
  void dequantize_nf4(const DequantizeNf4&) const;
  void nf4_few_rows(const Nf4Product&) const;
  void nf4_tiles(const Nf4Product&, bool gradient) const;  // y = x W^T + bias, or y = x W
  void quantize_absmax(const QuantizeAbsmax&) const;
  void dequantize_absmax(const DequantizeAbsmax&) const;

  void squared_row_norms(const SquaredRowNorms&) const;
  void dora_norm(const DoraNorm&) const;

  void jacobi_svd(const JacobiSvd&) const;

  static constexpr int64_t kScoreParts = 0;  // one thread sums a column of B
  static constexpr bool kGradSums = false;   // low_rank_grad leaves LowRankGrad::sums alone
  void update_importance(const ImportanceUpdate&) const;
  void rank_mask(const RankMask&) const;
  void mask_ranks(const MaskRanks&) const;
  void orthogonality(const Orthogonality&) const;
  void orthogonality_grad(const OrthogonalityGrad&) const;
};

}  // namespace peftkern
