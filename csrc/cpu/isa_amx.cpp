// SPDX-License-Identifier: Apache-2.0
// The kernels for AMX with BF16 (Intel Sapphire Rapids and later): avx512bf16's, and tiles where they pay.
// Headers come before the target region: what they define is shared with every other file and must stay baseline code.
#include "convert.h"
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

namespace peftkern::cpu {
namespace amx {
#include "vec/avx512.h"

#include "kernels/low_rank.inl"
#include "kernels/low_rank_bf16.inl"
#include "kernels/nf4.inl"
#include "kernels/nf4_amx.inl"
}  // namespace amx

const KernelTable& amx_kernels() {
  using namespace amx;
  static const KernelTable table{"amx",         padded_rank,   pack_down_bf16, pack_up,      low_rank_down_bf16,
                                 low_rank_up,   low_rank_grad, column_sums,    quantize_nf4, dequantize_nf4,
                                 pack_few_rows, nf4_few_rows,  &kNf4Forward,   &kNf4Gradient};
  return table;
}

}  // namespace peftkern::cpu
#pragma GCC pop_options
#endif
