// SPDX-License-Identifier: Apache-2.0
// nf4_few_rows for bf16 activations with vdpbf16ps, for blocks of 64 weights or more; others go to nf4.inl.
//
// A lane of a sum holds part of one y, and the lanes are added at the end. x is packed as [panel of kFewPanel
// rows][run] [row of the panel][kRun], so that a panel is one stream whatever the length of a row.

inline bool few_rows_in_bf16(const Nf4Product& a) { return a.x_dtype == DType::bf16 && a.block_size >= 64; }

constexpr int kFewPanel = 8;

// Of y, for which x is loaded once: as many as sums, tables, words and weights leave registers for.
template <int kRows>
constexpr int kFewColumns = kRows <= 4   ? 5
                            : kRows == 5 ? 4
                                         : 3;

// Bytes ahead of each stream. 4096 x 4096, one row, cold: 0.20 ms, with none 0.22; columns side by side 0.33.
constexpr int64_t kStreamAhead = 512;

void pack_few_rows_bf16(const Nf4Product& a, float* packed_x) {
  if (!few_rows_in_bf16(a)) return pack_few_rows(a, packed_x);
  const bf16_t* x = static_cast<const bf16_t*>(a.x);
  char* target = reinterpret_cast<char*>(packed_x);
  for (int64_t panel = 0; panel < a.rows; panel += kFewPanel)
    for (int64_t k = 0; k < a.in; k += kRun)
      for (int64_t row = panel; row < smaller(panel + kFewPanel, a.rows); ++row) {
        __m512i packed[4];
        pack_run(x + row * a.in + k, smaller(kRun, a.in - k), packed);
        for (int p = 0; p < 4; ++p, target += 64) _mm512_store_si512(target, packed[p]);
      }
}

