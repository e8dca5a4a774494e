// SPDX-License-Identifier: Apache-2.0
// Launches with more to say than <<< >>> can: overlap (grid_dependency.cuh) and clusters (cluster.cuh), both of sm_90
// and later. Whether code of these architectures runs, only the driver knows: on sm_90 an older one's may.
#pragma once
#include <cuda_runtime_api.h>

#include "cluster.cuh"

namespace peftkern {

struct Launch {
  unsigned blocks, threads;
  cudaStream_t stream;
  size_t shared_bytes = 0;
  bool overlap = false;  // start while the launch before this one runs; counts only for code that waits for it
};

// kernel<<<...>>>(args...). `parts` neighbouring blocks share a sum: in a cluster they have added them up at the end,
// as parts.cuh says; parts becomes how many are left to be added.
template <class... Parameters, class... Args>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Launch& launch, int64_t& parts, const Args&... args) {
  cudaFuncAttributes code = {};
  if (launch.overlap || parts > 1) {
    const cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error != cudaSuccess) return error;
  }
  const bool knows_attributes = code.ptxVersion >= 90;
  const auto launch_in_clusters = [&](unsigned blocks) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(launch.blocks), config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes, config.stream = launch.stream, config.attrs = attributes;
    if (launch.overlap && knows_attributes) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (blocks > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, args...);
  };
  const unsigned blocks = static_cast<unsigned>(parts < kClusterBlocks ? parts : kClusterBlocks);
  if (knows_attributes && blocks > 1 && parts % blocks == 0) {
    const cudaError_t error = launch_in_clusters(blocks);
    if (error == cudaSuccess) parts /= blocks;
    if (error != cudaErrorInvalidClusterSize) return error;
    cudaGetLastError();  // a small share of a GPU has no room for them
  }
  return launch_in_clusters(1);
}

}  // namespace peftkern
