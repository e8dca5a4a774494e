// SPDX-License-Identifier: Apache-2.0
// DoRA's norms (dora_norm.h) for a range of rows. Sums are in fp64, in lanes that the compiler makes vectors of.

struct Squares {
  double lanes[kWidth] = {};

  void add(F32 v) {
    float values[kWidth];
    store(values, v);
    for (int64_t lane = 0; lane < kWidth; ++lane) lanes[lane] += static_cast<double>(values[lane]) * values[lane];
  }
  void add(float v) { lanes[0] += static_cast<double>(v) * v; }
  double total() const {
    double sum = 0.0;
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

template <class T>
void squared_dense_rows(const SquaredRowNorms& a, int64_t row0, int64_t row1) {
  for (int64_t row = row0; row < row1; ++row) {
    const T* w = static_cast<const T*>(a.weight) + row * a.columns;
    Squares squares;
    for (int64_t c = 0; c < a.columns; c += kWidth)
      squares.add(c + kWidth <= a.columns ? load(w + c) : load_first(w + c, a.columns - c));
    a.out[row] = squares.total();
  }
}

// A row may begin and end inside of a block, and of a byte: what is not whole bytes is summed one by one.
void squared_nf4_rows(const SquaredRowNorms& a, int64_t row0, int64_t row1) {
  const uint8_t* packed = static_cast<const uint8_t*>(a.weight);
  for (int64_t row = row0; row < row1; ++row) {
    const int64_t row_end = (row + 1) * a.columns;
    Squares squares;
    for (int64_t i = row * a.columns; i < row_end;) {
      const int64_t block = i / a.block_size, end = smaller((block + 1) * a.block_size, row_end);
      const CodeValues<float> values(a.absmax[block]);
      while (i < end) {
        if (i % 2 == 0 && i + 2 * kWidth <= end) {
          F32 even, odd;
          values.lookup(packed + i / 2, even, odd);
          squares.add(even);
          squares.add(odd);
          i += 2 * kWidth;
        } else {
          const uint32_t code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
          squares.add(kNf4Codes[code] * a.absmax[block]);
          ++i;
        }
      }
    }
    a.out[row] = squares.total();
  }
}

void squared_row_norms(const SquaredRowNorms& a, int64_t row0, int64_t row1) {
  if (a.absmax) return squared_nf4_rows(a, row0, row1);
  dispatch(a.dtype, [&](auto tag) { squared_dense_rows<decltype(tag)>(a, row0, row1); });
}

constexpr int64_t kNormRanks = 64;  // whose sums are made at a time

template <class T>
void dora_norm_rows(const DoraNorm& a, int64_t row0, int64_t row1) {
  for (int64_t row = row0; row < row1; ++row) {
    const T* b = static_cast<const T*>(a.B) + row * a.rank;
    double squared = a.w2[row];
    for (int64_t first = 0; first < a.rank; first += kNormRanks) {
      const int64_t ranks = smaller(kNormRanks, a.rank - first);
      double sums[kNormRanks];  // 2 P + s G B
      for (int64_t i = 0; i < ranks; ++i) sums[i] = 2.0 * static_cast<double>(a.P[(first + i) * a.rows + row]);
      for (int64_t j = 0; j < a.rank; ++j) {
        const double* g = a.G + j * a.rank + first;
        const double factor = a.scaling * static_cast<double>(to_float(b[j]));
        for (int64_t i = 0; i < ranks; ++i) sums[i] += factor * g[i];
      }
      for (int64_t i = 0; i < ranks; ++i) squared += a.scaling * static_cast<double>(to_float(b[first + i])) * sums[i];
    }
    a.norm[row] = squared <= 0.0 ? 0.0f : static_cast<float>(__builtin_sqrt(squared));  // a NaN stays one
  }
}

void dora_norm(const DoraNorm& a, int64_t row0, int64_t row1) {
  dispatch(a.B_dtype, [&](auto tag) { dora_norm_rows<decltype(tag)>(a, row0, row1); });
}
