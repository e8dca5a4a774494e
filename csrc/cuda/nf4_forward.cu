// SPDX-License-Identifier: Apache-2.0
// Nf4Forward of nf4_product.h:  y = out_scale * (x W^T + alpha * u F^T) + bias;  z receives y before the scale
//
// As y^T = W x^T: W is the 16-row operand of the tensor cores and rows of x the 8 columns, so that one row of x costs
// an eighth of what it would as the 16-row operand, and no registers have to be moved between dequantizing and
// multiplying. A thread block makes kRows rows x 128 columns of y; each of its 4 warps makes all rows of 32 columns, so
// that a weight is dequantized once per block. It walks along `in` in steps of 64:
//
//     global memory               shared memory, kStages stages    registers of a lane (group, member)
//     x[rows, 64]      cp.async   x[rows][8 chunks of 8]           k 16 member + 0..15 of the rows group + 8 i
//     packed[128, 32]  cp.async   packed[128][32 bytes]            the same 16 k of 4 rows of W
//     absmax           registers  absmax[2 halves][128]            of these 4 rows
//
// k is permuted, in both operands alike: slots {2 member, + 1 | + 8, + 9} of the step s of 16 are the physical
// k = 16 member + 4 s + {0, 1 | 2, 3}. So a lane's weights are 8 consecutive bytes of the packed row, its x two 16-byte
// chunks, and bitsandbytes' layout is read as it is. Columns are permuted too: rows {group, group + 8} of the operand i
// are the columns 4 group + 2 i + {0, 1} of y, which a lane then stores 4 at a time.
//
// Weights travel one step ahead of x, and are dequantized a part of a step ahead of their use, between the
// multiply-adds of the part before: table reads and multiplications that would otherwise stop the tensor cores. A part
// is half a step, and for few rows, with 4 multiply-adds in a quarter of a step, that quarter: so they lie apart.
//
// The low-rank part comes before the loop, while the first stages arrive. In the tiles for a few rows it comes after
// it, and only there they wait for the launch before, which makes u: on sm_90 the two run at the same time. u and F
// enter the bf16 tensor cores as the sums high + low of two bf16 values, of which the product low * low is left out:
// relative error of a term below 3 * 2^-18.
//
// Few tiles and a long `in`: `splits` neighbouring blocks share the sum of a tile (parts.cuh). Without clusters a
// second kernel adds their parts. The other way, the last block to arrive adds them, needs a counter that something has
// set to zero before: that is a launch as well, and fences and atomics.
#include "grid_dependency.cuh"
#include "kernels.h"
#include "nf4_table.cuh"
#include "parts.cuh"

namespace peftkern {

constexpr int kForwardThreads = 128, kForwardColumns = 128;
constexpr int kForwardDepth = 64;     // of a step, along `in`
constexpr int kWarpColumns = 32;      // of y: rows of W
constexpr int kPackedRow = 32;        // bytes of a row of W in a stage
constexpr int kXRow = 128;            // bytes of a row of x in a stage
constexpr int kXChunks = kXRow / 16;  // of 8 values
constexpr int kLowRankDepth = 16;     // ranks of a step of the low-rank part
constexpr int64_t kMaxSplits = 1 << 12;
constexpr int64_t kMaxIn = 1 << 23;  // so that offsets within a tile fit 32 bits
static_assert(kForwardColumns == kForwardThreads, "a thread brings the absmax of one row of W");

// Rows of y in a tile: the fewest of 8, 16, 32, 64, 128 that hold all, so that W is read once for up to 128 rows.
static int64_t forward_tile_rows(int64_t rows) {
  int64_t tile = 8;
  while (tile < rows && tile < 128) tile *= 2;
  return tile;
}

// The shared memory of a block: the table of nf4_table.cuh, then the stages.
template <int kRows>
struct ForwardShared {
  static constexpr int kStages = kRows >= 64 ? 3 : kRows == 32 ? 4 : 6;  // few rows: bound by memory, so many in flight
  // The offset of the second half's absmax puts it into other banks than the first half's, for the lanes that want
  // both.
  static constexpr int kAbsmaxHalf = kForwardColumns * static_cast<int>(sizeof(float)) + 64;
  static constexpr int kPacked = kRows * kXRow, kAbsmax = kPacked + kForwardColumns * kPackedRow;  // offsets in a stage
  static constexpr int kStageBytes = kAbsmax + 2 * kAbsmaxHalf;
  static constexpr int kBytes = kByteTableBytes + kStages * kStageBytes;
  static_assert(kBytes <= 99 * 1024, "what a block of sm_86, sm_89 and sm_120 may have");
  static_assert(kBytes >= kRows * kForwardColumns * static_cast<int>(sizeof(float)), "the sums of a tile have room");

