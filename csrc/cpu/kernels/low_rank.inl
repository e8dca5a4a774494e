// SPDX-License-Identifier: Apache-2.0
// The four low-rank kernels (low_rank.h), written once against the vector vocabulary of vec/*.h.
//
// x is read once, as tiles that are widened to fp32 and masked on the way into the first-level cache; the products then
// run from there as register tiles of kTileRows x kTileVectors sums. A row's sums are taken in column order whatever
// rows share its tile, and a gradient's in row order, so no result depends on how the work was split.

constexpr int64_t kDepth = 256;   // columns of a down tile: 8 rows x 256 x 4 B = 8 KiB beside 16 KiB of packed factor
constexpr int64_t kSpan = 512;    // columns of an up panel: 16 ranks x 512 x 4 B = 32 KiB stay in cache for all rows
constexpr int64_t kKeepPad = 16;  // keep_bytes writes kWidth chunks at a time

static_assert(kRowUnit % kTileRows == 0 && kColumnUnit % (kTileVectors * kWidth) == 0);
static_assert(kDepth % (8 * kWidth) == 0 && kSpan % (8 * kWidth) == 0);

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// The keep bits of columns [column, column + n) of a row, bit i of the stream belonging to column + i; column % 8 == 0.
inline void keep_row(const Dropout& d, int64_t row, int64_t column, int64_t n, uint8_t* bits) {
  const uint64_t seed = static_cast<uint64_t>(*d.seed);
  for (int64_t chunk = 0; chunk * kDropoutChunk < n; chunk += kWidth)
    keep_bytes(seed, static_cast<uint64_t>(row), static_cast<uint32_t>(column / kDropoutChunk + chunk), d.threshold,
               bits + chunk);
}

// Of the kWidth columns from i on. No byte more: a load that spans two stores of keep_bytes waits for both.
inline uint32_t lane_bits(const uint8_t* bits, int64_t i) {
  uint16_t word = 0;
  std::memcpy(&word, bits + i / 8, kWidth > 8 ? 2 : 1);
  return static_cast<uint32_t>(word) >> (i % 8);
}

// tile[i][c] = mask(x[row + i][column + c]) as fp32; columns past the end become 0 up to the next full vector.
template <class T>
inline void load_tile(const T* x, int64_t ld, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      const Dropout& dropout, float* tile, int64_t tile_ld) {
  uint8_t bits[kDepth / 8 + kKeepPad];
  for (int64_t i = 0; i < rows; ++i) {
    const T* source = x + (row + i) * ld + column;
    float* target = tile + i * tile_ld;
    if (dropout.threshold) keep_row(dropout, row + i, column, columns, bits);
    for (int64_t c = 0; c < columns; c += kWidth) {
      F32 v = c + kWidth <= columns ? load(source + c) : load_first(source + c, columns - c);
      if (dropout.threshold) v = keep(v, lane_bits(bits, c));
      store(target + c, v);
    }
  }
}

// ---- down: out = alpha * drop(x) F^T
// ---------------------------------------------------------------------------------

int64_t padded_rank(int64_t rank) { return round_up(rank, kWidth); }

template <class T>
void pack_down_as(const LowRankDown& a, float* packed, int64_t column0, int64_t column1) {
  const T* factor = static_cast<const T*>(a.factor.data);
  const int64_t ld = padded_rank(a.rank);
  if (a.factor.rank_major) {
    transpose_panel(factor + column0, a.columns, a.rank, column1 - column0, packed + column0 * ld, ld);
  } else {
    copy_panel(factor + column0 * a.rank, a.rank, column1 - column0, a.rank, packed + column0 * ld, ld);
  }
}

void pack_down(const LowRankDown& a, float* packed, int64_t column0, int64_t column1) {
  dispatch(a.factor.dtype, [&](auto tag) { pack_down_as<decltype(tag)>(a, packed, column0, column1); });
}

