// SPDX-License-Identifier: Apache-2.0
// The Jacobi SVD on CUDA: the registration.
#include "../jacobi_svd_ops.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"

namespace peftkern {

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) { m.impl("jacobi_svd", TORCH_BOX(&jacobi_svd<CudaBackend>)); }

}  // namespace peftkern
