// SPDX-License-Identifier: Apache-2.0
// JacobiSvd of jacobi_svd.h: a thread block a matrix, a warp a pair of columns, a round between two barriers
//
// The columns are in shared memory up to kSharedSize, for larger matrices in place in global memory, where the 512 KB
// of n = 256 stay in the L2 cache. All lanes of a warp hold the sums of their pair, so each works out the rotation
// itself. Whether a sweep rotated anything is decided by the block's last barrier of the sweep: nothing goes to the
// host.
#include "kernels.h"

namespace peftkern {

constexpr int kJacobiWarps = 16;  // at most; small matrices have fewer pairs
// 96 columns take 73 KB: a block fits the 99 KB of sm_86, sm_89 and sm_120, two fit sm_80.
constexpr int64_t kSharedSize = 96;

// Of all lanes, in a fixed order.
__device__ __forceinline__ double dot(const double* x, const double* y, int n) {
  double sum = 0.0;
  for (int i = threadIdx.x % 32; i < n; i += 32) sum = fma(x[i], y[i], sum);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  return sum;
}

// Rotates a pair unless it is orthogonal; returns whether. norms: squares, of all columns.
__device__ __forceinline__ bool rotate_pair(double* columns, double* norms, int64_t i, int64_t j, int n) {
  double *x = columns + i * n, *y = columns + j * n, tangent;
  const double a = norms[i], b = norms[j], c = dot(x, y, n);
  if (!jacobi_rotation(a, b, c, jacobi_tolerance(n), tangent)) return false;
  const double cosine = 1.0 / sqrt(1.0 + tangent * tangent);
  for (int k = threadIdx.x % 32; k < n; k += 32) {
    const double u = x[k], v = y[k];
    x[k] = cosine * fma(-tangent, v, u);
    y[k] = cosine * fma(tangent, u, v);
  }
  __syncwarp();  // every lane has read both norms
  if (threadIdx.x % 32 == 0) {
    norms[i] = a - tangent * c;
    norms[j] = b + tangent * c;
  }
  return true;
}

template <bool kShared>
__global__ void __launch_bounds__(kJacobiWarps * 32, 2) jacobi_svd_kernel(JacobiSvd args) {
  extern __shared__ double shared[];
  const int n = static_cast<int>(args.n), warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  double* vectors = args.vectors + static_cast<int64_t>(blockIdx.x) * n * n;
  double* norms = shared;
  double* columns = kShared ? shared + n : vectors;
  if (kShared) {
    for (int i = threadIdx.x; i < n * n; i += blockDim.x) columns[i] = vectors[i];
    __syncthreads();
  }

  int sweep = 0;
  bool rotated = true;
  for (; rotated && sweep < kMaxJacobiSweeps; ++sweep) {
    rotated = false;
    for (int j = warp; j < n; j += warps) {
      const double square = dot(columns + j * n, columns + j * n, n);
      if (lane == 0) norms[j] = square;
    }
    __syncthreads();
    for (int round = 0; round < n + n % 2 - 1; ++round) {
      for (int pair = warp; pair < (n + 1) / 2; pair += warps) {
        int64_t i, j;
        jacobi_pair(n, round, pair, i, j);
        if (j < n) rotated |= rotate_pair(columns, norms, i, j, n);
      }
      __syncthreads();
    }
    rotated = __syncthreads_or(rotated);
  }
  if (threadIdx.x == 0) args.sweeps[blockIdx.x] = rotated ? sweep + 1 : sweep;

  for (int j = warp; j < n; j += warps) {
    const double* column = columns + j * n;
    const double square = dot(column, column, n), value = square <= kJacobiZero ? 0.0 : sqrt(square);
    if (lane == 0) args.values[static_cast<int64_t>(blockIdx.x) * n + j] = value;
    for (int k = lane; k < n; k += 32) vectors[j * n + k] = value == 0.0 ? 0.0 : column[k] / value;
  }
}

cudaError_t launch_jacobi_svd(const JacobiSvd& args, cudaStream_t stream) {
  if (args.n < 0 || args.n > kMaxJacobiSize) return cudaErrorInvalidValue;
  if (args.batch == 0) return cudaSuccess;
  const int64_t pairs = (args.n + 1) / 2;
  const unsigned threads = 32 * static_cast<unsigned>(pairs < 1 ? 1 : pairs < kJacobiWarps ? pairs : kJacobiWarps);
  const unsigned blocks = static_cast<unsigned>(args.batch);
  const size_t norms = static_cast<size_t>(args.n) * sizeof(double);
  if (args.n <= kSharedSize) {
    const size_t bytes = norms * static_cast<size_t>(args.n + 1);
    const cudaError_t error = cudaFuncSetAttribute(jacobi_svd_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
    jacobi_svd_kernel<true><<<blocks, threads, bytes, stream>>>(args);
  } else {
    jacobi_svd_kernel<false><<<blocks, threads, norms, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace peftkern
