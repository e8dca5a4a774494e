// SPDX-License-Identifier: Apache-2.0
// Launchers, most with one mistake each, for the tests of cudart.cpp.
#include <cuda_runtime_api.h>

__global__ void nothing() {}

extern "C" {

int no_blocks() {
  nothing<<<0, 32>>>();
  return cudaGetLastError();
}
int too_many_threads() {
  nothing<<<1, 1056>>>();
  return cudaGetLastError();
}
int grid_y_too_large() {
  nothing<<<dim3(1, 65536), 32>>>();
  return cudaGetLastError();
}
int shared_memory_without_attribute() {
  nothing<<<1, 32, 60 * 1024>>>();
  return cudaGetLastError();
}
int attribute_too_large() {
  cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 256 * 1024);
  return cudaGetLastError();
}
int shared_memory_with_attribute() {
  cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 60 * 1024);
  nothing<<<1, 32, 60 * 1024>>>();
  return cudaGetLastError();
}
int cluster_launch(unsigned blocks, unsigned x, unsigned y, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = x, attribute.val.clusterDim.y = y, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(32), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  cudaLaunchKernelEx(&config, nothing);
  return cudaGetLastError();
}
// As a launcher that times itself; inside a capture it may not wait.
int wait_for_itself(cudaStream_t stream) {
  cudaEvent_t event;
  cudaEventCreate(&event);
  nothing<<<1, 32, 0, stream>>>();
  cudaEventRecord(event, stream);
  const cudaError_t error = cudaEventSynchronize(event);
  cudaEventDestroy(event);
  return error;
}
int launch_nothing(cudaStream_t stream) {
  nothing<<<1, 32, 0, stream>>>();
  return cudaGetLastError();
}
int forgotten_error() {
  nothing<<<0, 32>>>();
  return 0;
}

}  // extern "C"
