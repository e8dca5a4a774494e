// SPDX-License-Identifier: Apache-2.0
// Many layers in few launches: a part of an array in host memory travels as a kernel argument, so that no copy to the
// device comes before the kernel and a captured graph keeps its own.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace peftkern {

// With the other argument of a kernel below the 4 KB that arguments may take.
constexpr int64_t kTableBytes = 3072;

template <class Item>
struct Table {
  static constexpr int kItems = kTableBytes / sizeof(Item);
  Item items[kItems];
  int count;
  int64_t first;  // index of items[0] in the whole array
};

// launch(table, blocks) for parts of an array of items, with blocks the sum of blocks_of(item); not where that is 0.
// Returns the first error.
template <class Item, class BlocksOf, class Launch>
cudaError_t for_each_table(const Item* items, int64_t count, const BlocksOf& blocks_of, const Launch& launch) {
  for (int64_t first = 0; first < count; first += Table<Item>::kItems) {
    Table<Item> table;
    table.count = static_cast<int>(count - first < Table<Item>::kItems ? count - first : Table<Item>::kItems);
    table.first = first;
    int64_t blocks = 0;
    for (int i = 0; i < table.count; ++i) {
      table.items[i] = items[first + i];
      blocks += blocks_of(table.items[i]);
    }
    if (blocks == 0) continue;
    launch(table, static_cast<unsigned>(blocks));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The item this thread block works on; `block` becomes its number among the blocks of that item.
template <class Item, class BlocksOf>
__device__ __forceinline__ int find_item(const Table<Item>& table, const BlocksOf& blocks_of, int64_t& block) {
  int i = 0;
  block = blockIdx.x;
  for (int64_t blocks = blocks_of(table.items[0]); block >= blocks; blocks = blocks_of(table.items[++i])) {
    block -= blocks;
  }
  return i;
}

}  // namespace peftkern
