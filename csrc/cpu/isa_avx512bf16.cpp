// SPDX-License-Identifier: Apache-2.0
// The kernels for AVX-512 with BF16 (Intel Cooper Lake and Sapphire Rapids, AMD Zen 4 and later): avx512's, and the
// bf16 dot product where both factors are bf16.
// Headers come before the target region: what they define is shared with every other file and must stay baseline code.
#include "convert.h"
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

namespace peftkern::cpu {
namespace avx512bf16 {
#include "vec/avx512.h"

#include "kernels/table_bf16.inl"
}  // namespace avx512bf16

const KernelTable& avx512bf16_kernels() {
  using namespace avx512bf16;
  static constexpr KernelTable table = bf16_kernel_table("avx512bf16");
  return table;
}

}  // namespace peftkern::cpu
#pragma GCC pop_options
#endif
