// SPDX-License-Identifier: Apache-2.0
// AdaLoRA's rank allocation on tensors, once for all devices: check, allocate, call the backend. What is computed:
// rank_allocation.h. Layers may lack gradients; A, E and B of a layer share a dtype, all tensors one device.
#pragma once
#include <algorithm>
#include <ostream>
#include <tuple>

#include "rank_allocation.h"
#include "tensors.h"

namespace peftkern {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

// The name of a tensor of a list. Put together only for a message: there are a thousand tensors a call.
struct Element {
  const char* list;
  size_t index;
};

inline std::ostream& operator<<(std::ostream& out, const Element& e) { return out << e.list << "[" << e.index << "]"; }

inline void check_length(size_t got, size_t expected, const char* argument) {
  PEFTKERN_CHECK(got == expected, argument, ": expected ", expected, " tensors, one a layer, got ", got);
}

inline void check_element_dtype(const Tensor& t, ScalarType expected, const Element& name) {
  PEFTKERN_CHECK(t.scalar_type() == expected, name, ": expected dtype ", name_of(expected), ", got ",
                 name_of(t.scalar_type()));
}

inline DType element_dtype(const Tensor& t, const Element& name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::BFloat16) return DType::bf16;
  if (type == ScalarType::Half) return DType::f16;
  fail(name, ": expected dtype float32, bfloat16 or float16, got ", name_of(type));
}

inline void check_element_device(const Tensor& t, const Tensor& reference, const Element& name) {
  PEFTKERN_CHECK(t.is_cpu() == reference.is_cpu() && t.get_device_index() == reference.get_device_index(), name,
                 ": expected the device of the first tensor, got a tensor on another device");
}

// [rank, columns] of lora_A, or [columns, rank] of lora_B.
inline OrthogonalFactor checked_factor(const Tensor& t, const Tensor& reference, bool rank_major, const Element& name) {
  PEFTKERN_CHECK(t.dim() == 2, name, ": expected a matrix, got shape ", shape_string(t.sizes()));
  check_element_device(t, reference, name);
  const int64_t rank = t.size(rank_major ? 0 : 1), columns = t.size(rank_major ? 1 : 0);
  return {t.const_data_ptr(), element_dtype(t, name), rank_major, rank, columns, 0, nullptr};
}

// The layers of an op as the kernels take them, and whatever copies of tensors that needs.
struct TripletLayers {
  std::vector<TripletLayer> layers;
  Tensors copies;
  int64_t triplets = 0, state = 0;

  const void* data(const Tensor& t) {
    if (t.is_contiguous()) return t.const_data_ptr();
    copies.push_back(dense(t));
    return copies.back().const_data_ptr();
  }

  const void* gradient(const OptionalTensor& grad, const Tensor& parameter, const Element& name) {
    if (!grad) return nullptr;
    check_element_dtype(*grad, parameter.scalar_type(), name);
    check_element_device(*grad, parameter, name);
    const auto got = grad->sizes(), expected = parameter.sizes();
    PEFTKERN_CHECK(std::equal(got.begin(), got.end(), expected.begin(), expected.end()), name, ": expected shape ",
                   shape_string(expected), ", got ", shape_string(got));
    return data(*grad);
  }

