# SPDX-License-Identifier: Apache-2.0
"""What every adapter method shares: the call, merging, the state dict. A method is a subclass that says its terms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import NF4Config, NF4Weight, adapted_linear, dequantize_nf4, quantize_nf4
from .base_weight import WEIGHT_NAMES, BaseWeight, parameter_of
from .conv1d import is_conv1d
from .dora import dora_forward
from .nf4_linear import NF4Linear, check_features, check_is_linear, init_bias, refuse_hooks


def features_of(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an nn.Linear, a Conv1D, an nn.Embedding (tokens in, their vectors out)."""
    if is_conv1d(layer):
        return layer.nx, layer.nf
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.in_features, layer.out_features


class AdaptedLinear(BaseWeight):
    """A frozen linear layer with a trainable adapter, ``adapted_linear(x, weight, bias=bias, **terms())``."""

    file_suffixes: ClassVar[dict[str, str]] = {}  # what HF PEFT's files put behind the name of a parameter
    bias: nn.Parameter | None
    use_dora: bool = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # The parameters of the base weight while a merged one is in their place. In a dict, since a parameter set as an
        # attribute would be registered, and so saved, counted and trained.
        self._unmerged: dict[str, nn.Parameter] | None = None

    def _start_base(
        self, in_features: int, out_features: int, bias: bool, device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        """__init__ with a frozen dense weight and bias that start as nn.Linear's."""
        check_features(in_features, out_features)
        AdaptedLinear.__init__(self, in_features, out_features)
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.set_base_weight(weight)
        self.bias = init_bias(bias, in_features, out_features, weight)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def _around(cls, linear: nn.Linear, quantize: NF4Config | None, default: NF4Config | None = None):
        """An instance, still without an adapter, over the weight (dense, or an NF4Linear's) and bias of linear, an
        nn.Linear or a Conv1D, shared and frozen. quantize, or else default, says how to quantize a dense weight."""
        transposed = is_conv1d(linear)
        if transposed:
            refuse_hooks("linear", linear, "Conv1D")
        else:
            check_is_linear(linear)
        weight: Tensor | NF4Weight = linear.base_weight() if isinstance(linear, NF4Linear) else linear.weight
        if isinstance(weight, NF4Weight):
            if quantize is not None:
                raise ValueError("quantize: expected None for a layer whose weight is NF4 already")
        elif config := quantize or default:
            weight = quantize_nf4(weight.t() if transposed else weight, config.block_size, config.double_quant)
        self = cls.__new__(cls)
        AdaptedLinear.__init__(self, *features_of(linear))
        self.fan_in_fan_out = transposed
        self._hold(weight)
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        return self

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the adapter by attribute name."""
        names = ("lora_A", "lora_E", "lora_B", "lora_magnitude_vector")
        return {name: self._parameters[name] for name in names if self._parameters.get(name) is not None}

    def terms(self) -> dict[str, Any]:
        """The adapter as keyword arguments of ``ops.adapted_linear``: A, B, lam, out_scale, scaling, dropout_p."""
        raise NotImplementedError(f"{type(self).__name__}.terms")

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the weight: float32 [out_features, in_features]."""
        raise NotImplementedError(f"{type(self).__name__}.delta_weight")

    def dense_weight(self) -> Tensor:
        """The weight as float32 [out_features, in_features]."""
        weight = self.base_weight()
        return dequantize_nf4(weight, torch.float32) if isinstance(weight, NF4Weight) else weight.float()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features], in x's dtype."""
        if self._unmerged is not None:
            terms: dict[str, Any] = {}
        elif self.use_dora:
            return dora_forward(self, x)
        else:
            terms = self.terms()
        bias = parameter_of(self, "bias")
        return adapted_linear(x, self.base_weight(), bias=bias, training=self.training, **terms)

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self, safe: bool = False) -> None:
        """Puts weight + delta_weight() in place of the weight: added in float32, rounded once; NF4 is requantized with
        the same block size. The original is kept aside, so that unmerge() is exact.

        safe: raise ValueError, and change nothing, if the merged weight is not finite. Merging twice is an error.
        """
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}.merge: already merged; call unmerge() first")
        original = self.base_weight()
        quantized = isinstance(original, NF4Weight)
        merged = self.dense_weight() + self.delta_weight()
        rounded = merged.to(original.dtype)
        if safe and not bool(torch.isfinite(rounded).all()):
            raise ValueError("merge: expected finite merged weights, got NaN or infinity; the layer is unchanged")
        if quantized:
            requantized = quantize_nf4(merged, original.block_size, original.double_quant)
            new: Tensor | NF4Weight = replace(requantized, dtype=original.dtype)
        else:
            new = rounded
        kept = {name: p for name, p in self._parameters.items() if name in WEIGHT_NAMES and p is not None}
        self.set_base_weight(new)
        self._unmerged = kept

    def unmerge(self) -> None:
        """Puts the original weight back, bit for bit. Raises RuntimeError if the layer is not merged."""
        if self._unmerged is None:
            raise RuntimeError(f"{type(self).__name__}.unmerge: not merged")
        self._replace_weight_parameters(self._unmerged)
        self._unmerged = None

    def _apply(self, fn, recurse=True):
        """``.to()``, ``.half()`` and their like reach the weight that is kept aside, too."""
        super()._apply(fn, recurse)
        for parameter in (self._unmerged or {}).values():
            parameter.data = fn(parameter.data)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """The unmerged weight, also while merged: a state dict that holds the adapter must not hold it twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None:
            for name, parameter in self._unmerged.items():
                destination[prefix + name] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        if self.merged:
            raise RuntimeError(
                f"{prefix.rstrip('.') or 'module'}: expected an unmerged layer to load into; unmerge() first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        if self.nf4_config is None:
            kind = str(self.weight.dtype).removeprefix("torch.")
        else:
            kind = f"nf4, block_size={self.nf4_config.block_size}, double_quant={self.nf4_config.double_quant}"
        merged = ", merged" if self.merged else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={kind}{merged}"
        )
