// SPDX-License-Identifier: Apache-2.0
// A CUDA runtime that runs nothing: what nvcc's host code calls, with every kernel launch handed to a callback, at once
// or, captured in a graph, when that is launched. Linked to the package's own launchers instead of libcudart, it shows
// what they ask for: kernel, grid, block, dynamic shared memory, arguments. What the real runtime refuses is refused
// here, with the same error.
//
// Only what the launchers use is here. A launcher that starts to call another runtime function fails to link (-z defs)
// until that function is added.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// What a stream was given while it was captured, in order.
struct CUgraph_st {
  std::vector<std::function<cudaError_t()>> nodes;
  bool ends_with_kernel = false;  // from which a programmatic edge can go
};
struct CUgraphExec_st : CUgraph_st {};

namespace {

// Returns a cudaError_t: the simulator refuses blocks above the launch bounds and passes its own failures on.
// overlaps: programmatic stream serialization, so the launch may start before the one before it has ended. cluster: so
// many blocks along x run together.
using LaunchCallback = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared_memory,
                               void* stream, void** arguments, int overlaps, unsigned cluster);
// Sizes in bytes of a kernel's parameters; returns how many there are, or -1.
using ParametersCallback = int (*)(const char* kernel, size_t* sizes);
constexpr int kMaxParameters = 64;

struct Kernel {
  std::string name;                    // mangled, as in the PTX
  int max_dynamic_shared = 48 * 1024;  // cudaFuncSetAttribute raises it
};

struct Configuration {
  dim3 grid, block;
  size_t shared_memory;
  void* stream;
};

constexpr int kMaxSharedMemory = 227 * 1024;  // of a block, sm_90 and sm_100; sm_80 has 163 KB
constexpr int kManyClusters = 9999;
constexpr unsigned kMaxCluster = 8;  // without cudaFuncAttributeNonPortableClusterSizeAllowed

using Clock = std::chrono::steady_clock;

LaunchCallback launch_callback = nullptr;
ParametersCallback parameters_callback = nullptr;
int ptx_version = 80;                               // of the simulated code: 10 * major + minor
int cluster_room = kManyClusters;                   // how many clusters run at once, of any size
thread_local cudaError_t last_error = cudaSuccess;  // the first one not yet asked for

// As in the real runtime, each thread has its own error and its own launches.
// Functions, as other static objects may use them before this file's would be made.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> map;
  return map;
}
std::vector<Configuration>& configurations() {
  static thread_local std::vector<Configuration> stack;
  return stack;
}

cudaError_t record(cudaError_t error) {
  if (last_error == cudaSuccess) last_error = error;
  return error;
}

// The capture that is going on, if any: of one stream, in cudaStreamCaptureModeGlobal.
struct Capture {
  cudaStream_t stream = nullptr;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  std::unique_ptr<CUgraph_st> graph;

  bool active() const { return status != cudaStreamCaptureStatusNone; }
  // The default stream would have to wait for the one that is captured.
  bool takes(cudaStream_t given) const { return active() && (given == stream || !given); }
  cudaError_t invalidate(cudaError_t error) {
    status = cudaStreamCaptureStatusInvalidated;
    return record(error);
  }
};
Capture capture;

// Does what a stream is given, or makes it a node of the graph.
cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work, bool is_kernel = false) {
  if (!capture.takes(stream)) return record(work());
  if (!stream) return capture.invalidate(cudaErrorStreamCaptureImplicit);
  if (capture.status == cudaStreamCaptureStatusInvalidated) return record(cudaErrorStreamCaptureInvalidated);
  capture.graph->nodes.push_back(std::move(work));
  capture.graph->ends_with_kernel = is_kernel;
  return cudaSuccess;
}
// What waits for the device must not be called while a stream is captured.
cudaError_t refuse_in_capture() {
  return capture.active() ? capture.invalidate(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

bool valid(dim3 grid, dim3 block) {
  const bool grid_fits =
      grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
  const bool block_fits = block.x >= 1 && block.y >= 1 && block.z >= 1 && block.z <= 64 &&
                          static_cast<uint64_t>(block.x) * block.y * block.z <= 1024;
  return grid_fits && block_fits;
}

cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_memory, cudaStream_t stream,
                   bool overlaps, unsigned cluster) {
  const auto kernel = kernels().find(stub);
  if (kernel == kernels().end()) return record(cudaErrorInvalidDeviceFunction);
  if (!valid(grid, block)) return record(cudaErrorInvalidConfiguration);
  if (shared_memory > static_cast<size_t>(kernel->second.max_dynamic_shared)) return record(cudaErrorInvalidValue);
  auto run = [=, name = kernel->second.name](void** values, bool overlap) {
    const unsigned grid_sizes[3] = {grid.x, grid.y, grid.z}, block_sizes[3] = {block.x, block.y, block.z};
    return static_cast<cudaError_t>(
        launch_callback(name.c_str(), grid_sizes, block_sizes, shared_memory, stream, values, overlap, cluster));
  };
  if (!capture.takes(stream)) return record(run(arguments, overlaps));
  size_t sizes[kMaxParameters];
  const int count = parameters_callback(kernel->second.name.c_str(), sizes);
  if (count < 0) return record(cudaErrorInvalidDeviceFunction);
  std::vector<std::string> copies;  // a node keeps the values of this moment
  for (int i = 0; i < count; ++i) copies.emplace_back(static_cast<const char*>(arguments[i]), sizes[i]);
  const bool edge = overlaps && capture.graph->ends_with_kernel;
  auto node = [run, copies, edge]() mutable {
    std::vector<void*> values;
    for (std::string& copy : copies) values.push_back(copy.data());
    return run(values.data(), edge);
  };
  return enqueue(stream, node, true);
}

}  // namespace