// sums[i][..] += tile[i][0:depth] packed[0:depth][..] for kTileRows rows and kVectors vectors of ranks
template <int kVectors>
inline void down_tile(const float* tile, int64_t depth, const float* packed, float* sums, int64_t ld) {
  F32 sum[kTileRows][kVectors];
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v) sum[i][v] = load(sums + i * ld + v * kWidth);
  for (int64_t c = 0; c < depth; ++c) {
    F32 factor[kVectors];
    for (int v = 0; v < kVectors; ++v) factor[v] = load(packed + c * ld + v * kWidth);
    for (int i = 0; i < kTileRows; ++i) {
      const F32 x = set1(tile[i * kDepth + c]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(x, factor[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v) store(sums + i * ld + v * kWidth, sum[i][v]);
}

inline void store_down(const LowRankDown& a, const float* sums, int64_t ld, int64_t row, int64_t rows) {
  const float scale = a.alpha * a.dropout.scale;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < a.rank; ++j) a.out[(row + i) * a.rank + j] = scale * sums[i * ld + j];
}

template <class T>
void down_rows(const LowRankDown& a, const float* packed, float* scratch, int64_t row0, int64_t row1) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t ld = padded_rank(a.rank);
  float tile[kTileRows * kDepth] = {};
  for (int64_t block = row0; block < row1; block += kRowBlock) {
    const int64_t block_rows = smaller(kRowBlock, row1 - block);
    std::memset(scratch, 0, sizeof(float) * static_cast<size_t>(kRowBlock * ld));
    for (int64_t column = 0; column < a.columns; column += kDepth) {
      const int64_t depth = smaller(kDepth, a.columns - column);
      for (int64_t i = 0; i < block_rows; i += kTileRows) {
        const int64_t rows = smaller(kTileRows, block_rows - i);
        load_tile(x, a.columns, block + i, rows, column, depth, a.dropout, tile, kDepth);
        int64_t j = 0;
        for (; j + kTileVectors * kWidth <= ld; j += kTileVectors * kWidth)
          down_tile<kTileVectors>(tile, depth, packed + column * ld + j, scratch + i * ld + j, ld);
        for (; j < ld; j += kWidth) down_tile<1>(tile, depth, packed + column * ld + j, scratch + i * ld + j, ld);
      }
    }
    store_down(a, scratch, ld, block, block_rows);
  }
}

void low_rank_down(const LowRankDown& a, const float* packed, float* scratch, int64_t row0, int64_t row1) {
  dispatch(a.x_dtype, [&](auto tag) { down_rows<decltype(tag)>(a, packed, scratch, row0, row1); });
}

// ---- up: y = out_scale * (y + alpha * mask(u F)) + bias, the second y only if accumulate ----------------------------

template <class T>
void pack_up_as(const LowRankUp& a, float* packed, int64_t ld, int64_t column0, int64_t column1) {
  const T* factor = static_cast<const T*>(a.factor.data);
  const int64_t columns = smaller(column1, a.columns) - column0;
  if (a.factor.rank_major) {
    copy_panel(factor + column0, a.columns, a.rank, columns, packed + column0, ld);
  } else {
    transpose_panel(factor + column0 * a.rank, a.rank, columns, a.rank, packed + column0, ld);
  }
}

void pack_up(const LowRankUp& a, float* packed, int64_t ld, int64_t column0, int64_t column1) {
  dispatch(a.factor.dtype, [&](auto tag) { pack_up_as<decltype(tag)>(a, packed, ld, column0, column1); });
}

// y of one vector of columns, `left` of which are inside the row.
template <class T, bool kWhole>
inline void up_store(const LowRankUp& a, int64_t at, int64_t column, int64_t left, F32 sum, const uint8_t* bits,
                     int64_t bit) {
  T* y = static_cast<T*>(a.y) + at;
  F32 value = !a.accumulate ? zero() : kWhole ? load(y) : load_first(y, left);
  if (a.dropout.threshold) sum = keep(sum, lane_bits(bits, bit));
  value = fma(sum, set1(a.alpha * a.dropout.scale), value);
  if (a.z) {
    T* z = static_cast<T*>(a.z) + at;
    kWhole ? store(z, value) : store_first(z, left, value);
  }
  if (a.out_scale) value = mul(value, kWhole ? load(a.out_scale + column) : load_first(a.out_scale + column, left));
  if (a.bias) value = add(value, kWhole ? load(a.bias + column) : load_first(a.bias + column, left));
  kWhole ? store(y, value) : store_first(y, left, value);
}

// A tile of y: kTileRows rows x kTileVectors vectors. The sums stay in registers where the tile is whole: kept in
// memory for the sake of an index that is not a constant, they cost a quarter of the time.
template <class T>
inline void up_tile(const LowRankUp& a, const float* const* u, const float* packed, int64_t ld, int64_t row,
                    int64_t rows, int64_t column, int64_t columns, const uint8_t* bits, int64_t bits_ld, int64_t bit) {
  F32 sum[kTileRows][kTileVectors];
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kTileVectors; ++v) sum[i][v] = zero();
  for (int64_t j = 0; j < a.rank; ++j) {
    F32 factor[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) factor[v] = load(packed + j * ld + column + v * kWidth);
    for (int i = 0; i < kTileRows; ++i) {
      const F32 weight = set1(u[i][j]);
      for (int v = 0; v < kTileVectors; ++v) sum[i][v] = fma(weight, factor[v], sum[i][v]);
    }
  }
  if (rows == kTileRows && columns >= kTileVectors * kWidth) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v)
        up_store<T, true>(a, (row + i) * a.columns + column + v * kWidth, column + v * kWidth, kWidth, sum[i][v],
                          bits + i * bits_ld, bit + v * kWidth);
    return;
  }
  float spilled[kTileRows][kTileVectors][kWidth];
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kTileVectors; ++v) store(spilled[i][v], sum[i][v]);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < smaller(columns, kTileVectors * kWidth); c += kWidth)
      up_store<T, false>(a, (row + i) * a.columns + column + c, column + c, smaller(columns - c, kWidth),
                         load(spilled[i][c / kWidth]), bits + i * bits_ld, bit + c);
}

