// SPDX-License-Identifier: Apache-2.0
// multi_lora_linear on CUDA: the registration.
#include "../multi_lora.h"

#include <torch/csrc/stable/library.h>

#include "backend.h"
#include "products.h"

namespace peftkern {

STABLE_TORCH_LIBRARY_IMPL(peftkern, CUDA, m) {
  m.impl("multi_lora_plan", TORCH_BOX(&multi_lora_plan<CudaBackend>));
  m.impl("multi_lora_linear", TORCH_BOX(&multi_lora_linear<CudaBackend>));
  m.impl("multi_lora_linear_backward", TORCH_BOX(&multi_lora_linear_backward<CudaBackend>));
}

}  // namespace peftkern
