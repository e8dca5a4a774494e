// SPDX-License-Identifier: Apache-2.0
// Runs of 128 NF4 weights of a row, looked up as pairs of bf16: what nf4_few_rows_bf16.inl and nf4_tiles_bf16.inl
// share.
//
// 64 packed bytes are 32 words of four weights: shifted right by 0, 4, 8 and 12 bits, the words are the indices of 32
// weights each, and no byte has to be widened. vpermw reads 5 bits of an index: the nibble, and which of the run's two
// blocks of 64 the word belongs to, as their tables share a register. So shift s gives weights 4 * i + {1, 0, 3, 2}[s]
// in lanes i, and x is packed to match. The last run of a row may have 64 weights: half the words.

constexpr int64_t kRun = 128;

template <int kShift>
struct RunShift {
  static constexpr int shift = kShift;
};

// f for each of the four shifts, an immediate operand of its instruction.
template <class F>
inline __attribute__((always_inline)) void for_each_shift(const F& f) {
  f(RunShift<0>{}), f(RunShift<1>{}), f(RunShift<2>{}), f(RunShift<3>{});
}

// Subnormal values vcvtne2ps2bf16 takes for zero: true if blocks of such scales have none.
constexpr float kNormalAbsmax = 0x1p-120f;
inline bool normal_blocks(const float* absmax, int64_t n) {
  __mmask16 others = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    const __mmask16 mask = n - i >= kWidth ? 0xffff : first(n - i);
    others |=
        _mm512_mask_cmp_ps_mask(mask, _mm512_maskz_loadu_ps(mask, absmax + i), set1(kNormalAbsmax).v, _CMP_NGE_UQ);
  }
  return others == 0;
}

// The values of both blocks, rounded once: in 3 instructions instead of 24 if they are normal.
template <bool kNormal>
inline __m512i run_table(float first, float second) {
  if constexpr (!kNormal) {
    const __m512i high = NibbleTable<bf16_t>(second).value;
    return _mm512_inserti64x4(NibbleTable<bf16_t>(first).value, _mm512_castsi512_si256(high), 1);
  }
  const F32 codes = load(kNf4Codes);
  const __m512bh rounded = _mm512_cvtne2ps_pbh(mul(codes, set1(second)).v, mul(codes, set1(first)).v);
  __m512i bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

template <class Shift>
inline __m512i run_lookup(Shift, __m512i words, __m512i table) {
  const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  constexpr int kAndThenOr = 0xEA;
  __m512i index = Shift::shift ? _mm512_srli_epi16(words, 4 * Shift::shift) : words;
  index = Shift::shift == 3 ? _mm512_or_si512(index, second)
                            : _mm512_ternarylogic_epi64(index, _mm512_set1_epi16(15), second, kAndThenOr);
  return _mm512_permutexvar_epi16(index, table);
}

// n weights, 64 or 128; words past them are 0.
inline __m512i run_words(const uint8_t* packed, int64_t n) {
  return n == kRun ? _mm512_loadu_si512(packed)
                   : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
}

// x[0 : n] in the order of run_lookup's weights, zero past n.
inline void pack_run(const bf16_t* x, int64_t n, __m512i (&packed)[4]) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(2 * i);
  const __m512i even = _mm512_load_si512(index), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  __m512i part[4];
  for (int p = 0; p < 4; ++p) part[p] = 32 * p < n ? _mm512_loadu_si512(x + 32 * p) : _mm512_setzero_si512();
  const __m512i even_low = _mm512_permutex2var_epi16(part[0], even, part[1]);
  const __m512i even_high = _mm512_permutex2var_epi16(part[2], even, part[3]);
  const __m512i odd_low = _mm512_permutex2var_epi16(part[0], odd, part[1]);
  const __m512i odd_high = _mm512_permutex2var_epi16(part[2], odd, part[3]);
  packed[0] = _mm512_permutex2var_epi16(odd_low, even, odd_high);
  packed[1] = _mm512_permutex2var_epi16(even_low, even, even_high);
  packed[2] = _mm512_permutex2var_epi16(odd_low, odd, odd_high);
  packed[3] = _mm512_permutex2var_epi16(even_low, odd, even_high);
}
