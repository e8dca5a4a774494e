// SPDX-License-Identifier: Apache-2.0
// The table of an instruction set that rounds to bf16 by an instruction, and has the bf16 dot product, for where both
// factors are bf16.

// vcvtneps2bf16 takes subnormals for zero; all else it rounds as the integers do.
inline __m256i to_bf16(F32 a) {
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, kSubnormal) != 0, false)) return round_bits_to_bf16(a);
  const __m256bh rounded = _mm512_cvtneps_pbh(a.v);
  __m256i bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

#include "table.inl"

#include "low_rank_bf16.inl"
#include "multi_lora_bf16.inl"
#include "nf4_run_bf16.inl"
#include "nf4_tiles.inl"
#include "nf4_tiles_bf16.inl"

#include "few_rows_bf16.inl"
#include "nf4_few_rows_bf16.inl"

constexpr KernelTable bf16_kernel_table(const char* name) {
  KernelTable table = kernel_table(name);
  table.pack_down = pack_down_bf16;
  table.low_rank_down = low_rank_down_bf16;
  table.multi_lora_down = multi_lora_down_bf16;
  table.pack_few_rows = pack_few_rows_bf16;
  table.nf4_few_rows = nf4_few_rows_bf16;
  table.widens_few_rows = widens_few_rows_bf16;
  table.few_rows = few_rows_bf16;
  add_tiles(table);
  table.nf4_forward[static_cast<int>(DType::bf16)] = &kTiles<Bf16Dot, false>;
  table.nf4_gradient[static_cast<int>(DType::bf16)] = &kTiles<Bf16Dot, true>;
  return table;
}