  // Blocks of a multiprocessor of sm_90, for __launch_bounds__.
  static constexpr int kBlocks = kRows >= 64 ? 2 : 3;
};

// The part of y that a block makes, or of whose sum over `in` it makes a part. In 32 bits, as the grid: 64-bit
// divisions are long, and their results would take registers that the loop needs.
template <int kRows>
struct ForwardTile {
  uint32_t tiles, index, split, row_tile, column_tile;

  // Neighbouring blocks share a sum, then rows of W, which come from memory; x comes from L2.
  __device__ __forceinline__ explicit ForwardTile(const Nf4Forward& args, uint32_t block = block_anew()) {
    const uint32_t row_tiles = static_cast<uint32_t>((args.rows + kRows - 1) / kRows);
    tiles = row_tiles * static_cast<uint32_t>((args.weight.out + kForwardColumns - 1) / kForwardColumns);
    const uint32_t splits = static_cast<uint32_t>(args.splits);
    index = block / splits, split = block % splits;
    row_tile = index % row_tiles, column_tile = index / row_tiles;
  }

  // The first ones.
  __device__ __forceinline__ int64_t row() const { return static_cast<int64_t>(row_tile) * kRows; }
  __device__ __forceinline__ int64_t column() const { return static_cast<int64_t>(column_tile) * kForwardColumns; }
};

// The sums of a lane: [rows 8 i + 2 member + h][columns 4 group + 2 j + c] is sum[i][j][2 c + h].
template <int kRows>
using ForwardSums = float[kRows / 8][2][4];

// Where the 16-byte chunk of a row of x lies in its row of a stage. Conflict-free for the copies, of which 8 lanes
// bring half a row of 2 rows, and for the reads, of which 8 lanes take every other chunk of 2 rows.
__device__ __forceinline__ int x_chunk_slot(int row, int chunk) { return chunk ^ (row & 1) ^ (row & 1) * 4; }

// Where a row of packed weights lies in a stage. A read takes the rows c, 4 + c, 8 + c and 12 + c of 16: each has its
// own banks.
__device__ __forceinline__ int packed_row_slot(int row) { return row ^ (row >> 2 & 3); }

// What a thread brings to every stage. Rows after the last one are copies of it, whose results nobody stores.
template <int kRows>
class ForwardLoader {
  using Shared = ForwardShared<kRows>;
  static constexpr int kRowStep = kForwardThreads / (kXChunks / 2);  // a thread brings 2 chunks of every 32nd row of x
  static constexpr int kRowCount = (kRows + kRowStep - 1) / kRowStep;
  static constexpr int kPackedStep = kForwardThreads / 2;  // and half of every 64th row of W

 public:
  __device__ __forceinline__ ForwardLoader(const Nf4Forward& args, int block_size_log2, const ForwardTile<kRows>& tile,
                                           uint32_t first_step, int steps)
      : absmax_(args.weight, block_size_log2,
                (tile.column() + last(threadIdx.x, args.weight.out - tile.column())) * args.weight.in +
                    first_step * kForwardDepth),
        two_halves_(block_size_log2 < 6) {
    const int64_t in = args.weight.in;
    const int x_row = threadIdx.x / (kXChunks / 2), chunk = threadIdx.x % (kXChunks / 2);
    x_ = static_cast<const uint8_t*>(args.x) + tile.row() * in * 2 + static_cast<int64_t>(first_step) * kXRow;
#pragma unroll
    for (int i = 0; i < kRowCount; ++i) {
      const int row = last(x_row + i * kRowStep, args.rows - tile.row());
      x_offset_[i] = static_cast<uint32_t>(row) * static_cast<uint32_t>(in) * 2 + chunk * 16;
    }
    const int packed_row = threadIdx.x / 2, half = threadIdx.x % 2;
    packed_ = args.weight.packed + tile.column() * (in / 2) + static_cast<int64_t>(first_step) * kPackedRow;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = last(packed_row + i * kPackedStep, args.weight.out - tile.column());
      packed_offset_[i] = static_cast<uint32_t>(row) * static_cast<uint32_t>(in / 2) + half * 16;
    }
    fetch_absmax(steps > 0);
  }

