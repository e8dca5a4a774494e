# SPDX-License-Identifier: Apache-2.0
"""DoRA (Liu et al. 2024, arXiv 2402.09353), what ``use_dora=True`` adds to a LoRA layer: ``lora_magnitude_vector``
[out], the norms that the rows of its weight have, by ``out_scale = magnitude / norm``. The norm is that of the rows of
``W + s B A``, made anew in each call, and has no gradient (section 4.3 of the paper, and HF PEFT's way)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.dora_norm import dora_linear, dora_norm
from ..ops.tensor_cache import TensorCache

if TYPE_CHECKING:
    from .lora import LoRALinear


def start_magnitude(layer: LoRALinear) -> None:
    """The norms as they are, so that the layer starts as plain LoRA would."""
    layer._dora_cache = TensorCache()  # of the squared rows of the frozen weight
    norm = adapted_norm(layer).to(layer.lora_A.dtype)
    layer.lora_magnitude_vector = nn.Parameter(norm)


def adapted_norm(layer: LoRALinear) -> Tensor:
    """float32 [out]: the norms of the rows of W + s B A."""
    return dora_norm(layer.base_weight(), layer.lora_A, layer.lora_B, layer.scaling, cache=layer._dora_cache)


def out_scale(layer: LoRALinear) -> Tensor:
    return layer.lora_magnitude_vector / adapted_norm(layer)


def dora_forward(layer: LoRALinear, x: Tensor) -> Tensor:
    """One fused call; with dropout, which reaches the base product too, that of HF PEFT in two (ops.dora_linear)."""
    p = layer.lora_dropout if layer.training else 0.0
    return dora_linear(
        x, layer.base_weight(), layer.lora_A, layer.lora_B, out_scale(layer), scaling=layer.scaling, bias=layer.bias,
        dropout=(lambda x: F.dropout(x, p)) if p > 0.0 else None,
    )  # fmt: skip


@torch.no_grad()
def dora_delta(layer: LoRALinear, weight: Tensor, low_rank: Tensor) -> Tensor:
    """float32: what the layer adds to its dense weight, scaling * B A being low_rank."""
    if layer.merged:
        raise RuntimeError(
            "delta_weight: expected an unmerged DoRA layer, whose change depends on the weight; unmerge()"
        )
    return out_scale(layer).float()[:, None] * (weight + low_rank) - weight
