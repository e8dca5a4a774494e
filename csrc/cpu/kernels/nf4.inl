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
