// SPDX-License-Identifier: Apache-2.0
// AdaLoRA's rank allocation on CUDA: the registration.
#include "../rank_allocation_ops.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"

namespace peftkern {

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) {
  m.impl("update_importance_", TORCH_BOX(&update_importance_lists<CudaBackend>));
  m.impl("update_importance_table_", TORCH_BOX(&update_importance_table<CudaBackend>));
  m.impl("rank_mask", TORCH_BOX(&rank_mask<CudaBackend>));
  m.impl("mask_ranks_", TORCH_BOX(&mask_ranks_list<CudaBackend>));
  m.impl("mask_ranks_table_", TORCH_BOX(&mask_ranks_table<CudaBackend>));
  m.impl("orthogonality", TORCH_BOX(&orthogonality<CudaBackend>));
  m.impl("orthogonality_backward", TORCH_BOX(&orthogonality_backward<CudaBackend>));
}

}  // namespace peftkern
