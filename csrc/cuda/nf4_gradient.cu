// SPDX-License-Identifier: Apache-2.0
// Nf4Gradient of nf4_product.h:  dx = q W + mask * (dh F)
//
// As dx^T = W^T q^T, for the reasons given in nf4_forward.cu, whose weight this reads along the other axis. A block
// makes kRows rows x 128 columns of dx; each of its 4 warps makes all rows of 32 columns, so that a weight is
// dequantized once per block. It walks along `out` in steps of 64:
//
//   global memory                     shared memory, kStages stages                registers of a lane (group, member)
//   q [rows, 64]        cp.async      q [rows][8 chunks]                           rows group + 8 i, k 16 member +
//   0..15 packed [64, 64 B]   cp.async      packed [16][4 warps][4 members][16 B]        4 columns of the same 16 k
//   absmax              registers     absmax [4 warps][4 members][16]              of these 16 k
//
// k, a row of W, is permuted in both operands alike: slots {2 member, + 1 | + 8, + 9} of the step s of 16 are the
// physical k = 16 member + 4 s + {0, 1 | 2, 3}. So a lane's q is two 16-byte chunks. Its weights are 2 bytes in each of
// 16 rows: as scaling is fp32 and rounding makes pairs anyway, pairs of one column from two rows cost nothing more, and
// the transposition is free. Rows {group, group + 8} of the operand j are the columns 4 group + 2 j + {0, 1} of dx.
//
// Weights travel one step ahead of q, and are dequantized half a step ahead of their use, between the multiply-adds of
// the half before.
//
// The low-rank part comes first, while the first stages arrive: the mask is applied to its sums alone, in registers,
// before q W is added to them. dh and F enter the bf16 tensor cores as sums high + low of two bf16 values, of which the
// product low * low is left out: relative error of a term below 3 * 2^-18.
#include "kernels.h"
#include "nf4_table.cuh"

namespace peftkern {

constexpr int kGradientThreads = 128, kGradientWarps = kGradientThreads / 32;
constexpr int kWarpColumns = 32, kGradientColumns = kWarpColumns * kGradientWarps;
constexpr int kGradientDepth = 64;                          // rows of W of a step
constexpr int kQRow = kGradientDepth * 2;                   // bytes of a row of q in a stage
constexpr int kPackedChunk = 16;                            // 32 columns of a row of W
constexpr int kPackedRows = kGradientWarps * kPackedChunk;  // bytes of a row of W in a stage
constexpr int kAbsmaxMember = 16 * 4 + 16;                  // bytes of the absmax of 16 rows; + 16: members' own banks
constexpr int kAbsmaxWarp = 4 * kAbsmaxMember;
constexpr int kLowRankDepth = 16;  // ranks of a step of the low-rank part

// The shared memory of a block: the table of nf4_table.cuh, then the stages.
template <int kRows>
struct GradientShared {
  static constexpr int kStages = kRows == 128 ? 3 : 4;
  static constexpr int kPacked = kRows * kQRow, kAbsmax = kPacked + kGradientDepth * kPackedRows;  // offsets in a stage
  static constexpr int kStageBytes = kAbsmax + kGradientWarps * kAbsmaxWarp;
  static constexpr int kBytes = kByteTableBytes + kStages * kStageBytes;
  static_assert(kBytes <= 99 * 1024, "what a block of sm_86, sm_89 and sm_120 may have");

  static constexpr int kBlocks = kRows == 32 ? 3 : 2;  // of a multiprocessor of sm_90, for __launch_bounds__
};

// The sums of a lane: [rows 8 i + 2 member + h][columns 4 group + 2 j + c] is sum[i][j][2 c + h].
template <int kRows>
using GradientSums = float[kRows / 8][2][4];

struct GradientTile {
  int64_t row, column;  // the first

  // Neighbouring blocks share columns of W, which come from memory; q comes from L2.
  __device__ __forceinline__ GradientTile(const Nf4Gradient& args, int rows) {
    const int64_t row_tiles = (args.rows + rows - 1) / rows;
    row = blockIdx.x % row_tiles * rows;
    column = blockIdx.x / row_tiles * kGradientColumns;
  }
};

// What a thread brings to every stage: zeros outside of q and W. Zero weights are dequantized as well, and meet zeros
// of q or are not used.
template <int kRows>
class GradientLoader {
  using Shared = GradientShared<kRows>;
  static constexpr int kChunks = kQRow / 16, kRowStep = kGradientThreads / kChunks, kRowCount = kRows / kRowStep;
  static constexpr int kPackedStep = kGradientThreads / kGradientWarps, kPackedCount = kGradientDepth / kPackedStep;

