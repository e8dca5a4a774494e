// SPDX-License-Identifier: Apache-2.0
// Arithmetic, logic and comparison, lane by lane.
#include <cfenv>

#include "machine.h"

namespace ptxsim {
namespace {

// destination = f(sources) in the arithmetic of T; the arity of f says how many sources there are.
template <class T, class F>
void map_lanes(Warp& w, const Instruction& in, u32 mask, F f) {
  const u32 flags = in.flags;
  u64* out = w.slot(in.operands[0]);
  const u64* a = w.slot(in.operands[1]);
  if constexpr (std::is_invocable_v<F, double, double, double>) {
    const u64 *b = w.slot(in.operands[2]), *c = w.slot(in.operands[3]);
    for_lanes(mask, [&](int l) { out[l] = put(Apply<T>::go(flags, f, get<T>(a[l]), get<T>(b[l]), get<T>(c[l]))); });
  } else if constexpr (std::is_invocable_v<F, double, double>) {
    const u64* b = w.slot(in.operands[2]);
    for_lanes(mask, [&](int l) { out[l] = put(Apply<T>::go(flags, f, get<T>(a[l]), get<T>(b[l]))); });
  } else {
    for_lanes(mask, [&](int l) { out[l] = put(Apply<T>::go(flags, f, get<T>(a[l]))); });
  }
}
template <class F>
void number(Warp& w, const Instruction& in, u32 mask, F f) {
  by_type(in.type, [&](auto type) { map_lanes<decltype(type)>(w, in, mask, f); });
}
template <class F>
void floating(Warp& w, const Instruction& in, u32 mask, F f) {
  by_float(in.type, [&](auto type) { map_lanes<decltype(type)>(w, in, mask, f); });
}
// f(a, b, c): a in the type of the instruction, b and c as they are in their slots (0 if absent).
template <class F>
void integer(Warp& w, const Instruction& in, u32 mask, F f) {
  by_integer(in.type, [&](auto type) {
    using T = decltype(type);
    const bool has_b = in.sources > 1, has_c = in.sources > 2;
    u64* out = w.slot(in.operands[0]);
    const u64* a = w.slot(in.operands[1]);
    const u64 *b = has_b ? w.slot(in.operands[2]) : a, *c = has_c ? w.slot(in.operands[3]) : a;
    for_lanes(mask, [&](int l) { out[l] = put(f(get<T>(a[l]), has_b ? b[l] : 0, has_c ? c[l] : 0)); });
  });
}

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
constexpr int width = 8 * sizeof(T);

template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - static_cast<u64>(a));
  return a / b;
}
template <class T>
T remainder_of(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? T(0) : static_cast<T>(a % b);
}
u32 look_up_logic(u32 table, u32 a, u32 b, u32 c) {
  u32 result = 0;
  for (int row = 0; row < 8; ++row) {
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return result;
}
template <class T>
u32 find_leading_bit(T a, bool as_shift) {
  Unsigned<T> value = a < 0 ? static_cast<Unsigned<T>>(~a) : static_cast<Unsigned<T>>(a);
  if (!value) return ~0u;
  int position = 63 - __builtin_clzll(static_cast<u64>(value));
  return as_shift ? width<T> - 1 - position : position;
}
template <class T>
T extract_bits(T a, int position, int length) {
  using U = Unsigned<T>;
  constexpr int k = width<T>;
  if (!length) return 0;
  bool negative = std::is_signed_v<T> && (static_cast<U>(a) >> std::min(position + length - 1, k - 1) & 1);
  U result = position < k ? static_cast<U>(a) >> position : 0;
  if (length < k) result &= (U(1) << length) - 1;
  int present = std::min(length, k - std::min(position, k));
  if (negative && present < k) result |= static_cast<U>(~U(0)) << present;
  return static_cast<T>(result);
}
u32 permute_bytes(u64 bytes, u32 selector) {
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    u32 choice = selector >> (4 * i) & 15, byte = bytes >> (8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // replicate the sign
    result |= byte << (8 * i);
  }
  return result;
}
s32 byte_value(u8 byte, bool is_unsigned) { return is_unsigned ? byte : static_cast<s8>(byte); }

bool compare_floats(int comparison, double a, double b) {
  const bool unordered = a != a || b != b;
  switch (comparison) {
    case cmp_eq: return a == b;
    case cmp_ne: return !unordered && a != b;
    case cmp_lt: return a < b;
    case cmp_le: return a <= b;
    case cmp_gt: return a > b;
    case cmp_ge: return a >= b;
    case cmp_equ: return unordered || a == b;
    case cmp_neu: return a != b;
    case cmp_ltu: return unordered || a < b;
    case cmp_leu: return unordered || a <= b;
    case cmp_gtu: return unordered || a > b;
    case cmp_geu: return unordered || a >= b;
    case cmp_num: return !unordered;
    default: return unordered;
  }
}
template <class T>
bool compare_integers(int comparison, T a, T b) {
  switch (comparison) {
    case cmp_eq: return a == b;
    case cmp_ne: return a != b;
    case cmp_lt:
    case cmp_lo: return a < b;
    case cmp_le:
    case cmp_ls: return a <= b;
    case cmp_gt:
    case cmp_hi: return a > b;
    default: return a >= b;
  }
}

// The type of a product (declared only, for decltype).
u32 product_of(u16);
s32 product_of(s16);
u64 product_of(u32);
s64 product_of(s32);
u128 product_of(u64);
s128 product_of(s64);

}  // namespace

