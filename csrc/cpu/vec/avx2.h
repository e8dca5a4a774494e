// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary with 8 lanes: AVX2, FMA, F16C. Meanings: scalar.h. Included inside the ISA's namespace.

constexpr int kWidth = 8;
constexpr int kTileRows = 4;  // 4 x 2 sums, 2 factor vectors and 1 broadcast of 16 registers
constexpr int kTileVectors = 2;
constexpr int kPanelRows = 6;  // 6 x 2 sums, 2 vectors of W and a broadcast of x in 16 registers

struct F32 {
  __m256 v;
};

inline F32 zero() { return {_mm256_setzero_ps()}; }
inline F32 set1(float x) { return {_mm256_set1_ps(x)}; }
inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }

inline F32 keep(F32 a, uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(chosen))};
}

inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline F32 load(const bf16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline F32 load(const f16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }

inline void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
inline __m128i to_bf16(F32 a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08));
}
inline __m128i to_f16(F32 a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
inline void store(bf16_t* p, F32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
inline void store(f16_t* p, F32 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_f16(a)); }

template <class T>
inline F32 load_first(const T* p, int64_t n) {
  T lanes[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
inline void store_first(T* p, int64_t n, F32 a) {
  T lanes[kWidth];
  store(lanes, a);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

inline void transpose(F32 (&r)[kWidth]) {
  __m256 quad[kWidth];  // [half of the rows][column of a 128-bit lane]
  for (int half = 0; half < 2; ++half) {
    const F32* in = r + 4 * half;
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(in[0].v, in[1].v));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(in[0].v, in[1].v));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(in[2].v, in[3].v));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(in[2].v, in[3].v));
    quad[4 * half + 0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    quad[4 * half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    quad[4 * half + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    quad[4 * half + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
  }
  for (int k = 0; k < 4; ++k) {
    r[k].v = _mm256_permute2f128_ps(quad[k], quad[4 + k], 0x20);
    r[4 + k].v = _mm256_permute2f128_ps(quad[k], quad[4 + k], 0x31);
  }
}

// Even and odd lanes of 2 * kWidth, as they came.
inline void interleave(F32 even, F32 odd, F32& low, F32& high) {
  const __m256 l = _mm256_unpacklo_ps(even.v, odd.v), h = _mm256_unpackhi_ps(even.v, odd.v);
  low.v = _mm256_permute2f128_ps(l, h, 0x20);
  high.v = _mm256_permute2f128_ps(l, h, 0x31);
}

// As in avx512.h, 4 chunks.
inline uint32_t keep_chunks(const PhiloxRow& p, __m256i index, uint32_t threshold) {
  const __m256i mul0 = _mm256_set1_epi64x(kPhiloxMul0), mul1 = _mm256_set1_epi64x(kPhiloxMul1);
  const auto word = [](uint32_t w) { return _mm256_set1_epi64x(w); };
  const auto high = [](__m256i product) { return _mm256_srli_epi64(product, 32); };
  const auto xor2 = [](__m256i a, __m256i b) { return _mm256_xor_si256(a, b); };
  __m256i c3 = _mm256_mul_epu32(xor2(index, word(p.a)), mul0);
  __m256i c1 = _mm256_mul_epu32(xor2(high(c3), word(p.b)), mul1);
  __m256i c0 = xor2(high(c1), word(p.c)), c2 = xor2(c3, word(p.d));
  c3 = word(p.e);
  uint32_t k0 = p.key0, k1 = p.key1;
  for (int round = 3; round < kPhiloxRounds; ++round, k0 += kPhiloxKey0, k1 += kPhiloxKey1) {
    const __m256i p0 = _mm256_mul_epu32(c0, mul0), p1 = _mm256_mul_epu32(c2, mul1);
    c0 = xor2(xor2(high(p1), c1), word(k0));
    c2 = xor2(xor2(high(p0), c3), word(k1));
    c1 = p1;
    c3 = p0;
  }
  const auto pair = [](__m256i a, __m256i b) { return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xAA); };
  const __m256i w01 = pair(c0, c1), w23 = pair(c2, c3), lane = _mm256_set1_epi16(0x7fff);
  const __m256i below = _mm256_set1_epi16(static_cast<int16_t>(threshold - 1));
  const __m256i even = _mm256_cmpgt_epi16(_mm256_and_si256(_mm256_unpacklo_epi64(w01, w23), lane), below);
  const __m256i odd = _mm256_cmpgt_epi16(_mm256_and_si256(_mm256_unpackhi_epi64(w01, w23), lane), below);
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_packs_epi16(even, odd)));
}

inline void keep_bytes(uint64_t seed, uint64_t row, uint32_t chunk, uint32_t threshold, uint8_t* out) {
  const PhiloxRow p = philox_row(seed, row);
  const __m256i index = _mm256_add_epi64(_mm256_set1_epi64x(chunk), _mm256_setr_epi64x(0, 1, 2, 3));
  const uint32_t kept[2] = {keep_chunks(p, index, threshold),
                            keep_chunks(p, _mm256_add_epi64(index, _mm256_set1_epi64x(4)), threshold)};
  std::memcpy(out, kept, 8);
}

struct MaxMagnitude {
  __m256i top;
  MaxMagnitude() : top(_mm256_setzero_si256()) {}
  void add(F32 x) {
    top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff)));
  }
  float result() const {
    __m128i r = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4E));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0xB1));
    return bits_float(static_cast<uint32_t>(_mm_cvtsi128_si32(r)));
  }
};

