// SPDX-License-Identifier: Apache-2.0
// Parameters that Python holds from one call to the next, to ask here where they lie: 0.2 us a tensor whose header has
// left the caches, against 0.6 us for data_ptr() from Python, whose calls are too long for the misses to overlap.
#pragma once
#include <utility>

#include "tensors.h"

namespace peftkern {

using HeldTensors = std::vector<Tensor>;

// A handle, which is an address: good until release_tensors.
inline int64_t hold_tensors(HeldTensors tensors) {
  return reinterpret_cast<int64_t>(new HeldTensors(std::move(tensors)));
}

inline void release_tensors(int64_t held) { delete reinterpret_cast<HeldTensors*>(held); }

// addresses: int64, contiguous, on the CPU, one or more for each tensor. Does a tensor lie elsewhere than its own says?
inline bool held_have_moved(int64_t held, Tensor addresses) {
  const HeldTensors& tensors = *reinterpret_cast<const HeldTensors*>(held);
  check_dtype(addresses, ScalarType::Long, "addresses");
  PEFTKERN_CHECK(
      addresses.is_cpu() && addresses.is_contiguous() && addresses.numel() >= static_cast<int64_t>(tensors.size()),
      "addresses: expected a contiguous tensor on the CPU of at least ", tensors.size(), " elements");
  const int64_t* expected = static_cast<const int64_t*>(addresses.const_data_ptr());
  bool moved = false;  // without an early end, so that the misses overlap
  for (size_t i = 0; i < tensors.size(); ++i)
    moved |= reinterpret_cast<int64_t>(tensors[i].const_data_ptr()) != expected[i];
  return moved;
}

}  // namespace peftkern