  // The weights of the first step, if there is one.
  __device__ __forceinline__ void load_first_weights(uint32_t stage, int steps) {
    load_weights(stage, thread_anew(), steps > 0);
    copy_async_commit();
    fetch_absmax(steps > 1);
  }

  // To `stage` x of the next step, and the weights of the step after it. left: how many steps there are from that of x
  // on.
  __device__ __forceinline__ void load(uint32_t stage, int left) {
    if (left > 0) {
      const uint32_t thread = thread_anew(), row = thread / (kXChunks / 2), chunk = thread % (kXChunks / 2);
      const uint32_t target = stage + row * kXRow + x_chunk_slot(row, chunk) * 16;
#pragma unroll
      for (int i = 0; i < kRowCount; ++i) {
        if (kRows < kRowStep && threadIdx.x >= kRows * (kXChunks / 2)) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          copy_async((target ^ (half * (kXRow / 2))) + i * kRowStep * kXRow, x_ + x_offset_[i] + half * (kXRow / 2),
                     16);
        }
      }
      x_ += kXRow;
      load_weights(stage, thread, left > 1);
    }
    copy_async_commit();
  }

  // The absmax that the next load() stores: half a step before, so that nothing waits for it. more: there is that step.
  __device__ __forceinline__ void fetch_absmax(bool more) {
    if (!more) return;
    absmax_.get(value_[0], value_[1], kForwardDepth / 2, two_halves_);
    absmax_.advance(kForwardDepth);
  }

 private:
  __device__ __forceinline__ static int last(int row, int64_t rows) {
    return row < rows ? row : static_cast<int>(rows) - 1;
  }

  // After the last step zeros, which are dequantized and not used.
  __device__ __forceinline__ void load_weights(uint32_t stage, uint32_t thread, bool more) {
    const uint32_t row = thread / 2, half = thread % 2;
    const uint32_t packed = stage + Shared::kPacked + packed_row_slot(row) * kPackedRow + half * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      copy_async(packed + i * kPackedStep * kPackedRow, packed_ + packed_offset_[i], more ? 16 : 0);
    }
    packed_ += kPackedRow;
    const uint32_t absmax = stage + Shared::kAbsmax + thread * static_cast<uint32_t>(sizeof(float));
    store_shared_float(absmax, value_[0]);
    if (two_halves_) store_shared_float(absmax + Shared::kAbsmaxHalf, value_[1]);
  }

  AbsmaxRow absmax_;
  const bool two_halves_;       // blocks of 32, so that a step has two of them
  const uint8_t *x_, *packed_;  // the same for all threads; their offsets within a tile are 32-bit
  uint32_t x_offset_[kRowCount], packed_offset_[2];
  float value_[2] = {0.0f, 0.0f};
};

// sum += alpha * u F^T, straight from global memory: a block reads F once, and u once per warp, from L1 but for the
// first.
template <int kRows>
__device__ __forceinline__ void add_low_rank(const Nf4Forward& args, const ForwardTile<kRows>& tile, int warp_column,
                                             ForwardSums<kRows>& sum) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  const int64_t column = tile.column() + warp_column + 4 * group;
  const bool u_aligned = quads_aligned<float>(args.u, args.rank * sizeof(float));
#pragma unroll 1
  for (int64_t rank = 4 * member; rank - 4 * member < args.rank; rank += kLowRankDepth) {
    float f[4][kQuad];
    device_dispatch(args.factor.dtype, [&](auto tag) {
      using F = decltype(tag);
      const bool aligned = quads_aligned<F>(args.factor.data, args.rank * sizeof(F));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        load_quad(static_cast<const F*>(args.factor.data) + (column + c) * args.rank + rank,
                  column + c < args.weight.out ? args.rank - rank : 0, aligned, f[c]);
      }
    });
    const SplitQuad factor[4] = {SplitQuad(f[0]), SplitQuad(f[1]), SplitQuad(f[2]), SplitQuad(f[3])};
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int64_t row = tile.row() + 8 * i + group;
      float v[kQuad];
      load_quad(args.u + row * args.rank + rank, row < args.rows ? args.rank - rank : 0, u_aligned, v);
