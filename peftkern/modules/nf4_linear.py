# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import NF4Config, dequantize_nf4, nf4_linear, quantize_nf4
from .base_weight import BaseWeight


class NF4Linear(BaseWeight, nn.Linear):
    """``nn.Linear`` with its weight frozen in 4-bit NormalFloat (QLoRA, arXiv 2305.14314).

    weight: uint8 [out_features, in_features / 2] and its scales (modules/base_weight.py); bias: [out_features] or None.
    The product runs in the dtype of x. ``state_dict`` is plain tensors; bitsandbytes' ``Linear4bit`` entries load too.
    Raises ValueError for sizes < 1 or a bad block_size.

    >>> NF4Linear.from_linear(nn.Linear(64, 32))(torch.randn(4, 64)).shape
    torch.Size([4, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 64,
        double_quant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_features(in_features, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.nf4_config = NF4Config(block_size, double_quant)
        dense = torch.empty(out_features, in_features, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        self.set_base_weight(quantize_nf4(dense, block_size, double_quant))
        self.bias = init_bias(bias, in_features, out_features, dense)

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = False) -> NF4Linear:
        """linear with its weight quantized; the bias is shared."""
        check_is_linear(linear)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.set_base_weight(quantize_nf4(linear.weight, block_size, double_quant))
        self.bias = linear.bias
        return self

    def forward(self, input: Tensor) -> Tensor:
        return nf4_linear(input, self.base_weight(), self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense tensor [out_features, in_features] (default dtype: the one it was quantized from)."""
        return dequantize_nf4(self.base_weight(), dtype)

    def reset_parameters(self) -> None:
        """Does nothing: the weight is frozen; quantize another one with ``set_base_weight``."""

    def extra_repr(self) -> str:
        config = self.nf4_config
        return f"{super().extra_repr()}, block_size={config.block_size}, double_quant={config.double_quant}"


def check_features(in_features: int, out_features: int) -> None:
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")


def check_is_linear(linear: nn.Module) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
    # Any other subclass computes something of its own (8-bit weights, scales, sharding), which would be lost.
    if not isinstance(linear, NF4Linear) and type(linear).forward is not nn.Linear.forward:
        raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}, which has a forward of its own")
    refuse_hooks("linear", linear, "nn.Linear")


def refuse_hooks(argument: str, layer: nn.Module, kind: str) -> None:
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        raise TypeError(
            f"{argument}: expected a plain {kind}, got one with forward hooks or a replaced forward (accelerate's "
            "offloading sets one), which would be lost; remove them first"
        )


def init_bias(bias: bool, in_features: int, out_features: int, like: Tensor) -> nn.Parameter | None:
    """As nn.Linear starts its bias: uniform in +-1 / sqrt(in_features)."""
    if not bias:
        return None
    bound = 1.0 / math.sqrt(in_features)
    return nn.Parameter(torch.empty(out_features, device=like.device, dtype=like.dtype).uniform_(-bound, bound))
