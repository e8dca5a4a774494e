// SPDX-License-Identifier: Apache-2.0
// The one definition of dropout: the mask is a pure function of (seed, row, column) and is regenerated wherever it is
// needed, never stored. CPU and CUDA give the same bits for every tiling, thread count and device.
//
//   words = Philox4x32-7(counter = (row, column / 8, row >> 32, 0), key = seed)     (Salmon et al., SC'11)
//   the 4 words are 8 lanes of 16 bits, low half first; lane j belongs to column 8 * (column / 8) + j
//   keep  <=>  (lane & 0x7fff) >= threshold,   threshold = round(p * 32768)
//   drop(x) = keep ? x / (1 - threshold / 32768) : 0
//
// 7 rounds are the fewest that pass BigCrush (ibid., table 2); 15 bits let a GPU test two lanes with one subtraction.
#pragma once
#include "dtypes.h"

namespace peftkern {

struct Dropout {
  const int64_t* seed = nullptr;  // [1], on the device of the data
  uint32_t threshold = 0;         // in 1/32768; 0 switches dropout off and seed is not read
  float scale = 1.0f;             // 1 / (1 - threshold / 32768)
};

inline Dropout make_dropout(const int64_t* seed, double p) {
  const double rounded = p * 32768.0 + 0.5;
  const uint32_t threshold = rounded >= 32767.0 ? 32767u : static_cast<uint32_t>(rounded);
  if (threshold == 0) return {};
  return {seed, threshold, static_cast<float>(32768.0 / (32768.0 - threshold))};
}

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;
constexpr int kDropoutChunk = 8;  // columns covered by one Philox call

struct PhiloxWords {
  uint32_t word[4];
};

PEFTKERN_HOST_DEVICE PhiloxWords philox(uint64_t seed, uint64_t row, uint32_t chunk) {
  uint32_t c0 = static_cast<uint32_t>(row), c1 = chunk, c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMul0) * c0, p1 = static_cast<uint64_t>(kPhiloxMul1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxKey0;
    k1 += kPhiloxKey1;
  }
  return {{c0, c1, c2, c3}};
}

// The first rounds of a row, for code that takes many chunks of it at once: the chunk reaches one word in each of the
// first two rounds, so that what the row alone decides is five numbers.
//   round 0: c0 = chunk ^ a     round 1: c2 = hi(c0 * Mul0) ^ b, c3 = lo(c0 * Mul0)
//   round 2: c0 = hi(c2 * Mul1) ^ c, c1 = lo(c2 * Mul1), c2 = c3 ^ d, c3 = e     then as above, from round 3 on
struct PhiloxRow {
  uint32_t a, b, c, d, e;
  uint32_t key0, key1;  // of round 3
};

inline PhiloxRow philox_row(uint64_t seed, uint64_t row) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const auto high = [](uint64_t p) { return static_cast<uint32_t>(p >> 32); };
  const auto low = [](uint64_t p) { return static_cast<uint32_t>(p); };
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxMul0) * low(row),
                 p1 = static_cast<uint64_t>(kPhiloxMul1) * high(row);
  const uint64_t q1 = static_cast<uint64_t>(kPhiloxMul1) * (high(p0) ^ k1);
  const uint64_t r0 = static_cast<uint64_t>(kPhiloxMul0) * (high(q1) ^ low(p1) ^ (k0 + kPhiloxKey0));
  return {high(p1) ^ k0,
          low(p0) ^ (k1 + kPhiloxKey1),
          low(q1) ^ (k0 + 2 * kPhiloxKey0),
          high(r0) ^ (k1 + 2 * kPhiloxKey1),
          low(r0),
          k0 + 3 * kPhiloxKey0,
          k1 + 3 * kPhiloxKey1};
}

// Bit j of the result: is column 8 * chunk + j of this row kept?
PEFTKERN_HOST_DEVICE uint32_t keep_bits(uint64_t seed, uint64_t row, uint32_t chunk, uint32_t threshold) {
  const PhiloxWords w = philox(seed, row, chunk);
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    bits |= static_cast<uint32_t>((w.word[i] & 0x7fff) >= threshold) << (2 * i);
    bits |= static_cast<uint32_t>(((w.word[i] >> 16) & 0x7fff) >= threshold) << (2 * i + 1);
  }
  return bits;
}

}  // namespace peftkern
