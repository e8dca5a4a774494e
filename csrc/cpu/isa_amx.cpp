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

#include "kernels/table_bf16.inl"

#include "kernels/nf4_amx.inl"
}  // namespace amx

const KernelTable& amx_kernels() {
  using namespace amx;
  static constexpr KernelTable table = [] {
    KernelTable t = bf16_kernel_table("amx");
    t.nf4_forward[static_cast<int>(DType::bf16)] = &kNf4Forward;
    t.nf4_gradient[static_cast<int>(DType::bf16)] = &kNf4Gradient;
    return t;
  }();
  return table;
}

}  // namespace peftkern::cpu
#pragma GCC pop_options
#endif
