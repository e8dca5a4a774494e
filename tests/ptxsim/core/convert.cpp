// SPDX-License-Identifier: Apache-2.0
// cvt: between all pairs of integer and float types.
#include "machine.h"

namespace ptxsim {
namespace {

template <class From>
u64 integer_to_float(From value, u8 to, int rounding) {
  u64 out = 0;
  by_float(to, [&](auto type) {
    using To = decltype(type);
    if constexpr (std::is_same_v<To, float>) {
      const bool directed = rounding > round_rn && rounding <= round_rp;
      out = put(directed ? round_to_float(rounding, static_cast<double>(value)) : static_cast<float>(value));
    } else if constexpr (is_scalar_float<To>) {
      out = put(narrow<To>(static_cast<double>(value)));
    }
  });
  return out;
}

template <class From>
u64 integer_to_integer(From value, u8 to, bool saturate) {
  u64 out = 0;
  by_integer(to, [&](auto type) {
    using To = decltype(type);
    s128 wide = value;
    if (saturate) {
      wide = std::max<s128>(wide, std::numeric_limits<To>::min());
      wide = std::min<s128>(wide, std::numeric_limits<To>::max());
    }
    const To result = static_cast<To>(wide);
    out = std::is_signed_v<To> ? static_cast<u64>(static_cast<s64>(result)) : put(result);
  });
  return out;
}

u64 float_to_float(double value, u8 to, int rounding, u32 flags) {
  value = round_to_integer(rounding, value);
  if (flags & flag_sat) value = value > 0 ? std::min(value, 1.0) : 0;
  if ((flags & flag_relu) && value <= 0) value = 0;
  u64 out = 0;
  by_float(to, [&](auto type) {
    using To = decltype(type);
    if constexpr (std::is_same_v<To, float>) {
      const float result = round_to_float(rounding, value);
      out = put(flags & flag_ftz ? flush_subnormal(result) : result);
    } else if constexpr (std::is_same_v<To, double>) {
      out = put(value);
    } else if constexpr (is_half<To>) {
      To result = narrow<To>(value);
      if (rounding == round_rz && std::fabs(static_cast<double>(widen(result))) > std::fabs(value)) --result.code;
      out = put(result);
    }
  });
  return out;
}

u64 float_to_integer(double value, u8 to, int rounding) {
  u64 out = 0;
  by_integer(to, [&](auto type) {
    using To = decltype(type);
    using Limits = std::numeric_limits<To>;
    const double rounded = round_to_integer(rounding, value);
    if (value != value) {
      out = 0;
    } else if (rounded <= static_cast<double>(Limits::min())) {
      out = put(Limits::min());
    } else if (rounded >= static_cast<double>(Limits::max())) {
      out = put(Limits::max());
    } else {
      out = put(static_cast<To>(rounded));
    }
  });
  return out;
}

}  // namespace

void Machine::convert(Warp& w, const I& in, u32 mask) {
  if (in.type == type_tf32) return convert_tf32(w, in, mask);
  u64* out = w.slot(in.operands[0]);
  const u64* a = w.slot(in.operands[1]);
  const bool to_float = is_float_type(in.type);
  by_type(in.type2, [&](auto type) {
    using From = decltype(type);
    if constexpr (std::is_integral_v<From>) {
      for_lanes(mask, [&](int l) {
        const From value = get<From>(a[l]);
        out[l] = to_float ? integer_to_float(value, in.type, in.rounding)
                          : integer_to_integer(value, in.type, in.flags & flag_sat);
      });
    } else if constexpr (is_scalar_float<From>) {
      for_lanes(mask, [&](int l) {
        double value = widen(get<From>(a[l]));
        if (std::is_same_v<From, float> && (in.flags & flag_ftz)) value = flush_subnormal(static_cast<float>(value));
        out[l] = to_float ? float_to_float(value, in.type, in.rounding, in.flags)
                          : float_to_integer(value, in.type, in.rounding);
      });
    }
  });
}

// cvt.rn.bf16x2.f32 d, a, b: a goes to the high half.
void Machine::convert_pair(Warp& w, const I& in, u32 mask) {
  u64* out = w.slot(in.operands[0]);
  const u64 *high = w.slot(in.operands[1]), *low = w.slot(in.operands[2]);
  const bool to_half = in.type == type_f16x2, relu = in.flags & flag_relu;
  auto code = [&](u64 value) -> u32 {
    float f = get<float>(value);
    if (relu && f < 0) f = 0;
    return to_half ? narrow<Half>(f).code : narrow<BFloat>(f).code;
  };
  for_lanes(mask, [&](int l) { out[l] = code(high[l]) << 16 | code(low[l]); });
}

void Machine::convert_tf32(Warp& w, const I& in, u32 mask) {
  constexpr u32 dropped = 0x1fff;  // the 13 low bits of the significand
  u64* out = w.slot(in.operands[0]);
  const u64* a = w.slot(in.operands[1]);
  for_lanes(mask, [&](int l) {
    u32 code = static_cast<u32>(a[l]);
    const float value = bits<float>(code);
    if ((in.flags & flag_relu) && value < 0) code = 0;
    if (value != value) {
      out[l] = 0x7fffffff;
    } else if (in.rounding == round_rna) {
      out[l] = (code + 0x1000) & ~dropped;
    } else if (in.rounding == round_rz) {
      out[l] = code & ~dropped;
    } else {
      out[l] = (code + 0xfff + ((code >> 13) & 1)) & ~dropped;
    }
  });
}

}  // namespace ptxsim
