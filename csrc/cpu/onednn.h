// SPDX-License-Identifier: Apache-2.0
// oneDNN's linear layer, which torch has for its compiler, called by the dispatcher.
#pragma once
#include "../tensors.h"

namespace peftkern {

// x W^T + bias in fp32. weight [out, in] may be a transposed view: oneDNN takes its strides as they are.
inline Tensor onednn_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const std::vector<std::optional<double>> scalars;
  return call_aten("mkldnn::_linear_pointwise", "", x, weight, bias, std::string("none"), scalars,
                   std::optional<std::string>());
}

// Whether this torch was built with it.
inline bool has_onednn() {
  static const bool found = [] {
    try {
      const Tensor one = torch::stable::empty({1, 1}, ScalarType::Float);
      onednn_linear(one, one, std::nullopt);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return found;
}

}  // namespace peftkern
