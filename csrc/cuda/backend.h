// SPDX-License-Identifier: Apache-2.0
// CUDA as csrc/adapted_linear.h and csrc/nf4_ops.h see it: the launchers of kernels.h on the device and current stream
// of a tensor, with errors as exceptions. CpuBackend has the same members.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <string>

#include "../tensors.h"
#include "kernels.h"

namespace peftkern {

// torch's current stream. Stream::nativeHandle() would be the way, but needs torch 2.13; and linking libtorch_cuda
// would keep the extension from loading in a CPU build of torch.
inline cudaStream_t current_cuda_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t device, void** stream);
  static const auto get_stream = library_function<GetStream>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream && get_stream(device, &stream) == 0, "peftkern: this build of torch has no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Of the current device.
inline int cuda_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  STD_TORCH_CHECK(known, "peftkern: no CUDA device tells its attributes");
  return value;
}

class CudaBackend {
 public:
  static constexpr int64_t kScoreParts = peftkern::kScoreParts;
  static constexpr bool kGradSums = true;  // low_rank_grad makes LowRankGrad::sums of 16-bit x

  explicit CudaBackend(const torch::stable::Tensor& tensor)
      : like_(tensor), guard_(tensor.get_device_index()), stream_(current_cuda_stream(tensor.get_device_index())) {}

  // An uninitialised dense weight; torch's caching allocator makes this cheap.
  Tensor empty_weight(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) const {
    return empty(like, shape, dtype);
  }

  // As CpuBackend's. No moment for it is while a CUDA graph is captured.
  std::string identity() const;
  bool may_time() const;
  double seconds(const Tensor& like, const std::function<void()>& call) const;

  static Addmm addmm() {
    static const auto function = library_function<Addmm>("libtorch_cuda.so", "aoti_torch_cuda_addmm_out");
    return function;
  }

  void low_rank_down(LowRankDown args) const {
    const Tensor workspace = floats(low_rank_down_workspace(args));
    args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    check(launch_low_rank_down(args, stream_), "low_rank_down");
  }
  void low_rank_up(const LowRankUp& args) const { check(launch_low_rank_up(args, stream_), "low_rank_up"); }
  void low_rank_grad(LowRankGrad args) const {
    const Tensor workspace = floats(low_rank_grad_workspace(args));
    args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    check(launch_low_rank_grad(args, stream_), "low_rank_grad");
  }
  void column_sums(ColumnSums args) const {
    const Tensor workspace = floats(column_sums_workspace(args));
    args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    check(launch_column_sums(args, stream_), "column_sums");
  }

  void check_ranks(const int32_t*, int64_t, int64_t) const {}  // they are on the device: kernels clamp them
  void multi_lora_plan(const MultiLoraPlan& args) const {
    check(launch_multi_lora_plan(args, stream_), "multi_lora_plan");
  }
  void multi_lora_down(MultiLoraDown args) const {
    const Tensor workspace = floats(multi_lora_down_workspace(args));
    args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    check(launch_multi_lora_down(args, stream_), "multi_lora_down");
  }
  void multi_lora_up(const MultiLoraUp& args) const { check(launch_multi_lora_up(args, stream_), "multi_lora_up"); }
  void multi_lora_grad(MultiLoraGrad args) const {
    const Tensor workspace = floats(multi_lora_grad_workspace(args));
    args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    check(launch_multi_lora_grad(args, stream_), "multi_lora_grad");
  }

  void quantize_nf4(const QuantizeNf4& args) const { check(launch_quantize_nf4(args, stream_), "quantize_nf4"); }
  void dequantize_nf4(const DequantizeNf4& args) const {
    check(launch_dequantize_nf4(args, stream_), "dequantize_nf4");
  }
  void nf4_forward(const Nf4Forward& args) const { check(launch_nf4_forward(args, stream_), "nf4_forward"); }
  void nf4_gradient(const Nf4Gradient& args) const { check(launch_nf4_gradient(args, stream_), "nf4_gradient"); }
  void quantize_absmax(QuantizeAbsmax args) const {
    const Tensor workspace = empty(like_, {quantize_absmax_workspace(args)}, ScalarType::Double);
    args.workspace = static_cast<double*>(workspace.mutable_data_ptr());
    check(launch_quantize_absmax(args, stream_), "quantize_absmax");
  }
  void dequantize_absmax(const DequantizeAbsmax& args) const {
    check(launch_dequantize_absmax(args, stream_), "dequantize_absmax");
  }

  void squared_row_norms(const SquaredRowNorms& args) const {
    check(launch_squared_row_norms(args, stream_), "squared_row_norms");
  }
  void dora_norm(const DoraNorm& args) const { check(launch_dora_norm(args, stream_), "dora_norm"); }

  void jacobi_svd(const JacobiSvd& args) const { check(launch_jacobi_svd(args, stream_), "jacobi_svd"); }

  void update_importance(const ImportanceUpdate& args) const {
    check(launch_update_importance(args, stream_), "update_importance_");
  }
  void rank_mask(const RankMask& args) const { check(launch_rank_mask(args, stream_), "rank_mask"); }
  void mask_ranks(const MaskRanks& args) const { check(launch_mask_ranks(args, stream_), "mask_ranks_"); }
  void orthogonality(const Orthogonality& args) const { check(launch_orthogonality(args, stream_), "orthogonality"); }
  void orthogonality_grad(const OrthogonalityGrad& args) const {
    check(launch_orthogonality_grad(args, stream_), "orthogonality_backward");
  }

 private:
  // Uninitialised memory of the stream: torch's allocator hands it out again in the order of launches.
  Tensor floats(int64_t n) const { return empty(like_, {n}, ScalarType::Float); }

  // STD_CUDA_CHECK would need libtorch_cuda, see above.
  static void check(cudaError_t error, const char* op) {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
  }

  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;  // restores the caller's device at the end
  cudaStream_t stream_;
};

}  // namespace peftkern
