// SPDX-License-Identifier: Apache-2.0
// One mma of each element type, fragments loaded by hand from A [16, K] and B [8, K] (B transposed), in 32-bit
// registers.
#include <stdint.h>

// kRegisters of A; element (row, k) of A is byte k * size of row `row`: a register is 4 bytes of a row.
template <int kRegisters>
__device__ void load_fragments(const uint32_t* a, const uint32_t* b, uint32_t* fa, uint32_t* fb) {
  const int group = threadIdx.x / 4, t = threadIdx.x % 4,
            words = kRegisters * 2;  // 32-bit words in a row of K elements
  for (int i = 0; i < kRegisters; ++i) fa[i] = a[(group + i % 2 * 8) * words + t + i / 2 * 4];
  for (int i = 0; i < kRegisters / 2; ++i) fb[i] = b[group * words + t + i * 4];
}
template <class T>
__device__ void store_fragment(T* c, const T* fc) {
  const int group = threadIdx.x / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + t * 2 + i % 2] = fc[i];
}

#define MMA_16(name, T, constraint, instruction)                                                     \
  __global__ void name(const uint32_t* a, const uint32_t* b, T* c) {                                 \
    uint32_t fa[4], fb[2];                                                                           \
    T fc[4] = {1, 2, 3, 4};                                                                          \
    load_fragments<4>(a, b, fa, fb);                                                                 \
    asm(instruction " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                         \
        : "+" constraint(fc[0]), "+" constraint(fc[1]), "+" constraint(fc[2]), "+" constraint(fc[3]) \
        : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));                   \
    store_fragment(c, fc);                                                                           \
  }
MMA_16(mma_bf16, float, "f", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MMA_16(mma_tf32, float, "f", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
MMA_16(mma_s8, int, "r", "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")
MMA_16(mma_u8, int, "r", "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32")

// Sums in fp16: two registers of two.
__global__ void mma_f16(const uint32_t* a, const uint32_t* b, uint32_t* c) {
  uint32_t fa[4], fb[2], fc[2] = {0x40003c00u, 0x44004200u};  // 1, 2, 3, 4
  load_fragments<4>(a, b, fa, fb);
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
      : "+r"(fc[0]), "+r"(fc[1])
      : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
  const int group = threadIdx.x / 4, t = threadIdx.x % 4;
  c[group * 4 + t] = fc[0];
  c[(group + 8) * 4 + t] = fc[1];
}

// ldmatrix.trans, then stmatrix (sm_90) of the same registers without .trans: each 8 x 8 matrix comes back transposed.
__global__ void transpose(const uint16_t* x, uint16_t* y) {
  __shared__ __align__(16) uint16_t matrices[4 * 64];
  uint32_t r[4], address = static_cast<uint32_t>(__cvta_generic_to_shared(matrices + threadIdx.x * 8));
  for (int i = threadIdx.x; i < 256; i += 32) matrices[i] = x[i];
  __syncwarp();
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
  __syncwarp();
  for (int i = threadIdx.x; i < 256; i += 32) y[i] = matrices[i];
#else
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(y)[i * 32 + threadIdx.x] = r[i];
#endif
}
