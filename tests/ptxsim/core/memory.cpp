// SPDX-License-Identifier: Apache-2.0
// Loads, stores, atomics and cp.async; every byte goes through access(), which holds the checks.
#include "machine.h"

namespace ptxsim {

// Turns `address` into an offset in the region that holds it.
Region* Machine::find_region(int space, u64& address, u32 thread) {
  switch (space) {
    case space_shared: return &block_->shared;
    case space_shared_cluster: return remote_region(address);
    case space_local: return &block_->local[thread];
    case space_param: return &param_;
    default: break;
  }
  const u64 window = (address >> window_bits) - first_used_window_;
  if (window < window_.size() && window_[window] >= 0) {
    Region& region = buffers_[window_[window]];
    address -= region.address;
    return &region;
  }
  const u64 generic = address >> 60;
  if (generic) {
    address &= (1ull << 60) - 1;
    if (space != space_generic) return nullptr;
    return generic == 1 ? &block_->shared : generic == 2 ? &block_->local[thread] : &param_;
  }
  auto after = [this](u64 value, s32 index) { return value < buffers_[index].address; };
  auto next = std::upper_bound(host_buffers_.begin(), host_buffers_.end(), address, after);
  if (next == host_buffers_.begin()) return nullptr;
  Region& region = buffers_[*--next];
  if (address - region.address >= region.size) return nullptr;
  address -= region.address;
  return &region;
}

// The checks on one lane's access. Returns where the bytes are, or null after an error.
u8* Machine::access(u32 thread, int space, u64 address, int size, AccessKind kind, const I& in, const u8* value) {
  u64 offset = address;
  Region* region = find_region(space, offset, thread);
  if (!region || offset + size > region->size || offset + size < offset) {
    report(report_out_of_bounds, thread, address, {}, region ? region->id : buffer_none, size);
    return nullptr;
  }
  if (address & (size - 1)) {
    report(report_misaligned, thread, address, {}, region->id, size);
    return nullptr;
  }
  if (space == space_shared_cluster && !may_reach(*region, thread, address, size)) return nullptr;
  if (region->read_only && kind != AccessKind::read) {
    report(report_read_only_write, thread, address, {}, region->id, size);
    return nullptr;
  }
  if (region->state) {
    u8* state = region->state + offset;
    for (int i = 0; i < size; ++i) {
      if (state[i] == in_flight) {
        Touch copy = region->history ? region->history[offset].writer : Touch{};
        report(report_cp_async_in_flight, thread, address, copy, region->id, size);
        break;
      }
      if (kind != AccessKind::write && state[i] == unwritten) {
        report(report_uninitialised_read, thread, address, {}, region->id, size);
        break;
      }
    }
    if (kind != AccessKind::read) memset(state, written, size);
  }
  if (region->history) {
    Touch writer = region->history[offset].writer;
    if ((in.flags & flag_non_coherent) && writer) {
      report(report_nc_of_written, thread, address, writer, region->id, size);
    }
    track(*region, offset, size, thread, kind, in.flags & flag_strong, value);
  }
  if (region->sectors) touch_sectors(*region, offset, size, thread, kind);
  return region->data + offset;
}

void Machine::addresses(Warp& w, const I& in, int operand, u32 mask, u64* out) {
  const u64* base = w.slot(in.operands[operand]);
  const u64 keep = in.space == space_shared || in.space == space_shared_cluster ? 0xffffffff : ~0ull;
  for_lanes(mask, [&](int l) { out[l] = (base[l] + in.offset) & keep; });
}

void Machine::load(Warp& w, const I& in, u32 mask) {
  const int element = type_size(in.type), size = element * in.destinations;
  const bool sign_extend = in.type == type_s8 || in.type == type_s16 || in.type == type_s32;
  u64 address[32];
  addresses(w, in, in.destinations, mask, address);
  if (in.space <= space_shared_cluster) count_request(stats_[current_], mask, address, size, in.space);
  for_lanes(mask, [&](int l) {
    const u8* bytes = access(w.thread(l), in.space, address[l], size, AccessKind::read, in);
    for (int i = 0; i < in.destinations; ++i) {
      if (in.operands[i] < 0) continue;
      u64 value = ~0ull;  // NaN in every float type
      if (bytes) {
        value = 0;
        memcpy(&value, bytes + i * element, element);
      }
      if (sign_extend) {
        const int unused = 64 - 8 * element;
        value = static_cast<u64>(static_cast<s64>(value << unused) >> unused);
      }
      w.slot(in.operands[i])[l] = value;
    }
  });
}

void Machine::store(Warp& w, const I& in, u32 mask) {
  const int element = type_size(in.type), elements = in.sources - 1, size = element * elements;
  u64 address[32];
  addresses(w, in, 0, mask, address);
  if (in.space <= space_shared_cluster) count_request(stats_[current_], mask, address, size, in.space);
  for_lanes(mask, [&](int l) {
    u8 value[64];
    for (int i = 0; i < elements; ++i) memcpy(value + i * element, &w.slot(in.operands[1 + i])[l], element);
    u8* bytes = access(w.thread(l), in.space, address[l], size, AccessKind::write, in, value);
    if (bytes) memcpy(bytes, value, size);
  });
}

void Machine::atomic(Warp& w, const I& in, u32 mask) {
  const int address_at = in.destinations, size = type_size(in.type);
  u64 address[32];
  addresses(w, in, address_at, mask, address);
  if (in.space <= space_shared_cluster) count_request(stats_[current_], mask, address, size, in.space);
  for_lanes(mask, [&](int l) {
    u8* bytes = access(w.thread(l), in.space, address[l], size, AccessKind::atomic, in);
    if (!bytes) return;
    if (in.space <= space_global) publish_and_take_in(w.thread(l), address[l], in.flags & flag_release);
    const u64 value = w.slot(in.operands[address_at + 1])[l];
    const u64 replacement = in.sources > 2 ? w.slot(in.operands[address_at + 2])[l] : 0;
    u64 old = 0;
    memcpy(&old, bytes, size);
    by_type(in.type, [&](auto type) {
      using T = decltype(type);
      T result = apply_atomic<T>(in.modifier, get<T>(old), get<T>(value), get<T>(replacement));
      memcpy(bytes, &result, sizeof result);
    });
    if (in.destinations && in.operands[0] >= 0) w.slot(in.operands[0])[l] = old;
  });
}

// Operands: destination, source, size, [bytes to copy; the rest is zeros]. Models a copy that is both early and late:
// the source is read now, the destination is undefined until the wait.
void Machine::copy_async(Warp& w, const I& in, u32 mask) {
  const u64 *to = w.slot(in.operands[0]), *from = w.slot(in.operands[1]);
  const u64* wanted = in.sources > 3 ? w.slot(in.operands[3]) : nullptr;
  const int size = static_cast<int>(w.slot(in.operands[2])[0]);
  u64 destination[32], source[32];
  u32 reading = 0;
  for_lanes(mask, [&](int l) {
    destination[l] = (to[l] + in.offset) & 0xffffffff;
    source[l] = from[l] + in.source_offset;
    if (!wanted || static_cast<u32>(wanted[l])) reading |= 1u << l;
  });
  if (reading) count_request(stats_[current_], reading, source, size, space_global);
  InstructionStats shared_side{};
  count_request(shared_side, mask, destination, size, space_shared);
  stats_[current_].waves += shared_side.waves;
  stats_[current_].ideal_waves += shared_side.ideal_waves;
  for_lanes(mask, [&](int l) {
    const u32 thread = w.thread(l);
    AsyncCopy copy{static_cast<u32>(destination[l]), static_cast<u8>(size), {}, current_};
    const int bytes_read = wanted ? std::min<int>(static_cast<u32>(wanted[l]), size) : size;
    if (source[l] & (size - 1)) report(report_misaligned, thread, source[l], {}, buffer_none, size);
    for (int i = 0; i < bytes_read;) {
      const int part = bytes_read - i >= 4 ? 4 : 1;
      if (u8* bytes = access(thread, space_global, source[l] + i, part, AccessKind::read, in)) {
        memcpy(copy.data + i, bytes, part);
      }
      i += part;
    }
    if (u8* bytes = access(thread, space_shared, destination[l], size, AccessKind::write, in)) {
      memset(block_->shared.state + destination[l], in_flight, size);
      memset(bytes, 0xff, size);
      block_->threads[thread].open.push_back(copy);
    }
  });
}

void Machine::commit_copies(Warp& w, u32 mask) {
  for_lanes(mask, [&](int l) {
    Thread& thread = block_->threads[w.thread(l)];
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
  });
}

void Machine::wait_copies(Warp& w, u32 mask, size_t groups_left) {
  for_lanes(mask, [&](int l) {
    Thread& thread = block_->threads[w.thread(l)];
    while (thread.groups.size() > groups_left) {
      land(w.thread(l), thread.groups.front());
      thread.groups.pop_front();
    }
  });
}

// The bytes arrive: a second write, reported at the line of the cp.async.
void Machine::land(u32 thread, std::vector<AsyncCopy>& group) {
  const int at_wait = current_;
  Region& shared = block_->shared;
  for (AsyncCopy& copy : group) {
    current_ = copy.instruction;
    memset(shared.state + copy.destination, written, copy.size);
    if (shared.history) track(shared, copy.destination, copy.size, thread, AccessKind::write, false, nullptr);
    memcpy(shared.data + copy.destination, copy.data, copy.size);
  }
  current_ = at_wait;
}

}  // namespace ptxsim
