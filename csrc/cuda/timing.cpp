// SPDX-License-Identifier: Apache-2.0
// What a call takes on the GPU, between two events of its stream.
#include "../choice.h"
#include "backend.h"

namespace peftkern {

namespace {

struct Event {
  cudaEvent_t event = nullptr;
  ~Event() {
    if (event) cudaEventDestroy(event);
  }
};

}  // namespace

std::string CudaBackend::identity() const {
  int device = 0, driver = 0;
  cudaDeviceProp properties{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  return std::string(properties.name) + ", driver " + std::to_string(driver);
}

bool CudaBackend::may_time() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_, &status), "cudaStreamIsCapturing");
  return status == cudaStreamCaptureStatusNone;
}

double CudaBackend::seconds(const Tensor& like, const std::function<void()>& call) const {
  int device = 0, l2_bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device), "cudaDeviceGetAttribute");
  Tensor flush = empty(like, {2 * static_cast<int64_t>(l2_bytes)}, ScalarType::Byte);
  Event before, after;
  check(cudaEventCreate(&before.event), "cudaEventCreate");
  check(cudaEventCreate(&after.event), "cudaEventCreate");
  std::vector<double> times;
  call();
  for (int i = 0; i < kTimings; ++i) {
    check(cudaMemsetAsync(flush.mutable_data_ptr(), i, static_cast<size_t>(flush.numel()), stream_), "cudaMemsetAsync");
    check(cudaEventRecord(before.event, stream_), "cudaEventRecord");
    call();
    check(cudaEventRecord(after.event, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(after.event), "cudaEventSynchronize");
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, before.event, after.event), "cudaEventElapsedTime");
    times.push_back(1e-3 * static_cast<double>(milliseconds));
  }
  return median(std::move(times));
}

}  // namespace peftkern
