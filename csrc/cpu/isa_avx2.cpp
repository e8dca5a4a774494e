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

#include "kernels/table.inl"

#include "kernels/nf4_tiles.inl"
}  // namespace avx2

const KernelTable& avx2_kernels() {
  using namespace avx2;
  static constexpr KernelTable table = [] {
    KernelTable t = kernel_table("avx2");
    add_tiles(t);
    return t;
  }();
  return table;
}

}  // namespace peftkern::cpu
#pragma GCC pop_options
#endif
