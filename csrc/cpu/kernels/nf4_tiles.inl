// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias and y = x W for any number of rows, W in NF4. Blocks of W are dequantized in cache, to the values of
// dequantize_nf4, and a register tile of sums takes them from there.
//
// A unit is a 32-bit lane: one fp32 value, or a pair of bf16 that neighbour in the depth (nf4_tiles_bf16.inl).
//   x   [panel of rows][units of the depth][rows of the panel]        packed once, read by broadcasts
//   W   [panel of kColumns columns][units of the depth][kColumns]     kBlockUnits of a panel, the gradient: of
//   kBlockColumns, at a time
// The forward product turns kWidth x kWidth blocks of units to get there; the gradient's W comes with its columns as
// lanes. A sum runs over the depth in one order, whatever the split of columns over threads.

constexpr int64_t kBlockUnits = 256;    // of the depth: 32 KiB of W for a register tile
constexpr int64_t kBlockColumns = 256;  // for which x is used from the second-level cache
constexpr int64_t kFewRows = 64;        // up to so many, whole rows of W are read one after the other
constexpr int64_t kRowsAhead = 16;      // of W, asked for while one is dequantized for the gradient
constexpr int64_t kPanelsAtATime = 64;  // of rows, for which sums are kept

// The products of activations of type T with fp32 units.
template <class T>
struct FmaDot {
  using Element = T;
  using Table = CodeValues<T>;
  static constexpr bool kRuns = false;  // pack_runs and dequantize_runs (nf4_tiles_bf16.inl)
  static constexpr int kPerUnit = 1;
  static constexpr int kParts = 2;  // vectors of units that 2 * kWidth weights of a row make; lane i of part p: unit
                                    // i * kParts + p

  static int64_t from_rows(int64_t) { return 9; }
  static F32 dot(F32 x, F32 w, F32 sum) { return fma(x, w, sum); }
  static F32 units(const T* p, int64_t n) { return n >= kWidth ? load(p) : load_first(p, n); }  // n elements, then 0
  static void lookup(const Table& table, const uint8_t* packed, F32 (&parts)[kParts]) {
    table.lookup(packed, parts[0], parts[1]);
  }

  // One step of the depth for 2 * kWidth columns, from the kPerUnit rows of W there.
  static void across(const Table (&tables)[kPerUnit], const uint8_t* const (&packed)[kPerUnit], F32& low, F32& high) {
    F32 even, odd;
    tables[0].lookup(packed[0], even, odd);
    interleave(even, odd, low, high);
  }
};

// sums[kRows][2 * kWidth] (+)= over steps units of x[step][kRows] times w[step][2 * kWidth]
template <class Dot, int kRows>
inline void register_tile(const float* x, const float* w, int64_t steps, float* sums, bool first) {
  F32 sum[kRows][2];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < 2; ++v) sum[i][v] = first ? zero() : load(sums + (2 * i + v) * kWidth);
  for (int64_t s = 0; s < steps; ++s, x += kRows, w += 2 * kWidth) {
    const F32 low = load(w), high = load(w + kWidth);
    for (int i = 0; i < kRows; ++i) {
      const F32 factor = set1(x[i]);
      sum[i][0] = Dot::dot(factor, low, sum[i][0]);
      sum[i][1] = Dot::dot(factor, high, sum[i][1]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < 2; ++v) store(sums + (2 * i + v) * kWidth, sum[i][v]);
}

template <class Dot, int kRows = kPanelRows>
inline void register_tile(int64_t rows, const float* x, const float* w, int64_t steps, float* sums, bool first) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return register_tile<Dot, kRows - 1>(rows, x, w, steps, sums, first);
  }
  register_tile<Dot, kRows>(x, w, steps, sums, first);
}

template <class Dot, bool kGradient>
struct Tiles {
  using T = typename Dot::Element;
  static constexpr int64_t kColumns = 2 * kWidth, kPerUnit = Dot::kPerUnit;

  static constexpr bool takes_runs() { return Dot::kRuns && !kGradient; }

  static int64_t depth(const Nf4Product& a) { return kGradient ? a.out : a.in; }
  static int64_t columns(const Nf4Product& a) { return kGradient ? a.in : a.out; }
  static int64_t units(const Nf4Product& a) { return ceil_div(depth(a), kPerUnit); }

  // Panels of equal height, but the last.
  static int64_t panels(const Nf4Product& a) { return ceil_div(a.rows, panel_rows(a)); }
  static int64_t panel_rows(const Nf4Product& a) { return ceil_div(a.rows, ceil_div(a.rows, kPanelRows)); }

