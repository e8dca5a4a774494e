# SPDX-License-Identifier: Apache-2.0
"""The functional API: one file per op, which holds the public function, its fake kernel and its gradient."""

from .adapted_linear import adapted_linear, lora_linear, nf4_linear
from .jacobi_svd import jacobi_svd
from .multi_lora import multi_lora_linear
from .nf4 import NF4Config, NF4Weight, dequantize_nf4, quantize_nf4
from .rank_allocation import mask_ranks, orthogonality_penalty, rank_mask, update_importance

__all__ = [
    "NF4Config",
    "NF4Weight",
    "adapted_linear",
    "dequantize_nf4",
    "jacobi_svd",
    "lora_linear",
    "mask_ranks",
    "multi_lora_linear",
    "nf4_linear",
    "orthogonality_penalty",
    "quantize_nf4",
    "rank_mask",
    "update_importance",
]
