// SPDX-License-Identifier: Apache-2.0
// multi_lora_down for a bf16 activation and bf16 factors, as low_rank_bf16.inl does it: pairs of columns, vdpbf16ps.

// packed[p][j] holds columns 2p and 2p + 1 of rank j. Two neighbouring bf16 of A are one 32-bit word, so they are
// transposed as the floats they are not.
inline void pack_pairs(const MultiLoraDown& a, const bf16_t* factor, int64_t rank, int64_t column, int64_t depth,
                       float* packed, int64_t ld) {
  const int64_t pairs = (depth + 1) / 2;
  if (a.factors.rank_major) {
    for (int64_t j = 0; j < rank; j += kWidth)
      for (int64_t p = 0; p < pairs; p += kWidth) {
        const int64_t left = depth - 2 * p;
        const __mmask32 inside = left >= 32 ? ~0u : (1u << left) - 1;
        F32 block[kWidth];
        for (int64_t i = 0; i < kWidth; ++i)
          block[i] = j + i < rank ? F32{_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(
                                        inside, factor + (j + i) * a.columns + column + 2 * p))}
                                  : zero();
        transpose(block);
        for (int64_t i = 0; i < kWidth; ++i) store(packed + (p + i) * ld + j, block[i]);
      }
  } else {
    for (int64_t p = 0; p < pairs; ++p)
      for (int64_t j = 0; j < rank; j += kWidth) {
        const bf16_t* even = factor + (column + 2 * p) * a.rank + j;
        const __mmask16 inside = first(smaller(rank - j, kWidth));
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, even));
        const __mmask16 odd_inside = 2 * p + 1 < depth ? inside : __mmask16{0};
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd_inside, even + a.rank));
        _mm512_storeu_si512(packed + p * ld + j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
  }
}

void multi_lora_down_bf16(const MultiLoraDown& a, int64_t adapter, int64_t rank, int64_t entry0, int64_t entry1,
                          float* scratch) {
  const LowRankDown rows_of{.x = a.x,
                            .x_dtype = a.x_dtype,
                            .rows = a.groups.rows,
                            .columns = a.columns,
                            .rank = rank,
                            .factor = {nullptr, a.factors.dtype, a.factors.rank_major},
                            .alpha = 1.0f,
                            .dropout = a.dropout,
                            .out = nullptr};
  if (!both_bf16(rows_of)) return multi_lora_down(a, adapter, rank, entry0, entry1, scratch);
  const bf16_t* factor = static_cast<const bf16_t*>(a.factors.data) + adapter * a.rank * a.columns;
  const int64_t ld = padded_rank(rank);
  float *sums = scratch, *packed = scratch + kRowChunk * ld;
  alignas(64) bf16_t tile[kTileRows * kDepth] = {};
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(kRowChunk * ld));
  for (int64_t column = 0; column < a.columns; column += kDepth) {
    const int64_t depth = smaller(kDepth, a.columns - column), pairs = (depth + 1) / 2;
    pack_pairs(a, factor, rank, column, depth, packed, ld);
    for (int64_t e = entry0; e < entry1; e += kTileRows) {
      for (int64_t i = 0; i < smaller(kTileRows, entry1 - e); ++i)
        load_pairs(rows_of, a.groups.order[e + i], 1, column, depth, tile + i * kDepth);
      float* const row_sums = sums + (e - entry0) * ld;
      int64_t j = 0;
      for (; j + kTileVectors * kWidth <= ld; j += kTileVectors * kWidth)
        down_tile_bf16<kTileVectors>(tile, pairs, packed + j, row_sums + j, ld);
      for (; j < ld; j += kWidth) down_tile_bf16<1>(tile, pairs, packed + j, row_sums + j, ld);
    }
  }
  store_multi_down(a, adapter, rank, sums, ld, entry0, entry1);
}
