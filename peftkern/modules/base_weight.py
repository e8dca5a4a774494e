# SPDX-License-Identifier: Apache-2.0
"""How a module holds its frozen base weight, dense or NF4: the parameters, the state dict, and nothing else.

Dense: ``weight`` [out, in], or [in, out] with ``fan_in_fan_out``, as transformers' Conv1D and nn.Embedding store it:
the parameter stays theirs, and the ops get its transpose, a view.

NF4: ``weight`` uint8 [out, in / 2] (flat if in is odd) and the scales *as bytes*, so that ``.to(dtype)``, autocast
wrappers and FSDP mixed precision, which cast float parameters, leave them alone:

    absmax            uint8 [4 * blocks], float32 bytes; with double quantization uint8 [blocks], the codes
    nested_absmax     uint8 [4 * ceil(blocks / 256)], float32 bytes      (double quantization only)
    absmax_offset     uint8 [4], float32 bytes                           (double quantization only)

The dtype that was quantized travels in the state dict's metadata, where torch keeps a module's version: torch.save
and load_state_dict carry it on; in a safetensors file it is missing, and the module keeps the dtype it was made with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import NF4Config, NF4Weight, quantize_nf4
from ..ops.library import FLOAT_DTYPES
from ..ops.nf4 import check_weight

DTYPE_KEY = "nf4_dtype"
WEIGHT_NAMES = ("weight", "absmax", "nested_absmax", "absmax_offset")


def _frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


def parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """``module.name``, without the AttributeError that Python makes before it asks nn.Module.__getattr__: 1 us."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def floats_of(t: Tensor) -> Tensor:
    """float32 values from their bytes; where these lie at an odd offset of a larger buffer, from a copy."""
    if not torch.compiler.is_compiling() and t.storage_offset() % 4:
        t = t.clone()
    return t.view(torch.float32)


def bytes_of(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def weight_parameters(weight: Tensor | NF4Weight) -> dict[str, nn.Parameter]:
    """The frozen parameters that hold weight, by name; they share its storage."""
    if not isinstance(weight, NF4Weight):
        parameter = weight if isinstance(weight, nn.Parameter) else _frozen(weight)
        return {"weight": parameter.requires_grad_(False)}
    parameters = {"weight": _frozen(weight.packed), "absmax": _frozen(bytes_of(weight.absmax))}
    if weight.nested_absmax is not None and weight.offset is not None:
        parameters["nested_absmax"] = _frozen(bytes_of(weight.nested_absmax))
        parameters["absmax_offset"] = _frozen(bytes_of(weight.offset))
    return parameters


class BaseWeight(nn.Module):
    """Mixin of modules that multiply by a frozen weight: ``in_features``, ``out_features`` and the parameters above."""

    in_features: int
    out_features: int
    weight: nn.Parameter
    nf4_config: NF4Config | None = None  # None: dense
    quantized_dtype: torch.dtype | None = None  # NF4: what was quantized, the default dtype of dequantize
    fan_in_fan_out: bool = False  # a dense weight is stored [in, out]

    def set_base_weight(self, weight: Tensor | NF4Weight) -> None:
        """Holds weight, [out_features, in_features] as base_weight() gives it, sharing its storage if it lies as it is
        stored. Raises ValueError for another shape, TypeError for another dtype than float32, bfloat16 and float16."""
        if self.fan_in_fan_out and not isinstance(weight, NF4Weight):
            weight = weight.t().contiguous()
        self._hold(weight)

    def _hold(self, weight: Tensor | NF4Weight) -> None:
        """set_base_weight for a weight as it is stored. A parameter stays the same object."""
        quantized = isinstance(weight, NF4Weight)
        expected = (self.out_features, self.in_features)
        if self.fan_in_fan_out and not quantized:
            expected = expected[::-1]
        if tuple(weight.shape) != expected:
            raise ValueError(f"weight: expected shape {expected}, got {tuple(weight.shape)}")
        if quantized:
            check_weight(weight, "weight")
        elif weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"weight: expected dtype float32, bfloat16 or float16, got {weight.dtype}")
        self.nf4_config = NF4Config(weight.block_size, weight.double_quant) if quantized else None
        self.quantized_dtype = weight.dtype if quantized else None
        self._replace_weight_parameters(weight_parameters(weight))

    def _replace_weight_parameters(self, parameters: dict[str, nn.Parameter]) -> None:
        """Registers parameters, first in order as in nn.Linear, for those that held the weight."""
        others = {name: p for name, p in self._parameters.items() if name not in WEIGHT_NAMES}
        self._parameters.clear()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self._parameters.update(others)

    def base_weight(self) -> Tensor | NF4Weight:
        """The weight as the ops take it; shares storage."""
        config = self.nf4_config
        if config is None:
            weight = parameter_of(self, "weight")
            return weight.t() if self.fan_in_fan_out else weight
        assert self.quantized_dtype is not None
        shape = (self.out_features, self.in_features)
        if not config.double_quant:
            return NF4Weight(self.weight, floats_of(self.absmax), config.block_size, shape, self.quantized_dtype)
        nested, offset = floats_of(self.nested_absmax), floats_of(self.absmax_offset)
        return NF4Weight(self.weight, self.absmax, config.block_size, shape, self.quantized_dtype, nested, offset)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quantized_dtype is not None and hasattr(destination, "_metadata"):
            name = str(self.quantized_dtype).removeprefix("torch.")
            destination._metadata.setdefault(prefix[:-1], {})[DTYPE_KEY] = name

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs) -> None:
        """Reads three layouts: ours; bitsandbytes' (``weight.absmax``, ``weight.quant_state...``); and, into an NF4
        module, a dense weight, which is quantized."""
        if self.nf4_config is not None:
            key = prefix + "weight"
            incoming = state_dict.get(key)
            weight = None
            try:
                if any(k.startswith(key + ".") for k in state_dict):
                    weight = NF4Weight.from_bnb(state_dict, key)
                    for name in [k for k in state_dict if k.startswith(key + ".")]:
                        del state_dict[name]
                elif incoming is not None and incoming.is_floating_point():
                    dense = incoming.t() if self.fan_in_fan_out else incoming
                    weight = quantize_nf4(dense, self.nf4_config.block_size, self.nf4_config.double_quant)
                if weight is not None:
                    self.set_base_weight(weight.to(self.weight.device))  # block_size and double_quant may differ
            except (ValueError, TypeError, KeyError, RuntimeError) as error:  # whatever a damaged entry sets off
                raise ValueError(f"{key}: {error}") from error
            if weight is not None:
                state_dict.update((prefix + name, p.detach()) for name, p in weight_parameters(weight).items())
            dtype = getattr(torch, str(local_metadata.get(DTYPE_KEY)), None)
            if weight is None and incoming is not None and dtype in FLOAT_DTYPES:
                self.quantized_dtype = dtype
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
