// SPDX-License-Identifier: Apache-2.0
// ImportanceUpdate of rank_allocation.h:  i = |p g|;  sensitivity = b1 sensitivity + (1 - b1) i;
//   uncertainty = b2 uncertainty + (1 - b2) |i - sensitivity|;  scores = sums of sensitivity * uncertainty
//
// Bound by memory: 16 bytes read and 8 written an element. One kernel updates A and B: a thread block takes a row of A,
// or one of kScoreParts slabs of the rows of B, in which a thread keeps to one column. Its sums go to scores and
// workspace; a second kernel updates E and adds up the parts, so that the order of every sum depends on the shapes
// alone.
#include "chunk.cuh"
#include "kernels.h"
#include "table.cuh"

namespace peftkern {

constexpr int kImportanceThreads = 128;
constexpr int kImportanceWarps = kImportanceThreads / 32;

using LayerTable = Table<TripletLayer>;

struct RowsAndParts {  // thread blocks of a layer
  __host__ __device__ int64_t operator()(const TripletLayer& layer) const {
    return layer.rank == 0 ? 0 : layer.rank + kScoreParts;
  }
};
struct OneBlock {
  __host__ __device__ int64_t operator()(const TripletLayer& layer) const { return layer.rank == 0 ? 0 : 1; }
};

// Every product and sum is rounded, as torch and the CPU do it.
struct Importance {
  float beta1, rest1, beta2, rest2, inverse_scale;

  __device__ __forceinline__ explicit Importance(const ImportanceUpdate& args)
      : beta1(static_cast<float>(args.beta1)),
        rest1(static_cast<float>(1.0 - args.beta1)),
        beta2(static_cast<float>(args.beta2)),
        rest2(static_cast<float>(1.0 - args.beta2)),
        inverse_scale(args.grad_scale ? 1.0f / *args.grad_scale : 1.0f) {}

  // The score of an element, and its new averages.
  __device__ __forceinline__ float update(float p, float g, float& sensitivity, float& uncertainty) const {
    const float i = fabsf(__fmul_rn(p, __fmul_rn(g, inverse_scale)));
    sensitivity = __fadd_rn(__fmul_rn(beta1, sensitivity), __fmul_rn(rest1, i));
    uncertainty = __fadd_rn(__fmul_rn(beta2, uncertainty), __fmul_rn(rest2, fabsf(__fsub_rn(i, sensitivity))));
    return __fmul_rn(sensitivity, uncertainty);
  }
};

// Scores of row j of A -> their mean, in scores.
template <class T>
__device__ __forceinline__ void update_row(const ImportanceUpdate& args, const TripletLayer& layer, int64_t j,
                                           float (&partial)[kImportanceThreads]) {
  const Importance importance(args);
  const T* p = static_cast<const T*>(layer.A) + j * layer.in;
  const T* g = layer.grad_A ? static_cast<const T*>(layer.grad_A) + j * layer.in : nullptr;
  float* sensitivity = args.sensitivity + layer.state + j * layer.in;
  float* uncertainty = args.uncertainty + layer.state + j * layer.in;
  const int64_t row_bytes = layer.in * static_cast<int64_t>(sizeof(T)), state_bytes = layer.in * 4;
  const bool p_aligned = chunks_aligned(layer.A, row_bytes), g_aligned = chunks_aligned(layer.grad_A, row_bytes);
  const bool s_aligned = chunks_aligned(args.sensitivity, state_bytes);  // state pieces start at 64 bytes
  const bool u_aligned = chunks_aligned(args.uncertainty, state_bytes);
  float total = 0.0f;
  for (int64_t i = threadIdx.x * kChunk; i < layer.in; i += kImportanceThreads * kChunk) {
    const int64_t valid = layer.in - i;
    float values[kChunk], gradients[kChunk] = {}, s[kChunk], u[kChunk];
    load_chunk(p + i, valid, p_aligned, values);
    if (g) load_chunk(g + i, valid, g_aligned, gradients);
    load_chunk(sensitivity + i, valid, s_aligned, s);
    load_chunk(uncertainty + i, valid, u_aligned, u);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) total += importance.update(values[k], gradients[k], s[k], u[k]);
    store_chunk(sensitivity + i, valid, s_aligned, s);
    store_chunk(uncertainty + i, valid, u_aligned, u);
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) total += __shfl_xor_sync(0xffffffff, total, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int warp = 0; warp < kImportanceWarps; ++warp) sum += partial[warp];
    args.scores[layer.first + j] = layer.in > 0 ? sum / static_cast<float>(layer.in) : 0.0f;
  }
}

