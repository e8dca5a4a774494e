// SPDX-License-Identifier: Apache-2.0
// NF4 on CUDA: the registration.
#include "../nf4_ops.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"

namespace peftkern {

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) {
  m.impl("quantize_nf4", TORCH_BOX(&quantize_nf4<CudaBackend>));
  m.impl("dequantize_nf4", TORCH_BOX(&dequantize_nf4<CudaBackend>));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax<CudaBackend>));
  m.impl("dequantize_absmax", TORCH_BOX(&dequantize_absmax<CudaBackend>));
}

}  // namespace peftkern
