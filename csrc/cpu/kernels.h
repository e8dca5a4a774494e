// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of one instruction set: raw pointers, one thread, a range of the work. cpu/<op>.cpp splits the work
// over threads and calls kernels().f(...). Torch-free.
#pragma once
#include "../dora_norm.h"
#include "../jacobi_svd.h"
#include "../low_rank.h"
#include "../multi_low_rank.h"
#include "../nf4.h"
#include "../rank_allocation.h"
#include "few_rows.h"

namespace peftkern::cpu {

// Work is handed out in these units, on every ISA, so that no result depends on the split.
constexpr int64_t kRowUnit = 8;       // rows of low_rank_down and low_rank_up
constexpr int64_t kColumnUnit = 128;  // columns of low_rank_grad and column_sums: 16 chunks, as keep_bytes makes them
constexpr int64_t kRowBlock = 64;     // rows whose rank sums low_rank_down holds in scratch
constexpr int64_t kRowChunk = 128;    // entries of a call of multi_lora_down: a factor is packed once for them
constexpr int64_t kPanelDepth = 256;  // columns of a factor that multi_lora_down packs at a time
constexpr int64_t kColumnSpan = 512;  // columns of a call of multi_lora_up
constexpr int64_t kMaxLanes = 16;     // of any instruction set
constexpr int64_t kFewRows = 8;       // rows of a register tile of few_rows, which takes any number

constexpr int64_t kDoubleUnit = 8;  // fp64 elements to which jacobi_svd pads a column, with zeros

// Outputs from this size on are written past the caches: without the read for ownership 40 instead of 72 bytes move for
// 16 weights, and a product that follows streams them from memory anyway.
constexpr int64_t kStreamBytes = 16 << 20;

// A product made of tiles: x is packed first, in panels of rows, then columns of y in whole units, each unit by one
// thread.
struct Nf4Tiles {
  int64_t (*from_rows)(int64_t in);  // how many the product y = x W^T has where this beats nf4_few_rows
  int64_t (*panels)(const Nf4Product&);
  size_t (*packed_bytes)(const Nf4Product&);
  size_t (*scratch_bytes)(const Nf4Product&);  // of a thread
  void (*pack)(const Nf4Product&, void* packed_x, int64_t panel0, int64_t panel1);
  void (*columns)(const Nf4Product&, const void* packed_x, void* scratch, int64_t column0, int64_t column1);
};

constexpr int64_t kTileColumnUnit = 32;  // columns of y

struct KernelTable {
  const char* name;

  // The factor as the kernel wants it, in fp32 unless the ISA has something better:
  // down: [columns, padded_rank];  up: [rank, padded_columns]. Zero padded; both with room for kMaxLanes rows at a
  // time.
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
  // ISA) columns the even ones come first, as a packed byte holds an even and an odd one. Or, in no more bytes, as
  // nf4_few_rows_bf16.inl says. Aligned to 64 bytes. in % block_size == 0
  void (*pack_few_rows)(const Nf4Product&, float* packed_x);
  void (*nf4_few_rows)(const Nf4Product&, const float* packed_x, int64_t column0, int64_t column1);

  // widened: [rows, in rounded up to kMaxLanes], x in fp32, if widens_few_rows says so
  bool (*widens_few_rows)(const FewRows&);
  void (*widen_few_rows)(const FewRows&, float* widened);
  void (*few_rows)(const FewRows&, const float* widened, int64_t column0, int64_t column1);

  // One adapter, `rank` of whose ranks count, and entries of its own. scratch: [kRowChunk + kPanelDepth, padded_rank]
  void (*multi_lora_down)(const MultiLoraDown&, int64_t adapter, int64_t rank, int64_t entry0, int64_t entry1,
                          float* scratch);
  // scratch: [padded_rank, kColumnSpan]
  void (*multi_lora_up)(const MultiLoraUp&, int64_t adapter, int64_t rank, int64_t entry0, int64_t entry1,
                        int64_t column0, int64_t column1, float* scratch);
  // scratch: as for low_rank_grad
  void (*multi_lora_grad)(const MultiLoraGrad&, int64_t adapter, int64_t rank, int64_t column0, int64_t column1,
                          float* scratch);

  void (*squared_row_norms)(const SquaredRowNorms&, int64_t row0, int64_t row1);
  void (*dora_norm)(const DoraNorm&, int64_t row0, int64_t row1);

  // scratch: [rank, kMaxLanes + 1] of the layer with the largest rank
  void (*update_importance)(const ImportanceUpdate&, float* scratch, int64_t layer0, int64_t layer1);

  // scratch: [n + 1, n rounded up to kDoubleUnit]
  void (*jacobi_svd)(const JacobiSvd&, double* scratch, int64_t matrix0, int64_t matrix1);

  // y = x W^T and y = x W for any number of rows of each dtype; in % 32 == 0. Null where the ISA has no fast way.
  const Nf4Tiles* nf4_forward[kDTypes];
  const Nf4Tiles* nf4_gradient[kDTypes];
};

const KernelTable& kernels();  // of the chosen ISA (dispatch.cpp)

}  // namespace peftkern::cpu
