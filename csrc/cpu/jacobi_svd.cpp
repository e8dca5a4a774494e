// SPDX-License-Identifier: Apache-2.0
// The Jacobi SVD on the CPU: matrices over threads, and the registration.
#include "../jacobi_svd_ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "backend.h"
#include "kernels.h"

namespace peftkern {

namespace {

constexpr int64_t kWorkPerThread = 1 << 16;  // multiply-adds; below about 10 us of work a second thread costs more

}  // namespace

void CpuBackend::jacobi_svd(const JacobiSvd& a) const {
  const int64_t ld = (a.n + cpu::kDoubleUnit - 1) / cpu::kDoubleUnit * cpu::kDoubleUnit;
  const int64_t work = 10 * a.n * a.n * a.n + 1;  // of a matrix: some 7 sweeps of n^2 / 2 pairs, 3 n each
  torch::stable::parallel_for(0, a.batch, std::max<int64_t>(1, kWorkPerThread / work), [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(static_cast<size_t>((a.n + 1) * ld));
    cpu::kernels().jacobi_svd(a, scratch.data(), begin, end);
  });
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) { m.impl("jacobi_svd", TORCH_BOX(&jacobi_svd<CpuBackend>)); }

}  // namespace peftkern