#pragma unroll
      for (int q = 0; q < kQuad; ++q) v[q] *= args.alpha;
      const SplitQuad u(v);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const SplitQuad &first = factor[2 * j], &second = factor[2 * j + 1];
        const auto add = [&](const uint32_t (&a0)[2], const uint32_t (&a1)[2], const uint32_t (&b)[2]) {
          multiply_add<bf16_t>(sum[i][j], a0[0], a1[0], a0[1], a1[1], b[0], b[1]);
        };
        add(first.high, second.high, u.high);
        add(first.low, second.low, u.high);
        add(first.high, second.high, u.low);
      }
    }
  }
}

// F of a tile on its way to L2, for a low-rank part that comes later.
template <int kRows>
__device__ __forceinline__ void prefetch_factor(const Nf4Forward& args, const ForwardTile<kRows>& tile) {
  constexpr int64_t kLine = 128;
  const int64_t row_bytes = args.rank * (args.factor.dtype == DType::f32 ? 4 : 2);
  const int64_t bytes = min(static_cast<int64_t>(kForwardColumns), args.weight.out - tile.column()) * row_bytes;
  const char* from = static_cast<const char*>(args.factor.data) + tile.column() * row_bytes;
  for (int64_t i = threadIdx.x * kLine; i < bytes; i += kForwardThreads * kLine) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from + i)));
  }
}

// The sums of a thread for the rows 8 i + 2 member + {0, 1}: [columns 4 group + 2 j + c] of row h is v[4 j + 2 c + h].
using RowPair = Sums<8>;

__device__ __forceinline__ RowPair row_pair(const float4& a, const float4& b) {
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
__device__ __forceinline__ RowPair row_pair(const float (&sum)[2][4]) {
  return {{sum[0][0], sum[0][1], sum[0][2], sum[0][3], sum[1][0], sum[1][1], sum[1][2], sum[1][3]}};
}

template <int kRows>
__device__ __forceinline__ bool has_rows(const Nf4Forward& args, const ForwardTile<kRows>& tile, int i,
                                         uint32_t thread) {
  return tile.row() + 8 * i + 2 * (thread % 4) < args.rows;
}

// What is left to do with the sums of a thread: z, out_scale, bias, y.
template <class T, int kRows>
class TileStore {
 public:
  __device__ __forceinline__ TileStore(const Nf4Forward& args, const ForwardTile<kRows>& tile, uint32_t thread)
      : args_(args),
        column_(tile.column() + thread / 32 * kWarpColumns + 4 * (thread % 32 / 4)),
        row_(tile.row() + 2 * (thread % 4)),
        y_aligned_(args.y_dtype == DType::f32 ? quads_aligned<float>(args.y, args.weight.out * sizeof(float))
                                              : quads_aligned<T>(args.y, args.weight.out * sizeof(T))),
        z_aligned_(quads_aligned<T>(args.z, args.weight.out * sizeof(T))) {
    if (args.out_scale)
      load_quad(args.out_scale + column_, valid(), quads_aligned<float>(args.out_scale, 0), out_scale_);
    if (args.bias) load_quad(args.bias + column_, valid(), quads_aligned<float>(args.bias, 0), bias_);
  }

  __device__ __forceinline__ void store(int i, const RowPair& sum) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = row_ + 8 * i + h, index = row * args_.weight.out + column_;
      if (row >= args_.rows) continue;
      float v[kQuad] = {sum.v[h], sum.v[2 + h], sum.v[4 + h], sum.v[6 + h]};
      if (args_.z) store_quad(static_cast<T*>(args_.z) + index, valid(), z_aligned_, v);
#pragma unroll
      for (int q = 0; q < kQuad; ++q) {
        // Two roundings whatever the compiler flags, as in low_rank_up.
        if (args_.out_scale) v[q] = __fmul_rn(v[q], out_scale_[q]);
        if (args_.bias) v[q] = __fadd_rn(v[q], bias_[q]);
      }
      if (args_.y_dtype == DType::f32) {
        store_quad(static_cast<float*>(args_.y) + index, valid(), y_aligned_, v);
      } else {
        store_quad(static_cast<T*>(args_.y) + index, valid(), y_aligned_, v);
      }
    }
  }

 private:
  __device__ __forceinline__ int64_t valid() const { return args_.weight.out - column_; }

  const Nf4Forward& args_;
  const int64_t column_, row_;
  const bool y_aligned_, z_aligned_;
  float out_scale_[kQuad], bias_[kQuad];
};

