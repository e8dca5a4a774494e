// SPDX-License-Identifier: Apache-2.0
// Which lanes run next, control flow, and the life of a block and a launch.
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
  allocate_block_memory();
  if (tracking()) clocks_.resize(static_cast<size_t>(threads_in_block_) * threads_in_block_);
  taken_in_.resize(std::min(blocks_, Touch::block_mask) + 1);
  threads_.resize(warps_in_block_ * 32);
  warps_.resize(warps_in_block_);
  slots_.resize(static_cast<size_t>(warps_in_block_) * config.slots * 32);
  for (u32 i = 0; i < warps_in_block_; ++i) {
    warps_[i].slots = slots_.data() + static_cast<size_t>(i) * config.slots * 32;
    warps_[i].index = i;
  }
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

void Machine::allocate_block_memory() {
  const u32 shared = config_.shared_bytes, local = config_.local_bytes;
  shared_data_.resize(shared);
  shared_state_.resize(shared);
  if (config_.shared_races) shared_history_.resize(shared);
  ByteHistory* history = shared_history_.empty() ? nullptr : shared_history_.data();
  shared_ = {0, shared, shared_data_.data(), shared_state_.data(), history, false, buffer_shared};
  local_data_.resize(static_cast<size_t>(local) * threads_in_block_);
  local_state_.resize(local_data_.size());
  for (u32 t = 0; t < threads_in_block_; ++t) {
    const size_t at = static_cast<size_t>(t) * local;
    local_.push_back({0, local, local_data_.data() + at, local_state_.data() + at, nullptr, false, buffer_local});
  }
}

Machine::~Machine() {
  for (Region& region : buffers_) free(region.history);
}

void Machine::run(const std::vector<u64>& constants, const std::vector<s32>& constant_slots) {
  const size_t chosen = config_.only_blocks.size(), count = chosen ? chosen : blocks_;
  for (size_t i = 0; i < count && !stop_; ++i) {
    block_ = chosen ? config_.only_blocks[i] : static_cast<u32>(i);
    start_block(constants, constant_slots);
    run_block();
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
  reports.push_back({kind, current_, other_instruction, block_, thread, other.block(), other.thread(), lanes, address,
                     1, buffer, size});
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
    const Thread& thread = threads_[w.thread(l)];
    size_t copies = thread.open.size();
    for (const auto& group : thread.groups) copies += group.size();
    if (copies) report(report_never_waited, w.thread(l), 0, {}, buffer_none, static_cast<int>(copies));
    if (!before_.empty() && !thread.grid_waited) report(report_no_grid_wait, w.thread(l));
  });
  w.running &= ~mask;
  w.done |= mask;
  for_lanes(w.waiting, [&](int l) {
    if (program_[w.pc[l]].op == op_bar) w.sync_mask[l] = ~w.done;
  });
  release_collectives(w);
  for (Barrier& barrier : barriers_) complete(barrier);
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
    if (in.op >= op_shfl && in.op <= op_bar) {
      if (in.op == op_bar && !(in.flags & flag_aligned)) {  // barrier.sync: lanes may arrive one by one
        count_execution(current_, mask);
        w.running &= ~mask;
        arrive(w, in, mask);
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

void Machine::start_block(const std::vector<u64>& constants, const std::vector<s32>& constant_slots) {
  const auto &grid = config_.grid, &block = config_.block;
  // What is not yet written reads as NaN, or as a wild index
  std::fill(shared_data_.begin(), shared_data_.end(), 0xff);
  std::fill(shared_state_.begin(), shared_state_.end(), unwritten);
  std::fill(shared_history_.begin(), shared_history_.end(), ByteHistory{});
  std::fill(local_data_.begin(), local_data_.end(), 0xff);
  std::fill(local_state_.begin(), local_state_.end(), unwritten);
  std::fill(slots_.begin(), slots_.end(), 0xa5a5a5a5deadbeefull);
  for (Barrier& barrier : barriers_) barrier = Barrier();
  for (Thread& thread : threads_) {
    thread.groups.clear();
    thread.open.clear();
    thread.grid_waited = false;
  }
  fenced_ = false;
  std::fill(taken_in_.begin(), taken_in_.end(), 0);
  if (tracking()) {
    std::fill(clocks_.begin(), clocks_.end(), 0);
    for (u32 t = 0; t < threads_in_block_; ++t) clocks_of(t)[t] = 1;
  }
  for (Warp& w : warps_) {
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
      set(t % block[0], t / block[0] % block[1], t / block[0] / block[1]);
      set(block[0], block[1], block[2]);
      set(block_ % grid[0], block_ / grid[0] % grid[1], block_ / grid[0] / grid[1]);
      set(grid[0], grid[1], grid[2]);
      set(l, w.index);
      set(self, below, below | self, ~(below | self), ~below);
      set(config_.dynamic_shared_bytes, warps_in_block_, block_, config_.shared_bytes);
    }
  }
}

void Machine::run_block() {
  std::vector<int> order(warps_in_block_);
  for (u32 i = 0; i < warps_in_block_; ++i) order[i] = i;
  for (;;) {
    if (config_.shuffle_warps) {
      for (u32 i = warps_in_block_ - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
    }
    bool progress = false, alive = false;
    for (int i : order) {
      progress |= run_warp(warps_[i], config_.shuffle_warps ? 1 + random() % config_.quantum : config_.quantum);
    }
    if (stop_) return;
    for (const Warp& w : warps_) alive |= w.done != ~0u;
    if (!alive) return;
    if (!progress) return report_stuck_lanes();
  }
}

void Machine::report_stuck_lanes() {
  for (Warp& w : warps_) {
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

}  // namespace ptxsim