void Machine::multiply(Warp& w, const I& in, u32 mask) {
  by_integer(in.type, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) > 1) {
      using WideT = decltype(product_of(T{}));
      const bool adds = in.sources == 3, wide = in.flags & flag_wide, high = in.flags & flag_hi;
      u64* out = w.slot(in.operands[0]);
      const u64 *a = w.slot(in.operands[1]), *b = w.slot(in.operands[2]), *c = adds ? w.slot(in.operands[3]) : a;
      for_lanes(mask, [&](int l) {
        WideT product = static_cast<WideT>(get<T>(a[l])) * static_cast<WideT>(get<T>(b[l]));
        if (wide) {
          if (adds) product += get<WideT>(c[l]);
          out[l] = sizeof(WideT) == 4 ? static_cast<u32>(product) : static_cast<u64>(product);
        } else {
          T result = high ? static_cast<T>(product >> width<T>) : static_cast<T>(product);
          if (adds) result += get<T>(c[l]);
          out[l] = put(result);
        }
      });
    }
  });
}

void Machine::minmax(Warp& w, const I& in, u32 mask) {
  const bool maximum = in.op == op_max, propagate_nan = in.flags & flag_nan;
  number(w, in, mask, [=](auto a, auto b) {
    using T = decltype(a);
    if constexpr (std::is_integral_v<T>) {
      return maximum ? std::max(a, b) : std::min(a, b);
    } else {
      if (propagate_nan && (a != a || b != b)) return static_cast<T>(NAN);
      if (a == b) return std::signbit(a) == maximum ? b : a;  // +0 is larger than -0
      return maximum ? std::fmax(a, b) : std::fmin(a, b);
    }
  });
}

void Machine::bit_field_insert(Warp& w, const I& in, u32 mask) {
  u64* out = w.slot(in.operands[0]);
  const u64 *field = w.slot(in.operands[1]), *base = w.slot(in.operands[2]);
  const u64 *position = w.slot(in.operands[3]), *length = w.slot(in.operands[4]);
  const u32 bits_in_type = type_size(in.type) * 8;
  for_lanes(mask, [&](int l) {
    u32 at = position[l] & 255, n = length[l] & 255;
    u64 where = at >= bits_in_type || !n ? 0 : (n >= 64 ? ~0ull : (1ull << n) - 1) << at;
    if (bits_in_type == 32) where &= 0xffffffff;
    u64 result = (base[l] & ~where) | (at < 64 ? field[l] << at & where : 0);
    out[l] = bits_in_type == 32 ? static_cast<u32>(result) : result;
  });
}

