// SPDX-License-Identifier: Apache-2.0
// C = A B^T with A [m, k], B [n, k] in fp16: cp.async pipeline, swizzled shared memory, ldmatrix, mma. Marks as in
// memory.cu.
#include <cuda_fp16.h>
#include <stdint.h>

constexpr int kTile = 64, kDepth = 32, kThreads = 128;  // 4 warps, each makes 32 x 32 of C

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes, or zeros where there is no source.
__device__ void copy_async(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(exists * 16));
}
__device__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
__device__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft));
}
__device__ void load_matrices(uint32_t (&r)[4], const half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p)));
}
__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Where chunk c (8 values) of a row of 32 lies: two rows share 128 bytes, and 8 rows meet all banks once.
__device__ int chunk_at(int row, int chunk) {
#ifdef BUG_NO_SWIZZLE
  return row * kDepth + chunk * 8;
#else
  return row * kDepth + (chunk ^ (row / 2 % 4)) * 8;
#endif
}

__device__ void load_tile(half* tile, const half* from, int first_row, int rows, int first_column, int columns) {
  for (int i = threadIdx.x; i < kTile * 4; i += kThreads) {
    int row = first_row + i / 4, column = first_column + i % 4 * 8;
    bool exists = row < rows && column < columns;
    copy_async(tile + chunk_at(i / 4, i % 4), exists ? from + int64_t{row} * columns + column : from, exists);
  }
}

template <int kStages>
__global__ void __launch_bounds__(kThreads) gemm(const half* a, const half* b, float* c, int m, int n, int k) {
  __shared__ __align__(16) half tile_a[kStages][kTile * kDepth], tile_b[kStages][kTile * kDepth];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile, warp_m = warp / 2 * 32, warp_n = warp % 2 * 32;
  const int steps = (k + kDepth - 1) / kDepth;
  float sums[2][4][4] = {};

  auto load = [&](int step) {
    if (step < steps) {
      load_tile(tile_a[step % kStages], a, m0, m, step * kDepth, k);  // <- BUG_NO_BARRIER BUG_LOAD_BEFORE_BARRIER
      load_tile(tile_b[step % kStages], b, n0, n, step * kDepth, k);
    }
    copy_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);

  for (int step = 0; step < steps; ++step) {
#ifdef BUG_WAIT_FOR_ONE_LESS
    copy_wait<kStages - 1>();
#elif !defined(BUG_NO_WAIT)
    copy_wait<kStages - 2>();
#endif
#ifdef BUG_LOAD_BEFORE_BARRIER
    load(step + kStages - 1);
    __syncthreads();
#else
#ifndef BUG_NO_BARRIER
    __syncthreads();
#endif
    load(step + kStages - 1);
#endif
    const half *sa = tile_a[step % kStages], *sb = tile_b[step % kStages];
    for (int part = 0; part < kDepth / 16; ++part) {
      uint32_t fa[2][4], fb[4][2];
      for (int i = 0; i < 2; ++i) {
        const half* from = sa + chunk_at(warp_m + i * 16 + lane % 16, part * 2 + lane / 16);
        load_matrices(fa[i], from);  // <- BUG_NO_WAIT BUG_WAIT_FOR_ONE_LESS BUG_NO_BARRIER BUG_LOAD_BEFORE_BARRIER
      }
      for (int j = 0; j < 4; j += 2) {
        uint32_t r[4];
        load_matrices(r, sb + chunk_at(warp_n + j * 8 + lane % 8 + lane / 16 * 8, part * 2 + lane / 8 % 2));
#ifdef BUG_SWAPPED_FRAGMENTS
        fb[j][0] = r[0], fb[j][1] = r[2], fb[j + 1][0] = r[1], fb[j + 1][1] = r[3];
#else
        fb[j][0] = r[0], fb[j][1] = r[1], fb[j + 1][0] = r[2], fb[j + 1][1] = r[3];
#endif
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) multiply_add(sums[i][j], fa[i], fb[j]);
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int h = 0; h < 4; ++h) {
        int row = m0 + warp_m + i * 16 + lane / 4 + h / 2 * 8, column = n0 + warp_n + j * 8 + lane % 4 * 2 + h % 2;
        if (row < m && column < n) c[int64_t{row} * n + column] = sums[i][j][h];
      }
    }
  }
}
template __global__ void gemm<2>(const half*, const half*, float*, int, int, int);
template __global__ void gemm<3>(const half*, const half*, float*, int, int, int);
