// SPDX-License-Identifier: Apache-2.0
// Which lanes run next, control flow, and the life of a cluster of blocks and a launch.
#include <cstdlib>
#include <new>

#include "machine.h"

namespace ptxsim {

Machine::Machine(const Instruction* program, const LaunchConfig& config, const std::vector<Buffer>& buffers,
                 const std::vector<Footprint>& before, u8* params, InstructionStats* stats)
    : program_(program), config_(config), stats_(stats), before_(before) {
  threads_in_block_ = config.block[0] * config.block[1] * config.block[2];
  warps_in_block_ = (threads_in_block_ + 31) / 32;
  blocks_ = config.grid[0] * config.grid[1] * config.grid[2];
  random_state_ = 0x9E3779B97F4A7C15ull ^ (static_cast<u64>(config.seed) << 20);
  param_ = {0, config.param_bytes, params, nullptr, nullptr, true, buffer_param};
  place_buffers(buffers);
  clocks_ = threads_in_block_ + 1;
  cluster_.resize(config.cluster);
  for (Block& block : cluster_) allocate(block);
}

// A table from window to buffer, and a sorted list of the buffers that lie at host addresses.
void Machine::place_buffers(const std::vector<Buffer>& buffers) {
  u64 first = ~0ull, last = 0;
  for (const Buffer& buffer : buffers) {
    const s32 id = static_cast<s32>(buffers_.size());
    void* history = nullptr;
    if (config_.global_races && buffer.track_races) {
      history = calloc(buffer.size + 1, sizeof(ByteHistory));  // pages that no access touches cost nothing
      if (!history) throw std::bad_alloc();
    }
    buffers_.push_back({buffer.address, buffer.size, buffer.data, buffer.initialised,
                        static_cast<ByteHistory*>(history), buffer.read_only, id});
    footprints.push_back({buffer.address / sector_bytes * sector_bytes, {}});
    footprints.back().sectors.resize((buffer.address % sector_bytes + buffer.size + sector_bytes - 1) / sector_bytes);
    buffers_.back().sectors = footprints.back().sectors.data();
    const u64 window = buffer.address >> window_bits;
    if (window < first_window) {
      host_buffers_.push_back(id);
    } else {
      first = std::min(first, window);
      last = std::max(last, window);
    }
  }
  if (last) {
    first_used_window_ = first;
    window_.assign(last - first + 1, -1);
    for (const Region& region : buffers_) {
      const u64 window = region.address >> window_bits;
      if (window >= first_window) window_[window - first] = region.id;
    }
  }
  auto by_address = [this](s32 a, s32 b) { return buffers_[a].address < buffers_[b].address; };
  std::sort(host_buffers_.begin(), host_buffers_.end(), by_address);
}

void Machine::allocate(Block& block) {
  const u32 shared = config_.shared_bytes, local = config_.local_bytes;
  block.shared_data.resize(shared);
  block.shared_state.resize(shared);
  if (config_.shared_races) block.shared_history.resize(shared);
  ByteHistory* history = block.shared_history.empty() ? nullptr : block.shared_history.data();
  block.shared = {0, shared, block.shared_data.data(), block.shared_state.data(), history, false, buffer_shared};
  block.local_data.resize(static_cast<size_t>(local) * threads_in_block_);
  block.local_state.resize(block.local_data.size());
  for (u32 t = 0; t < threads_in_block_; ++t) {
    u8 *data = block.local_data.data() + size_t{t} * local, *state = block.local_state.data() + size_t{t} * local;
    block.local.push_back({0, local, data, state, nullptr, false, buffer_local});
  }
  if (tracking()) block.clocks.resize(static_cast<size_t>(threads_in_block_) * clocks_);
  block.taken_in.resize(std::min(blocks_, Touch::block_mask) + 1);
  block.threads.resize(warps_in_block_ * 32);
  block.warps.resize(warps_in_block_);
  block.slots.resize(static_cast<size_t>(warps_in_block_) * config_.slots * 32);
  for (u32 i = 0; i < warps_in_block_; ++i) {
    block.warps[i].slots = block.slots.data() + static_cast<size_t>(i) * config_.slots * 32;
    block.warps[i].index = i;
  }
}

Machine::~Machine() {
  for (Region& region : buffers_) free(region.history);
}

void Machine::run(const std::vector<u64>& constants, const std::vector<s32>& constant_slots) {
  const size_t chosen = config_.only_blocks.size(), count = chosen ? chosen : blocks_;
  const u32 size = config_.cluster;
  u32 begun = 0;  // blocks up to there
  for (size_t i = 0; i < count && !stop_; ++i) {
    const u32 index = chosen ? config_.only_blocks[i] : static_cast<u32>(i);
    if (index < begun) continue;
    arrived_ = 0;
    released_.assign(2, std::vector<u32>(tracking() ? size * threads_in_block_ : 0));
    begun = index / size * size;
    for (Block& block : cluster_) start_block(block, begun++, constants, constant_slots);
    run_cluster();
  }
}

// One report for each pair of places; repetitions are counted.
void Machine::report(int kind, u32 thread, u64 address, Touch other, s32 buffer, int size, u32 lanes) {
  constexpr size_t enough = 200;
  const int other_instruction = other ? other.instruction() : -1;
  auto [known, is_new] = known_reports_.try_emplace({kind, current_, other_instruction}, reports.size());
  if (!is_new) {
    ++reports[known->second].count;
    return;
  }
  reports.push_back({kind, current_, other_instruction, block_->index, thread, other.block(), other.thread(), lanes,
                     address, 1, buffer, size});
  if (reports.size() > enough) stop_ = true;
}

u32 Machine::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return static_cast<u32>(random_state_ >> 11);
}

