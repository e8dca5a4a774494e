// SPDX-License-Identifier: Apache-2.0
// Scalar conversions between fp32 and the 16-bit storage dtypes, round to nearest even, as torch does them. Plain
// integer code: it compiles to the same bits under every target, so all ISAs share it for tails.
#pragma once
#include <cstring>

#include "../dtypes.h"

namespace peftkern {

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(f16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude >= 0x0400) return bits_float(sign | ((magnitude << 13) + (112u << 23)));      // normal
  return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));             // subnormal
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline bf16_t from_float<bf16_t>(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(u >> 16 | 0x40)};  // keep a NaN a NaN
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

template <>
inline f16_t from_float<f16_t>(float x) {
  const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // >= 65520 rounds to infinity
  if (magnitude < 0x38800000) {  // below the normal range: adding 0.5 puts the last fp16 bit at the last fp32 bit
    return {static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000))};
  }
  const uint32_t rebiased = magnitude - (112u << 23);
  return {static_cast<uint16_t>(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13)};
}

}  // namespace peftkern