 public:
  __device__ __forceinline__ GradientLoader(const Nf4Gradient& args, int block_size_log2, const GradientTile& tile)
      : weight_(args.weight), two_blocks_(block_size_log2 < 6), left_(static_cast<int>(args.weight.out)) {
    const int64_t out = args.weight.out, in = args.weight.in;
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    q_ = static_cast<const uint8_t*>(args.q) + ((tile.row + row) * out + chunk * kChunk) * 2;
    q_step_ = kRowStep * out * 2;
    q_rows_ = static_cast<int>(min(args.rows - tile.row - row, int64_t{kRows}));
    q_column_ = chunk * kChunk;
    q_target_ = row * kQRow + (chunk ^ (row & 1)) * 16;

    packed_row_ = threadIdx.x / kGradientWarps;
    const int warp = threadIdx.x % kGradientWarps;
    packed_ = args.weight.packed + packed_row_ * (in / 2) + tile.column / 2 + warp * kPackedChunk;
    packed_step_ = kPackedStep * (in / 2);
    packed_target_ =
        Shared::kPacked + ((packed_row_ % 16 * kGradientWarps + warp) * 4 + packed_row_ / 16) * kPackedChunk;
    if (tile.column + warp * kWarpColumns >= in) packed_row_ = kOutside;

    // A thread brings the absmax of a row for 2 warps, whose 64 columns share it unless blocks are shorter. 64 rows of
    // a multiple of 64 columns are whole blocks of any size.
    absmax_row_ = threadIdx.x % kGradientDepth;
    const int first_warp = threadIdx.x / kGradientDepth * 2;
    block_ = static_cast<uint32_t>((absmax_row_ * in + tile.column + first_warp * kWarpColumns) >> block_size_log2);
    block_step_ = static_cast<uint32_t>((kGradientDepth * in) >> block_size_log2);
    absmax_target_ =
        Shared::kAbsmax + first_warp * kAbsmaxWarp + absmax_row_ / 16 * kAbsmaxMember + absmax_row_ % 16 * 4;
    if (tile.column + first_warp * kWarpColumns >= in) absmax_row_ = kOutside;
    fetch_absmax();
  }

  // The weights of the first step.
  __device__ __forceinline__ void load_first(uint32_t stage) {
    load_packed(stage);
    load_absmax(stage);
    copy_async_commit();
  }

  // To `stage` q of the next step and the weights of the step after it.
  __device__ __forceinline__ void load(uint32_t stage) {
    const bool inside = q_column_ < left_ + kGradientDepth;
#pragma unroll
    for (int i = 0; i < kRowCount; ++i) {
      copy_async(stage + q_target_ + i * kRowStep * kQRow, q_ + i * q_step_, inside && i * kRowStep < q_rows_ ? 16 : 0);
    }
    q_ += kQRow;
    load_packed(stage);
    load_absmax(stage);
    copy_async_commit();
  }

 private:
  static constexpr int kOutside = 0x7fffffff - kGradientDepth;  // a row after the last one

  __device__ __forceinline__ void load_packed(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < kPackedCount; ++i) {
      copy_async(stage + packed_target_ + i * (kPackedStep / 16) * kPackedChunk, packed_,
                 packed_row_ + i * kPackedStep < left_ ? 16 : 0);
      packed_ += packed_step_;
    }
  }

  __device__ __forceinline__ void load_absmax(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < 2; ++i) store_shared_float(stage + absmax_target_ + i * kAbsmaxWarp, absmax_[i]);
    left_ -= kGradientDepth;
    block_ += block_step_;
    fetch_absmax();
  }

  // A step before it is stored, so that nothing waits for it.
  __device__ __forceinline__ void fetch_absmax() {
    absmax_[0] = absmax_[1] = 0.0f;
    if (absmax_row_ >= left_) return;
    absmax_[0] = absmax_of(weight_, block_);
    absmax_[1] = two_blocks_ ? absmax_of(weight_, block_ + 1) : absmax_[0];
  }

  const Nf4Matrix& weight_;
  const bool two_blocks_;
  int left_;  // rows of W from the next weights on
  const uint8_t *q_, *packed_;
  int64_t q_step_, packed_step_;
  uint32_t block_, block_step_;
  int q_rows_, q_column_, packed_row_, absmax_row_;
  uint32_t q_target_, packed_target_, absmax_target_;
  float absmax_[2];
};

// sum += mask * (dh F). Straight from global memory: F is read once per block, dh once per warp and from L1 but once.
template <int kRows>
__device__ __forceinline__ void add_low_rank(const Nf4Gradient& args, const GradientTile& tile, int warp_column,
                                             GradientSums<kRows>& sum) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const int64_t column = tile.column + warp_column + 4 * group;
  const bool dh_aligned = quads_aligned<float>(args.dh, args.rank * sizeof(float));