  TripletLayers(const Tensors& A, const Tensors& E, const Tensors& B, const OptionalTensors& grad_A,
                const OptionalTensors& grad_E, const OptionalTensors& grad_B) {
    check_length(E.size(), A.size(), "E");
    check_length(B.size(), A.size(), "B");
    check_length(grad_A.size(), A.size(), "grad_A");
    check_length(grad_E.size(), A.size(), "grad_E");
    check_length(grad_B.size(), A.size(), "grad_B");
    layers.reserve(A.size());
    for (size_t i = 0; i < A.size(); ++i) {
      const OrthogonalFactor a = checked_factor(A[i], A[0], true, {"A", i});
      const OrthogonalFactor b = checked_factor(B[i], A[0], false, {"B", i});
      const Element b_name{"B", i}, e_name{"E", i};
      PEFTKERN_CHECK(b.rank == a.rank, b_name, ": expected ", a.rank, " columns, the rank of A, got ", b.rank);
      PEFTKERN_CHECK(E[i].numel() == a.rank, e_name, ": expected ", a.rank, " elements, the rank of A, got shape ",
                     shape_string(E[i].sizes()));
      check_element_dtype(E[i], A[i].scalar_type(), e_name);
      check_element_dtype(B[i], A[i].scalar_type(), b_name);
      check_element_device(E[i], A[0], e_name);
      // E is read here; only MaskRanks, which makes its layers itself, writes it
      layers.push_back({.A = data(A[i]),
                        .E = const_cast<void*>(data(E[i])),
                        .B = data(B[i]),
                        .grad_A = gradient(grad_A[i], A[i], {"grad_A", i}),
                        .grad_E = gradient(grad_E[i], E[i], {"grad_E", i}),
                        .grad_B = gradient(grad_B[i], B[i], {"grad_B", i}),
                        .dtype = a.dtype,
                        .in = a.columns,
                        .out = b.columns,
                        .rank = a.rank,
                        .first = triplets,
                        .state = state});
      triplets += a.rank;
      state = layers.back().state_end();
    }
  }

  // table: int64 [10, layers] on the host: addresses of A, E, B and their gradients, which are believed, then the dtype
  // (a DType), in, out and rank.
  explicit TripletLayers(const Tensor& table) {
    check_dtype(table, ScalarType::Long, "table");
    PEFTKERN_CHECK(table.is_cpu() && table.is_contiguous(), "table: expected a contiguous tensor on the CPU");
    PEFTKERN_CHECK(table.dim() == 2 && table.size(0) == 10, "table: expected shape [10, layers], got ",
                   shape_string(table.sizes()));
    const int64_t n = table.size(1);
    const int64_t* values = static_cast<const int64_t*>(table.const_data_ptr());
    layers.reserve(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) {
      const auto value = [&](int64_t row) { return values[row * n + i]; };
      const auto address = [&](int64_t row) { return reinterpret_cast<void*>(value(row)); };
      PEFTKERN_CHECK(value(6) >= 0 && value(6) <= static_cast<int64_t>(DType::f16), "table: expected a DType, got ",
                     value(6));
      layers.push_back({.A = address(0),
                        .E = address(1),
                        .B = address(2),
                        .grad_A = address(3),
                        .grad_E = address(4),
                        .grad_B = address(5),
                        .dtype = static_cast<DType>(value(6)),
                        .in = value(7),
                        .out = value(8),
                        .rank = value(9),
                        .first = triplets,
                        .state = state});
      triplets += value(9);
      state = layers.back().state_end();
    }
  }
};

// sensitivity, uncertainty: float32, the state, updated. scores: float32 [sum of ranks].
template <class Backend>
Tensor update_importance(const TripletLayers& t, const Tensor& sensitivity, const Tensor& uncertainty, double beta1,
                         double beta2, const OptionalTensor& grad_scale) {
  for (const auto& [buffer, name] : {std::pair(&sensitivity, "sensitivity"), std::pair(&uncertainty, "uncertainty")}) {
    check_dtype(*buffer, ScalarType::Float, name);
    check_shape(*buffer, {t.state}, name);
    PEFTKERN_CHECK(buffer->is_contiguous(), name, ": expected a contiguous tensor");
    check_device(*buffer, sensitivity, name, "sensitivity");
  }
  PEFTKERN_CHECK(beta1 >= 0.0 && beta1 < 1.0, "beta1: expected 0 <= beta1 < 1, got ", beta1);
  PEFTKERN_CHECK(beta2 >= 0.0 && beta2 < 1.0, "beta2: expected 0 <= beta2 < 1, got ", beta2);
  if (grad_scale) {
    check_dtype(*grad_scale, ScalarType::Float, "grad_scale");
    PEFTKERN_CHECK(grad_scale->numel() == 1, "grad_scale: expected one element, got ", grad_scale->numel());
    check_device(*grad_scale, sensitivity, "grad_scale", "sensitivity");
  }
  Tensor scores = empty(sensitivity, {t.triplets}, ScalarType::Float);
  Tensor workspace = empty(sensitivity, {Backend::kScoreParts * t.triplets}, ScalarType::Float);
  const ImportanceUpdate args{
      .layers = t.layers.data(),
      .layer_count = static_cast<int64_t>(t.layers.size()),
      .triplets = t.triplets,
      .beta1 = beta1,
      .beta2 = beta2,
      .grad_scale = grad_scale ? static_cast<const float*>(grad_scale->const_data_ptr()) : nullptr,
      .sensitivity = static_cast<float*>(sensitivity.mutable_data_ptr()),
      .uncertainty = static_cast<float*>(uncertainty.mutable_data_ptr()),
      .scores = static_cast<float*>(scores.mutable_data_ptr()),
      .workspace = static_cast<float*>(workspace.mutable_data_ptr())};
  if (t.triplets) Backend(sensitivity).update_importance(args);
  return scores;
}