// The members that have rows, each two of every 8: with up to 8 rows in all the last ones may have none.
__host__ __device__ constexpr int64_t part_members(int64_t tile_rows, int64_t rows) {
  return tile_rows == 8 ? (rows + 1) / 2 : 4;
}

// The row pairs of the threads of a tile, in the workspace: [part][tile][i][j][member][warp][group] of 4 floats.
template <int kRows>
class PartsOfTile {
 public:
  __device__ __forceinline__ PartsOfTile(const Nf4Forward& args, const ForwardTile<kRows>& tile, uint32_t thread)
      : stride_(static_cast<uint32_t>(part_members(kRows, args.rows)) * (kForwardThreads / 4)),
        tiles_(tile.tiles),
        first_(reinterpret_cast<float4*>(args.workspace) + static_cast<int64_t>(tile.index) * (kRows / 4) * stride_ +
               thread % 4 * (kForwardThreads / 4) + thread / 4) {}

  __device__ __forceinline__ RowPair load(int part, int i) const {
    const float4* from = at(part, i);
    return row_pair(from[0], from[stride_]);
  }
  __device__ __forceinline__ void store(int part, int i, const RowPair& sum) const {
    float4* to = at(part, i);
    to[0] = make_float4(sum.v[0], sum.v[1], sum.v[2], sum.v[3]);
    to[stride_] = make_float4(sum.v[4], sum.v[5], sum.v[6], sum.v[7]);
  }

 private:
  __device__ __forceinline__ float4* at(int part, int i) const {
    return first_ + (static_cast<int64_t>(part) * tiles_ * (kRows / 4) + 2 * i) * stride_;
  }

  uint32_t stride_, tiles_;
  float4* first_;
};

// A cluster's parts of the sums of a tile, added up: each block takes some of the row pairs.
template <class T, int kRows>
__device__ __forceinline__ void add_in_cluster(const Nf4Forward& args, const ForwardTile<kRows>& tile, float4* own,
                                               const ForwardSums<kRows>& sum) {
  __syncthreads();  // the table and the stages, which were there, are used up
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    const float (&v)[4] = sum[i / 2][i % 2];
    own[i * kForwardThreads + threadIdx.x] = make_float4(v[0], v[1], v[2], v[3]);
  }
  cluster_sync();
  const PartMade made(tile.split, args.splits);
  const ClusterShare share(kRows / 8 * kForwardThreads);
  for (unsigned pair = share.first + threadIdx.x; pair < share.last; pair += kForwardThreads) {
    const unsigned i = pair / kForwardThreads, thread = pair % kForwardThreads;
    if (!has_rows(args, tile, i, thread)) continue;
    const float4 *first = own + 2 * i * kForwardThreads + thread, *second = first + kForwardThreads;
    const TileStore<T, kRows> to(args, tile, thread);  // before the sums: what it loads takes time
    const RowPair total = sum_of_cluster([&](const auto& block) { return row_pair(block(*first), block(*second)); });
    if (made.is_all()) {
      to.store(i, total);
    } else {
      PartsOfTile<kRows>(args, tile, thread).store(static_cast<int>(made.index), i, total);
    }
  }
  cluster_sync();  // all have read
}

