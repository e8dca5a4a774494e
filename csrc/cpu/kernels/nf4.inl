// SPDX-License-Identifier: Apache-2.0
// NF4 on a range of blocks. Definition: nf4.h.   w ~ kNf4Codes[code] * absmax
// Bound by memory: quantize reads 4 or 2 bytes and writes 0.5, dequantize the other way round.

constexpr int64_t kAhead = 2048;  // bytes of w asked for ahead: 3.7 ms against 6.1 ms for 4096 x 4096 fp32 from memory

template <class T>
void quantize_blocks(const QuantizeNf4& a, int64_t block0, int64_t block1) {
  const T* w = static_cast<const T*>(a.w);
  for (int64_t block = block0; block < block1; ++block) {
    const int64_t begin = block * a.block_size;
    const int64_t n = a.n - begin < a.block_size ? a.n - begin : a.block_size;
    MaxMagnitude largest;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      __builtin_prefetch(w + begin + i + kAhead / sizeof(T));
      largest.add(load(w + begin + i));
    }
    if (i < n) largest.add(load_first(w + begin + i, n - i));
    const float absmax = largest.result();
    const float divisor = absmax < kMinAbsmax ? kMinAbsmax : absmax;  // a NaN stays one
    a.absmax[block] = n == a.block_size ? absmax : divisor;

    uint8_t* packed = a.packed + begin / 2;
    if (n == a.block_size) {
      const float inverse = 1.0f / divisor;
      for (i = 0; i < n; i += kQuantizeElements) quantize_group(w + begin + i, inverse, packed + i / 2);
    } else {  // the shorter last block is divided, not multiplied
      for (i = 0; i < n; i += 2) {
        const uint32_t even = nf4_code(to_float(w[begin + i]) / divisor);
        const uint32_t odd = i + 1 < n ? nf4_code(to_float(w[begin + i + 1]) / divisor) : kNf4Zero;
        packed[i / 2] = static_cast<uint8_t>(even << 4 | odd);
      }
    }
  }
}

template <class T, bool kStream>
void dequantize_blocks(const DequantizeNf4& a, int64_t block0, int64_t block1) {
  T* out = static_cast<T*>(a.out);
  for (int64_t block = block0; block < block1; ++block) {
    const int64_t begin = block * a.block_size;
    const int64_t n = a.n - begin < a.block_size ? a.n - begin : a.block_size;
    const uint8_t* packed = a.packed + begin / 2;
    __builtin_prefetch(packed + kAhead / 2);
    const NibbleTable<T> table(a.absmax[block]);
    int64_t i = 0;
    for (; i + table.kElements <= n; i += table.kElements)
      table.template emit<kStream>(packed + i / 2, out + begin + i);
    for (; i < n; ++i) {
      const uint32_t code = i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4;
      out[begin + i] = from_float<T>(kNf4Codes[code] * a.absmax[block]);
    }
  }
}

void quantize_nf4(const QuantizeNf4& a, int64_t block0, int64_t block1) {
  dispatch(a.w_dtype, [&](auto tag) { quantize_blocks<decltype(tag)>(a, block0, block1); });
}

void dequantize_nf4(const DequantizeNf4& a, int64_t block0, int64_t block1) {
  const bool aligned = reinterpret_cast<uintptr_t>(a.out) % 64 == 0;
  dispatch(a.out_dtype, [&](auto tag) {
    using T = decltype(tag);
    if (aligned && a.n * static_cast<int64_t>(sizeof(T)) >= kStreamBytes) {
      dequantize_blocks<T, true>(a, block0, block1);
      fence();
    } else {
      dequantize_blocks<T, false>(a, block0, block1);
    }
  });
}

// ---- y = x W^T + bias for a few rows --------------------------------------------------------------------------------

template <class T>
void pack_few_rows_as(const Nf4Product& a, float* packed_x) {
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.in;
    float* target = packed_x + row * a.in;
    for (int64_t run = 0; run < a.in; run += 2 * kWidth)
      for (int64_t i = 0; i < kWidth; ++i) {
        target[run + i] = to_float(x[run + 2 * i]);
        target[run + kWidth + i] = to_float(x[run + 2 * i + 1]);
      }
  }
  const int64_t end = ceil_div(a.rows, kRowUnit) * kRowUnit;
  std::memset(packed_x + a.rows * a.in, 0, static_cast<size_t>((end - a.rows) * a.in) * sizeof(float));
}

void pack_few_rows(const Nf4Product& a, float* packed_x) {
  dispatch(a.x_dtype, [&](auto tag) { pack_few_rows_as<decltype(tag)>(a, packed_x); });
}

// One column of y for kRows rows: even and odd weights have sums of their own, so that no addition waits for another.
template <class T, int kRows>
inline void few_rows_column(const Nf4Product& a, const float* packed_x, int64_t row, int64_t column) {
  F32 even_sum[kRows], odd_sum[kRows];
  for (int i = 0; i < kRows; ++i) even_sum[i] = odd_sum[i] = zero();
  const uint8_t* packed = a.packed + column * a.in / 2;
  const float* absmax = a.absmax + column * (a.in / a.block_size);
  const float* x = packed_x + row * a.in;
  for (int64_t block = 0; block < a.in; block += a.block_size) {
    const CodeValues<T> values(*absmax++);
    __builtin_prefetch(packed + block / 2 + kAhead);
    for (int64_t k = block; k < block + a.block_size; k += 2 * kWidth) {
      F32 even, odd;
      values.lookup(packed + k / 2, even, odd);
      for (int i = 0; i < kRows; ++i) {
        even_sum[i] = fma(load(x + i * a.in + k), even, even_sum[i]);
        odd_sum[i] = fma(load(x + i * a.in + k + kWidth), odd, odd_sum[i]);
      }
    }
  }
  for (int i = 0; i < kRows && row + i < a.rows; ++i) {
    const float sum = sum_lanes(add(even_sum[i], odd_sum[i])) + (a.bias ? a.bias[column] : 0.0f);
    static_cast<T*>(a.y)[(row + i) * a.out + column] = from_float<T>(sum);
  }
}

template <class T>
void few_rows_columns(const Nf4Product& a, const float* packed_x, int64_t column0, int64_t column1) {
  for (int64_t column = column0; column < column1; ++column)
    for (int64_t row = 0; row < a.rows; row += kTileRows) {
      const int64_t left = a.rows - row;
      if (left == 1) {
        few_rows_column<T, 1>(a, packed_x, row, column);
      } else if (left == 2) {
        few_rows_column<T, 2>(a, packed_x, row, column);
      } else if (left <= 4 || kTileRows == 4) {
        few_rows_column<T, 4>(a, packed_x, row, column);
      } else {
        few_rows_column<T, kTileRows>(a, packed_x, row, column);
      }
    }
}

void nf4_few_rows(const Nf4Product& a, const float* packed_x, int64_t column0, int64_t column1) {
  dispatch(a.x_dtype, [&](auto tag) { few_rows_columns<decltype(tag)>(a, packed_x, column0, column1); });
}