// The lanes of each of kCount <= 8 vectors added up, in one order whatever kCount is. Vectors are halved in pairs: 3
// instructions a vector instead of 10.
template <int kCount>
inline __attribute__((always_inline)) void lane_sums(const F32 (&v)[kCount], float (&sums)[kCount]) {
  constexpr int kSlots = kCount > 4 ? 8 : kCount > 2 ? 4 : kCount;
  __m512 half[kSlots], quarter[kSlots], eighth;  // half, then a quarter ... of a vector for each v
  const auto at = [&](int i) { return i < kCount ? v[i].v : _mm512_setzero_ps(); };
  const auto added = [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); };
  if constexpr (kSlots == 1) {
    half[0] = added(v[0].v, _mm512_shuffle_f32x4(v[0].v, v[0].v, 0x4e));
  } else {
    for (int i = 0; i < kSlots / 2; ++i) {
      const __m512 a = at(i), b = at(i + kSlots / 2);
      half[i] = added(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
  }
  if constexpr (kSlots <= 2) {
    quarter[0] = added(half[0], _mm512_shuffle_f32x4(half[0], half[0], 0xb1));
  } else {
    for (int i = 0; i < kSlots / 4; ++i) {
      const __m512 a = half[i], b = half[i + kSlots / 4];
      quarter[i] = added(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
  }
  const __m512 a = quarter[0], b = quarter[kSlots == 8 ? 1 : 0];
  eighth = added(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  float lanes[kWidth];
  _mm512_storeu_ps(lanes, added(eighth, _mm512_shuffle_ps(eighth, eighth, 0xb1)));
  constexpr int kLane[4][8] = {{0}, {0, 8}, {0, 8, 4, 12}, {0, 2, 8, 10, 4, 6, 12, 14}};
  for (int i = 0; i < kCount; ++i) sums[i] = lanes[kLane[__builtin_ctz(kSlots)][i]];
}

// Columns column, column + stride, ... of a panel of x. They are far apart, each a stream of its own: the next column
// of a stream follows in memory, and the prefetcher runs on.
template <int kRows, int kColumns, bool kNormal = true>
void few_rows_bf16(const Nf4Product& a, const bf16_t* x, int64_t row, int64_t column, int64_t stride) {
  const int shift = __builtin_ctzll(static_cast<uint64_t>(a.block_size));
  const int64_t blocks = a.in >> shift;  // of a column
  const float* absmax = a.absmax + column * blocks;
  if constexpr (kNormal) {  // not in the loop: a call there would take every sum out of its register
    bool normal = true;
    for (int c = 0; c < kColumns; ++c) normal &= normal_blocks(absmax + c * stride * blocks, blocks);
    if (!normal) {
      for (int c = 0; c < kColumns; ++c) few_rows_bf16<kRows, 1, false>(a, x, row, column + c * stride, 1);
      return;
    }
  }
  F32 sum[kColumns][kRows];
  for (int c = 0; c < kColumns; ++c)
    for (int i = 0; i < kRows; ++i) sum[c][i] = zero();
  const uint8_t* packed = a.packed + column * a.in / 2;
  const auto add_run = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    const int64_t block = k >> shift, second_block = (k + n - 64) >> shift;
    __m512i words[kColumns], tables[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      const uint8_t* at = packed + c * stride * a.in / 2;
      const float* scale = absmax + c * stride * blocks;
      __builtin_prefetch(at + kStreamAhead);
      words[c] = run_words(at, n);
      tables[c] = run_table<kNormal>(scale[block], scale[second_block]);
    }
    for_each_shift([&](auto s) __attribute__((always_inline)) {
      __m512bh w[kColumns];
      for (int c = 0; c < kColumns; ++c) w[c] = as_bf16(_mm512_castsi512_ps(run_lookup(s, words[c], tables[c])));
      for (int i = 0; i < kRows; ++i) {
        const __m512bh factor = as_bf16(_mm512_load_ps(x + i * kRun + s.shift * 32));
        for (int c = 0; c < kColumns; ++c) sum[c][i].v = _mm512_dpbf16_ps(sum[c][i].v, factor, w[c]);
      }
    });
    x += kRows * kRun;
    packed += kRun / 2;
  };
  int64_t k = 0;
  for (; k + kRun <= a.in; k += kRun) add_run(k, kRun);
  if (k < a.in) add_run(k, kRun / 2);

  for (int c = 0; c < kColumns; ++c) {
    float values[kRows];
    lane_sums(sum[c], values);
    const int64_t n = column + c * stride;
    const float bias = a.bias ? a.bias[n] : 0.0f;
    bf16_t* y = static_cast<bf16_t*>(a.y) + row * a.out + n;
    for (int i = 0; i < kRows; ++i) y[i * a.out] = from_float<bf16_t>(values[i] + bias);
  }
}

template <int kRows = kFewPanel>
inline void few_rows_panel_bf16(int64_t rows, const Nf4Product& a, const bf16_t* x, int64_t row, int64_t column0,
                                int64_t column1) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return few_rows_panel_bf16<kRows - 1>(rows, a, x, row, column0, column1);
  }
  constexpr int kColumns = kFewColumns<kRows>;
  const int64_t stride = (column1 - column0) / kColumns;
  for (int64_t c = column0; c < column0 + stride; ++c) few_rows_bf16<kRows, kColumns>(a, x, row, c, stride);
  for (int64_t c = column0 + stride * kColumns; c < column1; ++c) few_rows_bf16<kRows, 1>(a, x, row, c, 1);
}

void nf4_few_rows_bf16(const Nf4Product& a, const float* packed_x, int64_t column0, int64_t column1) {
  if (!few_rows_in_bf16(a)) return nf4_few_rows(a, packed_x, column0, column1);
  const bf16_t* x = reinterpret_cast<const bf16_t*>(packed_x);
  const int64_t padded = ceil_div(a.in, kRun) * kRun;
  for (int64_t row = 0; row < a.rows; row += kFewPanel)
    few_rows_panel_bf16(smaller(kFewPanel, a.rows - row), a, x + row * padded, row, column0, column1);
}
