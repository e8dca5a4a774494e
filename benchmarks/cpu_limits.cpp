// SPDX-License-Identifier: Apache-2.0
// What 2 cores of a CPU with AVX-512-BF16 can do at most: bytes read, copied and written past the caches, and products
// from registers alone. The limits that docs/performance.md holds the kernels against.
//
//   g++ -O3 -std=c++20 -pthread -mavx512f -mavx512bf16 benchmarks/cpu_limits.cpp -o cpu_limits && ./cpu_limits
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

constexpr size_t kBytes = size_t{8} << 20, kBuffers = 10;  // a packed 4096 x 4096 weight; more than the caches hold
constexpr int kStreams = 4, kRounds = 61, kSums = 24;

// One thread beside the caller's, which spins between calls, as OpenMP's do.
class SecondThread {
 public:
  SecondThread() : thread_([this] { serve(); }) {}
  ~SecondThread() {
    stop_ = true;
    ++asked_;
    thread_.join();
  }
  void both(const std::function<void(int)>& work) {
    work_ = work;
    const int turn = ++asked_;
    work(0);
    while (done_ != turn) _mm_pause();
  }

 private:
  void serve() {
    for (int turn = 1;; ++turn) {
      while (asked_ < turn) _mm_pause();
      if (stop_) return;
      work_(1);
      done_ = turn;
    }
  }
  std::atomic<int> asked_{0}, done_{0};
  std::atomic<bool> stop_{false};
  std::function<void(int)> work_;
  std::thread thread_;
};

volatile int sink;

// Streams far apart, as nf4_few_rows_bf16.inl reads columns.
void read(const char* p, size_t n) {
  __m512i sum[kStreams] = {};
  const size_t run = n / kStreams;
  for (size_t k = 0; k < run; k += 64)
    for (int s = 0; s < kStreams; ++s) sum[s] = _mm512_xor_si512(sum[s], _mm512_load_si512(p + s * run + k));
  for (int s = 1; s < kStreams; ++s) sum[0] = _mm512_xor_si512(sum[0], sum[s]);
  sink = _mm512_reduce_or_epi32(sum[0]);
}

void copy(char* to, const char* from, size_t n) {
  for (size_t k = 0; k < n; k += 64) _mm512_stream_si512((__m512i*)(to + k), _mm512_load_si512(from + k));
  _mm_sfence();
}

void write(char* to, size_t n) {
  for (size_t k = 0; k < n; k += 64) _mm512_stream_si512((__m512i*)(to + k), _mm512_set1_epi32(1));
  _mm_sfence();
}

template <bool kBf16>
void multiply(int64_t steps) {
  __m512 sum[kSums];
#pragma GCC unroll 24
  for (auto& s : sum) s = _mm512_set1_ps(1e-3f);
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int j = 0; j < kSums; ++j) {
      sum[j] = kBf16 ? _mm512_dpbf16_ps(sum[j], (__m512bh)one, (__m512bh)one) : _mm512_fmadd_ps(one, one, sum[j]);
      asm volatile("" : "+v"(sum[j]));
    }
  }
#pragma GCC unroll 24
  for (auto& s : sum) sink = static_cast<int>(_mm512_reduce_add_ps(s));
}

int main() {
  SecondThread second;
  const auto median = [&](const std::function<void(int, int)>& work) {
    std::vector<double> seconds;
    for (int round = 0; round < kRounds; ++round) {
      const auto start = std::chrono::steady_clock::now();
      second.both([&](int thread) { work(round, thread); });
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::nth_element(seconds.begin(), seconds.begin() + kRounds / 2, seconds.end());
    return seconds[kRounds / 2];
  };
  for (const bool huge : {false, true}) {
    char* memory[2];
    for (auto& m : memory) {
      m = static_cast<char*>(
          mmap(nullptr, kBytes * kBuffers, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (huge) madvise(m, kBytes * kBuffers, MADV_HUGEPAGE);
      std::memset(m, 1, kBytes * kBuffers);
    }
    const auto part = [&](int which, int round, int thread) {
      return memory[which] + (round % kBuffers) * kBytes + thread * (kBytes / 2);
    };
    const double r = median([&](int i, int t) { read(part(0, i, t), kBytes / 2); });
    const double c = median([&](int i, int t) { copy(part(1, i, t), part(0, i, t), kBytes / 2); });
    const double w = median([&](int i, int t) { write(part(1, i, t), kBytes / 2); });
    std::printf("%s pages: read %.1f GB/s, copy past the caches %.1f (both ways), write past the caches %.1f\n",
                huge ? "huge" : "4 KiB", kBytes / r / 1e9, 2 * kBytes / c / 1e9, kBytes / w / 1e9);
    for (auto& m : memory) munmap(m, kBytes * kBuffers);
  }
  constexpr int64_t kSteps = 100000;
  const double products = 2.0 * kSteps * kSums * 16 * 2;
  std::printf("fp32 FMA %.0f GFLOP/s, ", products / median([](int, int) { multiply<false>(kSteps); }) / 1e9);
  std::printf("vdpbf16ps %.0f GFLOP/s\n", 2 * products / median([](int, int) { multiply<true>(kSteps); }) / 1e9);
}