template <class T, int kRows>
__global__ void __launch_bounds__(kForwardThreads, ForwardShared<kRows>::kBlocks)
    nf4_forward_kernel(Nf4Forward args, int block_size_log2) {
  using Shared = ForwardShared<kRows>;
  constexpr int kStages = Shared::kStages, kTiles = kRows / 8;
  constexpr int kParts = kRows <= 16 ? 4 : 2;  // of a step, each multiplied while the next one is dequantized
  constexpr int kPairs = 8 / kParts;           // of weights, of a row of W and a lane, in a part
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t table = shared_address(shared), table_lane = byte_table_lane();
  const uint32_t first_stage = table + kByteTableBytes, last_stage = first_stage + (kStages - 1) * Shared::kStageBytes;

  const ForwardTile<kRows> tile(args);
  const uint32_t all_steps = static_cast<uint32_t>(args.weight.in / kForwardDepth);
  const uint32_t splits = static_cast<uint32_t>(args.splits);
  const uint32_t first_step = all_steps * tile.split / splits;
  const int steps = static_cast<int>(all_steps * (tile.split + 1) / splits - first_step);
  const int warp_column = threadIdx.x / 32 * kWarpColumns;
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;

  ForwardLoader<kRows> loader(args, block_size_log2, tile, first_step, steps);
  loader.load_first_weights(last_stage, steps);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    loader.load(first_stage + s * Shared::kStageBytes, steps - s);
    loader.fetch_absmax(steps > s + 2);
  }
  fill_byte_table(shared, threadIdx.x, kForwardThreads);

  ForwardSums<kRows> sum = {};
  constexpr bool kLowRankLast = kRows <= 16;
  if constexpr (kLowRankLast) {
    if (tile.split == 0) prefetch_factor<kRows>(args, tile);
  } else {
    wait_for_launch_before();
    if (tile.split == 0) add_low_rank<kRows>(args, tile, warp_column, sum);
  }

  // The packed weights and absmax of 4 rows for a step, and the weights of two parts of it.
  uint2 packed[4];
  float absmax[4];
  uint32_t weights[2][4][kPairs];
  const int row = warp_column + 4 * group;
  const uint32_t packed_source = Shared::kPacked + packed_row_slot(row) * kPackedRow + 8 * member;
  const uint32_t absmax_source = Shared::kAbsmax + row * static_cast<uint32_t>(sizeof(float)) +
                                 (block_size_log2 < 6 ? member / 2 * Shared::kAbsmaxHalf : 0);
  const uint32_t x_source = group * kXRow + x_chunk_slot(group, 2 * member) * 16;
  const auto read_weights = [&](uint32_t stage) {
#pragma unroll
    for (int c = 0; c < 4; ++c) packed[c] = load_shared_uint2(stage + (packed_source ^ (c * kPackedRow)));
    const float4 v = load_shared_float4(stage + absmax_source);
    absmax[0] = v.x, absmax[1] = v.y, absmax[2] = v.z, absmax[3] = v.w;
  };
  const auto dequantize = [&](int part, int pair) {
    const int c = pair / kPairs, byte = part * kPairs + pair % kPairs;
    weights[part % 2][c][pair % kPairs] =
        dequantize_pair<T>(table, table_lane, byte < 4 ? packed[c].x : packed[c].y, byte % 4, absmax[c]);
  };
  // Multiplies a part of a step, and dequantizes the next one in between.
  const auto multiply = [&](uint32_t stage, int part) {
    const uint32_t (&w)[4][kPairs] = weights[part % 2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint4 x = load_shared_uint4(stage + (x_source ^ (part * kPairs / 4 * 16)) + i * 8 * kXRow);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int k = 0; k < kPairs; k += 2) {
          const bool second = (part * kPairs + k) % 4 != 0;
          multiply_add<T>(sum[i][j], w[2 * j][k], w[2 * j + 1][k], w[2 * j][k + 1], w[2 * j + 1][k + 1],
                          second ? x.z : x.x, second ? x.w : x.y);
        }
      }
      constexpr int kPairsPerTile = 4 * kPairs / kTiles;
#pragma unroll
      for (int pair = 0; pair < kPairsPerTile; ++pair) dequantize((part + 1) % kParts, i * kPairsPerTile + pair);
    }
  };

  copy_async_wait<kStages - 1>();
  __syncthreads();
  read_weights(last_stage);
#pragma unroll
  for (int pair = 0; pair < 4 * kPairs; ++pair) dequantize(0, pair);

  uint32_t stage = first_stage, free_stage = last_stage;
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // the stage has arrived from all threads, and none reads the free one any more
    loader.load(free_stage, left - (kStages - 1));
    free_stage = stage;
#pragma unroll
    for (int part = 0; part < kParts - 1; ++part) multiply(stage, part);
    loader.fetch_absmax(left > kStages + 1);
    read_weights(stage);
    multiply(stage, kParts - 1);
    stage = stage == last_stage ? first_stage : stage + Shared::kStageBytes;
  }

  const ForwardTile<kRows> same_tile(args);
  if constexpr (kLowRankLast) {
    wait_for_launch_before();
    if (same_tile.split == 0) add_low_rank<kRows>(args, same_tile, warp_column, sum);
  }
  const uint32_t thread = thread_anew();
  if (args.splits == 1) {
    const TileStore<T, kRows> to(args, same_tile, thread);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) to.store(i, row_pair(sum[i]));
  } else if (cluster_blocks() > 1) {
    add_in_cluster<T, kRows>(args, same_tile, reinterpret_cast<float4*>(shared), sum);
  } else {
    const PartsOfTile<kRows> to(args, same_tile, thread);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (has_rows(args, same_tile, i, thread)) to.store(same_tile.split, i, row_pair(sum[i]));
    }
  }
}

