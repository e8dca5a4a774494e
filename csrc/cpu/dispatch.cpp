// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs: the first row the machine supports, unless PEFTKERN_CPU_ISA or set_cpu_isa() names one.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace peftkern::cpu {

const KernelTable& scalar_kernels();
#ifdef __x86_64__
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512bf16_kernels();
const KernelTable& amx_kernels();
#endif

namespace {

struct Isa {
  bool (*supported)();
  const KernelTable& (*table)();
};

#ifdef __x86_64__
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The tiles' 8 KiB of state need the kernel's permission, once for the process; oneDNN asks for the same.
bool has_amx() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  static const bool supported = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return supported;
#else
  return false;
#endif
}
#endif

const Isa kIsas[] = {
// best first
#ifdef __x86_64__
    {has_amx, amx_kernels},
    {has_avx512bf16, avx512bf16_kernels},
    {has_avx512, avx512_kernels},
    {has_avx2, avx2_kernels},
#endif
    {[] { return true; }, scalar_kernels},
};

const KernelTable* find(const std::string& name) {
  for (const Isa& isa : kIsas)
    if (isa.supported() && (name.empty() || name == isa.table().name)) return &isa.table();
  std::string names;
  for (const std::string& have : isa_names()) names += (names.empty() ? "" : ", ") + have;
  throw std::runtime_error("cpu isa: expected one of this machine's {" + names + "} or \"\" for the best, got \"" +
                           name + "\"");
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.supported()) names.emplace_back(isa.table().name);
  return names;
}

void set_isa(const std::string& name) { chosen = find(name); }

bool is_amd() {
#ifdef __x86_64__
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const KernelTable& kernels() {
  const KernelTable* table = chosen;
  if (!table) {
    const char* wanted = std::getenv("PEFTKERN_CPU_ISA");
    chosen = table = find(wanted ? wanted : "");
  }
  return *table;
}

}  // namespace peftkern::cpu