// Scores of a slab of B's rows -> the sum of each column, in workspace. As many whole rows as the threads hold are
// neighbours in memory; of more columns than threads, a part of a row.
template <class T>
__device__ __forceinline__ void update_slab(const ImportanceUpdate& args, const TripletLayer& layer, int64_t part,
                                            float (&partial)[kImportanceThreads]) {
  const Importance importance(args);
  const T* p = static_cast<const T*>(layer.B);
  const T* g = static_cast<const T*>(layer.grad_B);
  float* sensitivity = args.sensitivity + layer.state_B();
  float* uncertainty = args.uncertainty + layer.state_B();
  const int64_t slab = (layer.out + kScoreParts - 1) / kScoreParts, row0 = part * slab;
  const int64_t row1 = row0 + slab < layer.out ? row0 + slab : layer.out;
  for (int64_t column0 = 0; column0 < layer.rank; column0 += kImportanceThreads) {
    const int64_t left = layer.rank - column0;
    const int width = static_cast<int>(left < kImportanceThreads ? left : kImportanceThreads);
    const int rows = kImportanceThreads / width, row = threadIdx.x / width;
    float total = 0.0f;
    if (row < rows) {
      for (int64_t r = row0 + row; r < row1; r += rows) {
        const int64_t i = r * layer.rank + column0 + threadIdx.x % width;
        float s = sensitivity[i], u = uncertainty[i];
        total += importance.update(to_float(p[i]), g ? to_float(g[i]) : 0.0f, s, u);
        sensitivity[i] = s;
        uncertainty[i] = u;
      }
    }
    partial[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x < width) {
      float sum = 0.0f;
      for (int other = 0; other < rows; ++other) sum += partial[other * width + threadIdx.x];
      args.workspace[part * args.triplets + layer.first + column0 + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kImportanceThreads)
    update_importance_kernel(ImportanceUpdate args, const __grid_constant__ LayerTable table) {
  __shared__ float partial[kImportanceThreads];
  int64_t block;
  const TripletLayer& layer = table.items[find_item(table, RowsAndParts(), block)];
  device_dispatch(layer.dtype, [&](auto tag) {
    if (block < layer.rank) {
      update_row<decltype(tag)>(args, layer, block, partial);
    } else {
      update_slab<decltype(tag)>(args, layer, block - layer.rank, partial);
    }
  });
}

__global__ void __launch_bounds__(kImportanceThreads)
    triplet_scores_kernel(ImportanceUpdate args, const __grid_constant__ LayerTable table) {
  int64_t block;
  const TripletLayer& layer = table.items[find_item(table, OneBlock(), block)];
  const Importance importance(args);
  device_dispatch(layer.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t j = threadIdx.x; j < layer.rank; j += kImportanceThreads) {
      float of_B = 0.0f;
      for (int64_t part = 0; part < kScoreParts; ++part) of_B += args.workspace[part * args.triplets + layer.first + j];
      const float gradient = layer.grad_E ? to_float(static_cast<const T*>(layer.grad_E)[j]) : 0.0f;
      const int64_t at = layer.state_E() + j;
      float s = args.sensitivity[at], u = args.uncertainty[at];
      const float of_E = importance.update(to_float(static_cast<const T*>(layer.E)[j]), gradient, s, u);
      args.sensitivity[at] = s;
      args.uncertainty[at] = u;
      const int64_t triplet = layer.first + j;
      const float mean_of_B = layer.out > 0 ? of_B / static_cast<float>(layer.out) : 0.0f;
      args.scores[triplet] = of_E + (args.scores[triplet] + mean_of_B);
    }
  });
}

cudaError_t launch_update_importance(const ImportanceUpdate& args, cudaStream_t stream) {
  const cudaError_t error =
      for_each_table(args.layers, args.layer_count, RowsAndParts(), [&](const LayerTable& table, unsigned blocks) {
        update_importance_kernel<<<blocks, kImportanceThreads, 0, stream>>>(args, table);
      });
  if (error != cudaSuccess) return error;
  return for_each_table(args.layers, args.layer_count, OneBlock(), [&](const LayerTable& table, unsigned blocks) {
    triplet_scores_kernel<<<blocks, kImportanceThreads, 0, stream>>>(args, table);
  });
}

}  // namespace peftkern