// The lanes that run next: those with the smallest pc, so that a loop's early leavers wait for the others. Now and then
// (always, in chaos mode) another group goes first for a while, so that no thread starves behind a spin lock.
u32 Machine::next_group(Warp& w, int& favoured, int& patience) {
  constexpr u32 steps_between = 1024;
  constexpr int steps_favoured = 64;
  if (config_.chaos || ++w.steps % steps_between == 0) {
    u32 leaders[32], groups = 0;
    for_lanes(w.running, [&](int l) {
      auto same_pc = [&](u32 leader) { return w.pc[leader] == w.pc[l]; };
      if (std::none_of(leaders, leaders + groups, same_pc)) leaders[groups++] = l;
    });
    favoured = leaders[random() % groups];
    patience = config_.chaos ? 1 : steps_favoured;
  }
  u32 pc = ~0u;
  if (patience && (w.running >> favoured & 1)) {
    --patience;
    pc = w.pc[favoured];
  } else if (w.running == ~0u) {
    for (int l = 0; l < 32; ++l) pc = std::min(pc, w.pc[l]);
  } else {
    for_lanes(w.running, [&](int l) { pc = std::min(pc, w.pc[l]); });
  }
  u32 group = 0;
  for (int l = 0; l < 32; ++l) group |= static_cast<u32>(w.pc[l] == pc) << l;
  return group & w.running;
}

void Machine::branch(Warp& w, const I& in, u32 group, u32 taken) {
  const u32 next = current_ + 1;
  count_execution(current_, group);
  if (in.op == op_bra) {
    for_lanes(group, [&](int l) { w.pc[l] = taken >> l & 1 ? static_cast<u32>(in.target) : next; });
  } else {  // brx: the table is a row of bra instructions at the target
    const u64* index = w.slot(in.operands[0]);
    for_lanes(group, [&](int l) {
      w.pc[l] = taken >> l & 1 ? static_cast<u32>(program_[in.target + static_cast<u32>(index[l])].target) : next;
    });
  }
}

// exit, trap and a failed assert end a thread.
void Machine::leave(Warp& w, const I& in, u32 mask) {
  if (in.op != op_exit) {
    const int kind = in.op == op_trap ? report_trap : report_assertion;
    report(kind, w.thread(first_lane(mask)), 0, {}, buffer_none, 0, mask);
  }
  for_lanes(mask, [&](int l) {
    const Thread& thread = block_->threads[w.thread(l)];
    size_t copies = thread.open.size();
    for (const auto& group : thread.groups) copies += group.size();
    if (copies) report(report_never_waited, w.thread(l), 0, {}, buffer_none, static_cast<int>(copies));
    if (!before_.empty() && !thread.grid_waited) report(report_no_grid_wait, w.thread(l));
  });
  w.running &= ~mask;
  w.done |= mask;
  leave_cluster(w, mask);
  for_lanes(w.waiting, [&](int l) {
    if (program_[w.pc[l]].op >= op_bar) w.sync_mask[l] = ~w.done;
  });
  release_collectives(w);
  for (Barrier& barrier : block_->barriers) complete(barrier);
}

bool Machine::run_warp(Warp& w, u32 quantum) {
  if (!w.running) return false;
  int favoured = 0, patience = 0;
  while (quantum-- && w.running && !stop_) {
    if (++steps > config_.max_steps) {
      report(report_step_limit, w.thread(first_lane(w.running)));
      stop_ = true;
      break;
    }
    const u32 group = next_group(w, favoured, patience);
    current_ = w.pc[first_lane(group)];
    const I& in = program_[current_];
    u32 mask = group;
    if (in.predicate >= 0) {
      const u64* predicate = w.slot(in.predicate);
      u32 yes = 0;
      for (int l = 0; l < 32; ++l) yes |= static_cast<u32>(predicate[l] & 1) << l;
      mask &= in.predicate_negated ? ~yes : yes;
    }
    if (in.op == op_bra || in.op == op_brx) {
      branch(w, in, group, mask);
      continue;
    }
    if (mask != group) for_lanes(group & ~mask, [&](int l) { ++w.pc[l]; });
    if (!mask) continue;
    if (in.op >= op_shfl && in.op <= op_cluster_wait) {
      if (in.op >= op_bar && !(in.flags & flag_aligned)) {  // barrier.sync: lanes may arrive one by one
        count_execution(current_, mask);
        w.running &= ~mask;
        meet(w, in, mask);
      } else {
        wait_collective(w, in, mask);
      }
      continue;
    }
    count_execution(current_, mask);
    if (in.op >= op_exit) {
      leave(w, in, mask);
      continue;
    }
    if (in.rounding > round_rn && in.op != op_cvt && in.op != op_cvt2) {
      execute_rounded(w, in, mask);
    } else {
      execute(w, in, mask);
    }
    for_lanes(mask, [&](int l) { ++w.pc[l]; });
  }
  return true;
}