#pragma unroll 1
  for (int64_t rank = 4 * member; rank - 4 * member < args.rank; rank += kLowRankDepth) {
    float f[4][kQuad];  // [rank][column]
    device_dispatch(args.factor.dtype, [&](auto tag) {
      using F = decltype(tag);
      const bool aligned = quads_aligned<F>(args.factor.data, args.weight.in * sizeof(F));
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        load_quad(static_cast<const F*>(args.factor.data) + (rank + r) * args.weight.in + column,
                  rank + r < args.rank ? args.weight.in - column : 0, aligned, f[r]);
      }
    });
    uint32_t high[4][2], low[4][2];  // [column][pair of ranks]
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) split_pair(f[2 * pair][c], f[2 * pair + 1][c], high[c][pair], low[c][pair]);
    }
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int64_t row = tile.row + 8 * i + group;
      float v[kQuad];
      load_quad(args.dh + row * args.rank + rank, row < args.rows ? args.rank - rank : 0, dh_aligned, v);
      const SplitQuad dh(v);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const auto add = [&](const uint32_t (&a)[4][2], const uint32_t (&b)[2]) {
          multiply_add<bf16_t>(sum[i][j], a[2 * j][0], a[2 * j + 1][0], a[2 * j][1], a[2 * j + 1][1], b[0], b[1]);
        };
        add(low, dh.high);
        add(high, dh.low);
        add(high, dh.high);
      }
    }
  }
  if (args.dropout.threshold == 0) return;

  // A lane's 4 columns are half of a chunk of the mask, the other half is its neighbour's in `group`: of their two rows
  // each makes one call, and they exchange the bits.
  const uint64_t seed = load_seed(args.dropout);
  const int half = group % 2;
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    const int64_t row = tile.row + 8 * i + 2 * member + half;
    const uint32_t mine = keep_bits(seed, row, static_cast<uint32_t>(column / kDropoutChunk), args.dropout.threshold);
    const uint32_t other = __shfl_xor_sync(0xffffffff, mine, 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t keep = (h == half ? mine : other) >> (4 * half);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& v = sum[i][c / 2][c % 2 * 2 + h];
        v = keep >> c & 1 ? v * args.dropout.scale : 0.0f;
      }
    }
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kGradientThreads, GradientShared<kRows>::kBlocks)
    nf4_gradient_kernel(Nf4Gradient args, int block_size_log2) {
  using Shared = GradientShared<kRows>;
  constexpr int kStages = Shared::kStages, kTiles = kRows / 8;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t table = shared_address(shared), table_lane = byte_table_lane();
  const uint32_t first_stage = table + kByteTableBytes, last_stage = first_stage + (kStages - 1) * Shared::kStageBytes;

  const GradientTile tile(args, kRows);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;

  GradientLoader<kRows> loader(args, block_size_log2, tile);
  loader.load_first(last_stage);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) loader.load(first_stage + s * Shared::kStageBytes);
  fill_byte_table(shared, threadIdx.x, kGradientThreads);

  GradientSums<kRows> sum = {};
  if (args.rank) add_low_rank<kRows>(args, tile, warp * kWarpColumns, sum);

  // What is stored of half a step, and the weights of both halves: [half][step of 16][column][pair of rows].
  uint32_t packed[2][2];
  float absmax[2][4];
  uint32_t weights[2][2][4][2];
  const uint32_t packed_source = Shared::kPacked + (warp * 4 + member) * kPackedChunk + 2 * group;
  const uint32_t absmax_source = Shared::kAbsmax + warp * kAbsmaxWarp + member * kAbsmaxMember;
  const uint32_t q_source = group * kQRow + (2 * member ^ (group & 1)) * 16;
  const auto read_weights = [&](uint32_t stage, int half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int step = 2 * half + i;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t source = stage + packed_source + (4 * step + 2 * pair) * 4 * kPackedRows;
        packed[i][pair] = load_shared_pair(source, source + 4 * kPackedRows);
      }
      const float4 v = load_shared_float4(stage + absmax_source + 16 * step);
      absmax[i][0] = v.x, absmax[i][1] = v.y, absmax[i][2] = v.z, absmax[i][3] = v.w;
    }
  };
  // 2 rows x 2 columns: bytes 0 and 1 of the word are of the first row.
  const auto dequantize = [&](int half, int part) {
    const int i = part / 4, pair = part / 2 % 2, c = part % 2;
    const float first = absmax[i][2 * pair], second = absmax[i][2 * pair + 1];
    const float2 a = look_up(table, table_lane, packed[i][pair], c);
    const float2 b = look_up(table, table_lane, packed[i][pair], c + 2);
    weights[half][i][2 * c][pair] = pack_pair<T>(__fmul_rn(a.x, first), __fmul_rn(b.x, second));
    weights[half][i][2 * c + 1][pair] = pack_pair<T>(__fmul_rn(a.y, first), __fmul_rn(b.y, second));
  };
  // Multiplies half a step. In between it dequantizes the next half, and asks for what takes the free stage.
  const auto multiply = [&](uint32_t stage, int half, uint32_t free_stage) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 q = load_shared_uint4(stage + (q_source ^ (half * 16)) + i * 8 * kQRow);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t (&w)[2][4][2] = weights[half];
        multiply_add<T>(sum[i][j], w[0][2 * j][0], w[0][2 * j + 1][0], w[0][2 * j][1], w[0][2 * j + 1][1], q.x, q.y);
        multiply_add<T>(sum[i][j], w[1][2 * j][0], w[1][2 * j + 1][0], w[1][2 * j][1], w[1][2 * j + 1][1], q.z, q.w);
      }