extern "C" {

void cudart_set_callbacks(LaunchCallback launch, ParametersCallback parameters) {
  launch_callback = launch, parameters_callback = parameters;
}
// An error that a launcher left behind without returning it.
int cudart_pending_error() { return last_error; }
void cudart_clear_error() { last_error = cudaSuccess; }

// ---- registration, called by the static initializers of every .cu file
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[stub].name = name;
}
// Module data lives in the simulator, which reads its values from the PTX.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

// ---- kernel<<<grid, block, shared_memory, stream>>>(arguments)
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_memory, struct CUstream_st* stream) {
  configurations().push_back({grid, block, shared_memory, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_memory, void* stream) {
  const Configuration top = configurations().back();
  configurations().pop_back();
  *grid = top.grid, *block = top.block, *shared_memory = top.shared_memory;
  std::memcpy(stream, &top.stream, sizeof(void*));
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  std::memcpy(kernel, &stub, sizeof(stub));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_memory,
                             cudaStream_t stream) {
  return launch(stub, grid, block, arguments, shared_memory, stream, false, 1);
}
// Of the attributes of a launch only these two are known, and code of an architecture without them is refused them.
// (Which error the real runtime gives for a wrong cluster is read from its manual, not seen.)
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  bool overlaps = false;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      overlaps = attribute.val.programmaticStreamSerializationAllowed;
    } else if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& size = attribute.val.clusterDim;
      const bool fits = size.x >= 1 && size.x <= kMaxCluster && size.y == 1 && size.z == 1;
      if (ptx_version < 90 || !fits || config->gridDim.x % size.x) return record(cudaErrorInvalidClusterSize);
      cluster = size.x;
    } else {
      return record(cudaErrorInvalidValue);
    }
  }
  if (overlaps && ptx_version < 90) return record(cudaErrorInvalidValue);
  return launch(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream, overlaps,
                cluster);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_memory,
                               cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_memory, stream);
}

// ---- the rest
// What is cached for a device is not for another: each of these pairs has a number of its own.
void cudart_set_device(int version, int clusters) {
  ptx_version = version, cluster_room = std::min(clusters, kManyClusters);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  if (!kernels().contains(stub)) return record(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = ptx_version;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const auto kernel = kernels().find(stub);
  if (kernel == kernels().end()) return record(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > kMaxSharedMemory) return record(cudaErrorInvalidValue);
    kernel->second.max_dynamic_shared = value;
  }
  return cudaSuccess;
}
// A device for what the package times: an event is the clock of this machine, which is no GPU's.
cudaError_t cudaGetDevice(int* device) {
  return *device = ptx_version * (kManyClusters + 1) + cluster_room, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* stub, int, size_t,
                                                                   unsigned) {
  return *blocks = 2, kernels().contains(stub) ? cudaSuccess : record(cudaErrorInvalidDeviceFunction);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* stub, const cudaLaunchConfig_t*) {
  if (ptx_version < 90) return record(cudaErrorInvalidClusterSize);
  return *clusters = cluster_room, kernels().contains(stub) ? cudaSuccess : record(cudaErrorInvalidDeviceFunction);
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "simulated");
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrL2CacheSize: return *value = 1 << 20, cudaSuccess;
    case cudaDevAttrMultiProcessorCount: return *value = 4, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *value = ptx_version / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *value = ptx_version % 10, cudaSuccess;
    default: return record(cudaErrorInvalidValue);
  }
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t stream) {
  return enqueue(stream, [=] { return std::memset(target, value, bytes), cudaSuccess; });
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return *event = reinterpret_cast<cudaEvent_t>(new Clock::time_point), cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return delete reinterpret_cast<Clock::time_point*>(event), cudaSuccess;
}
// In a capture an event is a place in the graph, neither a moment nor a node.
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (!capture.takes(stream)) *reinterpret_cast<Clock::time_point*>(event) = Clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return refuse_in_capture(); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  if (const cudaError_t error = refuse_in_capture(); error != cudaSuccess) return error;
  const auto elapsed = *reinterpret_cast<Clock::time_point*>(end) - *reinterpret_cast<Clock::time_point*>(start);
  return *milliseconds = std::chrono::duration<float, std::milli>(elapsed).count(), cudaSuccess;
}

// ---- graphs
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream) return record(cudaErrorStreamCaptureUnsupported);
  if (capture.active()) return record(cudaErrorIllegalState);
  capture = {stream, cudaStreamCaptureStatusActive, std::make_unique<CUgraph_st>()};
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return *status = stream == capture.stream ? capture.status : cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (!capture.active() || stream != capture.stream) return record(cudaErrorIllegalState);
  Capture ended = std::exchange(capture, Capture());
  if (ended.status == cudaStreamCaptureStatusInvalidated) return record(cudaErrorStreamCaptureInvalidated);
  return *graph = ended.graph.release(), cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return *executable = new CUgraphExec_st{*graph}, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  for (const auto& node : executable->nodes) {
    if (const cudaError_t error = enqueue(stream, node); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) { return delete executable, cudaSuccess; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorInvalidClusterSize: return "cluster misconfiguration";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    default: return "unrecognized error code";
  }
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

}  // extern "C"