// setp, set: a comparison, perhaps combined with a predicate (bits 8 and 9 of the modifier: and, or, xor).
void Machine::set_predicate(Warp& w, const I& in, u32 mask) {
  const int first = in.destinations, comparison = in.modifier & 255, combine = in.modifier >> 8;
  const u64 *a = w.slot(in.operands[first]), *b = w.slot(in.operands[first + 1]);
  const u64* extra = combine ? w.slot(in.operands[first + 2]) : a;
  const bool negated = in.flags & flag_negated;
  u64* out = in.operands[0] >= 0 ? w.slot(in.operands[0]) : nullptr;
  u64* complement = first > 1 && in.operands[1] >= 0 ? w.slot(in.operands[1]) : nullptr;
  by_type(in.type, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_integral_v<T> && !is_scalar_float<T>) {
      report(report_unsupported, w.thread(first_lane(mask)));
    } else {
      for_lanes(mask, [&](int l) {
        bool result;
        if constexpr (std::is_integral_v<T>) {
          result = compare_integers(comparison, get<T>(a[l]), get<T>(b[l]));
        } else {
          auto x = widen(get<T>(a[l])), y = widen(get<T>(b[l]));
          if constexpr (std::is_same_v<T, float>) {
            if (in.flags & flag_ftz) x = flush_subnormal(x), y = flush_subnormal(y);
          }
          result = compare_floats(comparison, x, y);
        }
        const bool other = (extra[l] & 1) ^ negated;
        auto combined = [&](bool value) {
          switch (combine) {
            case 0: return value;
            case 1: return value && other;
            case 2: return value || other;
            default: return value != other;
          }
        };
        const u64 yes = combined(result), no = combined(!result);
        if (in.op == op_set) {
          out[l] = yes ? (in.type2 == type_f32 ? 0x3f800000u : 0xffffffffu) : 0;
        } else {
          if (out) out[l] = yes;
          if (complement) complement[l] = no;
        }
      });
    }
  });
}

void Machine::test_property(Warp& w, const I& in, u32 mask) {
  u64* out = w.slot(in.operands[0]);
  const u64* a = w.slot(in.operands[1]);
  for_lanes(mask, [&](int l) {
    const double value = in.type == type_f64 ? get<double>(a[l]) : get<float>(a[l]);
    const int kind = in.type == type_f64 ? std::fpclassify(value) : std::fpclassify(static_cast<float>(value));
    switch (in.modifier) {
      case 0: out[l] = std::isfinite(value); break;
      case 1: out[l] = std::isinf(value); break;
      case 2: out[l] = value == value; break;
      case 3: out[l] = value != value; break;
      case 4: out[l] = kind == FP_NORMAL; break;
      default: out[l] = kind == FP_SUBNORMAL;
    }
  });
}

// The host's FPU does directed rounding. `execute` is not inlined, so its arithmetic stays between the two calls.
void Machine::execute_rounded(Warp& w, const I& in, u32 mask) {
  fesetround(in.rounding == round_rz ? FE_TOWARDZERO : in.rounding == round_rm ? FE_DOWNWARD : FE_UPWARD);
  execute(w, in, mask);
  fesetround(FE_TONEAREST);
}

