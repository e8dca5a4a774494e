// SPDX-License-Identifier: Apache-2.0
// The two products of a layer with its weight, and the ways to make them:
//
//   y = out_scale * (x W^T + s u B^T) + bias        the forward product, u [rows, rank] float32 given
//   dx = q W + mask * (dh A)                        the gradient product, dh [rows, rank] float32 given
//
// A way is a row {name, accepts, make, pays} of a table. csrc/<device>/products.h has the tables, best row first,
// plainest last; the rows that work on any device are here.
#pragma once
#include <span>

#include "choice.h"
#include "multi_low_rank.h"
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

// A way to make Product: [rows, out] or [rows, in], dense, in the dtype of x or q. make_mixed: with the low-rank terms
// of a batch whose rows choose their adapter, whose y is not set; null: the kernel of those follows.
template <class Backend, class Product>
struct Way {
  const char* name;
  bool (*accepts)(const Product&);
  Tensor (*make)(const Backend&, const Product&);
  bool (*pays)(const Product&) = nullptr;  // the rule where nothing is forced or timed; null: wherever it accepts
  Tensor (*make_mixed)(const Backend&, const Product&, const MultiLoraUp&) = nullptr;
};

// The tables. Specialised in csrc/<device>/products.h.
template <class Backend, class Product>
std::span<const Way<Backend, Product>> ways();

inline const char* direction(const ForwardProduct&) { return "forward"; }
inline const char* direction(const GradientProduct&) { return "gradient"; }

// What of a product decides which way is the fastest: the device, the sizes (rows and rank up to the next power of
// two), the dtypes, and what rides along.
inline int64_t bucket(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return n ? power : 0;
}

inline std::string common_description(const Terms& t, int64_t rows, ScalarType dtype) {
  std::ostringstream text;
  text << " M<=" << bucket(rows) << ' ' << t.in << 'x' << t.out << ' ' << name_of(dtype) << " weight ";
  if (t.absmax) {
    text << "NF4/" << t.block_size << (t.absmax->nested() ? " nested" : "");
  } else {
    text << name_of(t.weight.scalar_type());
  }
  if (t.rank) text << " r<=" << bucket(t.rank) << ' ' << name_of(t.A->scalar_type());
  return text.str();
}

inline std::string description(const ForwardProduct& p) {
  return "forward" + common_description(p.terms, p.rows(), p.x.scalar_type()) + (p.bias ? " bias" : "") +
         (p.terms.out_scale ? " out_scale" : "") + (p.z ? " z" : "");
}
inline std::string description(const GradientProduct& p) {
  return "gradient" + common_description(p.terms, p.rows(), p.q.scalar_type()) +
         (p.dh && p.terms.dropout.seed ? " dropout" : "");
}

inline const Tensor& activations(const ForwardProduct& p) { return p.x; }
inline const Tensor& activations(const GradientProduct& p) { return p.q; }

// The fastest of the ways that accept, by the clock: timed the first time, then remembered. Null where there is nothing
// to choose, or this is no moment to time: while a CUDA graph is captured, or while another thread does.
template <class Backend, class Product>
const Way<Backend, Product>* timed_way(const Backend& backend, const Product& product) {
  const std::string key = backend.identity() + ": " + description(product);
  const auto table = ways<Backend, Product>();
  if (const auto name = fastest_way(key)) {
    for (const auto& way : table)
      if (*name == way.name && way.accepts(product)) return &way;
    return nullptr;  // of an older table
  }
  if (!product.rows() || !backend.may_time()) return nullptr;
  const TimingTurn turn;
  if (!turn) return nullptr;
  Timed timed{key, {}};
  for (const auto& way : table) {
    if (!way.accepts(product)) continue;
    timed.seconds.emplace_back(way.name,
                               backend.seconds(activations(product), [&] { return way.make(backend, product); }));
  }
  remember(std::move(timed));
  return timed_way(backend, product);
}

// The way that set_product() forces, or the first row that accepts and pays.
template <class Backend, class Product>
const Way<Backend, Product>& way_by_rule(const Product& product) {
  const std::string forced = forced_product(direction(product));
  for (const auto& way : ways<Backend, Product>()) {
    if (forced.empty() ? way.pays && !way.pays(product) : forced != way.name) continue;
    if (way.accepts(product)) return way;
  }
  fail(direction(product), " product: \"", forced, "\" is forced and takes no ", product.rows(),
       " rows of this weight");
}

// The way that set_product() forces, else the fastest if peftkern.autotune is on, else by the rule.
template <class Backend, class Product>
const Way<Backend, Product>& chosen_way(const Backend& backend, const Product& product) {
  if (autotune_on() && forced_product(direction(product)).empty()) {
    if (const auto* way = timed_way(backend, product)) return *way;
  }
  return way_by_rule<Backend>(product);
}

template <class Backend, class Product>
Tensor make(const Backend& backend, const Product& product) {
  return chosen_way(backend, product).make(backend, product);
}

// A product of a batch whose rows choose their adapter. up.y and y_dtype are set here.
template <class Backend, class Product>
Tensor make_mixed(const Backend& backend, const Product& product, MultiLoraUp up) {
  const auto& way = chosen_way(backend, product);
  if (way.make_mixed) return way.make_mixed(backend, product, up);
  Tensor y = way.make(backend, product);
  up.y = y.mutable_data_ptr();
  up.y_dtype = dtype_of(y, "y");
  backend.multi_lora_up(up);
  return y;
}

