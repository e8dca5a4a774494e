// SPDX-License-Identifier: Apache-2.0
// AdaLoRA's rank allocation (Zhang et al. 2023, arXiv 2303.10512), in raw pointers: what both backends implement. A
// layer adds s * B diag(E) A to its weight; triplet j of it is row j of A, E[j] and column j of B. One call covers all
// layers. Torch-free. All arithmetic is in fp32, all sums are in an order that depends on the shapes alone.
//
//   ImportanceUpdate    for every element p of A, E and B, with its gradient g (no gradient counts as 0):
//                         i = |p * g|                                                        eq. 8
//                         sensitivity = beta1 * sensitivity + (1 - beta1) * i                eq. 9
//                         uncertainty = beta2 * uncertainty + (1 - beta2) * |i - sensitivity|    eq. 10, the new one
//                         s = sensitivity * uncertainty                                      eq. 11
//                       scores[j] = s(E[j]) + mean of s over row j of A + mean of s over column j of B     eq. 7
//                       (the mean over nothing is 0: a process may have a part of a layer)
//   RankMask            keep[j] = is score j above the threshold, over all layers
//   MaskRanks           E[j] = 0 where keep[j] is 0
//   Orthogonality       D = A A^T - I or B^T B - I of every factor, norm = ||D||_F; their mean or the sum of squares
//   OrthogonalityGrad   its gradient, c D A or c B D
//
// Arrays of layers and of factors lie in host memory: a launcher hands them to its kernels as arguments, so that
// nothing has to be copied to the device first.
#pragma once
#include <cstring>

#include "dtypes.h"

namespace peftkern {

// Each of A, E and B has its averages in one piece of the two state buffers. A piece starts at a multiple of this many
// elements; what lies between is never read.
constexpr int64_t kStateAlignment = 16;

PEFTKERN_HOST_DEVICE int64_t state_size(int64_t n) {
  return (n + kStateAlignment - 1) / kStateAlignment * kStateAlignment;
}

struct TripletLayer {
  const void* A;  // [rank, in]
  void* E;        // [rank]; written by MaskRanks alone
  const void* B;  // [out, rank]
  const void* grad_A;
  const void* grad_E;
  const void* grad_B;  // as A, E and B; each may be null
  DType dtype;         // of all six
  int64_t in, out, rank;
  int64_t first;  // index of triplet 0 in scores and keep
  int64_t state;  // start of A in the state buffers; E's is at state + state_size(rank * in), B's behind E's

  PEFTKERN_HOST_DEVICE int64_t state_E() const { return state + state_size(rank * in); }
  PEFTKERN_HOST_DEVICE int64_t state_B() const { return state_E() + state_size(rank); }
  PEFTKERN_HOST_DEVICE int64_t state_end() const { return state_B() + state_size(out * rank); }
};

struct ImportanceUpdate {
  const TripletLayer* layers;  // host memory
  int64_t layer_count, triplets;
  double beta1, beta2;      // used as float(beta) and float(1 - beta); every product and sum is rounded, as torch does
  const float* grad_scale;  // [1] on the device, or null: the gradient is then g * (1 / *grad_scale)
  float* sensitivity;       // [state_end of the last layer], read and written
  float* uncertainty;       // the same
  float* scores;            // [triplets]
  float* workspace;         // [Backend::kScoreParts, triplets]: sums of parts of B's columns; uninitialised
};

// How scores are ordered: as numbers, -0 equal to 0, a NaN above everything.
PEFTKERN_HOST_DEVICE uint32_t score_key(float score) {
  const float canonical = score + 0.0f;  // -0 becomes 0
  uint32_t bits;
  memcpy(&bits, &canonical, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The threshold is the (triplets - budget)-th smallest key. budget >= triplets keeps all, budget <= 0 none.
//   exact = false, HF PEFT's rule: keep = key > threshold; all that tie with the threshold go, so fewer may be kept
//   exact = true: exactly budget are kept; of those that tie with the threshold the first in index order
struct RankMask {
  const float* scores;  // [triplets]
  int64_t triplets, budget;
  bool exact;
  uint8_t* keep;  // [triplets], 0 or 1
};

struct MaskRanks {
  const TripletLayer* layers;  // host memory; E, dtype, rank and first are read
  int64_t layer_count;
  const uint8_t* keep;  // [triplets]
};

struct OrthogonalFactor {
  const void* data;  // [rank, columns] if rank_major (A), else [columns, rank] (B)
  DType dtype;
  bool rank_major;
  int64_t rank, columns;
  int64_t deviation;  // index in deviations at which D [rank, rank] starts
  void* grad;         // as data, dtype; written by OrthogonalityGrad alone
};

// squared = false, HF PEFT's form: value = mean over the factors of norm       (0 without a factor)
// squared = true, eq. 4 of the paper: value = sum over the factors of norm^2
struct Orthogonality {
  const OrthogonalFactor* factors;  // host memory
  int64_t factor_count;
  bool squared;
  float* deviations;  // [sum of rank^2]
  float* norms;       // [factor_count]
  float* value;       // [1]
};

// grad = c D A for A, c B D for B, with c = upstream * 2 / (factor_count * norm), 0 where norm is 0; squared: c = 4 *
// upstream.
struct OrthogonalityGrad {
  const OrthogonalFactor* factors;  // host memory
  int64_t factor_count;
  bool squared;
  const float* upstream;  // [1] on the device: the gradient of value
  const float* deviations;
  const float* norms;
};

}  // namespace peftkern
