// SPDX-License-Identifier: Apache-2.0
// The kernels for AVX2, FMA and F16C (Intel Haswell, AMD Excavator and later).
// Headers come before the target region: what they define is shared with every other file and must stay baseline code.
#include "convert.h"
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace peftkern::cpu {
namespace avx2 {
#include "vec/avx2.h"

#include "kernels/low_rank.inl"
#include "kernels/nf4.inl"
}  // namespace avx2

const KernelTable& avx2_kernels() {
  using namespace avx2;
  static const KernelTable table{"avx2",        padded_rank,   pack_down,   pack_up,      low_rank_down,
                                 low_rank_up,   low_rank_grad, column_sums, quantize_nf4, dequantize_nf4,
                                 pack_few_rows, nf4_few_rows,  nullptr,     nullptr};
  return table;
}

}  // namespace peftkern::cpu
#pragma GCC pop_options
#endif
