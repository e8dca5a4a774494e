// SPDX-License-Identifier: Apache-2.0
// The NF4 ops on tensors, once for all devices: check, allocate, call the backend.
#pragma once
#include <tuple>

#include "nf4.h"
#include "tensors.h"

namespace peftkern {

inline void check_block_size(int64_t block_size) {
  PEFTKERN_CHECK(valid_block_size(block_size), "block_size: expected a power of two from ", kMinBlockSize, " to ",
                 kMaxBlockSize, ", got ", block_size);
}

// The 8-bit codes of absmax values with what decodes them: nested_absmax [ceil(codes / 256)], offset of one element.
inline void check_nested(const Tensor& codes, const char* name, const Tensor& nested_absmax, const Tensor& offset) {
  check_dtype(codes, ScalarType::Byte, name);
  check_dtype(nested_absmax, ScalarType::Float, "nested_absmax");
  check_dtype(offset, ScalarType::Float, "offset");
  check_device(nested_absmax, codes, "nested_absmax", name);
  check_device(offset, codes, "offset", name);
  const int64_t blocks = ceil_div(codes.numel(), kNestedBlockSize);
  PEFTKERN_CHECK(nested_absmax.numel() == blocks, "nested_absmax: expected ", blocks, " values for ", codes.numel(),
                 " codes, got ", nested_absmax.numel());
  PEFTKERN_CHECK(offset.numel() == 1, "offset: expected 1 value, got ", offset.numel());
}

// The scales of an NF4 weight: float32, or with double quantization uint8 codes and what decodes them.
struct Nf4Scales {
  Tensor values;                         // [blocks] float32, or uint8 with both of
  OptionalTensor nested_absmax, offset;  // [ceil(blocks / 256)] and [], float32

  bool nested() const { return nested_absmax.has_value(); }

  void check() const {
    PEFTKERN_CHECK(nested_absmax.has_value() == offset.has_value(),
                   "nested_absmax and offset: expected both or neither");
    if (nested()) {
      check_nested(values, "absmax", *nested_absmax, *offset);
    } else {
      check_dtype(values, ScalarType::Float, "absmax");
    }
  }

  // [blocks] float32, dense
  template <class Backend>
  Tensor floats(const Backend& backend) const;
};

// packed [ceil(n / 2)] uint8 and ceil(n / block_size) scales of n weights, in any shape.
inline void check_nf4(const Tensor& packed, const Nf4Scales& absmax, int64_t n, int64_t block_size) {
  check_block_size(block_size);
  check_dtype(packed, ScalarType::Byte, "packed");
  absmax.check();
  check_device(absmax.values, packed, "absmax", "packed");
  PEFTKERN_CHECK(packed.numel() == ceil_div(n, 2), "packed: expected ", ceil_div(n, 2), " bytes for ", n,
                 " weights, got ", packed.numel());
  PEFTKERN_CHECK(absmax.values.numel() == ceil_div(n, block_size), "absmax: expected ", ceil_div(n, block_size),
                 " values for ", n, " weights in blocks of ", block_size, ", got ", absmax.values.numel());
}

template <class Backend>
Tensor dequantize(const Backend& backend, const Tensor& packed, const Nf4Scales& absmax, int64_t block_size,
                  const std::vector<int64_t>& shape, ScalarType dtype) {
  Tensor out = backend.empty_weight(packed, shape, dtype);
  const Tensor p = dense(packed), s = absmax.floats(backend);
  const DequantizeNf4 args{.packed = static_cast<const uint8_t*>(p.const_data_ptr()),
                           .absmax = static_cast<const float*>(s.const_data_ptr()),
                           .n = out.numel(),
                           .block_size = block_size,
                           .out = out.mutable_data_ptr(),
                           .out_dtype = dtype_of(out, "dtype")};
  if (args.n) backend.dequantize_nf4(args);
  return out;
}

// w: any shape -> packed [ceil(n / 2)], absmax [ceil(n / block_size)]
template <class Backend>
std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& w, int64_t block_size) {
  check_block_size(block_size);
  const DType dtype = dtype_of(w, "w");
  const Tensor source = dense(w);
  const int64_t n = source.numel();
  Tensor packed = empty(w, {ceil_div(n, 2)}, ScalarType::Byte);
  Tensor absmax = empty(w, {ceil_div(n, block_size)}, ScalarType::Float);
  const QuantizeNf4 args{.w = source.const_data_ptr(),
                         .w_dtype = dtype,
                         .n = n,
                         .block_size = block_size,
                         .packed = static_cast<uint8_t*>(packed.mutable_data_ptr()),
                         .absmax = static_cast<float*>(absmax.mutable_data_ptr())};
  if (n) Backend(w).quantize_nf4(args);
  return {packed, absmax};
}

template <class Backend>
Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                      const OptionalTensor& offset, int64_t block_size, std::vector<int64_t> shape, ScalarType dtype) {
  const Nf4Scales scales{absmax, nested_absmax, offset};
  check_nf4(packed, scales, element_count(shape, "shape"), block_size);
  return dequantize(Backend(packed), packed, scales, block_size, shape, dtype);
}

// absmax [n] -> codes [n] uint8, nested_absmax [ceil(n / 256)], offset []
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax) {
  check_dtype(absmax, ScalarType::Float, "absmax");
  const Tensor source = dense(absmax);
  const int64_t n = source.numel();
  Tensor codes = empty(absmax, {n}, ScalarType::Byte);
  Tensor nested = empty(absmax, {ceil_div(n, kNestedBlockSize)}, ScalarType::Float);
  Tensor offset = empty(absmax, {}, ScalarType::Float);
  const QuantizeAbsmax args{.absmax = static_cast<const float*>(source.const_data_ptr()),
                            .n = n,
                            .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
                            .nested_absmax = static_cast<float*>(nested.mutable_data_ptr()),
                            .offset = static_cast<float*>(offset.mutable_data_ptr())};
  Backend(absmax).quantize_absmax(args);
  return {codes, nested, offset};
}

// The float32 absmax values [codes] that the codes stand for.
template <class Backend>
Tensor decoded(const Backend& backend, const Tensor& codes, const Tensor& nested_absmax, const Tensor& offset) {
  const int64_t n = codes.numel();
  const Tensor c = dense(codes), s = dense(nested_absmax);
  Tensor absmax = empty(codes, {n}, ScalarType::Float);
  const DequantizeAbsmax args{.codes = static_cast<const uint8_t*>(c.const_data_ptr()),
                              .nested_absmax = static_cast<const float*>(s.const_data_ptr()),
                              .offset = static_cast<const float*>(offset.const_data_ptr()),
                              .n = n,
                              .absmax = static_cast<float*>(absmax.mutable_data_ptr())};
  if (n) backend.dequantize_absmax(args);
  return absmax;
}

template <class Backend>
Tensor Nf4Scales::floats(const Backend& backend) const {
  return nested() ? decoded(backend, values, *nested_absmax, *offset) : dense(values);
}

template <class Backend>
Tensor dequantize_absmax(const Tensor& codes, const Tensor& nested_absmax, const Tensor& offset) {
  check_nested(codes, "codes", nested_absmax, offset);
  return decoded(Backend(codes), codes, nested_absmax, offset);
}

}  // namespace peftkern
