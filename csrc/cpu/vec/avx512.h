// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary with 16 lanes: AVX-512 F, BW, VL, DQ. Meanings: scalar.h. Included inside the ISA's namespace.

constexpr int kWidth = 16;
constexpr int kTileRows = 8;  // 8 x 2 sums: twice the 4-cycle latency x 2 ports, and one factor load serves 8 rows
constexpr int kTileVectors = 2;
constexpr int kPanelRows = 14;  // 14 x 2 sums, 2 vectors of W and a broadcast of x in 32 registers

struct F32 {
  __m512 v;
};

inline F32 zero() { return {_mm512_setzero_ps()}; }
inline F32 set1(float x) { return {_mm512_set1_ps(x)}; }
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 keep(F32 a, uint32_t bits) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a.v)}; }

inline F32 from_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
inline __m256i round_bits_to_bf16(F32 a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_srli_epi32(u, 16),
                           _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(r);
}
inline __m256i to_bf16(F32 a);  // as above, or by the instruction of AVX-512-BF16 (kernels/table_bf16.inl)
inline __m256i to_f16(F32 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32 load(const bf16_t* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F32 load(const f16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16_t* p, F32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
inline void store(f16_t* p, F32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(a)); }

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline F32 load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline F32 load_first(const bf16_t* p, int64_t n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline F32 load_first(const f16_t* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline void store_first(float* p, int64_t n, F32 a) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store_first(bf16_t* p, int64_t n, F32 a) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(a)); }
inline void store_first(f16_t* p, int64_t n, F32 a) { _mm256_mask_storeu_epi16(p, first(n), to_f16(a)); }

inline void transpose(F32 (&r)[kWidth]) {
  __m512 quad[4][4];  // [quarter of the rows][column of a 128-bit lane]
  for (int q = 0; q < 4; ++q) {
    const F32* in = r + 4 * q;
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(in[0].v, in[1].v));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(in[0].v, in[1].v));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(in[2].v, in[3].v));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(in[2].v, in[3].v));
    quad[q][0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    quad[q][1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    quad[q][2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    quad[q][3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
  for (int k = 0; k < 4; ++k) {  // a 4 x 4 transposition of 128-bit lanes: even ones, odd ones, twice
    const __m512 even01 = _mm512_shuffle_f32x4(quad[0][k], quad[1][k], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(quad[0][k], quad[1][k], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(quad[2][k], quad[3][k], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(quad[2][k], quad[3][k], 0xdd);
    r[k].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
    r[4 + k].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    r[8 + k].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    r[12 + k].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

// Even and odd lanes of 2 * kWidth, as they came.
inline void interleave(F32 even, F32 odd, F32& low, F32& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low.v = _mm512_permutex2var_ps(even.v, first, odd.v);
  high.v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd.v);
}

// 8 chunks, each in the low half of a 64-bit lane: vpmuludq multiplies 32 x 32 -> 64 there and reads no high half, so
// the high halves may hold anything. index: which chunk a lane is.
inline void keep_chunks(const PhiloxRow& p, __m512i index, uint32_t threshold, uint8_t* out) {
  const __m512i mul0 = _mm512_set1_epi64(kPhiloxMul0), mul1 = _mm512_set1_epi64(kPhiloxMul1);
  const auto word = [](uint32_t w) { return _mm512_set1_epi64(w); };
  const auto high = [](__m512i product) { return _mm512_srli_epi64(product, 32); };
  const auto xor3 = [](__m512i a, __m512i b, __m512i c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); };
  __m512i c3 = _mm512_mul_epu32(_mm512_xor_si512(index, word(p.a)), mul0);
  __m512i c1 = _mm512_mul_epu32(_mm512_xor_si512(high(c3), word(p.b)), mul1);
  __m512i c0 = _mm512_xor_si512(high(c1), word(p.c)), c2 = _mm512_xor_si512(c3, word(p.d));
  c3 = word(p.e);
  uint32_t k0 = p.key0, k1 = p.key1;
  for (int round = 3; round < kPhiloxRounds; ++round, k0 += kPhiloxKey0, k1 += kPhiloxKey1) {
    const __m512i p0 = _mm512_mul_epu32(c0, mul0), p1 = _mm512_mul_epu32(c2, mul1);
    c0 = xor3(high(p1), c1, word(k0));
    c2 = xor3(high(p0), c3, word(k1));
    c1 = p1;
    c3 = p0;
  }
  // Each chunk's four words side by side are its 8 lanes of 16 bits: even 64-bit lanes, then odd ones.
  const auto pair = [](__m512i a, __m512i b) {  // low halves of a and b
    return _mm512_castps_si512(_mm512_mask_moveldup_ps(_mm512_castsi512_ps(a), 0xAAAA, _mm512_castsi512_ps(b)));
  };
  const __m512i w01 = pair(c0, c1), w23 = pair(c2, c3);
  const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold)), lane = _mm512_set1_epi16(0x7fff);
  const uint32_t kept[2] = {_mm512_cmpge_epi16_mask(_mm512_and_si512(_mm512_unpacklo_epi64(w01, w23), lane), limit),
                            _mm512_cmpge_epi16_mask(_mm512_and_si512(_mm512_unpackhi_epi64(w01, w23), lane), limit)};
  std::memcpy(out, kept, 8);
}

inline void keep_bytes(uint64_t seed, uint64_t row, uint32_t chunk, uint32_t threshold, uint8_t* out) {
  const PhiloxRow p = philox_row(seed, row);
  const __m512i index = _mm512_add_epi64(_mm512_set1_epi64(chunk), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  keep_chunks(p, index, threshold, out);
  keep_chunks(p, _mm512_add_epi64(index, _mm512_set1_epi64(8)), threshold, out + 8);
}

struct MaxMagnitude {
  __m512i top;
  MaxMagnitude() : top(_mm512_setzero_si512()) {}
  void add(F32 x) {
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff)));
  }
  float result() const { return bits_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(top))); }
};

