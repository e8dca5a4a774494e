// SPDX-License-Identifier: Apache-2.0
// nf4_few_rows for bf16 activations with vdpbf16ps, for blocks of 64 weights or more; others go to nf4.inl.
//
// 32 packed bytes, widened to 16 bits, are the indices of 64 weights: vpermw reads 5 bits of each, and the table is
// there twice, so the low nibbles (odd weights) need no mask and the high ones (even) a shift. x is packed to match: in
// each run of 64 columns the 32 even ones come first.

inline bool pairs_of_blocks(const Nf4Product& a) { return a.x_dtype == DType::bf16 && a.block_size >= 64; }

void pack_few_rows_bf16(const Nf4Product& a, float* packed_x) {
  if (!pairs_of_blocks(a)) return pack_few_rows(a, packed_x);
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(2 * i);
  const __m512i even = _mm512_load_si512(index), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  const bf16_t* x = static_cast<const bf16_t*>(a.x);
  bf16_t* target = reinterpret_cast<bf16_t*>(packed_x);
  for (int64_t i = 0; i < a.rows * a.in; i += 64) {
    const __m512i first = _mm512_loadu_si512(x + i), second = _mm512_loadu_si512(x + i + 32);
    _mm512_storeu_si512(target + i, _mm512_permutex2var_epi16(first, even, second));
    _mm512_storeu_si512(target + i + 32, _mm512_permutex2var_epi16(first, odd, second));
  }
}

// kColumns columns of y for kRows rows: x is loaded once for them, and no sum waits for the one before.
template <int kRows, int kColumns>
inline void few_rows_bf16(const Nf4Product& a, const bf16_t* x, int64_t row, int64_t column) {
  __m512 sum[kColumns][kRows];
  const uint8_t* packed[kColumns];
  const float* absmax[kColumns];
  const int shift = __builtin_ctzll(static_cast<uint64_t>(a.block_size));
  for (int c = 0; c < kColumns; ++c) {
    packed[c] = a.packed + (column + c) * a.in / 2;
    absmax[c] = a.absmax + ((column + c) * a.in >> shift);
    for (int i = 0; i < kRows; ++i) sum[c][i] = _mm512_setzero_ps();
  }
  for (int64_t block = 0; block < a.in; block += a.block_size) {
    Bf16Table tables[kColumns];
    for (int c = 0; c < kColumns; ++c) tables[c] = Bf16Table(*absmax[c]++);
    for (int64_t k = block; k < block + a.block_size; k += 64) {
      __m512bh even[kColumns], odd[kColumns];
      for (int c = 0; c < kColumns; ++c) {
        const uint8_t* at = packed[c] + k / 2;
        __builtin_prefetch(at + kColumns * a.in / 2);
        const __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(byte, 4), tables[c].value);
        even[c] = as_bf16(_mm512_castsi512_ps(high));
        odd[c] = as_bf16(_mm512_castsi512_ps(_mm512_permutexvar_epi16(byte, tables[c].value)));
      }
      for (int i = 0; i < kRows; ++i) {
        const bf16_t* run = x + (row + i) * a.in + k;
        const __m512bh x_even = as_bf16(_mm512_loadu_ps(run)), x_odd = as_bf16(_mm512_loadu_ps(run + 32));
        for (int c = 0; c < kColumns; ++c) {
          sum[c][i] = _mm512_dpbf16_ps(sum[c][i], x_even, even[c]);
          sum[c][i] = _mm512_dpbf16_ps(sum[c][i], x_odd, odd[c]);
        }
      }
    }
  }
  for (int c = 0; c < kColumns; ++c)
    for (int i = 0; i < kRows; ++i) {
      const float value = sum_lanes(F32{sum[c][i]}) + (a.bias ? a.bias[column + c] : 0.0f);
      static_cast<bf16_t*>(a.y)[(row + i) * a.out + column + c] = from_float<bf16_t>(value);
    }
}

template <int kRows>
inline void few_rows_columns_bf16(const Nf4Product& a, const bf16_t* x, int64_t row, int64_t column0, int64_t column1) {
  constexpr int kTogether = kRows <= 2 ? 4 : 2;
  int64_t column = column0;
  for (; column + kTogether <= column1; column += kTogether) few_rows_bf16<kRows, kTogether>(a, x, row, column);
  for (; column < column1; ++column) few_rows_bf16<kRows, 1>(a, x, row, column);
}

template <int kRows = 8>
inline void few_rows_columns_bf16(int64_t rows, const Nf4Product& a, const bf16_t* x, int64_t row, int64_t column0,
                                  int64_t column1) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return few_rows_columns_bf16<kRows - 1>(rows, a, x, row, column0, column1);
  }
  few_rows_columns_bf16<kRows>(a, x, row, column0, column1);
}

void nf4_few_rows_bf16(const Nf4Product& a, const float* packed_x, int64_t column0, int64_t column1) {
  if (!pairs_of_blocks(a)) return nf4_few_rows(a, packed_x, column0, column1);
  const bf16_t* x = reinterpret_cast<const bf16_t*>(packed_x);
  for (int64_t row = 0; row < a.rows; row += 8)
    few_rows_columns_bf16(smaller(8, a.rows - row), a, x, row, column0, column1);
}
