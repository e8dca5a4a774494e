// SPDX-License-Identifier: Apache-2.0
// A few rows times a dense weight on the CPU: columns over threads. The kernel of few_rows.h also makes the low-rank
// products of so few rows, which take longer to pack for the kernels of low_rank.h than to multiply.
#include "few_rows.h"

#include <vector>

#include "backend.h"
#include "kernels.h"
#include "split.h"

namespace peftkern {

using cpu::kernels;
using cpu::kMaxLanes;
using cpu::round_up;

void CpuBackend::few_rows(const FewRows& a) const {
  constexpr int64_t kColumns = 8;  // of a unit: as many as any tile
  const auto& k = kernels();
  std::vector<float> widened;
  if (k.widens_few_rows(a)) {
    widened.resize(static_cast<size_t>(a.rows * round_up(a.in, kMaxLanes)));
    k.widen_few_rows(a, widened.data());
  }
  // Dot products of rows as they lie run at four times the rate that split() assumes: 8 rows times a factor of 16 x 576
  // take 3 us, and a second thread 5.
  cpu::split(a.out, kColumns, static_cast<double>(a.rows * a.in) / 4.0,
             [&](int64_t begin, int64_t end) { k.few_rows(a, widened.data(), begin, end); });
}

}  // namespace peftkern
