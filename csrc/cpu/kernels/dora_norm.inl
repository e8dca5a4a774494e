// SPDX-License-Identifier: Apache-2.0
// DoRA's norms (dora_norm.h) for a range of rows.

// So many squares are summed in fp32, their sums in fp64.
constexpr int64_t kSquares = 1024;

template <class T>
void squared_dense_rows(const SquaredRowNorms& a, int64_t row0, int64_t row1) {
  for (int64_t row = row0; row < row1; ++row) {
    const T* w = static_cast<const T*>(a.weight) + row * a.columns;
    double total = 0.0;
    for (int64_t span = 0; span < a.columns; span += kSquares) {
      const int64_t end = smaller(span + kSquares, a.columns);
      F32 sum = zero();
      for (int64_t c = span; c < end; c += kWidth) {
        const F32 v = c + kWidth <= end ? load(w + c) : load_first(w + c, end - c);
        sum = fma(v, v, sum);
      }
      total += static_cast<double>(sum_lanes(sum));
    }
    a.out[row] = total;
  }
}

// A row may begin and end inside of a block, and of a byte: what is not whole bytes is summed one by one.
void squared_nf4_rows(const SquaredRowNorms& a, int64_t row0, int64_t row1) {
  const uint8_t* packed = static_cast<const uint8_t*>(a.weight);
  for (int64_t row = row0; row < row1; ++row) {
    const int64_t row_end = (row + 1) * a.columns;
    double total = 0.0;
    for (int64_t i = row * a.columns; i < row_end;) {
      const int64_t block = i / a.block_size, end = smaller((block + 1) * a.block_size, row_end);
      const CodeValues<float> values(a.absmax[block]);
      F32 sum = zero();
      float rest = 0.0f;
      while (i < end) {
        if (i % 2 == 0 && i + 2 * kWidth <= end) {
          F32 even, odd;
          values.lookup(packed + i / 2, even, odd);
          sum = fma(odd, odd, fma(even, even, sum));
          i += 2 * kWidth;
        } else {
          const uint32_t code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
          const float v = kNf4Codes[code] * a.absmax[block];
          rest += v * v;
          ++i;
        }
      }
      total += static_cast<double>(sum_lanes(sum)) + static_cast<double>(rest);
    }
    a.out[row] = total;
  }
}

void squared_row_norms(const SquaredRowNorms& a, int64_t row0, int64_t row1) {
  if (a.absmax) return squared_nf4_rows(a, row0, row1);
  dispatch(a.dtype, [&](auto tag) { squared_dense_rows<decltype(tag)>(a, row0, row1); });
}

template <class T>
void dora_norm_rows(const DoraNorm& a, int64_t row0, int64_t row1) {
  for (int64_t row = row0; row < row1; ++row) {
    const T* b = static_cast<const T*>(a.B) + row * a.rank;
    double squared = a.w2[row];
    for (int64_t i = 0; i < a.rank; ++i) {
      const float* g = a.G + i * a.rank;
      F32 sum = zero();
      for (int64_t j = 0; j < a.rank; j += kWidth) {
        const int64_t left = a.rank - j;
        sum = left >= kWidth ? fma(load(b + j), load(g + j), sum)
                             : fma(load_first(b + j, left), load_first(g + j, left), sum);
      }
      const double cross = 2.0 * static_cast<double>(a.P[i * a.rows + row]);
      squared +=
          a.scaling * static_cast<double>(to_float(b[i])) * (cross + a.scaling * static_cast<double>(sum_lanes(sum)));
    }
    a.norm[row] = squared <= 0.0 ? 0.0f : static_cast<float>(__builtin_sqrt(squared));  // a NaN stays one
  }
}

void dora_norm(const DoraNorm& a, int64_t row0, int64_t row1) {
  dispatch(a.B_dtype, [&](auto tag) { dora_norm_rows<decltype(tag)>(a, row0, row1); });
}
