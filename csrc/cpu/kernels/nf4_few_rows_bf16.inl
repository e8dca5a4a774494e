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

// The lanes of each of kCount <= 8 vectors added up, in one order whatever kCount is: the sum of v[i] is lane
// kSumLane[log2 kSumSlots][i] of what is returned. Vectors are halved in pairs: 3 instructions a vector, not 10.
template <int kCount>
constexpr int kSumSlots = kCount > 4   ? 8
                          : kCount > 2 ? 4
                                       : kCount;
constexpr int kSumLane[4][8] = {{0}, {0, 8}, {0, 8, 4, 12}, {0, 2, 8, 10, 4, 6, 12, 14}};
template <int kCount>
inline __attribute__((always_inline)) F32 lane_sums(const F32 (&v)[kCount]) {
  constexpr int kSlots = kSumSlots<kCount>;
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
  return {added(eighth, _mm512_shuffle_ps(eighth, eighth, 0xb1))};
}

// Columns first, first + stride, ...: far apart, each a stream of its own, so that the next column of a stream follows
// in memory, and the prefetcher runs on.
struct FewColumns {
  int64_t first, stride;
};

// The table of the n weights from k on of a column of the group: made where it is used ...
template <bool kNormal>
struct MadeTable {
  const float* absmax;  // of the first column
  int64_t column_blocks;
  int shift;  // k >> shift: its block

  MadeTable(const Nf4Product& a, FewColumns columns) : shift(__builtin_ctzll(static_cast<uint64_t>(a.block_size))) {
    absmax = a.absmax + columns.first * (a.in >> shift);
    column_blocks = columns.stride * (a.in >> shift);
  }
  __m512i operator()(int column, int64_t k, int64_t n) const {
    const float* scale = absmax + column * column_blocks;
    return run_table<kNormal>(scale[k >> shift], scale[(k + n - 64) >> shift]);
  }
};

// ... or beforehand, for all panels of x. The two products and the rounding of a table share their ports with the dot
// products: 5 cycles of the 41 that 8 rows take for 64 bytes.
template <int kColumns>
struct StoredTable {
  __m512i* tables;  // [runs, kColumns]

  void fill(const MadeTable<true>& made, int64_t in) const {
    for (int64_t k = 0; k < in; k += kRun)
      for (int c = 0; c < kColumns; ++c) tables[k / kRun * kColumns + c] = made(c, k, smaller(kRun, in - k));
  }
  __m512i operator()(int column, int64_t k, int64_t) const { return tables[k / kRun * kColumns + column]; }
};

// kColumns columns of a panel of x.
template <int kRows, int kColumns, class Table>
void few_rows_bf16(const Nf4Product& a, const bf16_t* x, int64_t row, FewColumns columns, Table table) {
  F32 sum[kColumns][kRows];
  for (int c = 0; c < kColumns; ++c)
    for (int i = 0; i < kRows; ++i) sum[c][i] = zero();
  const uint8_t* packed = a.packed + columns.first * a.in / 2;
  const auto add_run = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    __m512i words[kColumns], tables[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      const uint8_t* at = packed + c * columns.stride * a.in / 2;
      __builtin_prefetch(at + kStreamAhead);
      words[c] = run_words(at, n);
      tables[c] = table(c, k, n);
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
    const int64_t n = columns.first + c * columns.stride;
    alignas(32) bf16_t lanes[kWidth];
    store(lanes, add(lane_sums(sum[c]), set1(a.bias ? a.bias[n] : 0.0f)));
    bf16_t* y = static_cast<bf16_t*>(a.y) + row * a.out + n;
    for (int i = 0; i < kRows; ++i) y[i * a.out] = lanes[kSumLane[__builtin_ctz(kSumSlots<kRows>)][i]];
  }
}

// The panels of kRows rows from `row` on, a group of columns at a time, whose bytes come from memory once.
template <int kRows, int kColumns>
void few_rows_panels_bf16(int64_t panels, const Nf4Product& a, const bf16_t* x, int64_t row, FewColumns columns) {
  constexpr int64_t kStoredRuns = kRows == kFewPanel ? 256 : 1;  // 48 KiB of stack; longer rows make their tables
  alignas(64) __m512i stored[kStoredRuns * kColumns];
  const int64_t runs = ceil_div(a.in, kRun), blocks = a.in / a.block_size;
  const bool store_tables = panels > 1 && runs <= kStoredRuns;
  bool normal = true;
  for (int c = 0; c < kColumns; ++c)
    normal &= normal_blocks(a.absmax + (columns.first + c * columns.stride) * blocks, blocks);
  const MadeTable<true> made(a, columns);
  if (normal && store_tables) StoredTable<kColumns>{stored}.fill(made, a.in);
  for (int64_t p = 0; p < panels; ++p, x += kRows * runs * kRun, row += kRows) {
    if (!normal) {
      for (int c = 0; c < kColumns; ++c) {
        const FewColumns one{columns.first + c * columns.stride, 0};
        few_rows_bf16<kRows, 1>(a, x, row, one, MadeTable<false>(a, one));
      }
    } else if (store_tables) {
      few_rows_bf16<kRows, kColumns>(a, x, row, columns, StoredTable<kColumns>{stored});
    } else {
      few_rows_bf16<kRows, kColumns>(a, x, row, columns, made);
    }
  }
}

// `panels` panels of `rows` rows each.
template <int kRows = kFewPanel>
void few_rows_bf16(int64_t panels, int64_t rows, const Nf4Product& a, const bf16_t* x, int64_t row, int64_t column0,
                   int64_t column1) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return few_rows_bf16<kRows - 1>(panels, rows, a, x, row, column0, column1);
  }
  constexpr int kColumns = kFewColumns<kRows>;
  const int64_t stride = (column1 - column0) / kColumns, rest = column0 + stride * kColumns;
  for (int64_t c = column0; c < column0 + stride; ++c)
    few_rows_panels_bf16<kRows, kColumns>(panels, a, x, row, {c, stride});
  for (int64_t c = rest; c < column1; ++c) few_rows_panels_bf16<kRows, 1>(panels, a, x, row, {c, 0});
}

void nf4_few_rows_bf16(const Nf4Product& a, const float* packed_x, int64_t column0, int64_t column1) {
  if (!few_rows_in_bf16(a)) return nf4_few_rows(a, packed_x, column0, column1);
  const bf16_t* x = reinterpret_cast<const bf16_t*>(packed_x);
  const int64_t panels = a.rows / kFewPanel, row = panels * kFewPanel;
  if (panels > 0) few_rows_bf16(panels, kFewPanel, a, x, 0, column0, column1);
  if (row < a.rows) few_rows_bf16(1, a.rows - row, a, x + row * ceil_div(a.in, kRun) * kRun, row, column0, column1);
}
