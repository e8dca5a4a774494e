// SPDX-License-Identifier: Apache-2.0
// How CUDA makes the products of csrc/products.h: best first, plainest last.
#pragma once
#include "../products.h"
#include "backend.h"

namespace peftkern {

inline constexpr Way<CudaBackend, ForwardProduct> kCudaForward[] = {
    kLibraryAccumulateForward<CudaBackend>,
    kLibraryForward<CudaBackend>,
};

inline constexpr Way<CudaBackend, GradientProduct> kCudaGradient[] = {
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
