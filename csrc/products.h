// SPDX-License-Identifier: Apache-2.0
// The two products of a layer with its weight, and the ways to make them:
//
//   y = out_scale * (x W^T + s u B^T) + bias        the forward product, u [rows, rank] float32 given
//   dx = q W + mask * (dh A)                        the gradient product, dh [rows, rank] float32 given
//
// A way is a row {name, accepts, make} of a table. csrc/<device>/products.h has the tables, best row first, plainest
// last; the rows that work on any device are here.
#pragma once
#include <span>

#include "forced_product.h"
#include "terms.h"

namespace peftkern {

struct ForwardProduct {
  const Terms& terms;
  const Tensor& x;      // [rows, in], dense
  OptionalTensor u;     // [rows, rank] float32, dense; none if rank is 0
  OptionalTensor bias;  // [out]
  OptionalTensor z;     // [rows, out] in x's dtype, to be filled with y before out_scale and bias

  int64_t rows() const { return x.size(0); }
};

struct GradientProduct {
  const Terms& terms;
  const Tensor& q;    // [rows, out], dense
  OptionalTensor dh;  // [rows, rank] float32, dense; none if rank is 0

  int64_t rows() const { return q.size(0); }
};

// A way to make Product: [rows, out] or [rows, in], dense, in the dtype of x or q.
template <class Backend, class Product>
struct Way {
  const char* name;
  bool (*accepts)(const Product&);
  Tensor (*make)(const Backend&, const Product&);
};

// The tables. Specialised in csrc/<device>/products.h.
template <class Backend, class Product>
std::span<const Way<Backend, Product>> ways();

inline const char* direction(const ForwardProduct&) { return "forward"; }
inline const char* direction(const GradientProduct&) { return "gradient"; }

// The first row that accepts, or the one that set_product() forces.
template <class Backend, class Product>
Tensor make(const Backend& backend, const Product& product) {
  const std::string forced = forced_product(direction(product));
  for (const auto& way : ways<Backend, Product>()) {
    if (!forced.empty() && forced != way.name) continue;
    if (way.accepts(product)) return way.make(backend, product);
  }
  fail(direction(product), " product: \"", forced, "\" is forced and takes no ", product.rows(),
       " rows of this weight");
}

// ---- rows for any device

// y = x W^T + bias by the library, on a weight dequantized for it.
template <class Backend>
Tensor library_base(const Backend& backend, const ForwardProduct& p, const OptionalTensor& bias) {
  const ScalarType dtype = p.x.scalar_type();
  return linear(p.x, p.terms.dense_weight(backend, dtype),
                bias ? OptionalTensor(to_dtype(*bias, dtype)) : std::nullopt);
}

// Makes y of the base product that base(backend, p, bias) gives, and adds the low-rank part and what else there is in
// one pass. The bias rides in the base product unless out_scale has to come between.
template <class Backend, class Base>
Tensor with_low_rank(const Backend& backend, const ForwardProduct& p, const Base& base) {
  const Terms& t = p.terms;
  const bool late_bias = t.out_scale.has_value();
  Tensor y = base(backend, p, late_bias ? std::nullopt : p.bias);
  if (!p.rows() || !(p.u || t.out_scale || p.z)) return y;
  const OptionalTensor scale = float_vector(t.out_scale);
  const OptionalTensor late = late_bias ? float_vector(p.bias) : std::nullopt;
  const OptionalTensor b = p.u ? OptionalTensor(dense(*t.B)) : std::nullopt;
  backend.low_rank_up({.u = const_floats(p.u),
                       .rows = p.rows(),
                       .columns = t.out,
                       .rank = t.rank,
                       .factor = b ? factor(*b, false, "B") : Factor{nullptr, DType::f32, false},
                       .alpha = static_cast<float>(t.scaling),
                       .dropout = {},
                       .out_scale = const_floats(scale),
                       .bias = const_floats(late),
                       .z = p.z ? p.z->mutable_data_ptr() : nullptr,
                       .y = y.mutable_data_ptr(),
                       .y_dtype = dtype_of(y, "y")});
  return y;
}

template <class Backend>
constexpr Way<Backend, ForwardProduct> kLibraryForward = {
    "library", [](const ForwardProduct&) { return true; },
    [](const Backend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, library_base<Backend>); }};

// dx += mask * (dh A), in place
template <class Backend>
Tensor add_low_rank(const Backend& backend, const GradientProduct& p, Tensor dx) {
  const Terms& t = p.terms;
  if (!p.rows() || !p.dh) return dx;
  const Tensor a = dense(*t.A);
  backend.low_rank_up({.u = const_floats(p.dh),
                       .rows = p.rows(),
                       .columns = t.in,
                       .rank = t.rank,
                       .factor = factor(a, true, "A"),
                       .alpha = 1.0f,
                       .dropout = t.dropout,
                       .out_scale = nullptr,
                       .bias = nullptr,
                       .z = nullptr,
                       .y = dx.mutable_data_ptr(),
                       .y_dtype = dtype_of(dx, "grad")});
  return dx;
}

template <class Backend>
constexpr Way<Backend, GradientProduct> kLibraryGradient = {
    "library", [](const GradientProduct&) { return true; },
    [](const Backend& backend, const GradientProduct& p) {
      return add_low_rank(backend, p, product(p.q, p.terms.dense_weight(backend, p.q.scalar_type())));
    }};

// Tells forced_product.h what the tables of a backend hold.
template <class Backend, class Product>
void add_product_names(const char* direction) {
  for (const auto& way : ways<Backend, Product>()) add_product_name(direction, way.name);
}

}  // namespace peftkern
