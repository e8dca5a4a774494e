// SPDX-License-Identifier: Apache-2.0
// torch's private pool of a CUDA graph, for CPU tensors: what is allocated while a graph is captured stays until the
// graph goes, as replays write there. Unlike the real one it gives no block out twice.
#include <c10/core/Allocator.h>

#include <memory>
#include <vector>

namespace {

using Block = std::shared_ptr<c10::DataPtr>;  // the pool holds it, and the tensor in it
using Pool = std::vector<Block>;

struct Allocator final : c10::Allocator {
  c10::Allocator* usual = nullptr;
  Pool* pool = nullptr;  // of the capture that is going on

  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr memory = usual->allocate(bytes);
    if (!pool) return memory;
    void* const data = memory.get();
    const c10::Device device = memory.device();
    pool->push_back(std::make_shared<c10::DataPtr>(std::move(memory)));
    return {data, new Block(pool->back()), [](void* block) { delete static_cast<Block*>(block); }, device};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator allocator;

}  // namespace

extern "C" {

void* private_pool_begin() {
  allocator.usual = c10::GetAllocator(c10::DeviceType::CPU);
  allocator.pool = new Pool;
  c10::SetAllocator(c10::DeviceType::CPU, &allocator, 255);
  return allocator.pool;
}
void private_pool_end() {
  allocator.pool = nullptr;
  c10::SetAllocator(c10::DeviceType::CPU, allocator.usual, 255);
}
void private_pool_delete(void* pool) { delete static_cast<Pool*>(pool); }

}  // extern "C"
