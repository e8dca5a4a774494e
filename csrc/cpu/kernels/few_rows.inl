// SPDX-License-Identifier: Apache-2.0
// Few rows times a dense weight (few_rows.h). Each element of y is a dot product of two rows as they lie in memory: the
// weight is read once and never packed, so a product runs at the speed of the memory it streams from. The low-rank term
// goes into the lanes of the same sums, one fma for kWidth ranks; lanes are added up at the end.
//
// A sum is taken in one order, whatever rows and columns share its tile.

constexpr int64_t kTilesAhead = 2;  // a tile of 8 rows of 576 columns takes about as long as memory to answer

template <class W>
struct FloatDot {
  using X = float;  // widened before
  using Weight = W;
  static constexpr int64_t kStep = kWidth;
  static constexpr bool kWidened = true;

  static F32 load_x(const float* p) { return load(p); }
  static F32 load_x_first(const float* p, int64_t) { return load(p); }  // padded with zeros
  static F32 load_weight(const W* p) { return load(p); }
  static F32 load_weight_first(const W* p, int64_t n) { return load_first(p, n); }
  static F32 dot(F32 x, F32 w, F32 sum) { return fma(x, w, sum); }
};

void widen_few_rows(const FewRows& a, float* widened) {
  dispatch(a.x_dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t ld = round_up(a.in, kMaxLanes);
    for (int64_t i = 0; i < a.rows; ++i) {
      const T* x = static_cast<const T*>(a.x) + (a.x_rows ? a.x_rows[i] : i) * a.in;
      for (int64_t c = 0; c < ld; c += kWidth) store(widened + i * ld + c, load_up_to(x + c, a.in - c));
    }
  });
}

// target[i] = kWidth ranks from j on of a term's factor for `columns` columns; rows that share a factor share it.
template <class T>
inline void widen_factors(const FewRows& a, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t j,
                          float* buffer, const float** target) {
  for (int64_t i = 0; i < rows; ++i, buffer += columns * kWidth) {
    const LowRankTerm& t = a.terms[smaller(row + i, a.rows - 1)];
    const LowRankTerm* last = i ? &a.terms[smaller(row + i - 1, a.rows - 1)] : nullptr;
    if (last && last->factor == t.factor && last->rank == t.rank) {
      target[i] = target[i - 1];
      continue;
    }
    const T* factor = static_cast<const T*>(t.factor) + column * a.factor_ld + j;
    for (int64_t c = 0; c < columns; ++c) {
      __builtin_prefetch(factor + (kTilesAhead * columns + c) * a.factor_ld);
      store(buffer + c * kWidth, load_up_to(factor + c * a.factor_ld, t.rank - j));
    }
    target[i] = buffer;
  }
}

template <class T>
inline void store_few_rows(const FewRows& a, const float* total, int64_t row, int64_t rows, int64_t column,
                           int64_t columns) {
  for (int64_t i = 0; i < smaller(rows, a.rows - row); ++i) {
    T* y = static_cast<T*>(a.y) + (a.y_rows ? a.y_rows[row + i] : row + i) * a.y_ld + column;
    for (int64_t c = 0; c < columns; ++c) y[c] = from_float<T>(total[c * rows + i]);
  }
}

