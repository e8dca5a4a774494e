// SPDX-License-Identifier: Apache-2.0
// Waiting for other threads: `.sync` instructions of a warp, and the 16 barriers of a block. cluster.cpp has that of
// the cluster.
#include "machine.h"

namespace ptxsim {

// Lanes arrive at a collective one group at a time and park until all lanes of their mask are there.
void Machine::wait_collective(Warp& w, const I& in, u32 mask) {
  const bool aligned = in.op >= op_ldmatrix;  // all lanes of the warp take part; no mask operand
  const bool is_barrier = in.op >= op_bar;
  const u64* masks = aligned ? nullptr : w.slot(in.operands[in.destinations + in.sources - 1]);
  u32 names_itself = 0;
  for_lanes(mask, [&](int l) {
    w.sync_mask[l] = !aligned ? static_cast<u32>(masks[l]) : is_barrier ? ~w.done : ~0u;
    names_itself |= w.sync_mask[l] & 1u << l;
  });
  if (names_itself != mask || (aligned && !is_barrier && w.done)) {
    report(report_sync_mask, w.thread(first_lane(mask)), 0, {}, buffer_none, 0, mask);
  }
  w.running &= ~mask;
  w.waiting |= mask;
  release_collectives(w);
}

// Runs every collective of this warp whose lanes have all arrived. Exited lanes are not waited for.
void Machine::release_collectives(Warp& w) {
  for (u32 unseen = w.waiting; unseen;) {
    const int leader = first_lane(unseen);
    const u32 pc = w.pc[leader];
    const bool at_any_pc = program_[pc].op == op_warpsync;  // __syncwarp meets __syncwarp wherever each one stands
    u32 here = 0;
    for_lanes(w.waiting, [&](int l) {
      const bool same = w.pc[l] == pc || (at_any_pc && program_[w.pc[l]].op == op_warpsync);
      if (same && w.sync_mask[l] == w.sync_mask[leader]) here |= 1u << l;
    });
    unseen &= ~here;
    const u32 needed = w.sync_mask[leader] & ~w.done;
    if (needed & ~here) continue;
    current_ = pc;
    count_execution(pc, here);
    w.waiting &= ~here;
    if (program_[pc].op >= op_bar) {
      meet(w, program_[pc], here);
      continue;
    }
    run_collective(w, program_[pc], here);
    w.running |= here;
    for_lanes(here, [&](int l) { ++w.pc[l]; });
  }
}

void Machine::run_collective(Warp& w, const I& in, u32 mask) {
  switch (in.op) {
    case op_shfl: return shuffle(w, in, mask);
    case op_vote: return vote(w, in, mask);
    case op_match: return match(w, in, mask);
    case op_redux: return reduce(w, in, mask);
    case op_ldmatrix: return load_matrix(w, in, mask);
    case op_stmatrix: return store_matrix(w, in, mask);
    case op_mma: return matrix_multiply(w, in);
    default:
      if (tracking()) join_clocks(w, mask);
  }
}

// Lanes that do not run have come to a barrier together.
void Machine::meet(Warp& w, const I& in, u32 mask) {
  switch (in.op) {
    case op_cluster_arrive: return arrive_at_cluster(w, in, mask);
    case op_cluster_wait: return wait_for_cluster(w, mask);
    default: return arrive(w, in, mask);
  }
}

// Operands: [result] barrier number, [thread count], [predicate]. Modifier: how the barrier is met.
enum { barrier_sync, barrier_arrive, barrier_popc, barrier_and, barrier_or };

void Machine::arrive(Warp& w, const I& in, u32 mask) {
  const int leader = first_lane(mask), id_at = in.destinations;
  Barrier& barrier = block_->barriers[w.slot(in.operands[id_at])[leader] & 15];
  if (barrier.waiting.empty()) barrier.waiting.resize(warps_in_block_);
  barrier.expected = in.flags & flag_has_count ? static_cast<u32>(w.slot(in.operands[id_at + 1])[leader]) : 0;
  barrier.arrived += count_lanes(mask);
  barrier.used = true;
  if (tracking()) {
    barrier.clocks.resize(clocks_);
    for_lanes(mask, [&](int l) {
      const u32* clocks = clocks_of(w.thread(l));
      for (u32 i = 0; i < clocks_; ++i) barrier.clocks[i] = std::max(barrier.clocks[i], clocks[i]);
    });
  }
  if (in.modifier >= barrier_popc) {
    const u64* predicate = w.slot(in.operands[in.sources + in.destinations - 1]);
    const bool negated = in.flags & flag_negated;
    for_lanes(mask, [&](int l) { barrier.predicates_true += (predicate[l] & 1) ^ negated; });
  }
  if (in.modifier == barrier_arrive) {
    w.running |= mask;
    for_lanes(mask, [&](int l) {
      ++w.pc[l];
      if (tracking()) ++clocks_of(w.thread(l))[w.thread(l)];  // what it does from here on is not covered
    });
  } else {
    w.at_barrier |= mask;
    barrier.waiting[w.index] |= mask;
  }
  complete(barrier);
}

// Lets everybody go once all have arrived. Without a count, those are the threads that have not exited.
void Machine::complete(Barrier& barrier) {
  if (!barrier.used || barrier.arrived < (barrier.expected ? barrier.expected : block_->threads_alive())) return;
  for (Warp& w : block_->warps) {
    const u32 mask = barrier.waiting[w.index];
    if (!mask) continue;
    const I& in = program_[w.pc[first_lane(mask)]];
    const u64 result = in.modifier == barrier_popc  ? barrier.predicates_true
                       : in.modifier == barrier_and ? barrier.predicates_true == barrier.arrived
                                                    : barrier.predicates_true > 0;
    w.at_barrier &= ~mask;
    w.running |= mask;
    for_lanes(mask, [&](int l) {
      if (in.modifier >= barrier_popc) w.slot(in.operands[0])[l] = result;
      ++w.pc[l];
      if (!tracking()) return;
      u32* clocks = clocks_of(w.thread(l));
      const u32 own = clocks[w.thread(l)];
      memcpy(clocks, barrier.clocks.data(), clocks_ * sizeof(u32));
      clocks[w.thread(l)] = own + 1;
    });
  }
  barrier = Barrier();
}

}  // namespace ptxsim
