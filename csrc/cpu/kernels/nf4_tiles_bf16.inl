// SPDX-License-Identifier: Apache-2.0
// nf4_tiles.inl for bf16 activations with vdpbf16ps: a unit is a pair of bf16, twice the products of an instruction.

// NibbleTable<bf16_t> made by the machine's rounding: 3 instructions instead of 12. Subnormal values go the long way,
// as vcvtneps2bf16 takes them for zero.
struct Bf16Table : NibbleTable<bf16_t> {
  Bf16Table() : NibbleTable<bf16_t>(__m512i{}) {}
  explicit Bf16Table(float absmax) : NibbleTable<bf16_t>(values(absmax)) {}

  static __m512i values(float absmax) {
    if (!(absmax >= 0x1p-120f)) return NibbleTable<bf16_t>(absmax).value;
    const __m256bh rounded = _mm512_cvtneps_pbh(mul(load(kNf4Codes), set1(absmax)).v);
    __m256i bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return _mm512_broadcast_i64x4(bits);
  }
};

struct Bf16Dot {
  using Element = bf16_t;
  using Table = Bf16Table;
  static constexpr int kPerUnit = 2;
  static constexpr int kParts = 1;

  static F32 dot(F32 x, F32 w, F32 sum) { return {_mm512_dpbf16_ps(sum.v, as_bf16(x.v), as_bf16(w.v))}; }
  static F32 units(const bf16_t* p, int64_t n) {
    const __mmask32 mask = n >= 32 ? ~0u : (1u << n) - 1;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p))};
  }
  static void lookup(const Table& table, const uint8_t* packed, F32 (&parts)[kParts]) {
    parts[0] = {_mm512_castsi512_ps(table.lookup(packed))};
  }

  // A lane holds a column of both rows.
  static void across(const Table (&tables)[kPerUnit], const uint8_t* const (&packed)[kPerUnit], F32& low, F32& high) {
    const __m512i even = tables[0].lookup(packed[0]), odd = tables[1].lookup(packed[1]);
    const __m512i first = _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a,
                                           0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                                           0x00230003, 0x00220002, 0x00210001, 0x00200000);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    low = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(even, first, odd))};
    high = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(even, second, odd))};
  }
};
