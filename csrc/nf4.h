// SPDX-License-Identifier: Apache-2.0
// NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E), in
// bitsandbytes' storage layout. This file is the only home of its numbers; both backends include it, torch-free.
//
//   blocks      block_size consecutive elements of the flattened, row-major tensor (the last one may be shorter)
//   absmax      fp32 max |w| of each block
//   code        number of thresholds below the scaled value, so a tie goes to the lower code
//   scaled      w * (1 / absmax), but w / absmax in a shorter last block, whose absmax is at least kMinAbsmax: so that
//               codes and absmax are those of bitsandbytes' CPU path, bit for bit
//   packed      two codes a byte, the even flat element in the high nibble; an odd tail is padded with code 7 (zero)
//   dequantize  fp32 kNf4Codes[code] * absmax, rounded once to the output dtype
//
// Double quantization stores absmax as 8-bit codes in blocks of 256: offset = mean(absmax), then
//   absmax ~ kDynamicCodes[code] * nested_absmax + offset          (two fp32 roundings; never fused into one)
#pragma once
#include "dtypes.h"

namespace peftkern {

constexpr int64_t kMinBlockSize = 32, kMaxBlockSize = 4096;
constexpr int64_t kNestedBlockSize = 256;

inline bool valid_block_size(int64_t b) { return b >= kMinBlockSize && b <= kMaxBlockSize && (b & (b - 1)) == 0; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// clang-format off
// Lists as macros, so that one copy serves a host array and a CUDA __constant__ array.
#define PEFTKERN_NF4_CODES \
  -1.0f, -0.696192801f, -0.525073051f, -0.394917488f, -0.284441382f, -0.18477343f, -0.0910500363f, 0.0f, \
  0.0795802996f, 0.160930201f, 0.246112302f, 0.337915242f, 0.440709829f, 0.562617004f, 0.722956836f, 1.0f
// fp32 midpoints of neighbouring codes
#define PEFTKERN_NF4_THRESHOLDS \
  -0.848096371f, -0.610632896f, -0.45999527f, -0.33967942f, -0.234607399f, -0.137911737f, -0.0455250181f, 0.0397901498f, \
  0.120255247f, 0.203521252f, 0.292013764f, 0.389312536f, 0.501663446f, 0.64278692f, 0.861478448f
// The signed 8-bit dynamic code of bitsandbytes (Dettmers 2016, arXiv 1511.04561): for i in 0..6 the midpoints of
// linspace(0.1, 1, 2^i + 1) times 10^(i-6), both signs, with 0 and 1. tests/test_nf4.py rebuilds it from this formula.
#define PEFTKERN_DYNAMIC_CODES \
  -0.992968738f, -0.978906274f, -0.96484375f, -0.950781226f, -0.936718762f, -0.922656238f, -0.908593774f, -0.89453125f, \
  -0.880468726f, -0.866406262f, -0.852343738f, -0.838281274f, -0.82421875f, -0.810156226f, -0.796093762f, -0.782031238f, \
  -0.767968774f, -0.75390625f, -0.739843726f, -0.725781262f, -0.711718798f, -0.697656274f, -0.68359375f, -0.669531226f, \
  -0.655468762f, -0.641406298f, -0.627343774f, -0.61328125f, -0.599218726f, -0.585156262f, -0.571093798f, -0.557031274f, \
  -0.54296875f, -0.528906226f, -0.514843702f, -0.500781238f, -0.486718714f, -0.47265625f, -0.458593726f, -0.444531262f, \
  -0.430468738f, -0.416406244f, -0.40234375f, -0.388281226f, -0.374218762f, -0.360156238f, -0.346093744f, -0.33203125f, \
  -0.317968726f, -0.303906262f, -0.289843738f, -0.275781274f, -0.26171875f, -0.247656241f, -0.233593747f, -0.219531253f, \
  -0.205468744f, -0.19140625f, -0.177343756f, -0.163281247f, -0.149218753f, -0.135156244f, -0.12109375f, -0.107031256f, \
  -0.0985937491f, -0.0957812592f, -0.0929687545f, -0.0901562497f, -0.0873437524f, -0.0845312476f, -0.0817187577f, -0.078906253f, \
  -0.0760937482f, -0.0732812509f, -0.0704687461f, -0.0676562563f, -0.0648437515f, -0.0620312504f, -0.0592187531f, -0.0564062484f, \
  -0.053593751f, -0.05078125f, -0.047968749f, -0.0451562516f, -0.0423437469f, -0.0395312496f, -0.0367187522f, -0.0339062512f, \
  -0.0310937501f, -0.028281251f, -0.0254687499f, -0.0226562507f, -0.0198437516f, -0.0170312505f, -0.0142187504f, -0.0114062503f, \
  -0.00971874967f, -0.00915624946f, -0.00859375019f, -0.00803124998f, -0.00746874977f, -0.00690625003f, -0.00634374982f, -0.00578125007f, \
  -0.00521875033f, -0.00465624966f, -0.00409374991f, -0.00353124971f, -0.00296874996f, -0.00240624999f, -0.00184375001f, -0.00128124992f, \
  -0.000943750085f, -0.000831249985f, -0.00071875006f, -0.000606250076f, -0.000493750034f, -0.000381250022f, -0.000268750038f, -0.000156250011f, \
  -8.87499991e-05f, -6.62500024e-05f, -4.37499984e-05f, -2.12499981e-05f, -7.7499999e-06f, -3.25000019e-06f, -5.50000038e-07f, 0.0f, \
  5.50000038e-07f, 3.25000019e-06f, 7.7499999e-06f, 2.12499981e-05f, 4.37499984e-05f, 6.62500024e-05f, 8.87499991e-05f, 0.000156250011f, \
  0.000268750038f, 0.000381250022f, 0.000493750034f, 0.000606250076f, 0.00071875006f, 0.000831249985f, 0.000943750085f, 0.00128124992f, \
  0.00184375001f, 0.00240624999f, 0.00296874996f, 0.00353124971f, 0.00409374991f, 0.00465624966f, 0.00521875033f, 0.00578125007f, \
  0.00634374982f, 0.00690625003f, 0.00746874977f, 0.00803124998f, 0.00859375019f, 0.00915624946f, 0.00971874967f, 0.0114062503f, \
  0.0142187504f, 0.0170312505f, 0.0198437516f, 0.0226562507f, 0.0254687499f, 0.028281251f, 0.0310937501f, 0.0339062512f, \
  0.0367187522f, 0.0395312496f, 0.0423437469f, 0.0451562516f, 0.047968749f, 0.05078125f, 0.053593751f, 0.0564062484f, \
  0.0592187531f, 0.0620312504f, 0.0648437515f, 0.0676562563f, 0.0704687461f, 0.0732812509f, 0.0760937482f, 0.078906253f, \
  0.0817187577f, 0.0845312476f, 0.0873437524f, 0.0901562497f, 0.0929687545f, 0.0957812592f, 0.0985937491f, 0.107031256f, \
  0.12109375f, 0.135156244f, 0.149218753f, 0.163281247f, 0.177343756f, 0.19140625f, 0.205468744f, 0.219531253f, \
  0.233593747f, 0.247656241f, 0.26171875f, 0.275781274f, 0.289843738f, 0.303906262f, 0.317968726f, 0.33203125f, \
  0.346093744f, 0.360156238f, 0.374218762f, 0.388281226f, 0.40234375f, 0.416406244f, 0.430468738f, 0.444531262f, \
  0.458593726f, 0.47265625f, 0.486718714f, 0.500781238f, 0.514843702f, 0.528906226f, 0.54296875f, 0.557031274f, \
  0.571093798f, 0.585156262f, 0.599218726f, 0.61328125f, 0.627343774f, 0.641406298f, 0.655468762f, 0.669531226f, \
  0.68359375f, 0.697656274f, 0.711718798f, 0.725781262f, 0.739843726f, 0.75390625f, 0.767968774f, 0.782031238f, \
  0.796093762f, 0.810156226f, 0.82421875f, 0.838281274f, 0.852343738f, 0.866406262f, 0.880468726f, 0.89453125f, \
  0.908593774f, 0.922656238f, 0.936718762f, 0.950781226f, 0.96484375f, 0.978906274f, 0.992968738f, 1.0f
// clang-format on

constexpr float kNf4Codes[16] = {PEFTKERN_NF4_CODES};
constexpr float kNf4Thresholds[15] = {PEFTKERN_NF4_THRESHOLDS};
constexpr float kDynamicCodes[256] = {PEFTKERN_DYNAMIC_CODES};
constexpr uint8_t kNf4Zero = 7;

inline uint32_t nf4_code(float scaled) {
  uint32_t code = 0;
  for (float threshold : kNf4Thresholds) code += scaled > threshold;
  return code;
}

// Smallest divisor of a block: keeps an all-zero block at code 7 instead of 0 / 0, as bitsandbytes' CPU path does.
constexpr float kMinAbsmax = 1e-38f;

struct QuantizeNf4 {
  const void* w;  // [n], w_dtype
  DType w_dtype;
  int64_t n, block_size;
  uint8_t* packed;  // [ceil(n / 2)]
  float* absmax;    // [ceil(n / block_size)]; non-finite where the block holds a NaN or an infinity
};

struct DequantizeNf4 {
  const uint8_t* packed;
  const float* absmax;
  int64_t n, block_size;
  void* out;  // [n], out_dtype
  DType out_dtype;
};

// y = x W^T + bias, or y = x W with the same fields, W in NF4: a weight is looked up, rounded to x_dtype as dequantize
// rounds it, used for all rows, and never written to memory that others read.
struct Nf4Product {
  const void* x;  // [rows, in], x_dtype; for x W: [rows, out]
  DType x_dtype;
  int64_t rows, in, out;
  const uint8_t* packed;  // [out, in / 2]
  const float* absmax;    // [out * in / block_size]
  int64_t block_size;
  const float* bias;  // [out] or null
  void* y;            // [rows, out], x_dtype; for x W: [rows, in]
};

struct QuantizeAbsmax {
  const float* absmax;  // [n]
  int64_t n;
  uint8_t* codes;               // [n]
  float* nested_absmax;         // [ceil(n / 256)]
  float* offset;                // [1]
  double* workspace = nullptr;  // CUDA alone: [quantize_absmax_workspace(...)]
};

struct DequantizeAbsmax {
  const uint8_t* codes;
  const float* nested_absmax;
  const float* offset;
  int64_t n;
  float* absmax;  // [n]
};

}  // namespace peftkern