// [-1, 1] in 32 equal bins: narrower than any two thresholds are apart, so a bin holds one or none, and a code is the
// bin's first code plus one comparison. No threshold is near an edge, so rounding into the next bin changes nothing.
struct CodeBins {
  float threshold[32];  // of the bin; 2 if it has none
  int32_t code[32];     // at the lower edge of the bin
};

constexpr CodeBins make_code_bins() {
  CodeBins bins{};
  for (int bin = 0; bin < 32; ++bin) {
    bins.threshold[bin] = 2.0f;
    const float low = static_cast<float>(bin) / 16.0f - 1.0f, high = low + 1.0f / 16.0f;
    for (float t : kNf4Thresholds) {
      if (t < low) ++bins.code[bin];
      if (t >= low && t < high) bins.threshold[bin] = t;
    }
  }
  return bins;
}

constexpr CodeBins kCodeBins = make_code_bins();

constexpr int kQuantizeElements = 16;
template <class T>
inline void quantize_group(const T* w, float inverse, uint8_t* packed) {
  const __m512 scaled = mul(load(w), set1(inverse)).v;
  const __m512i exact = _mm512_cvttps_epi32(_mm512_fmadd_ps(scaled, _mm512_set1_ps(16.0f), _mm512_set1_ps(16.0f)));
  const __m512i bin = _mm512_min_epi32(exact, _mm512_set1_epi32(31));
  const __m512 threshold =
      _mm512_permutex2var_ps(_mm512_loadu_ps(kCodeBins.threshold), bin, _mm512_loadu_ps(kCodeBins.threshold + 16));
  const __m512i first =
      _mm512_permutex2var_epi32(_mm512_loadu_si512(kCodeBins.code), bin, _mm512_loadu_si512(kCodeBins.code + 16));
  const __mmask16 above = _mm512_cmp_ps_mask(scaled, threshold, _CMP_GT_OQ);
  const __m512i code = _mm512_mask_add_epi32(first, above, first, _mm512_set1_epi32(1));
  // lanes (even, odd) of a 64-bit pair become even << 4 | odd in the pair's lowest byte
  const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi64_epi8(pair));
}

// kStream: past the caches, for outputs too large to be found there again; p is aligned to 64 bytes then.
template <bool kStream>
inline void store_bits(void* p, __m512i v) {
  kStream ? _mm512_stream_si512(static_cast<__m512i*>(p), v) : _mm512_storeu_si512(p, v);
}

// 16-bit outputs: vpermw looks 32 codes up in one instruction. fp32: vpermps, 16 at a time.
template <class T>
struct NibbleTable {
  static constexpr int kElements = 32;
  __m512i value;  // the 16 values, twice

  explicit NibbleTable(__m512i values) : value(values) {}
  explicit NibbleTable(float absmax) {
    alignas(32) T rounded[16];
    store(rounded, mul(load(kNf4Codes), set1(absmax)));
    value = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
  }

  __m512i lookup(const uint8_t* packed) const {  // vpermw reads bits 0..4 of each index, and the table is there twice
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m512i code = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    return _mm512_permutexvar_epi16(code, value);
  }

  template <bool kStream>
  void emit(const uint8_t* packed, T* out) const {
    store_bits<kStream>(out, lookup(packed));
  }
};

template <>
struct NibbleTable<float> {
  static constexpr int kElements = 16;
  __m512 value;

  explicit NibbleTable(float absmax) : value(mul(load(kNf4Codes), set1(absmax)).v) {}

  template <bool kStream>
  void emit(const uint8_t* packed, float* out) const {
    const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    const __m512i low = _mm512_slli_epi64(_mm512_and_si512(byte, _mm512_set1_epi64(15)), 32);
    const __m512i code = _mm512_or_si512(_mm512_srli_epi64(byte, 4), low);
    store_bits<kStream>(out, _mm512_castps_si512(_mm512_permutexvar_ps(code, value)));
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
  __m512 value;

  CodeValues() = default;
  explicit CodeValues(float absmax) : value(round_through<T>(mul(load(kNf4Codes), set1(absmax))).v) {}

  void lookup(const uint8_t* packed, F32& even, F32& odd) const {  // vpermps reads bits 0..3 of each index
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    even = {_mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), value)};
    odd = {_mm512_permutexvar_ps(byte, value)};
  }
};

inline float sum_lanes(F32 a) { return _mm512_reduce_add_ps(a.v); }

inline void fence() { _mm_sfence(); }  // after streaming stores, before another thread may read them

constexpr int kWidth64 = 8;
struct F64 {
  __m512d v;
};
inline F64 set1(double x) { return {_mm512_set1_pd(x)}; }
inline F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline void store(double* p, F64 a) { _mm512_storeu_pd(p, a.v); }
inline double sum_lanes(F64 a) { return _mm512_reduce_add_pd(a.v); }