#pragma unroll
      for (int part = i * 8 / kTiles; part < (i + 1) * 8 / kTiles; ++part) dequantize(1 - half, part);
      if (half == 0 && i == kTiles / 2) loader.load(free_stage);
    }
  };

  copy_async_wait<kStages - 1>();
  __syncthreads();
  read_weights(last_stage, 0);
#pragma unroll
  for (int part = 0; part < 8; ++part) dequantize(0, part);
  read_weights(last_stage, 1);

  uint32_t stage = first_stage, free_stage = last_stage;
#pragma unroll 1
  for (int k = 0; k < static_cast<int>(args.weight.out); k += kGradientDepth) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the stage has arrived from all threads, and none reads the free one any more
    multiply(stage, 0, free_stage);
    read_weights(stage, 0);
    multiply(stage, 1, free_stage);
    read_weights(stage, 1);
    free_stage = stage;
    stage = stage == last_stage ? first_stage : stage + Shared::kStageBytes;
  }
  copy_async_wait<0>();

  const int64_t in = args.weight.in, column = tile.column + warp * kWarpColumns + 4 * group;
  const bool dx_aligned = quads_aligned<T>(args.dx, in * sizeof(T));
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = tile.row + 8 * i + 2 * member + h;
      if (row >= args.rows) continue;
      const float v[kQuad] = {sum[i][0][h], sum[i][0][2 + h], sum[i][1][h], sum[i][1][2 + h]};
      store_quad(static_cast<T*>(args.dx) + row * in + column, in - column, dx_aligned, v);
    }
  }
}

// Rows of dx in a tile: as many as leave a tile for every multiprocessor of the largest GPUs. The sums are the same.
static int64_t gradient_tile_rows(const Nf4Gradient& args) {
  constexpr int64_t kBlocks = 128;
  const int64_t column_tiles = ceil_div(args.weight.in, kGradientColumns);
  for (int64_t rows = 128; rows > 32; rows /= 2) {
    if (args.rows > rows / 2 && ceil_div(args.rows, rows) * column_tiles >= kBlocks) return rows;
  }
  return 32;
}

template <class T, int kRows>
static cudaError_t launch_tiles(const Nf4Gradient& args, int block_size_log2, cudaStream_t stream) {
  const auto kernel = nf4_gradient_kernel<T, kRows>;
  constexpr int kBytes = GradientShared<kRows>::kBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = ceil_div(args.rows, kRows) * ceil_div(args.weight.in, kGradientColumns);
  kernel<<<static_cast<unsigned>(tiles), kGradientThreads, kBytes, stream>>>(args, block_size_log2);
  return cudaGetLastError();
}

template <class T>
static cudaError_t launch_rows(const Nf4Gradient& args, int block_size_log2, cudaStream_t stream) {
  switch (gradient_tile_rows(args)) {
    case 32: return launch_tiles<T, 32>(args, block_size_log2, stream);
    case 64: return launch_tiles<T, 64>(args, block_size_log2, stream);
    default: return launch_tiles<T, 128>(args, block_size_log2, stream);
  }
}

cudaError_t launch_nf4_gradient(const Nf4Gradient& args, cudaStream_t stream) {
  const Nf4Matrix& w = args.weight;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  constexpr int64_t kMost = (int64_t{1} << 31) - 256;  // rows are counted in 32 bits, and so are blocks
  if (args.q_dtype == DType::f32 || w.in % 64 || w.out % kChunk || w.out > kMost ||
      w.out * w.in / kMinBlockSize > kMost || !valid_block_size(w.block_size) || !aligned(args.q) ||
      !aligned(w.packed)) {
    return cudaErrorInvalidValue;
  }
  if (args.rows == 0 || w.in == 0) return cudaSuccess;
  int block_size_log2 = 0;
  while (int64_t{1} << block_size_log2 < w.block_size) ++block_size_log2;
  return args.q_dtype == DType::bf16 ? launch_rows<bf16_t>(args, block_size_log2, stream)
                                     : launch_rows<f16_t>(args, block_size_log2, stream);
}

}  // namespace peftkern
