// SPDX-License-Identifier: Apache-2.0
// The kernels that are written once for every instruction set, as the table of one. An instruction set that has
// something better replaces the member.
#include "jacobi_svd.inl"
#include "panel.inl"

#include "low_rank.inl"
#include "few_rows.inl"
#include "multi_lora.inl"
#include "nf4.inl"
#include "rank_allocation.inl"

#include "dora_norm.inl"  // after low_rank.inl and nf4.inl

constexpr KernelTable kernel_table(const char* name) {
  return {.name = name,
          .padded_rank = padded_rank,
          .pack_down = pack_down,
          .pack_up = pack_up,
          .low_rank_down = low_rank_down,
          .low_rank_up = low_rank_up,
          .low_rank_grad = low_rank_grad,
          .column_sums = column_sums,
          .quantize_nf4 = quantize_nf4,
          .dequantize_nf4 = dequantize_nf4,
          .pack_few_rows = pack_few_rows,
          .nf4_few_rows = nf4_few_rows,
          .widens_few_rows = widens_few_rows,
          .widen_few_rows = widen_few_rows,
          .few_rows = few_rows,
          .multi_lora_down = multi_lora_down,
          .multi_lora_up = multi_lora_up,
          .multi_lora_grad = multi_lora_grad,
          .squared_row_norms = squared_row_norms,
          .dora_norm = dora_norm,
          .update_importance = update_importance,
          .jacobi_svd = jacobi_svd,
          .nf4_forward = {},
          .nf4_gradient = {}};
}
