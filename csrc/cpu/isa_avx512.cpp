// SPDX-License-Identifier: Apache-2.0
// The kernels for AVX-512 F, BW, VL and DQ (Intel Skylake-X, AMD Zen 4 and later).
// Headers come before the target region: what they define is shared with every other file and must stay baseline code.
#include "convert.h"
#include "kernels.h"

#ifdef __x86_64__
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

namespace peftkern::cpu {
namespace avx512 {
#include "vec/avx512.h"
inline __m256i to_bf16(F32 a) { return round_bits_to_bf16(a); }

#include "kernels/table.inl"

#include "kernels/nf4_tiles.inl"
}  // namespace avx512

const KernelTable& avx512_kernels() {
  using namespace avx512;
  static constexpr KernelTable table = [] {
    KernelTable t = kernel_table("avx512");
    add_tiles(t);
    return t;
  }();
  return table;
}

}  // namespace peftkern::cpu
#pragma GCC pop_options
#endif
