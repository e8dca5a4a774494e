// SPDX-License-Identifier: Apache-2.0
// DoRA's norms on the CPU: rows over threads, and the registration.
#include "../dora_norm_ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "backend.h"
#include "kernels.h"
#include "products.h"
#include "split.h"

namespace peftkern {

void CpuBackend::squared_row_norms(const SquaredRowNorms& a) const {
  cpu::split(a.rows, 1, static_cast<double>(a.columns),
             [&](int64_t begin, int64_t end) { cpu::kernels().squared_row_norms(a, begin, end); });
}

void CpuBackend::dora_norm(const DoraNorm& a) const {
  cpu::split(a.rows, 1, static_cast<double>(a.rank * a.rank + 1),
             [&](int64_t begin, int64_t end) { cpu::kernels().dora_norm(a, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
  m.impl("squared_row_norms", TORCH_BOX(&squared_row_norms<CpuBackend>));
  m.impl("dora_norm", TORCH_BOX(&dora_norm<CpuBackend>));
}

}  // namespace peftkern
