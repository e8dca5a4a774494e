// SPDX-License-Identifier: Apache-2.0
// How CUDA makes the products of csrc/products.h: best first, plainest last.
#pragma once
#include <limits>

#include "../products.h"
#include "backend.h"

namespace peftkern {

// ---- the fused kernels: NF4 weights looked up inside the product (nf4_product.h)

// Up to how many rows they beat dequantizing for the library. Modelled from rates of data sheets, measured nowhere:
// mma.sync, which they use, reaches about 0.6 of the library's tensor-core rate on sm_90, a quarter on sm_100, and all
// of it on sm_86, sm_89 and sm_12x; the library's way costs 4 bytes a weight more of memory traffic.
struct FusedRows {
  int architecture;  // compute capability, 10 * major + minor; from here to that of the next line
  int64_t rows;
};
inline constexpr int64_t kAnyRows = std::numeric_limits<int64_t>::max();
inline constexpr FusedRows kFusedRows[] = {{80, 1536}, {86, kAnyRows}, {90, 1024}, {100, 256}, {120, kAnyRows}};

inline bool fused_pays(int64_t rows) {
  const int architecture =
      10 * cuda_attribute(cudaDevAttrComputeCapabilityMajor) + cuda_attribute(cudaDevAttrComputeCapabilityMinor);
  int64_t most = 0;
  for (const FusedRows& line : kFusedRows)
    if (architecture >= line.architecture) most = line.rows;
  return rows <= most;
}

// Does a kernel find the tensor at an address of 16-byte chunks? One that is not contiguous is copied to a new one.
inline bool in_chunks(const Tensor& t) {
  return !t.is_contiguous() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

inline bool can_fuse(const Terms& t, const Tensor& activations) {
  return t.absmax && activations.scalar_type() != ScalarType::Float && activations.size(0) > 0 && t.out > 0 &&
         t.in > 0 && t.in % 64 == 0 && in_chunks(activations) && in_chunks(t.weight);
}

// A weight as the kernels take it, and the dense tensors that it points into.
struct FusedWeight {
  Tensor packed, scales;
  OptionalTensor nested_absmax, offset;
  Nf4Matrix matrix;

  bool copied;  // by a launch just before

  explicit FusedWeight(const Terms& t) : packed(dense(t.weight)), scales(dense(t.absmax->values)) {
    const bool nested = t.absmax->nested();
    if (nested) nested_absmax = dense(*t.absmax->nested_absmax), offset = dense(*t.absmax->offset);
    matrix = {.packed = static_cast<const uint8_t*>(packed.const_data_ptr()),
              .absmax = nested ? nullptr : const_floats(scales),
              .codes = nested ? static_cast<const uint8_t*>(scales.const_data_ptr()) : nullptr,
              .nested_absmax = const_floats(nested_absmax),
              .offset = const_floats(offset),
              .out = t.out,
              .in = t.in,
              .block_size = t.block_size};
    copied = !t.weight.is_contiguous() || !t.absmax->values.is_contiguous() ||
             (nested && !(t.absmax->nested_absmax->is_contiguous() && t.absmax->offset->is_contiguous()));
  }
};

// y_dtype: that of x, or float32
inline Tensor fused_forward(const CudaBackend& backend, const ForwardProduct& p, ScalarType y_dtype) {
  const Terms& t = p.terms;
  Tensor y = empty(p.x, {p.rows(), t.out}, y_dtype);
  const FusedWeight weight(t);
  const OptionalTensor b = p.u ? OptionalTensor(dense(*t.B)) : std::nullopt;
  const OptionalTensor out_scale = float_vector(t.out_scale), bias = float_vector(p.bias);
  Nf4Forward args{.x = p.x.const_data_ptr(),
                  .x_dtype = dtype_of(p.x, "x"),
                  .rows = p.rows(),
                  .weight = weight.matrix,
                  .u = const_floats(p.u),
                  .rank = p.u ? t.rank : 0,
                  .factor = b ? factor(*b, false, "B") : Factor{nullptr, DType::f32, false},
                  .alpha = static_cast<float>(t.scaling),
                  .out_scale = const_floats(out_scale),
                  .bias = const_floats(bias),
                  .z = p.z ? p.z->mutable_data_ptr() : nullptr,
                  .y = y.mutable_data_ptr(),
                  .y_dtype = dtype_of(y, "y"),
                  .splits = nf4_forward_splits(p.rows(), t.out, t.in, cuda_attribute(cudaDevAttrMultiProcessorCount)),
                  .workspace = nullptr,
                  .overlap = p.u && !weight.copied};  // what makes u comes after what made x
  OptionalTensor workspace;
  if (args.splits > 1) {
    workspace = empty(p.x, {nf4_forward_workspace(args)}, ScalarType::Float);
    args.workspace = floats(*workspace);
  }
  backend.nf4_forward(args);
  return y;
}

inline Tensor fused_gradient(const CudaBackend& backend, const GradientProduct& p) {
  const Terms& t = p.terms;
  Tensor dx = empty(p.q, {p.rows(), t.in}, p.q.scalar_type());
  const FusedWeight weight(t);
  const OptionalTensor a = p.dh ? OptionalTensor(dense(*t.A)) : std::nullopt;
  backend.nf4_gradient({.q = p.q.const_data_ptr(),
                        .q_dtype = dtype_of(p.q, "grad"),
                        .rows = p.rows(),
                        .weight = weight.matrix,
                        .dh = const_floats(p.dh),
                        .rank = p.dh ? t.rank : 0,
                        .factor = a ? factor(*a, true, "A") : Factor{nullptr, DType::f32, true},
                        .dropout = p.dh ? t.dropout : Dropout{},
                        .dx = dx.mutable_data_ptr()});
  return dx;
}

// ---- the tables

inline constexpr Way<CudaBackend, ForwardProduct> kCudaForward[] = {
    {"nf4_fused", [](const ForwardProduct& p) { return can_fuse(p.terms, p.x); },
     [](const CudaBackend& backend, const ForwardProduct& p) { return fused_forward(backend, p, p.x.scalar_type()); },
     [](const ForwardProduct& p) { return fused_pays(p.rows()); }},
    kLibraryAccumulateForward<CudaBackend>,
    kLibraryForward<CudaBackend>,
};

inline constexpr Way<CudaBackend, GradientProduct> kCudaGradient[] = {
    // whole 16-byte chunks of a row of q
    {"nf4_fused", [](const GradientProduct& p) { return can_fuse(p.terms, p.q) && p.terms.out % 8 == 0; },
     fused_gradient, [](const GradientProduct& p) { return fused_pays(p.rows()); }},
    kLibraryAccumulateGradient<CudaBackend>,
    kLibraryGradient<CudaBackend>,
};

template <>
inline std::span<const Way<CudaBackend, ForwardProduct>> ways() {
  return kCudaForward;
}
template <>
inline std::span<const Way<CudaBackend, GradientProduct>> ways() {
  return kCudaGradient;
}

}  // namespace peftkern
