// SPDX-License-Identifier: Apache-2.0
// Blocks of a cluster: each other's shared memory, and the barrier of all their threads.
#include <utility>

#include "machine.h"

namespace ptxsim {

// The address of a block's own shared memory, in that of another one.
void Machine::map_to_rank(Warp& w, const I& in, u32 mask) {
  constexpr u32 own = 1u << rank_shift, last_rank = 0xfe;
  u64* out = w.slot(in.operands[0]);
  const u64 *address = w.slot(in.operands[1]), *rank = w.slot(in.operands[2]);
  for_lanes(mask, [&](int l) {
    const u32 a = address[l], r = std::min<u32>(rank[l], last_rank);
    out[l] = a < own ? a | (r + 1) << rank_shift : ~0u;  // an address that is no own one stays wrong
  });
}

Region* Machine::remote_region(u64& address) {
  const u64 rank = address >> rank_shift;
  if (!rank) return &block_->shared;
  address &= (1u << rank_shift) - 1;
  return rank <= cluster_.size() ? &cluster_[rank - 1].shared : nullptr;
}

// Another block's memory is there from its start to its end: a phase of the barrier has to lie between the start of all
// blocks and this access, and the block must not have ended. leave_cluster() has the other half.
bool Machine::may_reach(const Region& region, u32 thread, u64 address, int size) {
  if (&region == &block_->shared) return true;
  const Block& owner = cluster_[(address >> rank_shift) - 1];
  const bool ended = !owner.threads_alive();
  if (ended || (tracking() && !clocks_of(thread)[threads_in_block_])) {
    report(report_remote_lifetime, thread, address, {}, region.id, size);
  }
  return !ended;
}

void Machine::arrive_at_cluster(Warp& w, const I& in, u32 mask) {
  const size_t first = static_cast<size_t>(block_ - cluster_.data()) * threads_in_block_;
  for_lanes(mask, [&](int l) {
    Thread& thread = block_->threads[w.thread(l)];
    if (thread.arrived) return report(report_cluster_barrier, w.thread(l), 0, {}, buffer_none, 0, mask);
    thread.arrived = phase();
    ++arrived_;
    if (!tracking() || !(in.flags & flag_release)) return;
    u32 *clocks = clocks_of(w.thread(l)), *released = released_.back().data() + first;
    for (u32 i = 0; i < threads_in_block_; ++i) released[i] = std::max(released[i], clocks[i]);
    ++clocks[w.thread(l)];  // what it does from here on is not covered
  });
  w.running |= mask;
  for_lanes(mask, [&](int l) { ++w.pc[l]; });
  complete_cluster_barrier();
}

void Machine::wait_for_cluster(Warp& w, u32 mask) {
  u32 early = 0;
  for_lanes(mask, [&](int l) {
    const u32 arrived = block_->threads[w.thread(l)].arrived;
    if (!arrived) report(report_cluster_barrier, w.thread(l), 0, {}, buffer_none, 0, mask);
    early |= static_cast<u32>(arrived == phase()) << l;
  });
  w.at_barrier |= early;
  pass_cluster_barrier(w, mask & ~early);
}

void Machine::pass_cluster_barrier(Warp& w, u32 mask) {
  const size_t first = static_cast<size_t>(block_ - cluster_.data()) * threads_in_block_;
  w.at_barrier &= ~mask;
  w.running |= mask;
  for_lanes(mask, [&](int l) {
    ++w.pc[l];
    const u32 passed = std::exchange(block_->threads[w.thread(l)].arrived, 0);
    if (!tracking() || !passed) return;
    u32 *clocks = clocks_of(w.thread(l)), *released = released_[passed].data() + first;
    for (u32 i = 0; i < threads_in_block_; ++i) clocks[i] = std::max(clocks[i], released[i]);
    clocks[threads_in_block_] = passed;
  });
}

// A phase ends when all threads of the cluster that have not exited have arrived.
void Machine::complete_cluster_barrier() {
  u32 alive = 0;
  for (const Block& block : cluster_) alive += block.threads_alive();
  if (!arrived_ || arrived_ < alive) return;
  arrived_ = 0;
  released_.push_back(released_.back());
  share_taken_in();
  Block* const turn = block_;
  for (Block& block : cluster_) {
    block_ = &block;
    for (Warp& w : block.warps) {
      u32 here = 0;
      for_lanes(w.at_barrier, [&](int l) { here |= static_cast<u32>(program_[w.pc[l]].op == op_cluster_wait) << l; });
      pass_cluster_barrier(w, here);
    }
  }
  block_ = turn;
}

// What one block took in from others by an atomic, all of its cluster have after their barrier.
void Machine::share_taken_in() {
  for (const Block& from : cluster_) {
    if (!from.has_taken_in) continue;
    for (Block& to : cluster_) {
      for (size_t i = 0; i < to.taken_in.size(); ++i) to.taken_in[i] |= from.taken_in[i];
      to.has_taken_in = true;
    }
  }
}

// Lanes that have exited. With the last thread of a block its memory goes: every access of the other blocks has to be
// ordered before the end of one of its threads.
void Machine::leave_cluster(Warp& w, u32 mask) {
  for_lanes(mask, [&](int l) {
    const u32 t = w.thread(l);
    if (std::exchange(block_->threads[t].arrived, 0) == phase()) --arrived_;
    if (tracking()) block_->last_phase = std::max(block_->last_phase, clocks_of(t)[threads_in_block_]);
  });
  complete_cluster_barrier();
  if (cluster_.size() == 1 || !block_->shared.history || block_->threads_alive()) return;
  for (u32 i = 0; i < block_->shared.size; ++i) {
    const ByteHistory& byte = block_->shared_history[i];
    for (Touch touch : {byte.writer, byte.reader, byte.other_reader}) {
      if (!touch || touch.block() == (block_->index & Touch::block_mask)) continue;
      if (was_released(touch, block_->last_phase)) continue;
      report(report_remote_lifetime, w.thread(first_lane(mask)), i, touch, buffer_shared, 1);
    }
  }
}

// Whether the thread of another block of the cluster released that access, in a phase up to this one.
bool Machine::was_released(Touch touch, u32 phase) const {
  const u32 rank = (touch.block() - cluster_[0].index) & Touch::block_mask;
  return rank < cluster_.size() && released_[phase][rank * threads_in_block_ + touch.thread()] >= touch.clock();
}

}  // namespace ptxsim