__attribute__((noinline)) void Machine::execute(Warp& w, const I& in, u32 mask) {
  auto slot = [&](int operand) { return w.slot(in.operands[operand]); };
  const bool is_float = is_float_type(in.type);
  switch (in.op) {
    case op_mov: {
      u64 *out = slot(0), *a = slot(1);
      return for_lanes(mask, [&](int l) { out[l] = a[l]; });
    }
    case op_pack: {
      const int parts = in.sources, part_bits = type_size(in.type) * 8 / parts;
      u64* out = slot(0);
      return for_lanes(mask, [&](int l) {
        u64 value = 0;
        for (int i = 0; i < parts; ++i) value |= (slot(1 + i)[l] & (~0ull >> (64 - part_bits))) << (part_bits * i);
        out[l] = value;
      });
    }
    case op_unpack: {
      const int parts = in.destinations, part_bits = type_size(in.type) * 8 / parts;
      const u64* a = slot(parts);
      return for_lanes(mask, [&](int l) {
        const u64 value = a[l];
        for (int i = 0; i < parts; ++i) {
          if (in.operands[i] >= 0) slot(i)[l] = (value >> (part_bits * i)) & (~0ull >> (64 - part_bits));
        }
      });
    }
    case op_add: return number(w, in, mask, [](auto a, auto b) { return a + b; });
    case op_sub: return number(w, in, mask, [](auto a, auto b) { return a - b; });
    case op_mul:
      if (!is_float) return multiply(w, in, mask);
      return floating(w, in, mask, [](auto a, auto b) { return a * b; });
    case op_mad:
    case op_fma:
      if (!is_float) return multiply(w, in, mask);
      return floating(w, in, mask, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
    case op_div:
      if (is_float) return floating(w, in, mask, [](auto a, auto b) { return a / b; });
      return integer(w, in, mask, [](auto a, u64 b, u64) { return divide(a, static_cast<decltype(a)>(b)); });
    case op_rem:
      return integer(w, in, mask, [](auto a, u64 b, u64) { return remainder_of(a, static_cast<decltype(a)>(b)); });
    case op_abs: {
      if (!is_float) return number(w, in, mask, [](auto a) { return static_cast<decltype(a)>(a < 0 ? 0 - a : a); });
      const u64 keep = in.type == type_f64       ? ~0ull >> 1
                       : in.type == type_f32     ? 0x7fffffff
                       : type_size(in.type) == 2 ? 0x7fff
                                                 : 0x7fff7fff;
      const bool flush = (in.flags & flag_ftz) && in.type == type_f32;
      u64 *out = slot(0), *a = slot(1);
      return for_lanes(mask, [&](int l) {
        out[l] = a[l] & keep;
        if (flush) out[l] = put(flush_subnormal(get<float>(out[l])));
      });
    }
    case op_neg: return number(w, in, mask, [](auto a) { return static_cast<decltype(a)>(-a); });
    case op_min:
    case op_max: return minmax(w, in, mask);
    case op_and: return integer(w, in, mask, [](auto a, u64 b, u64) { return static_cast<decltype(a)>(a & b); });
    case op_or: return integer(w, in, mask, [](auto a, u64 b, u64) { return static_cast<decltype(a)>(a | b); });
    case op_xor: return integer(w, in, mask, [](auto a, u64 b, u64) { return static_cast<decltype(a)>(a ^ b); });
    case op_not: {
      const bool predicate = in.type == type_pred;
      return integer(w, in, mask, [=](auto a, u64, u64) { return static_cast<decltype(a)>(predicate ? !a : ~a); });
    }
    case op_cnot: return integer(w, in, mask, [](auto a, u64, u64) { return static_cast<decltype(a)>(!a); });
    case op_lop3: {
      const u32 table = in.modifier;
      return integer(w, in, mask, [=](auto a, u64 b, u64 c) { return look_up_logic(table, a, b, c); });
    }
    case op_shl:
      return integer(w, in, mask, [](auto a, u64 b, u64) {
        const u32 n = b;
        return static_cast<decltype(a)>(n >= width<decltype(a)> ? 0 : a << n);
      });
    case op_shr:
      return integer(w, in, mask, [](auto a, u64 b, u64) {
        const u32 n = b;
        return static_cast<decltype(a)>(n >= width<decltype(a)> ? (a < 0 ? -1 : 0) : a >> n);
      });
    case op_shf: {
      const bool left = in.modifier & 1, wrap = in.modifier & 2;
      return integer(w, in, mask, [=](auto a, u64 b, u64 c) {
        const u32 n = wrap ? c & 31 : std::min<u32>(c, 32);
        const u64 both = static_cast<u64>(static_cast<u32>(b)) << 32 | static_cast<u32>(a);
        return static_cast<u32>(left ? both << n >> 32 : both >> n);
      });
    }
    case op_popc:
      return integer(w, in, mask, [](auto a, u64, u64) {
        return static_cast<u32>(__builtin_popcountll(static_cast<Unsigned<decltype(a)>>(a)));
      });
    case op_clz:
      return integer(w, in, mask, [](auto a, u64, u64) {
        constexpr int k = width<decltype(a)>;
        return static_cast<u32>(a ? __builtin_clzll(static_cast<Unsigned<decltype(a)>>(a)) - (64 - k) : k);
      });
    case op_brev:
      return integer(w, in, mask, [](auto a, u64, u64) {
        constexpr int k = width<decltype(a)>;
        Unsigned<decltype(a)> result = 0;
        for (int i = 0; i < k; ++i) {
          if (static_cast<u64>(a) >> i & 1) result |= Unsigned<decltype(a)>(1) << (k - 1 - i);
        }
        return result;
      });
    case op_bfind: {
      const bool as_shift = in.modifier;
      return integer(w, in, mask, [=](auto a, u64, u64) { return find_leading_bit(a, as_shift); });
    }
    case op_bfe: return integer(w, in, mask, [](auto a, u64 b, u64 c) { return extract_bits(a, b & 255, c & 255); });
    case op_bfi: return bit_field_insert(w, in, mask);
    case op_bmsk: {
      const bool clamp = in.modifier;
      return integer(w, in, mask, [=](auto a, u64 b, u64) {
        const u32 position = clamp ? a : a & 31, length = clamp ? b : b & 31;
        if (position >= 32) return 0u;
        return static_cast<u32>((length >= 32 ? ~0ull : (1ull << length) - 1) << position);
      });
    }
    case op_sad:
      return integer(w, in, mask, [](auto a, u64 b, u64 c) {
        using T = decltype(a);
        const T other = b;
        return static_cast<T>(static_cast<T>(c) + (a < other ? other - a : a - other));
      });
    case op_prmt:
      return integer(w, in, mask, [](auto a, u64 b, u64 c) {
        return permute_bytes(static_cast<u64>(static_cast<u32>(b)) << 32 | static_cast<u32>(a), c);
      });
    case op_dp4a: {
      const bool a_unsigned = in.type2 == type_u32, b_unsigned = in.type == type_u32;
      return integer(w, in, mask, [=](auto a, u64 b, u64 c) {
        s32 sum = c;
        for (int i = 0; i < 4; ++i) sum += byte_value(a >> 8 * i, a_unsigned) * byte_value(b >> 8 * i, b_unsigned);
        return sum;
      });
    }
    case op_dp2a: {
      const bool a_unsigned = in.type2 == type_u32, b_unsigned = in.type == type_u32;
      const int first_byte = in.flags & flag_hi ? 2 : 0;
      return integer(w, in, mask, [=](auto a, u64 b, u64 c) {
        s32 sum = c;
        for (int i = 0; i < 2; ++i) {
          const u16 half = static_cast<u32>(a) >> 16 * i;
          sum += (a_unsigned ? half : static_cast<s16>(half)) * byte_value(b >> 8 * (first_byte + i), b_unsigned);
        }
        return sum;
      });
    }
    case op_selp: {
      u64 *out = slot(0), *a = slot(1), *b = slot(2), *predicate = slot(3);
      return for_lanes(mask, [&](int l) { out[l] = predicate[l] & 1 ? a[l] : b[l]; });
    }
    case op_setp:
    case op_set: return set_predicate(w, in, mask);
    case op_cvt: return convert(w, in, mask);
    case op_cvt2: return convert_pair(w, in, mask);
    case op_mapa: return map_to_rank(w, in, mask);
    case op_cvta: {
      const u64 base = in.space == space_shared  ? shared_base
                       : in.space == space_local ? local_base
                       : in.space == space_param ? param_base
                                                 : 0;
      const bool to_space = in.modifier;
      u64 *out = slot(0), *a = slot(1);
      return for_lanes(mask, [&](int l) { out[l] = to_space ? a[l] - base : a[l] + base; });
    }
    // The approximate functions are correctly rounded here, in double; hardware is 1 to 2 ulp off.
    case op_sqrt: return floating(w, in, mask, [](auto a) { return static_cast<decltype(a)>(std::sqrt(a)); });
    case op_rsqrt:
      return floating(w, in, mask, [](auto a) { return static_cast<decltype(a)>(1.0 / std::sqrt(double(a))); });
    case op_rcp: return floating(w, in, mask, [](auto a) { return static_cast<decltype(a)>(1) / a; });
    case op_ex2: return floating(w, in, mask, [](auto a) { return static_cast<decltype(a)>(std::exp2(double(a))); });
    case op_lg2: return floating(w, in, mask, [](auto a) { return static_cast<decltype(a)>(std::log2(double(a))); });
    case op_sin: return floating(w, in, mask, [](auto a) { return static_cast<decltype(a)>(std::sin(double(a))); });
    case op_cos: return floating(w, in, mask, [](auto a) { return static_cast<decltype(a)>(std::cos(double(a))); });
    case op_tanh: return floating(w, in, mask, [](auto a) { return static_cast<decltype(a)>(std::tanh(double(a))); });
    case op_copysign:
      return floating(w, in, mask, [](auto a, auto b) { return static_cast<decltype(a)>(std::copysign(b, a)); });
    case op_testp: return test_property(w, in, mask);
    case op_ld: return load(w, in, mask);
    case op_st: return store(w, in, mask);
    case op_atom: return atomic(w, in, mask);
    case op_cp_async: return copy_async(w, in, mask);
    case op_cp_commit: return commit_copies(w, mask);
    case op_cp_wait: return wait_copies(w, mask, slot(0)[0]);
    case op_cp_wait_all: commit_copies(w, mask); return wait_copies(w, mask, 0);
    case op_activemask: return for_lanes(mask, [&](int l) { slot(0)[l] = mask; });
    case op_clock: return for_lanes(mask, [&](int l) { slot(0)[l] = steps; });
    case op_fence: block_->fenced = true; return;
    case op_grid_wait: return for_lanes(mask, [&](int l) { block_->threads[w.thread(l)].grid_waited = true; });
    case op_nop: return;
    default: report(report_unsupported, w.thread(first_lane(mask)));
  }
}

}  // namespace ptxsim
