// SPDX-License-Identifier: Apache-2.0
// Launches with more to say than <<< >>> can: overlap (grid_dependency.cuh) and clusters (cluster.cuh), both of sm_90
// and later. Whether code of these architectures runs, only the driver knows: on sm_90 an older one's may.
#pragma once
#include <cuda_runtime_api.h>

#include <map>
#include <utility>

#include "cluster.cuh"

namespace peftkern {

struct Launch {
  unsigned blocks, threads;
  cudaStream_t stream;
  size_t shared_bytes = 0;
  bool overlap = false;  // start while the launch before this one runs; counts only for code that waits for it
};

// The parts of the sums that a kernel makes, each by blocks of its own; after a launch in clusters, which have added
// theirs up, what is left of them. And how many of them are added before these sums are (parts.cuh).
struct PartsLeft {
  int parts, together = kClusterBlocks;

  explicit PartsLeft(int64_t made) : parts(static_cast<int>(made)) {}
};

// A launch with attributes.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(const Launch& launch, bool overlap, unsigned cluster) {
    config.gridDim = dim3(launch.blocks), config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes, config.stream = launch.stream, config.attrs = attributes;
    if (overlap) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// How many blocks of a kernel the current device runs at once: as they come, and in clusters of so many. A cluster lies
// within a part of the GPU (16 or 18 multiprocessors of an H100), a share of a GPU may have no room for any.
struct Room {
  int64_t blocks = 0, in_clusters = 0;
};

template <class Kernel>
Room room_for(Kernel kernel, const Launch& launch, unsigned cluster) {
  int device = 0, multiprocessors = 0, blocks = 0, clusters = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  static thread_local std::map<std::pair<std::pair<const void*, int>, unsigned>, Room> known;
  const auto [entry, is_new] = known.try_emplace({{reinterpret_cast<const void*>(kernel), device}, cluster});
  if (is_new) {
    const LaunchConfig with(launch, false, cluster);
    const bool asked =
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(launch.threads),
                                                      launch.shared_bytes) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &with.config) == cudaSuccess;
    if (asked)
      entry->second = {static_cast<int64_t>(multiprocessors) * blocks, static_cast<int64_t>(clusters) * cluster};
    cudaGetLastError();
  }
  return entry->second;
}

// kernel<<<...>>>(args...). Neighbouring blocks share sums of `left` parts: in clusters they add them up, unless some
// would then have to wait for others, and would not without.
template <class... Parameters, class... Args>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Launch& launch, PartsLeft& left, const Args&... args) {
  cudaFuncAttributes code = {};
  if (launch.overlap || left.parts > 1) {
    const cudaError_t error = cudaFuncGetAttributes(&code, kernel);
    if (error != cudaSuccess) return cudaGetLastError();
  }
  const bool knows_attributes = code.ptxVersion >= 90;
  unsigned cluster = static_cast<unsigned>(left.parts < kClusterBlocks ? left.parts : kClusterBlocks);
  if (!knows_attributes || left.parts % cluster != 0) cluster = 1;
  if (cluster > 1) {
    const Room room = room_for(kernel, launch, cluster);
    if (room.in_clusters < (launch.blocks <= room.blocks ? launch.blocks : cluster)) cluster = 1;
  }
  const LaunchConfig with(launch, launch.overlap && knows_attributes, cluster);
  if (cudaLaunchKernelEx(&with.config, kernel, args...) != cudaSuccess) return cudaGetLastError();
  if (cluster > 1) left.parts /= static_cast<int>(cluster), left.together = 1;
  return cudaSuccess;
}

}  // namespace peftkern