// A, E, B: [rank, in], [rank, 1], [out, rank] of every layer, each gradient as its parameter or None.
template <class Backend>
Tensor update_importance_lists(const Tensors& A, const Tensors& E, const Tensors& B, const OptionalTensors& grad_A,
                               const OptionalTensors& grad_E, const OptionalTensors& grad_B, const Tensor& sensitivity,
                               const Tensor& uncertainty, double beta1, double beta2,
                               const OptionalTensor& grad_scale) {
  if (!A.empty()) check_device(sensitivity, A[0], "sensitivity", "A[0]");
  const TripletLayers layers(A, E, B, grad_A, grad_E, grad_B);
  return update_importance<Backend>(layers, sensitivity, uncertainty, beta1, beta2, grad_scale);
}

template <class Backend>
Tensor update_importance_table(const Tensor& table, const Tensor& sensitivity, const Tensor& uncertainty, double beta1,
                               double beta2, const OptionalTensor& grad_scale) {
  return update_importance<Backend>(TripletLayers(table), sensitivity, uncertainty, beta1, beta2, grad_scale);
}

// scores: float32 [triplets] -> keep: bool [triplets]
template <class Backend>
Tensor rank_mask(const Tensor& scores, int64_t budget, bool exact) {
  check_dtype(scores, ScalarType::Float, "scores");
  PEFTKERN_CHECK(scores.dim() == 1, "scores: expected shape [triplets], got ", shape_string(scores.sizes()));
  const Tensor source = dense(scores);
  Tensor keep = empty(scores, {scores.size(0)}, ScalarType::Bool);
  const RankMask args{.scores = static_cast<const float*>(source.const_data_ptr()),
                      .triplets = scores.size(0),
                      .budget = budget,
                      .exact = exact,
                      .keep = static_cast<uint8_t*>(keep.mutable_data_ptr())};
  if (args.triplets) Backend(scores).rank_mask(args);
  return keep;
}

template <class Backend>
void mask_ranks(const std::vector<TripletLayer>& layers, int64_t triplets, const Tensor& keep) {
  check_dtype(keep, ScalarType::Bool, "keep");
  check_shape(keep, {triplets}, "keep");
  const Tensor source = dense(keep);
  const MaskRanks args{.layers = layers.data(),
                       .layer_count = static_cast<int64_t>(layers.size()),
                       .keep = static_cast<const uint8_t*>(source.const_data_ptr())};
  if (triplets) Backend(keep).mask_ranks(args);
}

// E: of every layer, contiguous, in the order of keep [triplets]; zeroed where keep is false.
template <class Backend>
void mask_ranks_list(const Tensors& E, const Tensor& keep) {
  std::vector<TripletLayer> layers;
  int64_t triplets = 0;
  for (size_t i = 0; i < E.size(); ++i) {
    const Element name{"E", i};
    check_element_device(E[i], keep, name);
    PEFTKERN_CHECK(E[i].is_contiguous(), name, ": expected a contiguous tensor");
    TripletLayer layer{};
    layer.E = E[i].mutable_data_ptr();
    layer.dtype = element_dtype(E[i], name);
    layer.rank = E[i].numel();
    layer.first = triplets;
    layers.push_back(layer);
    triplets += layer.rank;
  }
  mask_ranks<Backend>(layers, triplets, keep);
}

