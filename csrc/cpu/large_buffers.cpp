// SPDX-License-Identifier: Apache-2.0
#include "large_buffers.h"

#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace peftkern::cpu {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Buffer {
  void* data;
  size_t bytes;
};

struct Cache {
  std::mutex mutex;
  std::deque<Buffer> unused;  // oldest first
  size_t bytes = 0;
};

Cache* make_cache();

// Never destroyed: tensors may outlive every static object.
Cache& cache() {
  static Cache* const instance = make_cache();
  return *instance;
}

// Held across a fork, so that a child never finds it locked by a thread that it does not have.
Cache* make_cache() {
#ifdef __linux__
  pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); }, [] { cache().mutex.unlock(); });
#endif
  return new Cache;
}

size_t whole_pages(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

void drop_oldest(Cache& c) {
  std::free(c.unused.front().data);
  c.bytes -= c.unused.front().bytes;
  c.unused.pop_front();
}

}  // namespace

void* take_buffer(size_t bytes) {
  bytes = whole_pages(bytes);
  Cache& c = cache();
  {
    const std::lock_guard<std::mutex> lock(c.mutex);
    for (auto it = c.unused.rbegin(); it != c.unused.rend(); ++it) {
      if (it->bytes != bytes) continue;  // layers come in few sizes: exact ones suffice and nothing is wasted
      void* data = it->data;
      c.bytes -= bytes;
      c.unused.erase(std::next(it).base());
      return data;
    }
  }
  void* data = std::aligned_alloc(kHugePage, bytes);
  if (!data) throw std::bad_alloc();
#ifdef __linux__
  madvise(data, bytes, MADV_HUGEPAGE);  // a hint: fewer faults now, fewer TLB misses on every pass
#endif
  return data;
}

void give_buffer(void* data, size_t bytes) {
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.unused.push_back({data, whole_pages(bytes)});
  c.bytes += whole_pages(bytes);
  while (c.bytes > kCacheLimit && c.unused.size() > 1) drop_oldest(c);
}

size_t empty_buffer_cache() {
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  const size_t freed = c.bytes;
  while (!c.unused.empty()) drop_oldest(c);
  return freed;
}

}  // namespace peftkern::cpu
