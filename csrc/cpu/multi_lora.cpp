// SPDX-License-Identifier: Apache-2.0
// multi_lora_linear on the CPU: the plan, its kernels over threads, and the registration.
#include "../multi_lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "backend.h"
#include "kernels.h"
#include "products.h"
#include "split.h"

namespace peftkern {

using cpu::kColumnSpan;
using cpu::kColumnUnit;
using cpu::kernels;
using cpu::kRowChunk;

namespace {

// Entries of one adapter, and how many of the bank's ranks are its own.
struct Chunk {
  int64_t adapter, rank, entry0, entry1;
};

int64_t rank_of(const int32_t* ranks, int64_t rank, int64_t adapter) { return ranks ? ranks[adapter] : rank; }

std::vector<Chunk> chunks_of(const RowGroups& groups, const int32_t* ranks, int64_t rank) {
  std::vector<Chunk> chunks;
  for (int64_t a = 0; a < groups.adapters; ++a)
    for (int64_t e = groups.offsets[a]; e < groups.offsets[a + 1]; e += kRowChunk)
      chunks.push_back({a, rank_of(ranks, rank, a), e, std::min(e + kRowChunk, groups.offsets[a + 1])});
  return chunks;
}

const void* factor_of(const FactorBank& bank, int64_t adapter, int64_t elements) {
  const int64_t bytes = bank.dtype == DType::f32 ? 4 : 2;
  return static_cast<const char*>(bank.data) + adapter * elements * bytes;
}

// multi_lora_down of a few entries of one adapter, by the kernel that low_rank_down takes for so few rows
void few_rows_down(const MultiLoraDown& a, const Chunk& c) {
  const auto& k = kernels();
  const FewRows few{.x = a.x,
                    .x_dtype = a.x_dtype,
                    .x_rows = a.groups.order + c.entry0,
                    .rows = c.entry1 - c.entry0,
                    .in = a.columns,
                    .out = c.rank,
                    .weight = factor_of(a.factors, c.adapter, a.rank * a.columns),
                    .weight_dtype = a.factors.dtype,
                    .bias = nullptr,
                    .terms = nullptr,
                    .factor_dtype = DType::f32,
                    .factor_ld = 0,
                    .y_rows = nullptr,
                    .y = a.out + c.entry0 * a.rank,
                    .y_dtype = DType::f32,
                    .y_ld = a.rank};
  std::vector<float> widened;
  if (k.widens_few_rows(few)) {
    widened.resize(static_cast<size_t>(few.rows * cpu::round_up(few.in, cpu::kMaxLanes)));
    k.widen_few_rows(few, widened.data());
  }
  k.few_rows(few, widened.data(), 0, few.out);
  for (int64_t e = c.entry0; e < c.entry1; ++e) std::fill(a.out + e * a.rank + c.rank, a.out + (e + 1) * a.rank, 0.0f);
}

}  // namespace

// Entries in the order of the plan, each with its row and its adapter's B.
Tensor few_rows_mixed(const CpuBackend& backend, const ForwardProduct& p, const MultiLoraUp& up) {
  std::vector<RowTerm> terms;
  for (int64_t a = 0; a <= up.groups.adapters; ++a) {
    const bool any = a < up.groups.adapters;
    for (int64_t e = up.groups.offsets[a]; e < up.groups.offsets[a + 1]; ++e)
      terms.push_back({any ? up.u + e * up.rank : nullptr,
                       any ? factor_of(up.factors, a, up.columns * up.rank) : up.factors.data,
                       any ? rank_of(up.factors.ranks, up.rank, a) : 0, up.alphas && any ? up.alphas[a] : up.alpha});
  }
  return few_rows_product(backend, p, terms, up.rank, up.factors.dtype, up.groups.order);
}

void CpuBackend::check_ranks(const int32_t* ranks, int64_t adapters, int64_t rank) const {
  for (int64_t a = 0; ranks && a < adapters; ++a)
    PEFTKERN_CHECK(ranks[a] >= 0 && ranks[a] <= rank, "ranks: expected 0 to ", rank, ", got ", ranks[a],
                   " for adapter ", a);
}

void CpuBackend::multi_lora_plan(const MultiLoraPlan& a) const {
  const int64_t run = a.indices ? a.rows / a.indices : 1;
  for (int64_t i = 0; i < a.indices; ++i) {
    PEFTKERN_CHECK(a.index[i] >= -1 && a.index[i] < a.adapters, "adapter_index: expected -1 (no adapter) to ",
                   a.adapters - 1, ", got ", a.index[i], " at position ", i);
  }
  const auto group = [&](int64_t row) { return a.index[row / run] < 0 ? a.adapters : a.index[row / run]; };
  std::fill_n(a.offsets, a.adapters + 2, int64_t{0});
  for (int64_t row = 0; row < a.rows; ++row) ++a.offsets[group(row) + 1];
  for (int64_t g = 0; g <= a.adapters; ++g) a.offsets[g + 1] += a.offsets[g];
  std::copy_n(a.offsets, a.adapters + 1, a.cursor);
  for (int64_t row = 0; row < a.rows; ++row) a.order[a.cursor[group(row)]++] = row;
  int64_t tile = 0;
  for (int64_t g = 0; g <= a.adapters; ++g)
    for (int64_t e = a.offsets[g]; e < a.offsets[g + 1]; e += kRowTile, ++tile)
      a.tiles[2 * tile] = g, a.tiles[2 * tile + 1] = e;
  for (; tile < max_row_tiles(a.rows, a.adapters); ++tile) a.tiles[2 * tile] = -1, a.tiles[2 * tile + 1] = 0;
}

void CpuBackend::multi_lora_down(const MultiLoraDown& a) const {
  const auto& k = kernels();
  const int64_t ld = k.padded_rank(a.rank);
  const std::vector<Chunk> chunks = chunks_of(a.groups, a.factors.ranks, a.rank);
  const int64_t entries = a.groups.offsets[a.groups.adapters];
  const auto count = static_cast<int64_t>(chunks.size());
  // as in low_rank_down, so that a row has the bits it has in a batch of one adapter
  const bool few =
      a.groups.rows <= cpu::kFewRows && a.factors.rank_major && !a.alphas && a.alpha == 1.0f && !a.dropout.threshold;
  const double rows = static_cast<double>(entries) / static_cast<double>(std::max<int64_t>(count, 1));
  cpu::split(count, 1, (rows + 8.0) * static_cast<double>(a.columns * ld), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(few ? 0 : static_cast<size_t>((kRowChunk + cpu::kPanelDepth) * ld));
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& c = chunks[i];
      if (few) {
        few_rows_down(a, c);
      } else {
        k.multi_lora_down(a, c.adapter, c.rank, c.entry0, c.entry1, scratch.data());
      }
    }
  });
  std::fill(a.out + entries * a.rank, a.out + a.groups.rows * a.rank, 0.0f);  // rows without adapter
}