// x: kRows pointers, the last one repeated where there are fewer rows
template <int kRows, int kColumns, class Dot>
inline void few_rows_tile(const FewRows& a, const typename Dot::X* const* x, int64_t row, int64_t column) {
  F32 sum[kColumns][kRows];
  const typename Dot::Weight* weight[kColumns];
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c) {
    weight[c] = static_cast<const typename Dot::Weight*>(a.weight) + (column + c) * a.in;
    const F32 start = a.bias ? load_up_to(a.bias + column + c, 1) : zero();  // in one lane
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum[c][i] = start;
  }
  const int64_t whole = a.in / Dot::kStep * Dot::kStep;
  for (int64_t k = 0; k < whole; k += Dot::kStep) {
    F32 w[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      __builtin_prefetch(weight[c] + kTilesAhead * kColumns * a.in + k);
      w[c] = Dot::load_weight(weight[c] + k);
    }
    for (int i = 0; i < kRows; ++i) {
      const F32 value = Dot::load_x(x[i] + k);
      for (int c = 0; c < kColumns; ++c) sum[c][i] = Dot::dot(value, w[c], sum[c][i]);
    }
  }
  if (whole < a.in) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const F32 value = Dot::load_x_first(x[i] + whole, a.in - whole);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c)
        sum[c][i] = Dot::dot(value, Dot::load_weight_first(weight[c] + whole, a.in - whole), sum[c][i]);
    }
  }
  if (a.terms) {
    float buffer[kRows * kColumns * kWidth];
    const float* factor[kRows];
    for (int64_t j = 0; j < a.factor_ld; j += kWidth) {
      dispatch(a.factor_dtype,
               [&](auto t) { widen_factors<decltype(t)>(a, row, kRows, column, kColumns, j, buffer, factor); });
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const F32 u = load(a.terms[smaller(row + i, a.rows - 1)].u + j);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) sum[c][i] = fma(u, load(factor[i] + c * kWidth), sum[c][i]);
      }
    }
  }
  constexpr int kSums = kRows * kColumns;
  float total[(kSums + kWidth - 1) / kWidth * kWidth];
#pragma GCC unroll 16
  for (int s = 0; s < kSums; s += kWidth) {
    F32 block[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) block[i] = s + i < kSums ? sum[(s + i) / kRows][(s + i) % kRows] : zero();
    transpose(block);
#pragma GCC unroll 4
    for (int half = kWidth / 2; half; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) block[i] = add(block[i], block[i + half]);
    store(total + s, block[0]);
  }
  dispatch(a.y_dtype, [&](auto y) { store_few_rows<decltype(y)>(a, total, row, kRows, column, kColumns); });
}

constexpr int kFewRowsSums = kTileRows * kTileVectors;  // as many sums as the registers hold

template <int kRows, class Dot>
inline void few_rows_columns(const FewRows& a, const typename Dot::X* x, int64_t ld, int64_t column0, int64_t column1) {
  constexpr int kMost = kFewRowsSums / kRows, kColumns = kMost < 1 ? 1 : kMost > 8 ? 8 : kMost;
  const auto columns = [&](auto tile, int64_t column) {
    for (int64_t row = 0; row < a.rows; row += kRows) {
      const typename Dot::X* rows[kRows];
      for (int64_t i = 0; i < kRows; ++i) {
        const int64_t r = smaller(row + i, a.rows - 1);
        rows[i] = x + (!Dot::kWidened && a.x_rows ? a.x_rows[r] : r) * ld;
      }
      tile(rows, row, column);
    }
  };
  int64_t column = column0;
  for (; column + kColumns <= column1; column += kColumns)
    columns([&](auto rows, int64_t row, int64_t c) { few_rows_tile<kRows, kColumns, Dot>(a, rows, row, c); }, column);
  for (; column < column1; ++column)
    columns([&](auto rows, int64_t row, int64_t c) { few_rows_tile<kRows, 1, Dot>(a, rows, row, c); }, column);
}

// The weight's rows stay in the first-level cache while more than 8 rows pass.
template <class Dot>
inline void few_rows_as(const FewRows& a, const typename Dot::X* x, int64_t ld, int64_t column0, int64_t column1) {
  if (a.rows == 1) return few_rows_columns<1, Dot>(a, x, ld, column0, column1);
  if (a.rows == 2) return few_rows_columns<2, Dot>(a, x, ld, column0, column1);
  if (a.rows <= 4) return few_rows_columns<4, Dot>(a, x, ld, column0, column1);
  few_rows_columns<8, Dot>(a, x, ld, column0, column1);
}

bool widens_few_rows(const FewRows&) { return true; }

void few_rows(const FewRows& a, const float* widened, int64_t column0, int64_t column1) {
  dispatch(a.weight_dtype, [&](auto w) {
    few_rows_as<FloatDot<decltype(w)>>(a, widened, round_up(a.in, kMaxLanes), column0, column1);
  });
}
