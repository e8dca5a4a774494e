// SPDX-License-Identifier: Apache-2.0
// ColumnSums of low_rank.h:  q = g * scale, and over the rows the sums of g and of g * z
//
// Bound by reading g and z and writing q, each once. A block has 32 columns, as reduce.cuh describes, and a slab of the
// rows. Neighbouring blocks have the slabs of a sum (parts.cuh).
#include "kernels.h"
#include "parts.cuh"
#include "reduce.cuh"

namespace peftkern {

constexpr int64_t kStepRows = 256;  // of all threads; a slab has whole steps

// The workspace: [part][sums], then [part][dots], as far as they are wanted.
__device__ __forceinline__ float* part_dots(const ColumnSums& args, int64_t parts) {
  return args.workspace + (args.sums ? parts * args.columns : 0);
}

template <class T>
__global__ void __launch_bounds__(kReduceThreads) column_sums_kernel(ColumnSums args, int64_t slabs) {
  constexpr int kRowsInFlight = 8 / sizeof(T);  // per thread: there is no arithmetic to hide the latency behind
  constexpr int kGroupRows = kRowsInFlight * kRowLanes;
  static_assert(kStepRows % kGroupRows == 0);
  __shared__ PartialSums<2> partial;
  const int64_t slab = blockIdx.x % slabs, first_column = blockIdx.x / slabs * kReduceColumns;
  const int64_t column = first_column + threadIdx.x % kChunkLanes * kChunk, valid = args.columns - column;
  const int64_t steps = (args.rows + kStepRows - 1) / kStepRows;
  const int64_t first_row = steps * slab / slabs * kStepRows + threadIdx.x / kChunkLanes;
  const int64_t last_row = min(steps * (slab + 1) / slabs * kStepRows, args.rows);
  const T *g = static_cast<const T*>(args.g) + column, *z = static_cast<const T*>(args.z) + column;
  T* q = static_cast<T*>(args.q) + column;
  const int64_t row_bytes = args.columns * sizeof(T);
  const bool g_aligned = chunks_aligned(args.g, row_bytes), z_aligned = chunks_aligned(args.z, row_bytes);
  const bool q_aligned = chunks_aligned(args.q, row_bytes);

  float scale[kChunk] = {}, sum[2][kChunk] = {};
  if (args.q) load_chunk(args.scale + column, valid, chunks_aligned(args.scale, 0), scale);
  for (int64_t first = first_row; first < last_row; first += kGroupRows) {
    Chunk<T> g_chunk[kRowsInFlight], z_chunk[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = first + i * kRowLanes, inside = row < last_row ? valid : 0;
      g_chunk[i].load(g + row * args.columns, inside, g_aligned);
      if (args.dots) z_chunk[i].load(z + row * args.columns, inside, z_aligned);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      float g_value[kChunk], z_value[kChunk], product[kChunk];
      g_chunk[i].to_floats(g_value);
      if (args.dots) z_chunk[i].to_floats(z_value);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        sum[0][j] += g_value[j];
        if (args.dots) sum[1][j] = fmaf(g_value[j], z_value[j], sum[1][j]);
        product[j] = g_value[j] * scale[j];
      }
      const int64_t row = first + i * kRowLanes;
      if (args.q) store_chunk(q + row * args.columns, row < last_row ? valid : 0, q_aligned, product);
    }
  }
  partial.add_lanes(sum);

  // A lane takes a column, a warp the sums of g, another one those of g * z.
  const ClusterShare share(2 * kReduceColumns);
  const unsigned at = share.first + threadIdx.x, which = at / kReduceColumns, c = at % kReduceColumns;
  float* out = at >= share.last ? nullptr : which == 0 ? args.sums : args.dots;
  if (out && first_column + c < args.columns) {
    const PartMade made(slab, slabs);
    if (!made.is_all()) out = (which == 0 ? args.workspace : part_dots(args, made.left)) + made.index * args.columns;
    out[first_column + c] = partial.total(which, c);
  }
  cluster_sync();  // all have read
}

__global__ void __launch_bounds__(kPartThreads) column_sums_sum_kernel(ColumnSums args, PartsLeft left) {
  const int64_t n = args.columns, i = part_element(), first_dot = args.sums ? n : 0;
  if (args.sums) sum_parts(i, args.workspace, left, n, args.sums, DType::f32);
  if (args.dots && i >= first_dot)
    sum_parts(i - first_dot, part_dots(args, left.parts), left, n, args.dots, DType::f32);
}

static int64_t column_tiles(const ColumnSums& args) { return ceil_div(args.columns, kReduceColumns); }

static int64_t slab_count(const ColumnSums& args) { return part_count(column_tiles(args), args.rows); }

// Columns of sums.
static int64_t sum_outputs(const ColumnSums& args) {
  return (args.sums ? args.columns : 0) + (args.dots ? args.columns : 0);
}

int64_t column_sums_workspace(const ColumnSums& args) {
  const int64_t slabs = slab_count(args);
  return slabs > 1 ? slabs * sum_outputs(args) : 0;
}

cudaError_t launch_column_sums(const ColumnSums& args, cudaStream_t stream) {
  // Not skipped without rows: the sums are then zero, and have to be written.
  if (args.columns == 0) return cudaSuccess;
  const int64_t slabs = slab_count(args), workspace = column_sums_workspace(args);
  if (workspace && !args.workspace) return cudaErrorInvalidValue;
  const Launch launch = {static_cast<unsigned>(column_tiles(args) * slabs), kReduceThreads, stream};
  PartsLeft left(workspace ? slabs : 1);  // q alone has none
  const cudaError_t error = dispatch(args.dtype, [&](auto tag) {
    return launch_kernel(column_sums_kernel<decltype(tag)>, launch, left, args, slabs);
  });
  if (error != cudaSuccess || left.parts == 1) return error;
  const unsigned sums = static_cast<unsigned>(ceil_div(sum_outputs(args), kPartThreads));
  column_sums_sum_kernel<<<sums, kPartThreads, 0, stream>>>(args, left);
  return cudaGetLastError();
}

}  // namespace peftkern
