// SPDX-License-Identifier: Apache-2.0
// Every CUDA kernel of the package, as the host sees it: raw pointers and sizes in a struct (low_rank.h and nf4.h say
// what is computed, and give the shapes), a stream, and the launch error. Torch-free. Nothing here synchronizes,
// allocates or reads back, so every launch can be captured in a CUDA graph.
#pragma once
#include <cuda_runtime_api.h>

#include "../dora_norm.h"
#include "../jacobi_svd.h"
#include "../low_rank.h"
#include "../multi_low_rank.h"
#include "../nf4.h"
#include "../nf4_product.h"
#include "../rank_allocation.h"

namespace peftkern {

// Floats that the workspace of these has to hold; none is needed where it is 0.
int64_t low_rank_down_workspace(const LowRankDown& args);
int64_t low_rank_grad_workspace(const LowRankGrad& args);
int64_t column_sums_workspace(const ColumnSums& args);
int64_t multi_lora_down_workspace(const MultiLoraDown& args);
int64_t multi_lora_grad_workspace(const MultiLoraGrad& args);
int64_t quantize_absmax_workspace(const QuantizeAbsmax& args);  // doubles

cudaError_t launch_low_rank_down(const LowRankDown& args, cudaStream_t stream);
cudaError_t launch_low_rank_up(const LowRankUp& args, cudaStream_t stream);
cudaError_t launch_low_rank_grad(const LowRankGrad& args, cudaStream_t stream);
cudaError_t launch_column_sums(const ColumnSums& args, cudaStream_t stream);

cudaError_t launch_multi_lora_plan(const MultiLoraPlan& args, cudaStream_t stream);
cudaError_t launch_multi_lora_down(const MultiLoraDown& args, cudaStream_t stream);
cudaError_t launch_multi_lora_up(const MultiLoraUp& args, cudaStream_t stream);
cudaError_t launch_multi_lora_grad(const MultiLoraGrad& args, cudaStream_t stream);

cudaError_t launch_quantize_nf4(const QuantizeNf4& args, cudaStream_t stream);
cudaError_t launch_dequantize_nf4(const DequantizeNf4& args, cudaStream_t stream);
cudaError_t launch_quantize_absmax(const QuantizeAbsmax& args, cudaStream_t stream);
cudaError_t launch_dequantize_absmax(const DequantizeAbsmax& args, cudaStream_t stream);

cudaError_t launch_squared_row_norms(const SquaredRowNorms& args, cudaStream_t stream);
cudaError_t launch_dora_norm(const DoraNorm& args, cudaStream_t stream);
// Nf4Forward::splits that fill a GPU, and the floats of Nf4Forward::workspace for args.splits.
int64_t nf4_forward_splits(int64_t rows, int64_t out, int64_t in, int64_t multiprocessors);
int64_t nf4_forward_workspace(const Nf4Forward& args);
cudaError_t launch_nf4_forward(const Nf4Forward& args, cudaStream_t stream);
cudaError_t launch_nf4_gradient(const Nf4Gradient& args, cudaStream_t stream);

cudaError_t launch_jacobi_svd(const JacobiSvd& args, cudaStream_t stream);

constexpr int64_t kScoreParts = 8;  // slabs of B's rows in ImportanceUpdate::workspace
cudaError_t launch_update_importance(const ImportanceUpdate& args, cudaStream_t stream);
cudaError_t launch_rank_mask(const RankMask& args, cudaStream_t stream);
cudaError_t launch_mask_ranks(const MaskRanks& args, cudaStream_t stream);
cudaError_t launch_orthogonality(const Orthogonality& args, cudaStream_t stream);
cudaError_t launch_orthogonality_grad(const OrthogonalityGrad& args, cudaStream_t stream);

}  // namespace peftkern
