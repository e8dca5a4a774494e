// SPDX-License-Identifier: Apache-2.0
// Included before every csrc/cuda/*.cpp when it is compiled for the tests: the same code, with three names replaced, so
// that the CUDA ops run on CPU tensors and the simulator.
#pragma once
// First everything that must see the names as they are.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

namespace torch::stable::accelerator {
// A CPU tensor has no device to switch to.
struct NoDeviceGuard {
  explicit NoDeviceGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoDeviceGuard

// current_cuda_stream() of backend.h looks torch's own function up. Every launch here is on this stream.
inline int32_t simulated_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(PTXSIM_STREAM);
  return 0;
}
// The library's product of CUDA tensors is that of CPU tensors.
inline void* simulated_function(const char* name) {
  if (std::strstr(name, "stream")) return reinterpret_cast<void*>(&simulated_stream);
  return dlsym(dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY), "aoti_torch_cpu_addmm_out");
}
#define dlopen(name, mode) reinterpret_cast<void*>(1)
#define dlsym(library, name) simulated_function(name)

// The registrations say (peftkern, CUDA).
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(peftkern_simulated, CPU, m, C10_UID)