template <class T>
void up_rows(const LowRankUp& a, const float* packed, int64_t ld, int64_t row0, int64_t row1) {
  constexpr int64_t kBits = kSpan / 8 + kKeepPad;
  uint8_t bits[kTileRows * kBits];
  for (int64_t span = 0; span < a.columns; span += kSpan) {
    const int64_t span_end = smaller(span + kSpan, a.columns);
    for (int64_t row = row0; row < row1; row += kTileRows) {
      const int64_t rows = smaller(kTileRows, row1 - row);
      const float* u[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) u[i] = a.u + (row + smaller(i, rows - 1)) * a.rank;
      if (a.dropout.threshold)
        for (int64_t i = 0; i < rows; ++i) keep_row(a.dropout, row + i, span, span_end - span, bits + i * kBits);
      for (int64_t column = span; column < span_end; column += kTileVectors * kWidth)
        up_tile<T>(a, u, packed, ld, row, rows, column, span_end - column, bits, kBits, column - span);
    }
  }
}

void low_rank_up(const LowRankUp& a, const float* packed, int64_t ld, int64_t row0, int64_t row1) {
  dispatch(a.y_dtype, [&](auto tag) { up_rows<decltype(tag)>(a, packed, ld, row0, row1); });
}

// ---- grad: alpha * u^T drop(x)
// ---------------------------------------------------------------------------------------

// sums[j][..] += u[0:rows][j] tile[0:rows][..] for kTileRows ranks and kTileVectors vectors of columns
inline void grad_tile(const float* tile, int64_t rows, const float* u, int64_t u_ld, const int64_t* rank, float* sums) {
  F32 sum[kTileRows][kTileVectors];
  for (int j = 0; j < kTileRows; ++j)
    for (int v = 0; v < kTileVectors; ++v) sum[j][v] = load(sums + j * kColumnUnit + v * kWidth);
  for (int64_t i = 0; i < rows; ++i) {
    F32 x[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) x[v] = load(tile + i * kColumnUnit + v * kWidth);
    for (int j = 0; j < kTileRows; ++j) {
      const F32 weight = set1(u[i * u_ld + rank[j]]);
      for (int v = 0; v < kTileVectors; ++v) sum[j][v] = fma(weight, x[v], sum[j][v]);
    }
  }
  for (int j = 0; j < kTileRows; ++j)
    for (int v = 0; v < kTileVectors; ++v) store(sums + j * kColumnUnit + v * kWidth, sum[j][v]);
}

