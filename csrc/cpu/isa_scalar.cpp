// SPDX-License-Identifier: Apache-2.0
// The kernels for any CPU. The other ISAs are tested against these.
#include "convert.h"
#include "kernels.h"

namespace peftkern::cpu {
namespace scalar {
#include "vec/scalar.h"

#include "kernels/low_rank.inl"
#include "kernels/nf4.inl"
}  // namespace scalar

const KernelTable& scalar_kernels() {
  using namespace scalar;
  static const KernelTable table{"scalar",      padded_rank,   pack_down,   pack_up,      low_rank_down,
                                 low_rank_up,   low_rank_grad, column_sums, quantize_nf4, dequantize_nf4,
                                 pack_few_rows, nf4_few_rows,  nullptr,     nullptr};
  return table;
}

}  // namespace peftkern::cpu
