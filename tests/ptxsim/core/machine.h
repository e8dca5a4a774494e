// SPDX-License-Identifier: Apache-2.0
// The machine: one launch, block after block. Each lane has a program counter of its own; an instruction is executed
// for all lanes of a warp that stand at it. README.md lists what is checked and what differs from hardware.
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
  void publish_and_take_in(u64 address, bool release);

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
  void arrive(Warp& w, const I& in, u32 mask);
  void complete(Barrier& barrier);
  u32 threads_alive() const;

  // scheduler.cpp
  void place_buffers(const std::vector<Buffer>& buffers);
  void allocate_block_memory();
  u32 random();
  u32 next_group(Warp& w, int& favoured, int& patience);
  void branch(Warp& w, const I& in, u32 group, u32 taken);
  void leave(Warp& w, const I& in, u32 mask);
  bool run_warp(Warp& w, u32 quantum);
  void start_block(const std::vector<u64>& constants, const std::vector<s32>& constant_slots);
  void run_block();
  void report_stuck_lanes();
  void report(int kind, u32 thread, u64 address = 0, Touch other = {}, s32 buffer = buffer_none, int size = 0,
              u32 lanes = 0);
  void count_execution(int pc, u32 mask) {
    ++stats_[pc].warps;
    stats_[pc].threads += count_lanes(mask);
  }

  bool tracking() const { return config_.shared_races || config_.global_races; }
  u32* clocks_of(u32 thread) { return &clocks_[static_cast<size_t>(thread) * threads_in_block_]; }

  const Instruction* program_;
  LaunchConfig config_;
  InstructionStats* stats_;

  std::vector<Region> buffers_;
  const std::vector<Footprint>& before_;  // of the launch that this one may overlap with
  std::vector<s32> window_;               // window number - first_used_window_ -> index of a buffer, or -1
  u64 first_used_window_ = 0;
  std::vector<s32> host_buffers_;  // buffers at host addresses, by address
  Region shared_, param_;
  std::vector<Region> local_;  // of each thread
  std::vector<u8> shared_data_, shared_state_, local_data_, local_state_;
  std::vector<ByteHistory> shared_history_;

  u32 threads_in_block_, warps_in_block_, block_ = 0, blocks_;
  std::vector<u64> slots_;
  std::vector<Warp> warps_;
  std::vector<Thread> threads_;
  Barrier barriers_[16];

  std::vector<u32> clocks_;  // vector clock of each thread: what of every other thread it is ordered after
  std::unordered_map<u64, Published> published_;
  std::vector<u8> taken_in_;  // blocks whose published writes this block may read
  bool fenced_ = false;

  std::map<std::tuple<int, int, int>, size_t> known_reports_;
  u64 random_state_;
  int current_ = 0;  // the instruction in execution
  bool stop_ = false;
};

}  // namespace ptxsim
