// SPDX-License-Identifier: Apache-2.0
// The kernels for any CPU. The other ISAs are tested against these.
#include "convert.h"
#include "kernels.h"

namespace peftkern::cpu {
namespace scalar {
#include "vec/scalar.h"

#include "kernels/table.inl"
}  // namespace scalar

const KernelTable& scalar_kernels() {
  using namespace scalar;
  static constexpr KernelTable table = kernel_table("scalar");
  return table;
}

}  // namespace peftkern::cpu