// ---- rows for any device

// y = x W^T + bias by the library, on a weight dequantized for it.
template <class Backend>
Tensor library_base(const Backend& backend, const ForwardProduct& p, const OptionalTensor& bias) {
  const ScalarType dtype = p.x.scalar_type();
  return linear(p.x, p.terms.dense_weight(backend, dtype),
                bias ? OptionalTensor(to_dtype(*bias, dtype)) : std::nullopt);
}

// y = out_scale * (y + s u B^T) + bias in one pass, in place or, without accumulate, with 0 for the second y.
template <class Backend>
void low_rank_pass(const Backend& backend, const ForwardProduct& p, const OptionalTensor& bias, Tensor& y,
                   bool accumulate) {
  const Terms& t = p.terms;
  const OptionalTensor scale = float_vector(t.out_scale), offset = float_vector(bias);
  const OptionalTensor b = p.u ? OptionalTensor(dense(*t.B)) : std::nullopt;
  backend.low_rank_up({.u = const_floats(p.u),
                       .rows = p.rows(),
                       .columns = t.out,
                       .rank = t.rank,
                       .factor = b ? factor(*b, false, "B") : Factor{nullptr, DType::f32, false},
                       .alpha = static_cast<float>(t.scaling),
                       .dropout = {},
                       .out_scale = const_floats(scale),
                       .bias = const_floats(offset),
                       .z = p.z ? p.z->mutable_data_ptr() : nullptr,
                       .y = y.mutable_data_ptr(),
                       .y_dtype = dtype_of(y, "y"),
                       .accumulate = accumulate});
}

// Makes y of the base product that base(backend, p, bias) gives, and adds the low-rank part and what else there is in
// one pass. The bias rides in the base product unless that takes none, or out_scale has to come between.
template <class Backend, class Base>
Tensor with_low_rank(const Backend& backend, const ForwardProduct& p, const Base& base, bool takes_bias = true) {
  const bool late_bias = p.bias && (p.terms.out_scale || !takes_bias);
  Tensor y = base(backend, p, late_bias ? std::nullopt : p.bias);
  if (p.rows() && (p.u || p.terms.out_scale || late_bias || p.z)) {
    low_rank_pass(backend, p, late_bias ? p.bias : std::nullopt, y, /*accumulate=*/true);
  }
  return y;
}

template <class Backend>
constexpr Way<Backend, ForwardProduct> kLibraryForward = {
    "library", [](const ForwardProduct&) { return true; },
    [](const Backend& backend, const ForwardProduct& p) { return with_low_rank(backend, p, library_base<Backend>); }};

// y = s u B^T + bias first, then the library adds x W^T to it: y is written, then read and written inside of the
// product, where the pass after a library's product reads and writes it by itself. As there, y is rounded to its dtype
// between the two terms; here it is the smaller one that is rounded twice.
template <class Backend>
constexpr Way<Backend, ForwardProduct> kLibraryAccumulateForward = {
    "library_accumulate",
    [](const ForwardProduct& p) { return Backend::addmm() && p.rows() > 0 && p.u && !p.terms.out_scale && !p.z; },
    [](const Backend& backend, const ForwardProduct& p) {
      const ScalarType dtype = p.x.scalar_type();
      Tensor y = empty(p.x, {p.rows(), p.terms.out}, dtype);
      low_rank_pass(backend, p, p.bias, y, /*accumulate=*/false);
      add_product<Backend>(y, p.x, call_aten("aten::t", "", p.terms.dense_weight(backend, dtype)));
      return y;
    }};

// dx = dx + mask * (dh A), or without accumulate only the second term
template <class Backend>
void low_rank_pass(const Backend& backend, const GradientProduct& p, Tensor& dx, bool accumulate) {
  const Terms& t = p.terms;
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
                       .y_dtype = dtype_of(dx, "grad"),
                       .accumulate = accumulate});
}

// dx += mask * (dh A), in place
template <class Backend>
Tensor add_low_rank(const Backend& backend, const GradientProduct& p, Tensor dx) {
  if (p.rows() && p.dh) low_rank_pass(backend, p, dx, /*accumulate=*/true);
  return dx;
}

template <class Backend>
constexpr Way<Backend, GradientProduct> kLibraryGradient = {
    "library", [](const GradientProduct&) { return true; },
    [](const Backend& backend, const GradientProduct& p) {
      return add_low_rank(backend, p, product(p.q, p.terms.dense_weight(backend, p.q.scalar_type())));
    }};

// As for the forward product; the mask is on the term that comes first, so dropout makes no difference.
template <class Backend>
constexpr Way<Backend, GradientProduct> kLibraryAccumulateGradient = {
    "library_accumulate", [](const GradientProduct& p) { return Backend::addmm() && p.rows() > 0 && p.dh; },
    [](const Backend& backend, const GradientProduct& p) {
      const ScalarType dtype = p.q.scalar_type();
      Tensor dx = empty(p.q, {p.rows(), p.terms.in}, dtype);
      low_rank_pass(backend, p, dx, /*accumulate=*/false);
      add_product<Backend>(dx, p.q, p.terms.dense_weight(backend, dtype));
      return dx;
    }};

// Tells choice.h what the tables of a backend hold.
template <class Backend, class Product>
void add_product_names(const char* direction) {
  for (const auto& way : ways<Backend, Product>()) add_product_name(direction, way.name);
}

}  // namespace peftkern