// The sum of the parts that are left. A block takes the row pairs i of a tile.
template <class T, int kRows>
__global__ void __launch_bounds__(kForwardThreads) nf4_forward_add_kernel(Nf4Forward args, PartsLeft left) {
  const ForwardTile<kRows> tile(args, blockIdx.x / (kRows / 8) * static_cast<uint32_t>(args.splits));
  const int i = blockIdx.x % (kRows / 8);
  if (!has_rows(args, tile, i, threadIdx.x)) return;
  const PartsOfTile<kRows> from(args, tile, threadIdx.x);
  const RowPair total = sum_of_parts<8>(left, [&](int part) { return from.load(part, i); });
  TileStore<T, kRows>(args, tile, threadIdx.x).store(i, total);
}

template <class T, int kRows>
static cudaError_t launch_tiles(const Nf4Forward& args, int block_size_log2, cudaStream_t stream) {
  const auto kernel = nf4_forward_kernel<T, kRows>;
  constexpr int kBytes = ForwardShared<kRows>::kBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return cudaGetLastError();
  const int64_t tiles = ceil_div(args.rows, kRows) * ceil_div(args.weight.out, kForwardColumns);
  const Launch launch = {static_cast<unsigned>(tiles * args.splits), kForwardThreads, stream, kBytes, args.overlap};
  PartsLeft left(args.splits);
  const cudaError_t launched = launch_kernel(kernel, launch, left, args, block_size_log2);
  if (launched != cudaSuccess || left.parts == 1) return launched;
  const unsigned blocks = static_cast<unsigned>(tiles * (kRows / 8));
  nf4_forward_add_kernel<T, kRows><<<blocks, kForwardThreads, 0, stream>>>(args, left);
  return cudaGetLastError();
}

template <class T>
static cudaError_t launch_rows(const Nf4Forward& args, int block_size_log2, cudaStream_t stream) {
  switch (forward_tile_rows(args.rows)) {
    case 8: return launch_tiles<T, 8>(args, block_size_log2, stream);
    case 16: return launch_tiles<T, 16>(args, block_size_log2, stream);
    case 32: return launch_tiles<T, 32>(args, block_size_log2, stream);
    case 64: return launch_tiles<T, 64>(args, block_size_log2, stream);
    default: return launch_tiles<T, 128>(args, block_size_log2, stream);
  }
}

cudaError_t launch_nf4_forward(const Nf4Forward& args, cudaStream_t stream) {
  const Nf4Matrix& w = args.weight;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool dtypes = args.x_dtype != DType::f32 && (args.y_dtype == args.x_dtype || args.y_dtype == DType::f32);
  if (!dtypes || w.in % kForwardDepth || w.in > kMaxIn || args.splits > kMaxSplits || !valid_block_size(w.block_size) ||
      args.splits < 1 || !aligned(args.x) || !aligned(w.packed) || (args.splits > 1 && !args.workspace)) {
    return cudaErrorInvalidValue;
  }
  if (args.rows == 0 || w.out == 0) return cudaSuccess;
  int block_size_log2 = 0;
  while (int64_t{1} << block_size_log2 < w.block_size) ++block_size_log2;
  return args.x_dtype == DType::bf16 ? launch_rows<bf16_t>(args, block_size_log2, stream)
                                     : launch_rows<f16_t>(args, block_size_log2, stream);
}

int64_t nf4_forward_splits(int64_t rows, int64_t out, int64_t in, int64_t multiprocessors) {
  const int64_t tiles = ceil_div(rows, forward_tile_rows(rows)) * ceil_div(out, kForwardColumns);
  return part_count(tiles, in, 2 * multiprocessors);
}

int64_t nf4_forward_workspace(const Nf4Forward& args) {
  if (args.splits <= 1) return 0;
  const int64_t tile_rows = forward_tile_rows(args.rows);
  return args.splits * ceil_div(args.rows, tile_rows) * tile_rows * ceil_div(args.weight.out, kForwardColumns) *
         part_members(tile_rows, args.rows) * (kForwardColumns / 4);
}

}  // namespace peftkern
