// SPDX-License-Identifier: Apache-2.0
// What a memory request of a warp costs: 32-byte sectors in global memory, waves of 32 banks in shared memory,
// whosever it is.
#include "machine.h"

namespace ptxsim {
namespace {

// Wide accesses go in phases: 16 lanes of 8 bytes, 8 lanes of 16. A phase takes as many waves as its busiest bank has
// different words.
void count_waves(InstructionStats& stats, u32 mask, const u64* address, int size) {
  constexpr int banks = 32;
  const int lanes_per_phase = size <= 4 ? 32 : std::max(1, 128 / size), words_per_lane = std::max(1, size / 4);
  for (int first = 0; first < 32; first += lanes_per_phase) {
    u32 words[banks][32];
    u8 used[banks] = {};
    int busiest = 0;
    for (int lane = first; lane < first + lanes_per_phase; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int k = 0; k < words_per_lane; ++k) {
        const u32 word = static_cast<u32>(address[lane] >> 2) + k, bank = word % banks;
        int i = 0;
        while (i < used[bank] && words[bank][i] != word) ++i;
        if (i == used[bank]) words[bank][used[bank]++] = word;
        busiest = std::max<int>(busiest, used[bank]);
      }
    }
    stats.waves += busiest;
    stats.ideal_waves += busiest > 0;
  }
}

void count_sectors(InstructionStats& stats, u32 mask, const u64* address, int size) {
  u64 sectors[32 * 4];
  int n = 0;
  bool ascending = true;
  for_lanes(mask, [&](int l) {
    for (u64 sector = address[l] >> 5; sector <= (address[l] + size - 1) >> 5 && n < 128; ++sector) {
      if (n && sectors[n - 1] == sector) continue;
      ascending &= !n || sectors[n - 1] < sector;
      sectors[n++] = sector;
    }
  });
  if (!ascending) {
    std::sort(sectors, sectors + n);
    n = std::unique(sectors, sectors + n) - sectors;
  }
  stats.sectors += n;
  stats.ideal_sectors += (static_cast<u64>(count_lanes(mask)) * size + 31) / 32;
}

}  // namespace

void Machine::count_request(InstructionStats& stats, u32 mask, const u64* address, int size, int space) {
  ++stats.requests;
  stats.bytes += static_cast<u64>(count_lanes(mask)) * size;
  if (space == space_shared_cluster) {
    for_lanes(mask, [&](int l) {
      u64 offset = address[l];
      if (remote_region(offset) != &block_->shared) stats.remote_bytes += size;
    });
  }
  if (space == space_shared || space == space_shared_cluster) {
    count_waves(stats, mask, address, size);
  } else {
    count_sectors(stats, mask, address, size);
  }
}

// Notes the sectors of one lane's access, and checks its order with the launch before: until griddepcontrol.wait that
// one may still run, so what it writes must not be read, nor what it touches be written.
void Machine::touch_sectors(const Region& region, u64 offset, int size, u32 thread, AccessKind kind) {
  const u64 from = region.address % sector_bytes + offset, first = region.address / sector_bytes * sector_bytes;
  for (u64 i = from / sector_bytes; i <= (from + size - 1) / sector_bytes; ++i) {
    u8& sector = region.sectors[i];
    if (kind != AccessKind::write) sector |= sector & sector_written ? sector_read : sector_read | sector_fetched;
    if (kind != AccessKind::read) sector |= sector_written;
    if (before_.empty() || block_->threads[thread].grid_waited) continue;
    if (touched_before(first + i * sector_bytes) & (kind == AccessKind::read ? sector_written : 0xff)) {
      report(report_before_grid_wait, thread, region.address + offset, {}, region.id, size);
    }
  }
}

u8 Machine::touched_before(u64 address) const {
  for (const Footprint& part : before_) {
    const u64 i = (address - part.address) / sector_bytes;
    if (address >= part.address && i < part.sectors.size()) return part.sectors[i];
  }
  return 0;
}

}  // namespace ptxsim
