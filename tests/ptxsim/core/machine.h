// SPDX-License-Identifier: Apache-2.0
// The machine: one launch, cluster after cluster, the blocks of a cluster in turns. Each lane has a program counter of
// its own; an instruction is executed for all lanes of a warp that stand at it. README.md lists what is checked and
// what differs from hardware.
#pragma once

#include <deque>
#include <map>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "numeric.h"

namespace ptxsim {

// Who touched a byte: thread 10 bits | block 20 | clock 16 | instruction 17 | strong 1. Zero means nobody.
struct Touch {
  u64 packed = 0;
  static constexpr u32 block_mask = 0xfffff, clock_mask = 0xffff;
  static constexpr int instruction_limit = 1 << 17;

  explicit operator bool() const { return packed; }
  u32 thread() const { return packed >> 54; }
  u32 warp() const { return packed >> 59; }
  u32 block() const { return packed >> 34 & block_mask; }
  u32 clock() const { return packed >> 18 & clock_mask; }
  int instruction() const { return packed >> 1 & 0x1ffff; }
  bool strong() const { return packed & 1; }  // an atomic, volatile or relaxed access: two of these do not race
};
// The last writer of a byte and two readers since.
struct ByteHistory {
  Touch writer, reader, other_reader;
};

// States of a byte.
constexpr u8 unwritten = 0, written = 1, in_flight = 2;

struct Region {
  u64 address = 0, size = 0;
  u8 *data = nullptr, *state = nullptr;  // state is null where initialisation is not followed
  ByteHistory* history = nullptr;        // null where races are not followed
  bool read_only = false;
  s32 id = buffer_none;
  u8* sectors = nullptr;  // of its footprint; null for what is not global memory
};

// A cp.async: its bytes were read at the issue and land at the wait. Until then the destination is in flight.
struct AsyncCopy {
  u32 destination;
  u8 size;
  u8 data[16];
  int instruction;
};
struct Thread {
  std::vector<AsyncCopy> open;  // not yet committed
  std::deque<std::vector<AsyncCopy>> groups;
  bool grid_waited;
  u32 arrived;  // the phase of the cluster's barrier it arrived in and has not waited for; 0: none
};

struct Warp {
  u64* slots;
  u32 pc[32], sync_mask[32];               // sync_mask: the lanes that a waiting lane waits for
  u32 running, waiting, at_barrier, done;  // one bit a lane, each lane in one of the four
  u32 steps;
  int index;

  u64* slot(int i) const { return slots + static_cast<size_t>(i) * 32; }
  u32 thread(int lane) const { return index * 32 + lane; }
};

struct Barrier {
  u32 expected = 0, arrived = 0, predicates_true = 0;
  bool used = false;
  std::vector<u32> waiting;  // lanes of each warp
  std::vector<u32> clocks;
};

struct Block {
  u32 index = 0;  // in the grid
  std::vector<u8> shared_data, shared_state, local_data, local_state;
  std::vector<ByteHistory> shared_history;
  Region shared;
  std::vector<Region> local;  // of each thread
  std::vector<u64> slots;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  Barrier barriers[16];
  // Vector clock of each thread: what of every other thread of the block it is ordered after, and up to which phase of
  // the cluster's barrier it knows what the other blocks released.
  std::vector<u32> clocks;
  std::vector<u8> taken_in;  // blocks whose published writes this block may read
  bool has_taken_in = false, fenced = false;
  u32 last_phase = 0;  // the latest that a thread knew when it ended

  u32 threads_alive() const {
    u32 alive = 0;
    for (const Warp& w : warps) alive += __builtin_popcount(~w.done);
    return alive;
  }
};

// Blocks that published their writes by fence + atomic on a word.
struct Published {
  std::vector<u32> blocks;
  u32 reader = ~0u;     // the block that last took them in ...
  size_t taken_in = 0;  // ... and how many
};

enum class AccessKind { read, write, atomic };

template <class F>
inline void for_lanes(u32 mask, F f) {
  if (mask == ~0u) {
    for (int lane = 0; lane < 32; ++lane) f(lane);
  } else {
    for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
  }
}
inline int first_lane(u32 mask) { return __builtin_ctz(mask); }
inline u32 count_lanes(u32 mask) { return __builtin_popcount(mask); }

class Machine {
 public:
  Machine(const Instruction* program, const LaunchConfig& config, const std::vector<Buffer>& buffers,
          const std::vector<Footprint>& before, u8* params, InstructionStats* stats);
  ~Machine();
  void run(const std::vector<u64>& constants, const std::vector<s32>& constant_slots);

  std::vector<Report> reports;
  std::vector<Footprint> footprints;  // one for each buffer
  u64 steps = 0;

 private:
  using I = Instruction;

  // alu.cpp, convert.cpp
  void execute(Warp& w, const I& in, u32 mask);  // everything but control flow and collectives
  void execute_rounded(Warp& w, const I& in, u32 mask);
  void multiply(Warp& w, const I& in, u32 mask);
  void minmax(Warp& w, const I& in, u32 mask);
  void bit_field_insert(Warp& w, const I& in, u32 mask);
  void set_predicate(Warp& w, const I& in, u32 mask);
  void test_property(Warp& w, const I& in, u32 mask);
  void convert(Warp& w, const I& in, u32 mask);
  void convert_pair(Warp& w, const I& in, u32 mask);
  void convert_tf32(Warp& w, const I& in, u32 mask);