  static size_t packed_bytes(const Nf4Product& a) { return static_cast<size_t>(a.rows * units(a) * 4); }

  static void pack(const Nf4Product& a, void* packed, int64_t panel0, int64_t panel1) {
    const T* x = static_cast<const T*>(a.x);
    for (int64_t row = panel0 * panel_rows(a); row < smaller(panel1 * panel_rows(a), a.rows); row += panel_rows(a)) {
      const int64_t rows = smaller(panel_rows(a), a.rows - row);
      float* target = static_cast<float*>(packed) + row * units(a);
      if constexpr (takes_runs()) {
        if (Dot::has_runs(a)) {
          Dot::pack_runs(a, row, rows, target);
          continue;
        }
      }
      for (int64_t unit = 0; unit < units(a); unit += kWidth) {
        const int64_t column = unit * kPerUnit, here = smaller(kWidth, units(a) - unit);
        F32 block[kWidth];
        for (int64_t i = 0; i < kWidth; ++i)
          block[i] = i < rows ? Dot::units(x + (row + i) * depth(a) + column, depth(a) - column) : zero();
        transpose(block);
        for (int64_t s = 0; s < here; ++s) store_first(target + (unit + s) * rows, rows, block[s]);
      }
    }
  }

  // The end of the weights from a column on that have one absmax, in every row.
  static int64_t run_end(const Nf4Product& a, int64_t column) {
    const int64_t run = a.in & (a.block_size - 1) ? kTileColumnUnit : a.block_size;  // both powers of two
    return (column | (run - 1)) + 1;
  }

  static float absmax(const Nf4Product& a, int64_t row, int64_t column) {    // 0 past the last row
    const int shift = __builtin_ctzll(static_cast<uint64_t>(a.block_size));  // a division costs as much as a lookup
    return row < a.out ? a.absmax[(row * a.in + column) >> shift] : 0.0f;
  }
  static const uint8_t* packed(const Nf4Product& a, int64_t row, int64_t column) {
    return a.packed + (smaller(row, a.out - 1) * a.in + column) / 2;
  }

  // W[column0 : column0 + kColumns][unit0 : unit0 + steps]
  static void dequantize_forward(const Nf4Product& a, int64_t column0, int64_t unit0, int64_t steps, float* w) {
    const int64_t begin = unit0 * kPerUnit, end = (unit0 + steps) * kPerUnit;
    for (int64_t n = 0; n < kColumns; n += kWidth) {
      float* target = w + n;
      const uint8_t* rows[kWidth];
      for (int i = 0; i < kWidth; ++i) rows[i] = packed(a, column0 + n + i, 0);
      if constexpr (takes_runs()) {
        if (Dot::has_runs(a)) {
          const auto scale = [&](int i, int64_t k) { return absmax(a, column0 + n + i, k); };
          Dot::dequantize_runs(rows, scale, kWidth * a.in / 2, begin, end, target, kColumns);
          continue;
        }
      }
      for (int64_t k = begin, next; k < end; k = next) {
        next = smaller(end, run_end(a, k));
        typename Dot::Table tables[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          const int64_t row = column0 + n + i;
          tables[i] = typename Dot::Table(absmax(a, row, k));
          for (int64_t ahead = k; ahead < next; ahead += 128) __builtin_prefetch(packed(a, row + kWidth, ahead));
        }
        for (int64_t at = k; at < next; at += 2 * kWidth, target += 2 * kWidth / kPerUnit * kColumns) {
          F32 block[Dot::kParts][kWidth];
          for (int i = 0; i < kWidth; ++i) {
            F32 parts[Dot::kParts];
            Dot::lookup(tables[i], rows[i] + at / 2, parts);
            for (int p = 0; p < Dot::kParts; ++p) block[p][i] = parts[p];
          }
          for (int p = 0; p < Dot::kParts; ++p) {
            transpose(block[p]);
            for (int i = 0; i < kWidth; ++i) store(target + (i * Dot::kParts + p) * kColumns, block[p][i]);
          }
        }
      }
    }
  }

