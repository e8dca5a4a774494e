// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch, sm_90 and later: a kernel launched with `overlap` may start while the launch before it
// still runs, from where all blocks of that one have let it. Until wait_for_launch_before() it must not read what that
// launch writes, nor write what it touches; and every thread has to come there, so that its own end means the end of
// both. What came earlier still has ended before. tests/ptxsim checks this. Captured in a graph, it is an edge of that
// kind.
#pragma once
#include <cuda_runtime_api.h>

namespace peftkern {

// Without effect where the next launch does not overlap.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// kernel<<<blocks, threads, shared_bytes, stream>>>(args...). overlap counts only for code that waits: on sm_90, code
// of an older architecture may run as well.
template <class... Parameters, class... Args>
cudaError_t launch_kernel(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes,
                          cudaStream_t stream, bool overlap, const Args&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = stream, config.attrs = &attribute;
  if (overlap) {
    cudaFuncAttributes code;
    const cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error != cudaSuccess) return error;
    if (code.ptxVersion >= 90) config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace peftkern