template <class Backend>
void mask_ranks_table(const Tensor& table, const Tensor& keep) {
  const TripletLayers t(table);
  mask_ranks<Backend>(t.layers, t.triplets, keep);
}

// The factors of every layer, A's first, and whatever copies that needs.
struct OrthogonalFactors {
  std::vector<OrthogonalFactor> factors;
  Tensors copies;
  int64_t deviations = 0;

  OrthogonalFactors(const Tensors& A, const Tensors& B) {
    PEFTKERN_CHECK(!A.empty() || !B.empty(), "A and B: expected at least one tensor");
    const Tensor& reference = A.empty() ? B[0] : A[0];
    const auto add = [&](const Tensors& list, bool rank_major, const char* argument) {
      for (size_t i = 0; i < list.size(); ++i) {
        OrthogonalFactor f = checked_factor(list[i], reference, rank_major, {argument, i});
        if (!list[i].is_contiguous()) {
          copies.push_back(dense(list[i]));
          f.data = copies.back().const_data_ptr();
        }
        f.deviation = deviations;
        deviations += f.rank * f.rank;
        factors.push_back(f);
      }
    };
    add(A, true, "A");
    add(B, false, "B");
  }
};

// A: [rank, in], B: [out, rank] of every layer -> value float32 [], and for the gradient deviations and norms.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> orthogonality(const Tensors& A, const Tensors& B, bool squared) {
  const OrthogonalFactors f(A, B);
  const Tensor& like = A.empty() ? B[0] : A[0];
  Tensor value = empty(like, {}, ScalarType::Float);
  Tensor deviations = empty(like, {f.deviations}, ScalarType::Float);
  Tensor norms = empty(like, {static_cast<int64_t>(f.factors.size())}, ScalarType::Float);
  Backend(like).orthogonality({.factors = f.factors.data(),
                               .factor_count = static_cast<int64_t>(f.factors.size()),
                               .squared = squared,
                               .deviations = static_cast<float*>(deviations.mutable_data_ptr()),
                               .norms = static_cast<float*>(norms.mutable_data_ptr()),
                               .value = static_cast<float*>(value.mutable_data_ptr())});
  return {value, deviations, norms};
}

// grad: float32 [] -> the gradients of A and B, in their dtypes.
template <class Backend>
std::tuple<Tensors, Tensors> orthogonality_backward(const Tensor& grad, const Tensors& A, const Tensors& B,
                                                    const Tensor& deviations, const Tensor& norms, bool squared) {
  OrthogonalFactors f(A, B);
  const Tensor& like = A.empty() ? B[0] : A[0];
  for (const auto& [t, size, name] :
       {std::tuple(&grad, int64_t{1}, "grad"), std::tuple(&deviations, f.deviations, "deviations"),
        std::tuple(&norms, static_cast<int64_t>(f.factors.size()), "norms")}) {
    check_dtype(*t, ScalarType::Float, name);
    PEFTKERN_CHECK(t->numel() == size, name, ": expected ", size, " elements, got ", t->numel());
    check_device(*t, like, name, "the first factor");
  }
  Tensors dA, dB;
  const auto add = [&](const Tensors& list, Tensors& grads) {
    for (const Tensor& t : list) {
      grads.push_back(empty(t, {t.size(0), t.size(1)}, t.scalar_type()));
      f.factors[dA.size() + dB.size() - 1].grad = grads.back().mutable_data_ptr();
    }
  };
  add(A, dA);
  add(B, dB);
  const Tensor upstream = dense(grad), d = dense(deviations), n = dense(norms);
  Backend(like).orthogonality_grad({.factors = f.factors.data(),
                                    .factor_count = static_cast<int64_t>(f.factors.size()),
                                    .squared = squared,
                                    .upstream = static_cast<const float*>(upstream.const_data_ptr()),
                                    .deviations = static_cast<const float*>(d.const_data_ptr()),
                                    .norms = static_cast<const float*>(n.const_data_ptr())});
  return {dA, dB};
}

}  // namespace peftkern
