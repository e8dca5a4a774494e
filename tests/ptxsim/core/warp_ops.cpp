// SPDX-License-Identifier: Apache-2.0
// Exchanges within a warp: shfl, vote, match, redux, ldmatrix, stmatrix. `mask` is the complete set of lanes taking
// part.
#include "machine.h"

namespace ptxsim {

void Machine::shuffle(Warp& w, const I& in, u32 mask) {
  enum { up, down, butterfly, index };
  const int first = in.destinations;
  u64 source[32];
  memcpy(source, w.slot(in.operands[first]), sizeof source);
  const u64 *b = w.slot(in.operands[first + 1]), *c = w.slot(in.operands[first + 2]);
  for_lanes(mask, [&](int l) {
    const int distance = b[l] & 31, clamp = c[l] & 31, segment = (c[l] >> 8) & 31;
    const int low = l & segment, high = low | (clamp & ~segment);
    int from;
    switch (in.modifier) {
      case up: from = l - distance; break;
      case down: from = l + distance; break;
      case butterfly: from = l ^ distance; break;
      default: from = low | (distance & ~segment);
    }
    const bool in_range = in.modifier == up ? from >= high : from <= high;
    if (!in_range) from = l;
    if (!(mask >> from & 1)) report(report_inactive_lane, w.thread(l), 0, {}, buffer_none, from, mask);
    if (in.operands[0] >= 0) w.slot(in.operands[0])[l] = static_cast<u32>(source[from]);
    if (first > 1 && in.operands[1] >= 0) w.slot(in.operands[1])[l] = in_range;
  });
}

void Machine::vote(Warp& w, const I& in, u32 mask) {
  enum { all, any, uniform, ballot };
  const u64* predicate = w.slot(in.operands[1]);
  u64* out = w.slot(in.operands[0]);
  const bool negated = in.flags & flag_negated;
  u32 yes = 0;
  for_lanes(mask, [&](int l) { yes |= static_cast<u32>((predicate[l] & 1) ^ negated) << l; });
  const u64 result = in.modifier == all       ? yes == mask
                     : in.modifier == any     ? yes != 0
                     : in.modifier == uniform ? yes == mask || yes == 0
                                              : yes;
  for_lanes(mask, [&](int l) { out[l] = result; });
}

void Machine::match(Warp& w, const I& in, u32 mask) {
  const bool all = in.modifier;
  const u64* a = w.slot(in.operands[in.destinations]);
  const u64 compared = type_size(in.type) == 8 ? ~0ull : 0xffffffff;
  u64 result[32];
  for_lanes(mask, [&](int l) {
    u32 equal = 0;
    for_lanes(mask, [&](int j) { equal |= static_cast<u32>(((a[l] ^ a[j]) & compared) == 0) << j; });
    result[l] = all && equal != mask ? 0 : equal;
  });
  for_lanes(mask, [&](int l) {
    w.slot(in.operands[0])[l] = result[l];
    if (in.destinations > 1 && in.operands[1] >= 0) w.slot(in.operands[1])[l] = result[l] != 0;
  });
}

void Machine::reduce(Warp& w, const I& in, u32 mask) {
  const u64* a = w.slot(in.operands[1]);
  u64 total = a[first_lane(mask)];
  for_lanes(mask & (mask - 1), [&](int l) {
    by_integer(in.type, [&](auto type) {
      using T = decltype(type);
      total = put(apply_atomic<T>(in.modifier, get<T>(total), get<T>(a[l]), T{}));
    });
  });
  for_lanes(mask, [&](int l) { w.slot(in.operands[0])[l] = total; });
}

// 8x8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r of matrix i; lane 4 r + c then holds
// elements 2 c and 2 c + 1 of row r of every matrix (of column r with .trans).
void Machine::load_matrix(Warp& w, const I& in, u32 mask) {
  const int matrices = in.destinations;
  const u32 addressing = matrices == 4 ? ~0u : (1u << (8 * matrices)) - 1;
  u64 address[32];
  addresses(w, in, matrices, mask, address);
  count_request(stats_[current_], addressing, address, 16, space_shared);
  u16 row[32][8];
  memset(row, 0xff, sizeof row);
  for_lanes(addressing, [&](int l) {
    if (u8* bytes = access(w.thread(l), space_shared, address[l], 16, AccessKind::read, in)) memcpy(row[l], bytes, 16);
  });
  const bool transposed = in.flags & flag_trans;
  for (int i = 0; i < matrices; ++i) {
    u64* out = w.slot(in.operands[i]);
    const u16(*matrix)[8] = row + i * 8;
    for (int l = 0; l < 32; ++l) {
      const int r = l >> 2, c = 2 * (l & 3);
      const u32 low = transposed ? matrix[c][r] : matrix[r][c];
      const u32 high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      out[l] = low | high << 16;
    }
  }
}

void Machine::store_matrix(Warp& w, const I& in, u32 mask) {
  const int matrices = in.sources - 1;
  const u32 addressing = matrices == 4 ? ~0u : (1u << (8 * matrices)) - 1;
  u64 address[32];
  addresses(w, in, 0, mask, address);
  count_request(stats_[current_], addressing, address, 16, space_shared);
  u16 row[32][8];
  const bool transposed = in.flags & flag_trans;
  for (int i = 0; i < matrices; ++i) {
    const u64* a = w.slot(in.operands[1 + i]);
    u16(*matrix)[8] = row + i * 8;
    for (int l = 0; l < 32; ++l) {
      for (int j = 0; j < 2; ++j) {
        const int r = l >> 2, c = 2 * (l & 3) + j;
        (transposed ? matrix[c][r] : matrix[r][c]) = static_cast<u16>(a[l] >> (16 * j));
      }
    }
  }
  for_lanes(addressing, [&](int l) {
    const u8* value = reinterpret_cast<const u8*>(row[l]);
    u8* bytes = access(w.thread(l), space_shared, address[l], 16, AccessKind::write, in, value);
    if (bytes) memcpy(bytes, value, 16);
  });
}

}  // namespace ptxsim