  // W[unit0 : unit0 + steps][column0 : column0 + count]
  static void dequantize_gradient(const Nf4Product& a, int64_t column0, int64_t count, int64_t unit0, int64_t steps,
                                  float* w) {
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t row = (unit0 + s) * kPerUnit;
      for (int64_t k = 0, next; k < count; k = next) {
        next = smaller(count, run_end(a, column0 + k) - column0);
        typename Dot::Table tables[kPerUnit];
        for (int i = 0; i < kPerUnit; ++i) {
          tables[i] = typename Dot::Table(absmax(a, row + i, column0 + k));
          for (int64_t ahead = k; ahead < next; ahead += 128)
            __builtin_prefetch(packed(a, row + i + kRowsAhead, column0 + ahead));
        }
        for (int64_t at = k; at < next; at += kColumns) {
          const uint8_t* rows[kPerUnit];
          for (int i = 0; i < kPerUnit; ++i) rows[i] = packed(a, row + i, column0 + at);
          F32 low, high;
          Dot::across(tables, rows, low, high);
          store(w + at * steps + s * kColumns, low);
          store(w + at * steps + s * kColumns + kWidth, high);
        }
      }
    }
  }

  static void finish(const Nf4Product& a, const float* sums, int64_t row0, int64_t rows, int64_t column) {
    T* y = static_cast<T*>(a.y);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t at = column + v * kWidth, left = columns(a) - at;
        if (left <= 0) break;
        F32 value = load(sums + (2 * i + v) * kWidth);
        T* target = y + (row0 + i) * columns(a) + at;
        if (left >= kWidth) {
          store(target, a.bias ? add(value, load(a.bias + at)) : value);
        } else {
          store_first(target, left, a.bias ? add(value, load_first(a.bias + at, left)) : value);
        }
      }
  }

  static int64_t sums_rows(const Nf4Product& a) { return smaller(a.rows, kPanelsAtATime * panel_rows(a)); }
  static int64_t block_columns(const Nf4Product& a) {
    return !kGradient && a.rows <= kFewRows ? kColumns : kBlockColumns;
  }
  static size_t scratch_bytes(const Nf4Product& a) {
    return static_cast<size_t>(4 * block_columns(a) * (kBlockUnits + sums_rows(a)));
  }

  static void column_range(const Nf4Product& a, const void* packed_x, void* scratch, int64_t column0, int64_t column1) {
    float *w = static_cast<float*>(scratch), *sums = w + block_columns(a) * kBlockUnits;
    for (int64_t column = column0; column < column1; column += block_columns(a)) {
      const int64_t count = smaller(block_columns(a), column1 - column);
      for (int64_t row0 = 0; row0 < a.rows; row0 += sums_rows(a)) {
        const int64_t row1 = smaller(row0 + sums_rows(a), a.rows);
        for (int64_t unit = 0; unit < units(a); unit += kBlockUnits) {
          const int64_t steps = smaller(kBlockUnits, units(a) - unit);
          if (kGradient) dequantize_gradient(a, column, count, unit, steps, w);
          for (int64_t n = 0; n < count; n += kColumns) {
            if (!kGradient) dequantize_forward(a, column + n, unit, steps, w);
            for (int64_t row = row0; row < row1; row += panel_rows(a)) {
              const int64_t rows = smaller(panel_rows(a), a.rows - row);
              const float* x = static_cast<const float*>(packed_x) + row * units(a) + unit * rows;
              float* c = sums + n * sums_rows(a) + (row - row0) * kColumns;
              register_tile<Dot>(rows, x, w + (kGradient ? n * steps : 0), steps, c, unit == 0);
              if (unit + steps == units(a)) finish(a, c, row, rows, column + n);
            }
          }
        }
      }
    }
  }
};

template <class Dot, bool kGradient>
constexpr Nf4Tiles kTiles{Dot::from_rows,
                          Tiles<Dot, kGradient>::panels,
                          Tiles<Dot, kGradient>::packed_bytes,
                          Tiles<Dot, kGradient>::scratch_bytes,
                          Tiles<Dot, kGradient>::pack,
                          Tiles<Dot, kGradient>::column_range};

// Fills the rows of the table that products with fp32 units make.
constexpr void add_tiles(KernelTable& table) {
  table.nf4_forward[static_cast<int>(DType::f32)] = &kTiles<FmaDot<float>, false>;
  table.nf4_forward[static_cast<int>(DType::bf16)] = &kTiles<FmaDot<bf16_t>, false>;
  table.nf4_forward[static_cast<int>(DType::f16)] = &kTiles<FmaDot<f16_t>, false>;
  table.nf4_gradient[static_cast<int>(DType::f32)] = &kTiles<FmaDot<float>, true>;
  table.nf4_gradient[static_cast<int>(DType::bf16)] = &kTiles<FmaDot<bf16_t>, true>;
  table.nf4_gradient[static_cast<int>(DType::f16)] = &kTiles<FmaDot<f16_t>, true>;
}
