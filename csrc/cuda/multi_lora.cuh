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

// Blocks for a batch: one for each tile that it may have, none of which is empty. And how many may have work if blocks
// take kRows entries.
inline int64_t most_row_tiles(const RowGroups& groups, int64_t rows = kRowTile) {
  const int64_t tiles = groups.rows / rows + groups.adapters + 1;
  return tiles < groups.rows ? tiles : groups.rows;
}

// Up to kRows entries of one adapter: of kRows / kRowTile tiles the first block takes all. adapter < 0: nothing, as
// another block has it, or for a tile more than there are, of those launched to be on the safe side because only the
// device knows how many there are.
template <int64_t kRows = kRowTile>
struct RowTile {
  static_assert(kRows % kRowTile == 0);
  int64_t adapter, first, last;

  __device__ __forceinline__ RowTile(const RowGroups& groups, int64_t tile) {
    adapter = groups.tiles[2 * tile];
    first = last = groups.tiles[2 * tile + 1];
    if (adapter < 0) return;
    if (kRows > kRowTile && (first - groups.offsets[adapter]) % kRows != 0) {
      adapter = -1;
    } else {
      last = min(first + kRows, groups.offsets[adapter + 1]);
    }
  }
};

}  // namespace peftkern
