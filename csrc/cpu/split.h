// SPDX-License-Identifier: Apache-2.0
// How the CPU's ops hand work to threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "../nf4.h"

namespace peftkern::cpu {

constexpr double kWorkPerThread = 1 << 16;  // multiply-adds; below about 10 us of work a second thread costs more

// f(begin, end) over [0, n) in whole units, on as many threads as the work (multiply-adds per element of n) is worth.
template <class F>
void split(int64_t n, int64_t unit, double work_per_element, const F& f) {
  const double units = kWorkPerThread / (work_per_element * static_cast<double>(unit) + 1.0);
  const int64_t grain = units < 1.0 ? 1 : static_cast<int64_t>(units);
  torch::stable::parallel_for(0, ceil_div(n, unit), grain,
                              [&](int64_t begin, int64_t end) { f(begin * unit, end * unit < n ? end * unit : n); });
}

inline int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

}  // namespace peftkern::cpu
