// SPDX-License-Identifier: Apache-2.0
// What Python and the machine share: names of operations, types and reports, and the records that cross the border.
// Python reads every list below from the compiled module (bindings.cpp), so there is no second copy of any of them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace ptxsim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using s128 = __int128;
using u128 = unsigned __int128;

// clang-format off
#define PTXSIM_TYPES(X) \
  X(pred) X(b8) X(u8) X(s8) X(b16) X(u16) X(s16) X(b32) X(u32) X(s32) X(b64) X(u64) X(s64) \
  X(f16) X(f16x2) X(bf16) X(bf16x2) X(f32) X(f64) X(tf32)

// Order matters: from shfl to cluster_wait an operation is collective, from ldmatrix on it is `.aligned` as well, from bar
// on a barrier; and from exit on it ends a thread.
#define PTXSIM_OPS(X) \
  X(mov) X(pack) X(unpack) X(add) X(sub) X(mul) X(mad) X(fma) X(div) X(rem) X(abs) X(neg) X(min) X(max) \
  X(and) X(or) X(xor) X(not) X(cnot) X(lop3) X(shl) X(shr) X(shf) X(popc) X(clz) X(brev) X(bfind) X(bfe) X(bfi) \
  X(bmsk) X(sad) X(prmt) X(dp4a) X(dp2a) X(selp) X(setp) X(set) X(cvt) X(cvt2) X(cvta) X(mapa) X(sqrt) X(rsqrt) X(rcp) \
  X(ex2) X(lg2) X(sin) X(cos) X(tanh) X(copysign) X(testp) \
  X(ld) X(st) X(atom) X(cp_async) X(cp_commit) X(cp_wait) X(cp_wait_all) X(fence) X(grid_wait) X(nop) X(clock) \
  X(activemask) \
  X(shfl) X(vote) X(match) X(redux) X(warpsync) X(ldmatrix) X(stmatrix) X(mma) X(bar) X(cluster_arrive) X(cluster_wait) \
  X(bra) X(brx) X(exit) X(trap) X(assertfail)

#define PTXSIM_COMPARISONS(X) \
  X(eq) X(ne) X(lt) X(le) X(gt) X(ge) X(lo) X(ls) X(hi) X(hs) X(equ) X(neu) X(ltu) X(leu) X(gtu) X(geu) X(num) X(nan)
#define PTXSIM_ROUNDINGS(X) X(none) X(rn) X(rz) X(rm) X(rp) X(rni) X(rzi) X(rmi) X(rpi) X(rna)
#define PTXSIM_ATOMICS(X) X(add) X(min) X(max) X(and) X(or) X(xor) X(exch) X(cas) X(inc) X(dec)
#define PTXSIM_SPACES(X) X(generic) X(global) X(shared) X(shared_cluster) X(local) X(param) X(const)
#define PTXSIM_FLAGS(X) \
  X(ftz) X(sat) X(hi) X(wide) X(negated) X(nan) X(strong) X(aligned) X(non_coherent) X(trans) X(relu) X(release) \
  X(has_count)
#define PTXSIM_REPORTS(X) \
  X(out_of_bounds) X(misaligned) X(uninitialised_read) X(read_only_write) X(cp_async_in_flight) X(race) \
  X(race_same_value) X(deadlock) X(sync_mask) X(inactive_lane) X(trap) X(assertion) X(step_limit) X(never_waited) \
  X(unsupported) X(nc_of_written) X(before_grid_wait) X(no_grid_wait) X(cluster_barrier) X(remote_lifetime)
// clang-format on

#define X(name) type_##name,
enum Type : u8 { PTXSIM_TYPES(X) };
#undef X
#define X(name) op_##name,
enum Op : u16 { PTXSIM_OPS(X) };
#undef X
#define X(name) cmp_##name,
enum Comparison { PTXSIM_COMPARISONS(X) };
#undef X
#define X(name) round_##name,
enum Rounding : u8 { PTXSIM_ROUNDINGS(X) };
#undef X
#define X(name) atomic_##name,
enum Atomic { PTXSIM_ATOMICS(X) };
#undef X
#define X(name) space_##name,
enum Space : u8 { PTXSIM_SPACES(X) };
#undef X
#define X(name) report_##name,
enum ReportKind { PTXSIM_REPORTS(X) };
#undef X
#define X(name) flag_bit_##name,
enum FlagBit { PTXSIM_FLAGS(X) };
#undef X
#define X(name) flag_##name = 1u << flag_bit_##name,
enum Flag : u32 { PTXSIM_FLAGS(X) };
#undef X

// One decoded instruction. An operand is a slot: 32 lanes of 64 bits. Immediates, symbols and special registers are
// slots that are filled before the block starts, so the machine knows one kind of operand only.
struct Instruction {
  u16 op;
  u8 type;
  u8 type2;         // cvt: source; mma: accumulator; dp2a, dp4a: first factor; set: destination
  u8 destinations;  // operands [0, destinations) are written, the next `sources` are read
  u8 sources;
  u8 space;
  u8 rounding;  // of a directed-rounding arithmetic instruction or a cvt
  u8 predicate_negated;
  u32 flags;
  s32 modifier;   // comparison, atomic operation, shuffle mode, lop3 table, ...
  s32 predicate;  // slot, or -1
  s32 target;     // of a branch
  s32 operands[18];
  s64 offset;         // added to the address
  s64 source_offset;  // cp.async: added to the global address
};

// Counted for each instruction of the program.
struct InstructionStats {
  u64 warps, threads, requests, bytes, sectors, ideal_sectors, waves, ideal_waves, remote_bytes;
};

struct Report {
  s32 kind, instruction, other_instruction;  // other_instruction: the other side of a race, or -1
  u32 block, thread, other_block, other_thread, lanes;
  u64 address, count;
  s32 buffer, size;
};

constexpr s32 buffer_none = -1, buffer_shared = -2, buffer_local = -3, buffer_param = -4;

// What a launch did to a 32-byte sector of global memory: bits of a byte. Fetched: read before it had written there.
constexpr int sector_bytes = 32;
constexpr u8 sector_read = 1, sector_written = 2, sector_fetched = 4;

// The sectors of a piece of memory, from the one that holds `address` on.
struct Footprint {
  u64 address;
  std::vector<u8> sectors;
};

struct Buffer {
  u64 address, size;
  u8 *data, *initialised;
  bool read_only, track_races;
};

struct LaunchConfig {
  std::array<u32, 3> grid{1, 1, 1}, block{1, 1, 1};
  u32 cluster = 1;  // blocks that run together
  u32 shared_bytes = 0, dynamic_shared_bytes = 0, local_bytes = 0, param_bytes = 0, slots = 0;
  u32 seed = 0, quantum = 512;                // quantum: instructions a warp runs before another one gets its turn
  bool shuffle_warps = false, chaos = false;  // chaos: a random group of lanes runs each step
  bool shared_races = true, global_races = true;
  u32 mma_mode = 0;  // 0 exact sums; n > 0 truncates to 24 + n - 1 bits as tensor cores do
  u64 max_steps = 1000000000;
  std::vector<u32> only_blocks;  // ascending; their clusters alone run; empty: all
};

// Every buffer has a window of its own above all host addresses, so an access past its end never hits a neighbour.
constexpr int window_bits = 36;
constexpr u64 first_window = 1ull << 56 >> window_bits;
// In the shared::cluster window, above the addresses of a block itself, those of the block with rank r start at r + 1.
constexpr int rank_shift = 24;
constexpr u64 shared_base = 1ull << 60, local_base = 2ull << 60, param_base = 3ull << 60;

}  // namespace ptxsim
