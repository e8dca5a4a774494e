// SPDX-License-Identifier: Apache-2.0
// adapted_linear on CUDA: the registration.
#include "../adapted_linear.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "products.h"

namespace peftkern {

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) {
  add_product_names<CudaBackend, ForwardProduct>("forward");
  add_product_names<CudaBackend, GradientProduct>("gradient");
  m.impl("adapted_linear", TORCH_BOX(&adapted_linear<CudaBackend>));
  m.impl("adapted_linear_backward", TORCH_BOX(&adapted_linear_backward<CudaBackend>));
  m.impl("product_ways", TORCH_BOX(&product_ways<CudaBackend>));
}

}  // namespace peftkern
