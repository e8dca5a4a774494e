// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of kernels/*.inl, one lane wide: the plain meaning of every function in avx2.h and avx512.h.
// Included inside the ISA's namespace.

constexpr int kWidth = 1;        // fp32 lanes of F32
constexpr int kTileRows = 4;     // rows of a register tile
constexpr int kTileVectors = 2;  // vectors of a register tile, along columns or ranks

struct F32 {
  float v;
};

inline F32 zero() { return {0.0f}; }
inline F32 set1(float x) { return {x}; }
inline F32 add(F32 a, F32 b) { return {a.v + b.v}; }
inline F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }  // a * b + c
inline F32 abs(F32 a) { return {bits_float(float_bits(a.v) & 0x7fffffff)}; }
inline F32 keep(F32 a, uint32_t bits) { return {bits & 1 ? a.v : 0.0f}; }  // zero the lanes whose bit is 0

template <class T>
inline F32 load(const T* p) {
  return {to_float(*p)};
}
template <class T>
inline F32 load_first(const T* p, int64_t) {  // only the first n < kWidth lanes are read, the others are 0
  return load(p);
}
template <class T>
inline void store(T* p, F32 a) {
  *p = from_float<T>(a.v);
}
template <class T>
inline void store_first(T* p, int64_t, F32 a) {
  store(p, a);
}

inline void transpose(F32 (&)[kWidth]) {}  // rows of a kWidth x kWidth block become its columns

// Keep bits (dropout.h) of kWidth chunks of 8 columns, a byte a chunk.
inline void keep_bytes(uint64_t seed, uint64_t row, uint32_t chunk, uint32_t threshold, uint8_t* out) {
  *out = static_cast<uint8_t>(keep_bits(seed, row, chunk, threshold));
}

// Largest |x| of everything added, compared as integers: exact, and a NaN or infinity beats every finite value.
struct MaxMagnitude {
  uint32_t top = 0;
  void add(F32 x) {
    const uint32_t m = float_bits(x.v) & 0x7fffffff;
    if (m > top) top = m;
  }
  float result() const { return bits_float(top); }
};

// NF4 codes of kQuantizeElements values times inverse, packed.
constexpr int kQuantizeElements = 2;
template <class T>
inline void quantize_group(const T* w, float inverse, uint8_t* packed) {
  *packed = static_cast<uint8_t>(nf4_code(to_float(w[0]) * inverse) << 4 | nf4_code(to_float(w[1]) * inverse));
}

// The 16 values a block can take, in the output dtype, and their lookup for kElements packed codes.
template <class T>
struct NibbleTable {
  static constexpr int kElements = 2;
  T value[16];
  explicit NibbleTable(float absmax) {
    for (int c = 0; c < 16; ++c) value[c] = from_float<T>(kNf4Codes[c] * absmax);
  }
  template <bool kStream>  // true: the output is aligned and too large to be found in a cache again
  void emit(const uint8_t* packed, T* out) const {
    out[0] = value[*packed >> 4];
    out[1] = value[*packed & 15];
  }
};

// The 16 values a block can take, rounded to T and widened again, and their lookup for kWidth packed bytes.
template <class T>
struct CodeValues {
  float value[16];
  explicit CodeValues(float absmax) {
    for (int c = 0; c < 16; ++c) value[c] = to_float(from_float<T>(kNf4Codes[c] * absmax));
  }
  void lookup(const uint8_t* packed, F32& even, F32& odd) const {
    even = {value[*packed >> 4]};
    odd = {value[*packed & 15]};
  }
};

inline float sum_lanes(F32 a) { return a.v; }

inline void fence() {}  // after streaming stores

// fp64, for jacobi_svd.inl: whole vectors only.
constexpr int kWidth64 = 1;
struct F64 {
  double v;
};
inline F64 set1(double x) { return {x}; }
inline F64 add(F64 a, F64 b) { return {a.v + b.v}; }
inline F64 mul(F64 a, F64 b) { return {a.v * b.v}; }
inline F64 fma(F64 a, F64 b, F64 c) { return {a.v * b.v + c.v}; }
inline F64 load(const double* p) { return {*p}; }
inline void store(double* p, F64 a) { *p = a.v; }
inline double sum_lanes(F64 a) { return a.v; }
