// SPDX-License-Identifier: Apache-2.0
// Number types of PTX: half floats, rounding, and the dispatch from a type code to a C++ type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "types.h"

namespace ptxsim {

template <class To, class From>
inline To bits(From from) {
  To to{};
  memcpy(&to, &from, std::min(sizeof to, sizeof from));
  return to;
}
template <class T>
inline T get(u64 slot) {
  return bits<T>(slot);
}
template <class T>
inline u64 put(T value) {
  return bits<u64>(value);
}

struct Half {
  u16 code;
};
struct BFloat {
  u16 code;
};
template <class Element>
struct Pair {
  Element low, high;
};
template <class T>
constexpr bool is_half = std::is_same_v<T, Half> || std::is_same_v<T, BFloat>;
template <class T>
constexpr bool is_scalar_float = is_half<T> || std::is_floating_point_v<T>;

inline float widen(Half h) { return static_cast<float>(bits<_Float16>(h.code)); }
inline float widen(BFloat b) { return bits<float>(static_cast<u32>(b.code) << 16); }
template <class T>
inline T widen(T x) {
  return x;
}

// One rounding from double: to odd at f32 (which keeps the sticky bit), then to nearest even at bf16.
inline u16 bfloat_from_double(double value) {
  if (value != value) return 0x7fff;
  float nearest = static_cast<float>(value);
  u32 code = bits<u32>(nearest);
  if (static_cast<double>(nearest) != value && !std::isinf(nearest)) {
    if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) --code;
    code |= 1;
  }
  return static_cast<u16>((code + 0x7fff + ((code >> 16) & 1)) >> 16);
}
template <class T>
inline T narrow(double value) {
  if constexpr (std::is_same_v<T, Half>) {
    return {bits<u16>(static_cast<_Float16>(value))};
  } else if constexpr (std::is_same_v<T, BFloat>) {
    return {bfloat_from_double(value)};
  } else {
    return static_cast<T>(value);
  }
}

inline float flush_subnormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

inline double round_to_integer(int rounding, double value) {
  switch (rounding) {
    case round_rni: return std::nearbyint(value);
    case round_rmi: return std::floor(value);
    case round_rpi: return std::ceil(value);
    case round_rzi: return std::trunc(value);
    default: return value;
  }
}
inline float round_to_float(int rounding, double value) {
  float nearest = static_cast<float>(value);
  double back = nearest;
  if (rounding == round_rz && std::fabs(back) > std::fabs(value)) return std::nextafter(nearest, 0.f);
  if (rounding == round_rm && back > value) return std::nextafter(nearest, -INFINITY);
  if (rounding == round_rp && back < value) return std::nextafter(nearest, INFINITY);
  return nearest;
}

// f(a...) in the arithmetic of T. Halves are exact in double up to the one rounding at the end.
template <class T, class F, class... Arguments>
inline T apply_scalar(u32 flags, F f, Arguments... a) {
  if constexpr (is_half<T>) {
    double value = f(static_cast<double>(widen(a))...);
    if (flags & flag_relu) value = value > 0 ? value : 0;
    return narrow<T>(flags & flag_sat ? std::min(std::max(value, 0.0), 1.0) : value);
  } else if constexpr (std::is_same_v<T, float>) {
    float value = flags & flag_ftz ? flush_subnormal(f(flush_subnormal(a)...)) : f(a...);
    if (flags & flag_sat) value = value > 0 ? (value < 1 ? value : 1.f) : 0.f;
    return value;
  } else {
    return static_cast<T>(f(a...));
  }
}
template <class T>
struct Apply {
  template <class F, class... Arguments>
  static T go(u32 flags, F f, Arguments... a) {
    return apply_scalar<T>(flags, f, a...);
  }
};
template <class Element>
struct Apply<Pair<Element>> {
  template <class F, class... Arguments>
  static Pair<Element> go(u32 flags, F f, Arguments... a) {
    return {apply_scalar<Element>(flags, f, a.low...), apply_scalar<Element>(flags, f, a.high...)};
  }
};

inline bool is_float_type(u8 type) { return type >= type_f16; }

inline int type_size(u8 type) {
  switch (type) {
    case type_pred:
    case type_b8:
    case type_u8:
    case type_s8: return 1;
    case type_b16:
    case type_u16:
    case type_s16:
    case type_f16:
    case type_bf16: return 2;
    case type_b64:
    case type_u64:
    case type_s64:
    case type_f64: return 8;
    default: return 4;
  }
}

// Calls f with a value of the C++ type: by_integer(type_s16, f) is f(s16{}).
template <class F>
void by_integer(u8 type, F f) {
  switch (type) {
    case type_pred:
    case type_b8:
    case type_u8: return f(u8{});
    case type_s8: return f(s8{});
    case type_b16:
    case type_u16: return f(u16{});
    case type_s16: return f(s16{});
    case type_s32: return f(s32{});
    case type_b64:
    case type_u64: return f(u64{});
    case type_s64: return f(s64{});
    default: return f(u32{});
  }
}
template <class F>
void by_float(u8 type, F f) {
  switch (type) {
    case type_f16: return f(Half{});
    case type_bf16: return f(BFloat{});
    case type_f16x2: return f(Pair<Half>{});
    case type_bf16x2: return f(Pair<BFloat>{});
    case type_f64: return f(double{});
    default: return f(float{});
  }
}
template <class F>
void by_type(u8 type, F f) {
  if (is_float_type(type)) {
    by_float(type, f);
  } else {
    by_integer(type, f);
  }
}

template <class T>
inline T apply_atomic(int operation, T old, T value, T replacement) {
  if constexpr (std::is_integral_v<T>) {
    switch (operation) {
      case atomic_add: return old + value;
      case atomic_min: return std::min(old, value);
      case atomic_max: return std::max(old, value);
      case atomic_and: return old & value;
      case atomic_or: return old | value;
      case atomic_xor: return old ^ value;
      case atomic_exch: return value;
      case atomic_cas: return old == value ? replacement : old;
      case atomic_inc: return old >= value ? 0 : old + 1;
      default: return old == 0 || old > value ? value : old - 1;
    }
  } else {
    auto combine = [operation](auto x, auto y) {
      return operation == atomic_add   ? x + y
             : operation == atomic_min ? std::fmin(x, y)
             : operation == atomic_max ? std::fmax(x, y)
                                       : y;
    };
    return Apply<T>::go(0, combine, old, value);
  }
}

}  // namespace ptxsim
