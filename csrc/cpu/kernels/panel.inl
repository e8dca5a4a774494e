// SPDX-License-Identifier: Apache-2.0
// Panels of a low-rank factor, widened to fp32: copied, or transposed in registers.

template <class T>
inline F32 load_up_to(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n > 0 ? load_first(p, n) : zero();
}

// target[r][c] = source[r][c], in whole vectors: zero past columns
template <class T>
inline void copy_panel(const T* source, int64_t stride, int64_t rows, int64_t columns, float* target, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += kWidth)
      store(target + r * ld + c, load_up_to(source + r * stride + c, columns - c));
}

// block[j][i] = source[i][j], zero past rows and columns
template <class T>
inline void load_transposed(const T* source, int64_t stride, int64_t rows, int64_t columns, F32 (&block)[kWidth]) {
  if (rows >= kWidth && columns >= kWidth) {
    for (int64_t i = 0; i < kWidth; ++i) block[i] = load(source + i * stride);
  } else {
    for (int64_t i = 0; i < kWidth; ++i) block[i] = i < rows ? load_up_to(source + i * stride, columns) : zero();
  }
  transpose(block);
}

// target[c][r] = source[r][c], in whole vectors both ways: zero past rows and columns
template <class T>
inline void transpose_panel(const T* source, int64_t stride, int64_t rows, int64_t columns, float* target, int64_t ld) {
  for (int64_t r = 0; r < rows; r += kWidth)
    for (int64_t c = 0; c < columns; c += kWidth) {
      F32 block[kWidth];
      load_transposed(source + r * stride + c, stride, rows - r, columns - c, block);
      for (int64_t i = 0; i < kWidth; ++i) store(target + (c + i) * ld + r, block[i]);
    }
}