  // memory.cpp
  Region* find_region(int space, u64& address, u32 thread);
  u8* access(u32 thread, int space, u64 address, int size, AccessKind kind, const I& in, const u8* value = nullptr);
  void addresses(Warp& w, const I& in, int operand, u32 mask, u64* out);
  void load(Warp& w, const I& in, u32 mask);
  void store(Warp& w, const I& in, u32 mask);
  void atomic(Warp& w, const I& in, u32 mask);
  void copy_async(Warp& w, const I& in, u32 mask);
  void commit_copies(Warp& w, u32 mask);
  void wait_copies(Warp& w, u32 mask, size_t groups_left);
  void land(u32 thread, std::vector<AsyncCopy>& group);

  // races.cpp
  Touch touch_of(u32 thread, bool strong) const;
  bool happened_before(Touch touch, u32 thread) const;
  void track(Region& region, u64 offset, int size, u32 thread, AccessKind kind, bool strong, const u8* value);
  void join_clocks(Warp& w, u32 mask);
  void publish_and_take_in(u32 thread, u64 address, bool release);

  // counters.cpp
  void count_request(InstructionStats& stats, u32 mask, const u64* address, int size, int space);
  void touch_sectors(const Region& region, u64 offset, int size, u32 thread, AccessKind kind);
  u8 touched_before(u64 address) const;

  // warp_ops.cpp, mma.cpp
  void shuffle(Warp& w, const I& in, u32 mask);
  void vote(Warp& w, const I& in, u32 mask);
  void match(Warp& w, const I& in, u32 mask);
  void reduce(Warp& w, const I& in, u32 mask);
  void load_matrix(Warp& w, const I& in, u32 mask);
  void store_matrix(Warp& w, const I& in, u32 mask);
  void matrix_multiply(Warp& w, const I& in);
  float dot(double start, const double* products, int count, int block) const;

  // barriers.cpp
  void wait_collective(Warp& w, const I& in, u32 mask);
  void release_collectives(Warp& w);
  void run_collective(Warp& w, const I& in, u32 mask);
  void meet(Warp& w, const I& in, u32 mask);
  void arrive(Warp& w, const I& in, u32 mask);
  void complete(Barrier& barrier);

  // cluster.cpp
  void map_to_rank(Warp& w, const I& in, u32 mask);
  Region* remote_region(u64& address);
  bool may_reach(const Region& region, u32 thread, u64 address, int size);
  void arrive_at_cluster(Warp& w, const I& in, u32 mask);
  void wait_for_cluster(Warp& w, u32 mask);
  void pass_cluster_barrier(Warp& w, u32 mask);
  void leave_cluster(Warp& w, u32 mask);
  void complete_cluster_barrier();
  void share_taken_in();
  bool was_released(Touch touch, u32 phase) const;
  u32 phase() const { return static_cast<u32>(released_.size()) - 1; }

  // scheduler.cpp
  void place_buffers(const std::vector<Buffer>& buffers);
  void allocate(Block& block);
  u32 random();
  u32 next_group(Warp& w, int& favoured, int& patience);
  void branch(Warp& w, const I& in, u32 group, u32 taken);
  void leave(Warp& w, const I& in, u32 mask);
  bool run_warp(Warp& w, u32 quantum);
  void start_block(Block& block, u32 index, const std::vector<u64>& constants, const std::vector<s32>& constant_slots);
  void run_cluster();
  void report_stuck_lanes();
  void report(int kind, u32 thread, u64 address = 0, Touch other = {}, s32 buffer = buffer_none, int size = 0,
              u32 lanes = 0);
  void count_execution(int pc, u32 mask) {
    ++stats_[pc].warps;
    stats_[pc].threads += count_lanes(mask);
  }

  bool tracking() const { return config_.shared_races || config_.global_races; }
  u32* clocks_of(u32 thread) { return &block_->clocks[static_cast<size_t>(thread) * clocks_]; }
  const u32* clocks_of(u32 thread) const { return &block_->clocks[static_cast<size_t>(thread) * clocks_]; }

  const Instruction* program_;
  LaunchConfig config_;
  InstructionStats* stats_;

  std::vector<Region> buffers_;
  const std::vector<Footprint>& before_;  // of the launch that this one may overlap with
  std::vector<s32> window_;               // window number - first_used_window_ -> index of a buffer, or -1
  u64 first_used_window_ = 0;
  std::vector<s32> host_buffers_;  // buffers at host addresses, by address
  Region param_;

  u32 threads_in_block_, warps_in_block_, blocks_;
  u32 clocks_;                  // in the vector of a thread
  std::vector<Block> cluster_;  // by rank
  Block* block_ = nullptr;      // whose turn it is
  u32 arrived_ = 0;             // threads at the cluster's barrier
  // Clocks of all threads of the cluster that its barrier released, up to each phase; the last one is not yet complete.
  std::vector<std::vector<u32>> released_;

  std::unordered_map<u64, Published> published_;

  std::map<std::tuple<int, int, int>, size_t> known_reports_;
  u64 random_state_;
  int current_ = 0;  // the instruction in execution
  bool stop_ = false;
};

}  // namespace ptxsim
