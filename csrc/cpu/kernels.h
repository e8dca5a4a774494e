// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of one instruction set: raw pointers, one thread, a range of the work. cpu/<op>.cpp splits the work
// over threads and calls kernels().f(...). Torch-free.
#pragma once
#include "../low_rank.h"
#include "../nf4.h"

namespace peftkern::cpu {

// Work is handed out in these units, on every ISA, so that no result depends on the split.
constexpr int64_t kRowUnit = 8;  // rows of low_rank_down and low_rank_up
constexpr int64_t kColumnUnit =
    128;                           // columns of low_rank_grad and column_sums: 16 chunks of 8, as keep_bytes makes them
constexpr int64_t kRowBlock = 64;  // rows whose rank sums low_rank_down holds in scratch

// Outputs from this size on are written past the caches: without the read for ownership 40 instead of 72 bytes move for
// 16 weights, and a product that follows streams them from memory anyway.
constexpr int64_t kStreamBytes = 16 << 20;

// A product made of tiles: x is packed first, then columns of y in whole units, each unit by one thread.
struct Nf4Tiles {
  size_t (*packed_bytes)(const Nf4Product&);
  size_t (*scratch_bytes)(const Nf4Product&);                                     // of a thread
  void (*pack)(const Nf4Product&, void* packed_x, int64_t tile0, int64_t tile1);  // tiles of kTileUnit rows of x
  void (*columns)(const Nf4Product&, const void* packed_x, void* scratch, int64_t column0, int64_t column1);
};

constexpr int64_t kTileUnit = 16;        // rows of a packed tile
constexpr int64_t kTileColumnUnit = 32;  // columns of y

struct KernelTable {
  const char* name;

  // The factor as the kernel wants it, in fp32 unless the ISA has something better:
  // down: [columns, padded_rank], zero padded;  up: [rank, padded_columns], zero padded.
  int64_t (*padded_rank)(int64_t rank);
  void (*pack_down)(const LowRankDown&, float* packed, int64_t column0, int64_t column1);  // column0 even
  void (*pack_up)(const LowRankUp&, float* packed, int64_t padded_columns, int64_t column0, int64_t column1);

  // scratch: [kRowBlock, padded_rank]
  void (*low_rank_down)(const LowRankDown&, const float* packed, float* scratch, int64_t row0, int64_t row1);
  void (*low_rank_up)(const LowRankUp&, const float* packed, int64_t padded_columns, int64_t row0, int64_t row1);
  // scratch: [rank rounded up to kRowUnit, kColumnUnit]
  void (*low_rank_grad)(const LowRankGrad&, float* scratch, int64_t column0, int64_t column1);
  void (*column_sums)(const ColumnSums&, int64_t column0, int64_t column1);

  void (*quantize_nf4)(const QuantizeNf4&, int64_t block0, int64_t block1);
  void (*dequantize_nf4)(const DequantizeNf4&, int64_t block0, int64_t block1);

  // x as nf4_few_rows wants it: fp32 [rows rounded up to 8, in], zero rows at the end; in each run of 2 * (lanes of the
  // ISA) columns the even ones come first, as a packed byte holds an even and an odd one.
  void (*pack_few_rows)(const Nf4Product&, float* packed_x);
  void (*nf4_few_rows)(const Nf4Product&, const float* packed_x, int64_t column0,
                       int64_t column1);  // in % block_size == 0

  // y = x W^T and y = x W for any number of rows of bf16; in % 32 == 0. Null where the ISA has no fast way.
  const Nf4Tiles* nf4_forward;
  const Nf4Tiles* nf4_gradient;
};

const KernelTable& kernels();  // of the chosen ISA (dispatch.cpp)

}  // namespace peftkern::cpu
