// SPDX-License-Identifier: Apache-2.0
// A cache of large CPU buffers, for dequantized weights: what torch's caching allocator does on a GPU.
//
// malloc returns anything above 32 MiB to the system when it is freed, so a fresh 4096 x 4096 bf16 weight costs 8192
// page faults each time: 8 to 10 ms here, against 1 ms for dequantizing into memory that is there. Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

namespace peftkern::cpu {

constexpr size_t kLargeBuffer = size_t{8} << 20;   // from here on: smaller ones malloc keeps by itself
constexpr size_t kCacheLimit = size_t{256} << 20;  // kept unused, and the last one given back whatever its size

void* take_buffer(size_t bytes);             // at least so many, aligned to 2 MiB; throws std::bad_alloc
void give_buffer(void* data, size_t bytes);  // with the bytes it was taken for
size_t empty_buffer_cache();                 // frees what is unused; returns how many bytes that was

// A buffer for the length of a scope.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes), data_(take_buffer(bytes)) {}
  ~Buffer() { give_buffer(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  size_t bytes_;
  void* data_;
};

}  // namespace peftkern::cpu
