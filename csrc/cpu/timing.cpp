// SPDX-License-Identifier: Apache-2.0
// What a call takes on the CPU, by the wall clock.
#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <cstring>

#include "../choice.h"
#include "backend.h"
#include "dispatch.h"

namespace peftkern {

namespace {
// More than the second level of all cores holds. Last levels, up to 480 MiB, are shared with whatever else runs.
constexpr size_t kFlushBytes = size_t{32} << 20;
}  // namespace

std::string CpuBackend::identity() const {
  return std::string("cpu ") + cpu::kernels().name + ", " + std::to_string(torch::stable::get_num_threads()) +
         " threads";
}

double CpuBackend::seconds(const Tensor&, const std::function<void()>& call) const {
  using clock = std::chrono::steady_clock;
  std::vector<char> flush(kFlushBytes);
  std::vector<double> times;
  call();
  for (int i = 0; i < kTimings; ++i) {
    std::memset(flush.data(), i, flush.size());
    const auto start = clock::now();
    call();
    times.push_back(std::chrono::duration<double>(clock::now() - start).count());
  }
  return median(std::move(times));
}

}  // namespace peftkern
