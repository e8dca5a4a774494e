// SPDX-License-Identifier: Apache-2.0
// The table of an instruction set that has the bf16 dot product, for where both factors are bf16.
#include "table.inl"

#include "low_rank_bf16.inl"
#include "multi_lora_bf16.inl"
#include "nf4_tiles.inl"
#include "nf4_tiles_bf16.inl"

#include "nf4_few_rows_bf16.inl"

constexpr KernelTable bf16_kernel_table(const char* name) {
  KernelTable table = kernel_table(name);
  table.pack_down = pack_down_bf16;
  table.low_rank_down = low_rank_down_bf16;
  table.multi_lora_down = multi_lora_down_bf16;
  table.pack_few_rows = pack_few_rows_bf16;
  table.nf4_few_rows = nf4_few_rows_bf16;
  add_tiles(table);
  table.nf4_forward[static_cast<int>(DType::bf16)] = &kTiles<Bf16Dot, false>;
  table.nf4_gradient[static_cast<int>(DType::bf16)] = &kTiles<Bf16Dot, true>;
  return table;
}
