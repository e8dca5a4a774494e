// SPDX-License-Identifier: Apache-2.0
// The race detector: vector clocks, so that a race is found whatever order this run happened to take.
// Threads of a block are ordered by barriers and __syncwarp, blocks by the barrier of their cluster and by fence +
// atomic.
#include "machine.h"

namespace ptxsim {

Touch Machine::touch_of(u32 thread, bool strong) const {
  const u32 clock = clocks_of(thread)[thread];
  return {static_cast<u64>(thread) << 54 | static_cast<u64>(block_->index & Touch::block_mask) << 34 |
          static_cast<u64>(clock & Touch::clock_mask) << 18 | static_cast<u64>(current_) << 1 | strong};
}

bool Machine::happened_before(Touch touch, u32 thread) const {
  const u32 other = touch.thread(), *clocks = clocks_of(thread);
  if (touch.block() != (block_->index & Touch::block_mask)) {
    return block_->taken_in[touch.block()] || was_released(touch, clocks[threads_in_block_]);
  }
  return other == thread || clocks[other] >= touch.clock();
}

// `value`: what a store is about to write, to tell apart races in which all write the same; null if not known.
void Machine::track(Region& region, u64 offset, int size, u32 thread, AccessKind kind, bool strong, const u8* value) {
  const Touch touch = touch_of(thread, strong || kind == AccessKind::atomic);
  bool reported = false;
  auto races_with = [&](Touch other) {
    return other && !happened_before(other, thread) && !(touch.strong() && other.strong());
  };
  for (int i = 0; i < size; ++i) {
    ByteHistory& byte = region.history[offset + i];
    auto clash = [&](Touch other, bool same_value) {
      const int what = same_value ? report_race_same_value : report_race;
      if (!reported) report(what, thread, region.address + offset + i, other, region.id, size);
      reported = true;
    };
    if (races_with(byte.writer)) {
      clash(byte.writer, kind == AccessKind::write && value && value[i] == region.data[offset + i]);
    }
    if (kind == AccessKind::read) {
      if (!byte.reader || happened_before(byte.reader, thread)) {
        byte.reader = touch;
      } else if (!byte.other_reader || happened_before(byte.other_reader, thread) ||
                 byte.reader.warp() == byte.other_reader.warp()) {
        byte.other_reader = touch;  // two readers are kept, of two warps if there are
      }
    } else {
      if (races_with(byte.reader)) clash(byte.reader, false);
      if (races_with(byte.other_reader)) clash(byte.other_reader, false);
      byte = {touch, {}, {}};
    }
  }
}

// __syncwarp: every lane is now ordered after what all of them did before.
void Machine::join_clocks(Warp& w, u32 mask) {
  const size_t n = clocks_;
  std::vector<u32> latest(n, 0);
  for_lanes(mask, [&](int l) {
    const u32* clocks = clocks_of(w.thread(l));
    for (size_t i = 0; i < n; ++i) latest[i] = std::max(latest[i], clocks[i]);
  });
  for_lanes(mask, [&](int l) {
    u32* clocks = clocks_of(w.thread(l));
    memcpy(clocks, latest.data(), n * sizeof(u32));
    ++clocks[w.thread(l)];
  });
}

// An atomic takes in what other blocks published on the same word, and publishes this block's writes if a fence came
// before it. (All of the block's, and of its cluster's after a phase of their barrier: a barrier before the fence makes
// it cumulative. A missing acquire is not seen.)
void Machine::publish_and_take_in(u32 thread, u64 address, bool release) {
  Published& published = published_[address];
  if (published.reader != block_->index) {
    published.reader = block_->index;
    published.taken_in = 0;
  }
  for (; published.taken_in < published.blocks.size(); ++published.taken_in) {
    block_->taken_in[published.blocks[published.taken_in] & Touch::block_mask] = 1;
    block_->has_taken_in = true;
  }
  const bool known = !published.blocks.empty() && published.blocks.back() == block_->index;
  if (known || !(block_->fenced || release)) return;
  if (tracking() && clocks_of(thread)[threads_in_block_]) {
    for (const Block& block : cluster_) published.blocks.push_back(block.index);
  }
  published.blocks.push_back(block_->index);
}

}  // namespace ptxsim
