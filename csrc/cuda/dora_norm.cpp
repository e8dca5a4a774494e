// SPDX-License-Identifier: Apache-2.0
// DoRA's norms on CUDA: the registration.
#include "../dora_norm_ops.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "products.h"

namespace peftkern {

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) {
  m.impl("squared_row_norms", TORCH_BOX(&squared_row_norms<CudaBackend>));
  m.impl("dora_norm", TORCH_BOX(&dora_norm<CudaBackend>));
}

}  // namespace peftkern
