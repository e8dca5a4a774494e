// SPDX-License-Identifier: Apache-2.0
// What the kernels of multi_low_rank.h share: an adapter's share of the bank, and the tile a block works on.
#pragma once
#include "../multi_low_rank.h"
#include "tile.cuh"

namespace peftkern {

// Ranks of the bank that count for an adapter; none for the rows without adapter.
__device__ __forceinline__ int64_t rank_of(const int32_t* ranks, int64_t rank, int64_t adapter, int64_t adapters) {
  if (adapter >= adapters) return 0;
  return ranks ? min(max(static_cast<int64_t>(ranks[adapter]), int64_t{0}), rank) : rank;
}

__device__ __forceinline__ float alpha_of(const float* alphas, float alpha, int64_t adapter, int64_t adapters) {
  return alphas && adapter < adapters ? alphas[adapter] : alpha;
}

// The factor of one adapter.
__device__ __forceinline__ Factor factor_of(const FactorBank& bank, int64_t adapter, int64_t rank, int64_t columns) {
  const int64_t bytes = adapter * rank * columns * (bank.dtype == DType::f32 ? 4 : 2);
  return {static_cast<const char*>(bank.data) + bytes, bank.dtype, bank.rank_major};
}

// Up to kRowTile entries of one adapter. adapter < 0: a tile more than there are, of those launched to be on the safe
// side because only the device knows how many there are.
struct RowTile {
  int64_t adapter, first, last;

  __device__ __forceinline__ RowTile(const RowGroups& groups, int64_t tile) {
    adapter = groups.tiles[2 * tile];
    first = groups.tiles[2 * tile + 1];
    last = adapter < 0 ? first : min(first + kRowTile, groups.offsets[adapter + 1]);
  }
};

}  // namespace peftkern
