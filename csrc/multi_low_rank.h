// SPDX-License-Identifier: Apache-2.0
// What the kernels of a batch with many adapters compute, in raw pointers: low_rank.h, where each row has a factor of
// its own choice. Both backends implement these, and peftkern/ops/multi_lora.py is made of them and one product with
// the base (csrc/multi_lora.h). Torch-free.
//
// The rows are first sorted by adapter (MultiLoraPlan). After that an adapter's rows are neighbours, its factors are
// read once for all of them, and a gradient is a sum over one adapter's rows in ascending order. Index, plan and ranks
// are on the device, so nothing of this needs the host.
#pragma once
#include "dropout.h"
#include "dtypes.h"

namespace peftkern {

constexpr int64_t kRowTile = 32;  // entries of a tile of RowGroups

inline int64_t max_row_tiles(int64_t rows, int64_t adapters) { return rows / kRowTile + adapters + 1; }

// The rows of a batch by adapter. Adapter number `adapters` means none: the base alone.
struct RowGroups {
  const int64_t* offsets;  // [adapters + 2]: the entries of adapter a are offsets[a] .. offsets[a + 1] - 1
  const int64_t* order;    // [rows]: the row of each entry, ascending within an adapter
  const int64_t* tiles;    // [max_row_tiles, 2]: (adapter, first entry) of up to kRowTile entries; (-1, 0) is unused
  int64_t rows, adapters;
};

// Sorts rows by adapter, stably. Row i belongs to adapter index[i / (rows / indices)]: an index is given for each row,
// or for each run of rows (an item of the batch). Indices outside [0, adapters) mean none.
struct MultiLoraPlan {
  const int64_t* index;  // [indices], which divides rows
  int64_t indices, rows, adapters;
  int64_t *offsets, *order, *tiles;  // as in RowGroups
  int64_t* cursor;                   // [adapters + 1] workspace; ends as the end of each adapter's entries
};

// One low-rank factor of every adapter: lora_A is [adapters, rank, columns], lora_B is [adapters, columns, rank].
struct FactorBank {
  const void* data;
  DType dtype;
  bool rank_major;  // true: A;  false: B
  const int32_t*
      ranks;  // [adapters] or null: the first ranks[a] of the `rank` are adapter a's, the rest does not count
};

// out[e] = alpha_a * drop(x[order[e]]) F_a^T for every entry e of adapter a     h = drop(x) A^T  and  du = s * q B
// Zero past the rank of a, and for entries without adapter.
struct MultiLoraDown {
  const void* x;  // [groups.rows, columns], x_dtype
  DType x_dtype;
  RowGroups groups;
  int64_t columns, rank;
  FactorBank factors;
  const float* alphas;  // [adapters] or null: then alpha for all
  float alpha;
  Dropout dropout;
  float* out;                  // [groups.rows, rank], sorted as the entries
  float* workspace = nullptr;  // CUDA alone: [multi_lora_down_workspace(...)]
};

// y[order[e]] += alpha_a * mask(u[e] F_a) for every entry e of adapter a        y0 + s * h B^T  and  q W + mask * (dh
// A)
struct MultiLoraUp {
  const float* u;  // [groups.rows, rank], sorted as the entries
  RowGroups groups;
  int64_t columns, rank;
  FactorBank factors;
  const float* alphas;
  float alpha;
  Dropout dropout;
  void* y;  // [groups.rows, columns], y_dtype; read and written where the row has an adapter
  DType y_dtype;
};

// grad[a] = alpha_a * sum over the entries e of a of u[e]^T drop(x[order[e]])            dA = dh^T drop(x), dB = s q^T
// h Zero past the rank of a, and for an adapter without rows.
struct MultiLoraGrad {
  const float* u;  // [groups.rows, rank], sorted as the entries
  const void* x;   // [groups.rows, columns], x_dtype
  DType x_dtype;
  RowGroups groups;
  int64_t columns, rank;
  const int32_t* ranks;
  const float* alphas;
  float alpha;
  Dropout dropout;
  void* grad;  // [adapters, rank, columns] if rank_major, else [adapters, columns, rank]
  DType grad_dtype;
  bool rank_major;
  float* workspace = nullptr;  // CUDA alone: [multi_lora_grad_workspace(...)]
};

}  // namespace peftkern
