// SPDX-License-Identifier: Apache-2.0
// nf4_tiles.inl for bf16 activations with vdpbf16ps: a unit is a pair of bf16, twice the products of an instruction.
// The forward product takes whole runs where it can: units of the depth are then in the order of run_lookup.

// NibbleTable<bf16_t> made by the machine's rounding: 3 instructions instead of 12. Subnormal values go the long way,
// as vcvtneps2bf16 takes them for zero.
struct Bf16Table : NibbleTable<bf16_t> {
  Bf16Table() : NibbleTable<bf16_t>(__m512i{}) {}
  explicit Bf16Table(float absmax) : NibbleTable<bf16_t>(values(absmax)) {}

  static __m512i values(float absmax) {
    if (!(absmax >= 0x1p-120f)) return NibbleTable<bf16_t>(absmax).value;
    const __m256bh rounded = _mm512_cvtneps_pbh(mul(load(kNf4Codes), set1(absmax)).v);
    __m256i bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return _mm512_broadcast_i64x4(bits);
  }
};

struct Bf16Dot {
  using Element = bf16_t;
  using Table = Bf16Table;
  static constexpr bool kRuns = true;
  static constexpr int kPerUnit = 2;
  static constexpr int kParts = 1;

  // Measured, few rows' time over tiles': 8 and 12 rows of 576 0.91 and 1.16, 16 and 32 of 1024 0.89 and 1.08, 32 and
  // 40 of 1536 0.97 and 1.02, 48 and 64 of 2048 0.98 and 1.02, 64 and 80 of 4096 0.95 and 1.00, 48 and 64 of 14336 1.00
  // and 1.03. The end of a column costs few rows about 65 cycles a panel, and x has to stay in the second-level cache.
  static int64_t from_rows(int64_t in) {
    constexpr int64_t kMost = 72, kElements = 3 << 18;
    return smaller(smaller(kMost, kElements / in), in < 576 ? 9 : in / 32 - 8);
  }
  static F32 dot(F32 x, F32 w, F32 sum) { return {_mm512_dpbf16_ps(sum.v, as_bf16(x.v), as_bf16(w.v))}; }
  static F32 units(const bf16_t* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? ~0u : (1u << n) - 1;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
  }
  static void lookup(const Table& table, const uint8_t* packed, F32 (&parts)[kParts]) {
    parts[0] = {_mm512_castsi512_ps(table.lookup(packed))};
  }

  static bool has_runs(const Nf4Product& a) { return a.block_size >= 64 && a.in % 64 == 0; }

  // x[row0 : row0 + rows] as units
  static void pack_runs(const Nf4Product& a, int64_t row0, int64_t rows, float* target) {
    const bf16_t* x = static_cast<const bf16_t*>(a.x) + row0 * a.in;
    for (int64_t k = 0; k < a.in; k += kRun) {
      const int64_t n = smaller(kRun, a.in - k), units = n / 8;  // of each shift
      F32 block[4][kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        __m512i parts[4] = {};
        if (i < rows) pack_run(x + i * a.in + k, n, parts);
        for (int p = 0; p < 4; ++p) block[p][i] = {_mm512_castsi512_ps(parts[p])};
      }
      for (int p = 0; p < 4; ++p) {
        transpose(block[p]);
        for (int64_t u = 0; u < units; ++u, target += rows) store_first(target, rows, block[p][u]);
      }
    }
  }

  // W[kWidth columns whose packed weights are given][begin : end] as units, stride apart. absmax(i, k): of column i
  template <class Absmax>
  static void dequantize_runs(const uint8_t* const (&columns)[kWidth], const Absmax& absmax, int64_t ahead,
                              int64_t begin, int64_t end, float* target, int64_t stride) {
    for (int64_t k = begin; k < end; k += kRun) {
      const int64_t n = smaller(kRun, end - k), units = n / 8;
      __m512i tables[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const float first = absmax(i, k), second = absmax(i, k + n - 64);
        const bool normal = first >= kNormalAbsmax && second >= kNormalAbsmax;
        tables[i] = normal ? run_table<true>(first, second) : run_table<false>(first, second);
        __builtin_prefetch(columns[i] + ahead + k / 2);
      }
      for_each_shift([&](auto s) __attribute__((always_inline)) {
        F32 block[kWidth];
        for (int i = 0; i < kWidth; ++i)
          block[i] = {_mm512_castsi512_ps(run_lookup(s, run_words(columns[i] + k / 2, n), tables[i]))};
        transpose(block);
        for (int64_t u = 0; u < units; ++u, target += stride) store(target, block[u]);
      });
    }
  }

  // A lane holds a column of both rows.
  static void across(const Table (&tables)[kPerUnit], const uint8_t* const (&packed)[kPerUnit], F32& low, F32& high) {
    const __m512i even = tables[0].lookup(packed[0]), odd = tables[1].lookup(packed[1]);
    const __m512i first = _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a,
                                           0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                                           0x00230003, 0x00220002, 0x00210001, 0x00200000);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    low = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(even, first, odd))};
    high = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(even, second, odd))};
  }
};
