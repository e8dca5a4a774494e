// SPDX-License-Identifier: Apache-2.0
// low_rank_down for a bf16 activation and a bf16 factor with vdpbf16ps: two products a lane and no widening of x.
// The sums stay fp32; only their order (pairs of columns) differs from low_rank.inl. Other dtypes go there.

inline bool both_bf16(const LowRankDown& a) { return a.x_dtype == DType::bf16 && a.factor.dtype == DType::bf16; }

// packed: [ceil(columns / 2), padded_rank, 2] bf16, so that a lane holds the two columns of one rank; half of the
// buffer.
void pack_down_bf16(const LowRankDown& a, float* packed, int64_t column0, int64_t column1) {
  if (!both_bf16(a)) return pack_down(a, packed, column0, column1);
  const bf16_t* factor = static_cast<const bf16_t*>(a.factor.data);
  bf16_t* pairs = reinterpret_cast<bf16_t*>(packed);
  const int64_t ld = padded_rank(a.rank);
  for (int64_t block = column0; block < column1; block += kColumnUnit) {
    const int64_t end = round_up(smaller(block + kColumnUnit, column1), 2);
    for (int64_t j = 0; j < ld; ++j)
      for (int64_t c = block; c < end; ++c) {
        const bool real = j < a.rank && c < a.columns;
        const int64_t at = a.factor.rank_major ? j * a.columns + c : c * a.rank + j;
        pairs[(c / 2 * ld + j) * 2 + c % 2] = real ? factor[at] : bf16_t{0};
      }
  }
}

inline void load_pairs(const LowRankDown& a, int64_t row, int64_t rows, int64_t column, int64_t columns, bf16_t* tile) {
  uint8_t bits[kDepth / 8 + kKeepPad];
  for (int64_t i = 0; i < rows; ++i) {
    const bf16_t* source = static_cast<const bf16_t*>(a.x) + (row + i) * a.columns + column;
    if (a.dropout.threshold) keep_row(a.dropout, row + i, column, columns, bits);
    for (int64_t c = 0; c < columns; c += 32) {
      __mmask32 wanted = columns - c >= 32 ? ~0u : (1u << (columns - c)) - 1;
      if (a.dropout.threshold) {
        uint32_t kept;
        std::memcpy(&kept, bits + c / 8, 4);
        wanted &= kept;
      }
      _mm512_storeu_si512(tile + i * kDepth + c, _mm512_maskz_loadu_epi16(wanted, source + c));
    }
  }
}

inline __m512bh as_bf16(__m512 v) {
  __m512bh r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

template <int kVectors>
inline void down_tile_bf16(const bf16_t* tile, int64_t pairs, const float* packed, float* sums, int64_t ld) {
  __m512 sum[kTileRows][kVectors];
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_loadu_ps(sums + i * ld + v * kWidth);
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh factor[kVectors];
    for (int v = 0; v < kVectors; ++v) factor[v] = as_bf16(_mm512_loadu_ps(packed + p * ld + v * kWidth));
    for (int i = 0; i < kTileRows; ++i) {
      float pair;  // two bf16 columns in one lane
      std::memcpy(&pair, tile + i * kDepth + 2 * p, 4);
      const __m512bh x = as_bf16(_mm512_set1_ps(pair));
      for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], x, factor[v]);
    }
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + i * ld + v * kWidth, sum[i][v]);
}

void low_rank_down_bf16(const LowRankDown& a, const float* packed, float* scratch, int64_t row0, int64_t row1) {
  if (!both_bf16(a)) return low_rank_down(a, packed, scratch, row0, row1);
  const int64_t ld = padded_rank(a.rank);
  alignas(64) bf16_t tile[kTileRows * kDepth] = {};
  for (int64_t block = row0; block < row1; block += kRowBlock) {
    const int64_t block_rows = smaller(kRowBlock, row1 - block);
    std::memset(scratch, 0, sizeof(float) * static_cast<size_t>(kRowBlock * ld));
    for (int64_t column = 0; column < a.columns; column += kDepth) {
      const int64_t depth = smaller(kDepth, a.columns - column);
      for (int64_t i = 0; i < block_rows; i += kTileRows) {
        load_pairs(a, block + i, smaller(kTileRows, block_rows - i), column, depth, tile);
        const float* panel = packed + column / 2 * ld;
        int64_t j = 0;
        for (; j + kTileVectors * kWidth <= ld; j += kTileVectors * kWidth)
          down_tile_bf16<kTileVectors>(tile, (depth + 1) / 2, panel + j, scratch + i * ld + j, ld);
        for (; j < ld; j += kWidth) down_tile_bf16<1>(tile, (depth + 1) / 2, panel + j, scratch + i * ld + j, ld);
      }
    }
    store_down(a, scratch, ld, block, block_rows);
  }
}
