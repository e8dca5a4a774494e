# SPDX-License-Identifier: Apache-2.0
"""The frozen layers that an adapter of HF PEFT adds to: which are fused, and what they multiply by."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import NF4Linear
from ..ops import NF4Weight, dequantize_nf4
from ..ops.library import FLOAT_DTYPES, ops

_DEVICES = ("cpu", "cuda") if ops.cuda_archs() else ("cpu",)

Inputs = tuple[Tensor, Tensor | NF4Weight, Tensor | None, torch.dtype]


@cache
def conv1d() -> type | None:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        return None
    return Conv1D


@cache
def bnb_linear() -> tuple[type, ...]:
    try:
        from bitsandbytes.nn import Linear4bit, LinearNF4
    except ImportError:
        return ()
    return (Linear4bit, LinearNF4)


def has_kernels(device_type: str) -> bool:
    return device_type in _DEVICES


def text_of(base: nn.Module) -> str:
    names = {NF4Linear: "NF4 base", nn.Linear: "dense base", conv1d(): "Conv1D base"}
    return names.get(type(base), "bitsandbytes NF4 base")


def kind_reason(base: nn.Module, fan_in_fan_out: bool) -> str | None:
    """Why nothing on this base is fused, or None: what does not change between calls."""
    kind = type(base)
    if kind not in (nn.Linear, NF4Linear, conv1d(), *bnb_linear()):
        return f"the base layer is a {kind.__module__.split('.')[0]} {kind.__name__}"
    if (kind is conv1d()) != fan_in_fan_out:
        return "fan_in_fan_out does not fit the base layer"
    state = quant_state(base)
    return None if state is None else _code_reason(state)


def base_inputs(base: nn.Module, x: Tensor) -> Inputs | None:
    """x, weight and bias as the base layer would multiply them, and the dtype of its result; None: not by us."""
    kind, parameters = type(base), base._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or (bias is None and "bias" not in parameters):  # a computed one, which is an attribute
        weight, bias = base.weight, base.bias
    if (type(x) is not Tensor and type(x) is not nn.Parameter) or x.dtype not in FLOAT_DTYPES:
        return None
    device = x.device
    if weight.requires_grad or device != weight.device or device.type not in _DEVICES:
        return None
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
    if kind is nn.Linear or kind is conv1d():
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return None
        if weight.dtype not in FLOAT_DTYPES or not (autocast or x.dtype == weight.dtype):
            return None  # without autocast a mixture is PEFT's error to raise
        return x, weight if kind is nn.Linear else weight.t(), bias, dtype
    if kind is NF4Linear:
        return x, base.base_weight(), bias, dtype
    q = _bnb_weight(base, dtype)
    return None if q is None else (x.to(dtype), q, bias, x.dtype)


# ---- bitsandbytes


def quant_state(base: nn.Module) -> Any:
    return getattr(base.weight, "quant_state", None) if type(base) in bnb_linear() else None


def bnb_reason(base: nn.Module) -> str | None:
    """Why our product would not be bitsandbytes', or None: what may change from call to call."""
    state = quant_state(base)
    if state is None:
        return "the weight of bitsandbytes is not quantized yet"
    if state.quant_type != "nf4":
        return f"the weight of bitsandbytes is {state.quant_type}, not nf4"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the weight for its own inference kernels"
    if state.nested and state.state2.blocksize != 256:
        return f"double quantization in blocks of {state.state2.blocksize}"
    if base.weight.device.type == "cpu" and state.shape[1] % state.blocksize:
        return "bitsandbytes on the CPU dequantizes rows that are no multiple of a block in its own way"
    return None


@cache
def _code_books() -> tuple[Tensor, Tensor]:
    """NF4's and the 8-bit one of double quantization, as our kernels have them."""
    pairs = torch.arange(0, 16, 2, dtype=torch.int32)
    nf4 = NF4Weight((16 * pairs + pairs + 1).to(torch.uint8), torch.ones(1), 32, (16,), torch.float32)
    ones = torch.full((256, 16), 255, dtype=torch.uint8)  # 256 blocks of 1.0, each with an absmax of its own
    absmax = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    nested = NF4Weight(ones, absmax, 32, (256, 32), torch.float32, torch.ones(1), torch.zeros(()))
    return dequantize_nf4(nf4), dequantize_nf4(nested)[:, 0].contiguous()


def _code_reason(state: Any) -> str | None:
    if state.quant_type != "nf4":
        return None  # bnb_reason says so
    nf4, dynamic = _code_books()
    books = [("code book", state.code, nf4)]
    if state.nested:
        books.append(("nested code book", state.state2.code, dynamic))
    for name, theirs, ours in books:
        if not theirs.is_meta and not (theirs.shape == ours.shape and torch.equal(theirs.float().cpu(), ours)):
            return f"the weight of bitsandbytes has a {name} of its own"
    return None


def _bnb_weight(base: nn.Module, dtype: torch.dtype) -> NF4Weight | None:
    """The weight of a Linear4bit, sharing its storage, if the base layer would multiply by these values in dtype."""
    if not base.compute_type_is_set or base.compute_dtype not in (None, dtype) or bnb_reason(base) is not None:
        return None
    state = base.weight.quant_state
    if state.dtype not in (dtype, torch.float32):  # it would be rounded to state.dtype on the way
        return None
    packed, shape = base.weight.detach().view(torch.uint8), tuple(state.shape)  # .data would hide changes in place
    if not state.nested:
        return NF4Weight(packed, state.absmax, state.blocksize, shape, state.dtype)
    return NF4Weight(packed, state.absmax, state.blocksize, shape, state.dtype, state.state2.absmax, state.offset)