template <class T, class G>
void grad_columns(const LowRankGrad& a, float* scratch, int64_t column0, int64_t column1) {
  const T* x = static_cast<const T*>(a.x);
  G* grad = static_cast<G*>(a.grad);
  const float scale = a.alpha * a.dropout.scale;
  float tile[kRowBlock * kColumnUnit] = {};
  for (int64_t column = column0; column < column1; column += kColumnUnit) {
    const int64_t columns = smaller(kColumnUnit, column1 - column);
    std::memset(scratch, 0, sizeof(float) * static_cast<size_t>(round_up(a.rank, kRowUnit) * kColumnUnit));
    for (int64_t row = 0; row < a.rows; row += kRowBlock) {
      const int64_t rows = smaller(kRowBlock, a.rows - row);
      load_tile(x, a.columns, row, rows, column, columns, a.dropout, tile, kColumnUnit);
      for (int64_t j = 0; j < a.rank; j += kTileRows) {
        int64_t rank[kTileRows];  // past the last rank the last one is summed again and not stored
        for (int64_t k = 0; k < kTileRows; ++k) rank[k] = smaller(j + k, a.rank - 1);
        for (int64_t c = 0; c < columns; c += kTileVectors * kWidth)
          grad_tile(tile + c, rows, a.u + row * a.rank, a.rank, rank, scratch + j * kColumnUnit + c);
      }
    }
    for (int64_t j = 0; j < a.rank; ++j)
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t at = a.rank_major ? j * a.columns + column + c : (column + c) * a.rank + j;
        grad[at] = from_float<G>(scale * scratch[j * kColumnUnit + c]);
      }
  }
}

void low_rank_grad(const LowRankGrad& a, float* scratch, int64_t column0, int64_t column1) {
  dispatch(a.x_dtype, [&](auto x) {
    dispatch(a.grad_dtype, [&](auto g) { grad_columns<decltype(x), decltype(g)>(a, scratch, column0, column1); });
  });
}

// ---- column sums: q = g * scale, and over the rows the sums of g and of g * z ---------------------------------------

struct SpanSums {
  float sums[kSpan], dots[kSpan];
};

// `rows` rows of one vector of columns, `left` of which are inside the row.
template <class T, bool kWhole>
inline void sum_tile(const ColumnSums& a, int64_t at, int64_t rows, int64_t column, int64_t left, float* sums,
                     float* dots) {
  const T *g = static_cast<const T*>(a.g) + at, *z = static_cast<const T*>(a.z) + at;
  T* q = static_cast<T*>(a.q) + at;
  const F32 scale = !a.q ? zero() : kWhole ? load(a.scale + column) : load_first(a.scale + column, left);
  F32 sum = load(sums), dot = load(dots);
  for (int64_t i = 0; i < rows; ++i, g += a.columns, z += a.columns, q += a.columns) {
    const F32 value = kWhole ? load(g) : load_first(g, left);
    sum = add(sum, value);
    if (a.dots) dot = fma(value, kWhole ? load(z) : load_first(z, left), dot);
    if (a.q) kWhole ? store(q, mul(value, scale)) : store_first(q, left, mul(value, scale));
  }
  store(sums, sum);
  store(dots, dot);
}

// A block of rows is read row by row, kSpan columns of each, so that what lies side by side is read at once.
template <class T>
void sum_columns(const ColumnSums& a, int64_t column0, int64_t column1) {
  for (int64_t span = column0; span < column1; span += kSpan) {
    const int64_t columns = smaller(kSpan, column1 - span);
    SpanSums total = {};
    for (int64_t block = 0; block < a.rows; block += kRowBlock) {  // two levels: the error grows with rows / 64 + 64
      SpanSums sum = {};
      const int64_t end = smaller(block + kRowBlock, a.rows);
      for (int64_t row = block; row < end; row += kTileRows) {
        const int64_t rows = smaller(kTileRows, end - row), at = row * a.columns + span;
        int64_t c = 0;
        for (; c + kWidth <= columns; c += kWidth)
          sum_tile<T, true>(a, at + c, rows, span + c, kWidth, sum.sums + c, sum.dots + c);
        if (c < columns) sum_tile<T, false>(a, at + c, rows, span + c, columns - c, sum.sums + c, sum.dots + c);
      }
      for (int64_t c = 0; c < columns; ++c) total.sums[c] += sum.sums[c], total.dots[c] += sum.dots[c];
    }
    if (a.sums) std::memcpy(a.sums + span, total.sums, sizeof(float) * static_cast<size_t>(columns));
    if (a.dots) std::memcpy(a.dots + span, total.dots, sizeof(float) * static_cast<size_t>(columns));
  }
}

void column_sums(const ColumnSums& a, int64_t column0, int64_t column1) {
  dispatch(a.dtype, [&](auto tag) { sum_columns<decltype(tag)>(a, column0, column1); });
}