void Machine::start_block(Block& block, u32 index, const std::vector<u64>& constants,
                          const std::vector<s32>& constant_slots) {
  block_ = &block;
  const auto &grid = config_.grid, &extents = config_.block;
  // What is not yet written reads as NaN, or as a wild index
  std::fill(block.shared_data.begin(), block.shared_data.end(), 0xff);
  std::fill(block.shared_state.begin(), block.shared_state.end(), unwritten);
  std::fill(block.shared_history.begin(), block.shared_history.end(), ByteHistory{});
  std::fill(block.local_data.begin(), block.local_data.end(), 0xff);
  std::fill(block.local_state.begin(), block.local_state.end(), unwritten);
  std::fill(block.slots.begin(), block.slots.end(), 0xa5a5a5a5deadbeefull);
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  for (Thread& thread : block.threads) {
    thread.groups.clear();
    thread.open.clear();
    thread.grid_waited = false;
    thread.arrived = 0;
  }
  block.index = index;
  block.fenced = block.has_taken_in = false;
  block.last_phase = 0;
  std::fill(block.taken_in.begin(), block.taken_in.end(), 0);
  if (tracking()) {
    std::fill(block.clocks.begin(), block.clocks.end(), 0);
    for (u32 t = 0; t < threads_in_block_; ++t) clocks_of(t)[t] = 1;
  }
  for (Warp& w : block.warps) {
    w.running = w.waiting = w.at_barrier = w.steps = 0;
    w.done = ~0u;
    for (size_t i = 0; i < constants.size(); ++i) std::fill_n(w.slot(constant_slots[i]), 32, constants[i]);
    for (int l = 0; l < 32; ++l) {
      const u32 t = w.thread(l);
      w.pc[l] = 0;
      if (t < threads_in_block_) {
        w.running |= 1u << l;
        w.done &= ~(1u << l);
      }
      const u32 below = (1u << l) - 1, self = 1u << l;
      int next_slot = 0;  // the order of SPECIAL_REGISTERS in decode.py
      auto set = [&](auto... values) { ((w.slot(next_slot++)[l] = values), ...); };
      set(t % extents[0], t / extents[0] % extents[1], t / extents[0] / extents[1]);
      set(extents[0], extents[1], extents[2]);
      set(index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]);
      set(grid[0], grid[1], grid[2]);
      set(l, w.index);
      set(self, below, below | self, ~(below | self), ~below);
      set(config_.dynamic_shared_bytes, warps_in_block_, index, config_.shared_bytes);
      set(index % config_.cluster, config_.cluster);
    }
  }
}

// The blocks take turns: each lets all of its warps run for a while.
void Machine::run_cluster() {
  std::vector<Block*> blocks;
  for (Block& block : cluster_) blocks.push_back(&block);
  std::vector<int> order(warps_in_block_);
  for (u32 i = 0; i < warps_in_block_; ++i) order[i] = i;
  auto shuffle = [this](auto& list) {
    for (size_t i = list.size() - 1; i > 0; --i) std::swap(list[i], list[random() % (i + 1)]);
  };
  for (;;) {
    bool progress = false;
    if (config_.shuffle_warps) shuffle(blocks);
    for (Block* block : blocks) {
      block_ = block;
      if (config_.shuffle_warps) shuffle(order);
      for (int i : order) {
        progress |= run_warp(block->warps[i], config_.shuffle_warps ? 1 + random() % config_.quantum : config_.quantum);
      }
      if (stop_) return;
    }
    if (std::none_of(blocks.begin(), blocks.end(), [](Block* block) { return block->threads_alive(); })) return;
    if (!progress) return report_stuck_lanes();
  }
}

void Machine::report_stuck_lanes() {
  for (Block& block : cluster_) {
    block_ = &block;
    for (Warp& w : block.warps) {
      for (u32 stuck = w.waiting | w.at_barrier; stuck;) {
        const int leader = first_lane(stuck);
        u32 group = 0;
        for_lanes(stuck, [&](int l) { group |= static_cast<u32>(w.pc[l] == w.pc[leader]) << l; });
        stuck &= ~group;
        current_ = w.pc[leader];
        report(report_deadlock, w.thread(leader), 0, {}, buffer_none, 0, group);
      }
    }
  }
}

}  // namespace ptxsim
