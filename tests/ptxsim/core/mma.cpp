// SPDX-License-Identifier: Apache-2.0
// mma.sync m16n8k*: D = A B + C, with A [16, K], B [K, 8] and C, D [16, 8] spread over the lanes of a warp.
#include "machine.h"

namespace ptxsim {
namespace {

double element(u8 type, u32 reg, int i) {
  switch (type) {
    case type_f16: return widen(Half{static_cast<u16>(reg >> (16 * i))});
    case type_bf16: return widen(BFloat{static_cast<u16>(reg >> (16 * i))});
    case type_tf32: return bits<float>(reg & 0xffffe000u);  // the tensor core does not see the low 13 bits
    case type_s8: return static_cast<s8>(reg >> (8 * i));
    default: return static_cast<u8>(reg >> (8 * i));
  }
}

}  // namespace

// mma_mode 0: the exact sum, rounded once. Mode m > 0: in blocks along k, terms are aligned to the largest and cut to
// 24 + m - 1 bits, as tensor cores are said to do (not checked against one).
float Machine::dot(double start, const double* products, int count, int block) const {
  if (!config_.mma_mode) {
    double sum = start;
    for (int i = 0; i < count; ++i) sum += products[i];
    return static_cast<float>(sum);
  }
  for (int first = 0; first < count; first += block) {
    constexpr int none = -2000;
    const int last = std::min(count, first + block);
    int largest = none;
    auto see = [&](double term) {
      if (term == 0 || !std::isfinite(term)) return;
      int exponent;
      std::frexp(term, &exponent);
      largest = std::max(largest, exponent);
    };
    see(start);
    for (int i = first; i < last; ++i) see(products[i]);
    const double unit = std::ldexp(1.0, largest - 24 - static_cast<int>(config_.mma_mode) + 1);
    auto cut = [&](double term) {
      return std::isfinite(term) && largest > none ? std::trunc(term / unit) * unit : term;
    };
    double sum = cut(start);
    for (int i = first; i < last; ++i) sum += cut(products[i]);
    start = round_to_float(round_rz, sum);
  }
  return static_cast<float>(start);
}

// in.modifier: registers of A. Lane 4 g + t holds, of register i of A, row g + 8 (i % 2) and columns from
// t * per_register + 4 (i / 2) per_register; of register i of B, those rows and column g.
void Machine::matrix_multiply(Warp& w, const I& in) {
  const int per_register = in.type == type_tf32 ? 1 : in.type == type_s8 || in.type == type_u8 ? 4 : 2;
  const int a_registers = in.modifier, b_registers = a_registers / 2, depth = b_registers * 4 * per_register;
  const bool half_sum = in.type2 == type_f16;
  const s32 *a_operands = in.operands + (half_sum ? 2 : 4), *b_operands = a_operands + a_registers;
  const s32* c_operands = b_operands + b_registers;
  double a[16][32], b[8][32], products[32];
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, t = l & 3;
    for (int j = 0; j < per_register; ++j) {
      for (int i = 0; i < a_registers; ++i) {
        const int column = t * per_register + (i >> 1) * 4 * per_register + j;
        a[g + (i & 1) * 8][column] = element(in.type, static_cast<u32>(w.slot(a_operands[i])[l]), j);
      }
      for (int i = 0; i < b_registers; ++i) {
        const int row = t * per_register + i * 4 * per_register + j;
        b[g][row] = element(in.type, static_cast<u32>(w.slot(b_operands[i])[l]), j);
      }
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int q = 0; q < 4; ++q) {
      const int row = (l >> 2) + (q >> 1) * 8, column = (l & 3) * 2 + (q & 1);
      for (int k = 0; k < depth; ++k) products[k] = a[row][k] * b[column][k];
      const u64 c = w.slot(c_operands[half_sum ? q >> 1 : q])[l];
      if (in.type2 == type_s32) {
        s64 sum = static_cast<s32>(c);
        for (int k = 0; k < depth; ++k) sum += static_cast<s64>(products[k]);
        w.slot(in.operands[q])[l] = static_cast<u32>(sum);
      } else if (half_sum) {
        const int shift = 16 * (q & 1);
        const float start = widen(Half{static_cast<u16>(c >> shift)});
        const u64 code = narrow<Half>(dot(start, products, depth, 8)).code;
        u64& out = w.slot(in.operands[q >> 1])[l];
        out = (out & ~(0xffffull << shift)) | code << shift;
      } else {
        w.slot(in.operands[q])[l] = put(dot(get<float>(c), products, depth, per_register == 1 ? 4 : 8));
      }
    }
  }
}

}  // namespace ptxsim
