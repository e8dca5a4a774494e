// SPDX-License-Identifier: Apache-2.0
// DoRA's norms on CUDA: the registration.
#include "../dora_norm_ops.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "products.h"

namespace peftkern {

// Of an NF4 weight in 16 bits as a layer's product with it, whose rows are A's; the sums stay float32. The library's
// way would write the whole weight in float32, and read it again.
static Tensor dora_product(const CudaBackend& backend, const Terms& base, const Tensor& A, ScalarType dtype) {
  const Tensor a = dense(to_dtype(A, dtype));
  if (!can_fuse(base, a)) return dora_product<CudaBackend>(backend, base, A, dtype);
  return fused_forward(backend, ForwardProduct{base, a, std::nullopt, std::nullopt, std::nullopt}, ScalarType::Float);
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) {
  m.impl("squared_row_norms", TORCH_BOX(&squared_row_norms<CudaBackend>));
  m.impl("dora_norm", TORCH_BOX(&dora_norm<CudaBackend>));
}

}  // namespace peftkern