constexpr int kQuantizeElements = 8;
template <class T>
inline void quantize_group(const T* w, float inverse, uint8_t* packed) {
  const F32 scaled = mul(load(w), set1(inverse));
  __m256i code = _mm256_setzero_si256();
  for (float threshold : kNf4Thresholds) {
    const __m256 above = _mm256_cmp_ps(scaled.v, _mm256_set1_ps(threshold), _CMP_GT_OQ);
    code = _mm256_sub_epi32(code, _mm256_castps_si256(above));
  }
  // lanes (even, odd) of a 64-bit pair become even << 4 | odd in the pair's lowest byte
  const __m256i pair = _mm256_or_si256(_mm256_slli_epi64(code, 4), _mm256_srli_epi64(code, 32));
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), pair);
  for (int i = 0; i < 4; ++i) packed[i] = static_cast<uint8_t>(lanes[i]);
}

// kStream: past the caches, for outputs too large to be found there again; p is aligned to 32 bytes then.
template <bool kStream>
inline void store_bits(void* p, __m256i v) {
  kStream ? _mm256_stream_si256(static_cast<__m256i*>(p), v) : _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}

// 16-bit outputs: two byte tables, one pshufb each. fp32: two 8-entry tables and a blend on the code's top bit.
template <class T>
struct NibbleTable {
  static constexpr int kElements = 16;
  __m128i low, high;  // byte i: low and high byte of value i

  explicit NibbleTable(float absmax) {
    alignas(16) T value[16];
    for (int half = 0; half < 16; half += 8) store(value + half, mul(load(kNf4Codes + half), set1(absmax)));
    const __m128i a = _mm_load_si128(reinterpret_cast<const __m128i*>(value));
    const __m128i b = _mm_load_si128(reinterpret_cast<const __m128i*>(value + 8));
    const __m128i bytes = _mm_set1_epi16(0xff);
    low = _mm_packus_epi16(_mm_and_si128(a, bytes), _mm_and_si128(b, bytes));
    high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  }

  template <bool kStream>
  void emit(const uint8_t* packed, T* out) const {
    const __m128i byte = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)), nibble = _mm_set1_epi8(15);
    const __m128i code = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(byte, 4), nibble), _mm_and_si128(byte, nibble));
    const __m128i l = _mm_shuffle_epi8(low, code), h = _mm_shuffle_epi8(high, code);
    store_bits<kStream>(out, _mm256_set_m128i(_mm_unpackhi_epi8(l, h), _mm_unpacklo_epi8(l, h)));
  }
};

template <>
struct NibbleTable<float> {
  static constexpr int kElements = 8;
  __m256 low, high;  // values 0..7 and 8..15

  explicit NibbleTable(float absmax)
      : low(mul(load(kNf4Codes), set1(absmax)).v), high(mul(load(kNf4Codes + 8), set1(absmax)).v) {}

  template <bool kStream>
  void emit(const uint8_t* packed, float* out) const {
    int32_t four;
    std::memcpy(&four, packed, 4);
    const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)), nibble = _mm256_set1_epi64x(15);
    const __m256i code =
        _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(_mm256_and_si256(byte, nibble), 32));
    const __m256 l = _mm256_permutevar8x32_ps(low, code), h = _mm256_permutevar8x32_ps(high, code);
    const __m256 chosen = _mm256_blendv_ps(l, h, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    store_bits<kStream>(out, _mm256_castps_si256(chosen));
  }
};

template <class T>
inline F32 round_through(F32 a) {
  T lanes[kWidth];
  store(lanes, a);
  return load(lanes);
}

template <class T>
struct CodeValues {
  __m256 low, high;  // values 0..7 and 8..15

  CodeValues() = default;
  explicit CodeValues(float absmax)
      : low(round_through<T>(mul(load(kNf4Codes), set1(absmax))).v),
        high(round_through<T>(mul(load(kNf4Codes + 8), set1(absmax))).v) {}

  F32 of(__m256i code) const {  // bits 0..3 of each lane
    const __m256 l = _mm256_permutevar8x32_ps(low, code), h = _mm256_permutevar8x32_ps(high, code);
    return {_mm256_blendv_ps(l, h, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)))};
  }

  void lookup(const uint8_t* packed, F32& even, F32& odd) const {
    const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    even = of(_mm256_srli_epi32(byte, 4));
    odd = of(byte);
  }
};

inline float sum_lanes(F32 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline void fence() { _mm_sfence(); }  // after streaming stores, before another thread may read them

constexpr int kWidth64 = 4;
struct F64 {
  __m256d v;
};
inline F64 set1(double x) { return {_mm256_set1_pd(x)}; }
inline F64 add(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline F64 mul(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
inline void store(double* p, F64 a) { _mm256_storeu_pd(p, a.v); }
inline double sum_lanes(F64 a) {
  const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
}