void CpuBackend::multi_lora_up(const MultiLoraUp& a) const {
  const auto& k = kernels();
  const std::vector<Chunk> chunks = chunks_of(a.groups, a.factors.ranks, a.rank);
  const int64_t entries = a.groups.offsets[a.groups.adapters], spans = ceil_div(a.columns, kColumnSpan);
  const auto count = static_cast<int64_t>(chunks.size());
  const double rows = static_cast<double>(entries) / static_cast<double>(std::max<int64_t>(count, 1));
  cpu::split(count * spans, 1, (rows + 8.0) * static_cast<double>(a.rank * kColumnSpan),
             [&](int64_t begin, int64_t end) {
               std::vector<float> scratch(static_cast<size_t>(k.padded_rank(a.rank) * kColumnSpan));
               for (int64_t i = begin; i < end; ++i) {
                 const Chunk& c = chunks[i / spans];
                 if (c.rank == 0) continue;
                 const int64_t column = i % spans * kColumnSpan;
                 k.multi_lora_up(a, c.adapter, c.rank, c.entry0, c.entry1, column,
                                 std::min(column + kColumnSpan, a.columns), scratch.data());
               }
             });
}

void CpuBackend::multi_lora_grad(const MultiLoraGrad& a) const {
  const auto& k = kernels();
  const int64_t units = ceil_div(a.columns, kColumnUnit);
  const double rows = static_cast<double>(a.groups.rows) / static_cast<double>(a.groups.adapters);
  cpu::split(a.groups.adapters * units, 1, (rows + 1.0) * static_cast<double>(a.rank * kColumnUnit),
             [&](int64_t begin, int64_t end) {
               std::vector<float> scratch(static_cast<size_t>(cpu::round_up(a.rank, cpu::kRowUnit) * kColumnUnit));
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t adapter = i / units, column = i % units * kColumnUnit;
                 k.multi_lora_grad(a, adapter, rank_of(a.ranks, a.rank, adapter), column,
                                   std::min(column + kColumnUnit, a.columns), scratch.data());
               }
             });
}

STABLE_TORCH_LIBRARY_IMPL(peftkern, CPU, m) {
  m.impl("multi_lora_plan", TORCH_BOX(&multi_lora_plan<CpuBackend>));
  m.impl("multi_lora_linear", TORCH_BOX(&multi_lora_linear<CpuBackend>));
  m.impl("multi_lora_linear_backward", TORCH_BOX(&multi_lora_linear_backward<CpuBackend>));
}

}  // namespace peftkern
