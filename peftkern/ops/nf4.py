# SPDX-License-Identifier: Apache-2.0
"""NF4 weights: quantize, dequantize, and the value that carries one around. Definition: csrc/nf4.h, reference.py."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .library import FLOAT_DTYPES, ops

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256

_quantize_nf4 = ops.quantize_nf4.default
_dequantize_nf4 = ops.dequantize_nf4.default
_quantize_absmax = ops.quantize_absmax.default
_dequantize_absmax = ops.dequantize_absmax.default


@dataclass(frozen=True)
class NF4Config:
    """How to quantize a weight to NF4.

    block_size: weights that share one absmax; a power of two from 32 to 4096. Smaller is more exact and larger.
    double_quant: store absmax as 8-bit codes too, which takes 4.127 instead of 4.5 bits a weight at block_size 64.
    modules_to_not_convert: for whole models: names, name endings or regular expressions of layers that stay as they
        are, besides the output head and weights that are tied to another layer's, which always do.

    transformers takes it as the ``quantization_config`` of ``from_pretrained`` (docs/transformers.md).
    """

    block_size: int = 64
    double_quant: bool = False
    modules_to_not_convert: tuple[str, ...] | None = None

    quant_method: ClassVar[str] = "peftkern"  # under which transformers finds the quantizer

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size: expected one of {BLOCK_SIZES}, got {self.block_size!r}")
        names = self.modules_to_not_convert
        if names is not None:
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"modules_to_not_convert: expected a list of names, got {names!r}")
            object.__setattr__(self, "modules_to_not_convert", tuple(names))

    def to_dict(self) -> dict[str, Any]:
        """What transformers writes into config.json."""
        names = self.modules_to_not_convert
        return {
            "quant_method": self.quant_method, **asdict(self),
            "modules_to_not_convert": None if names is None else list(names),
        }  # fmt: skip

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From what ``to_dict`` gave; raises ValueError for other keys."""
        fields = {name: value for name, value in values.items() if name != "quant_method"}
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"quantization_config: expected the fields of NF4Config, got {unknown}")
        config = cls(**fields)
        return (config, kwargs) if return_unused_kwargs else config


@dataclass(frozen=True)
class NF4Weight:
    """A tensor in NF4, in bitsandbytes' storage layout.

    packed: uint8, [out, in / 2] for a matrix with an even number of columns, else flat [ceil(n / 2)].
    absmax: float32 [blocks], or with double quantization the uint8 codes [blocks] of it, which come with
    nested_absmax: float32 [ceil(blocks / 256)] and offset: float32 [].
    shape: of the weight; dtype: what it was quantized from, and the default of ``dequantize_nf4``.
    """

    packed: Tensor
    absmax: Tensor
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Every byte the weight takes."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(t.nbytes for t in parts if t is not None)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def float_absmax(self) -> Tensor:
        """absmax as float32 [blocks]."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        return _dequantize_absmax(self.absmax, self.nested_absmax, self.offset)

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device."""
        moved = {
            name: None if value is None else value.to(device)
            for name, value in (("nested_absmax", self.nested_absmax), ("offset", self.offset))
        }
        return replace(self, packed=self.packed.to(device), absmax=self.absmax.to(device), **moved)

    @classmethod
    def from_bnb(cls, tensors: Mapping[str, Tensor], prefix: str = "weight") -> NF4Weight:
        """Reads a 4-bit weight as bitsandbytes saves it: ``{prefix}``, ``{prefix}.absmax``, ``{prefix}.quant_map``,
        ``{prefix}.quant_state.bitsandbytes__nf4`` and, with double quantization, ``{prefix}.nested_*``.

        Raises ValueError for another 4-bit type, a code book that is not NF4's, or a missing or damaged entry.
        """
        key = f"{prefix}.quant_state.bitsandbytes__nf4"
        if key not in tensors:
            others = [k for k in tensors if k.startswith(f"{prefix}.quant_state.")]
            raise ValueError(f"{prefix}: expected the entry {key!r}, got {others or 'no quant_state entry'}")
        try:
            state = json.loads(bytes(tensors[key].cpu().numpy().tobytes()).decode())
            block_size, shape = NF4Config(state["blocksize"]).block_size, tuple(int(n) for n in state["shape"])
            dtype = getattr(torch, state["dtype"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{key}: expected bitsandbytes' JSON with blocksize, shape and dtype: {error}") from error
        if dtype not in FLOAT_DTYPES or min(shape, default=0) < 0:
            raise ValueError(f"{key}: expected a float dtype and sizes >= 0, got {state['dtype']!r} and {list(shape)}")
        from ..reference import NF4_CODES, dynamic_codes

        _expect_codes(tensors, f"{prefix}.quant_map", torch.tensor(NF4_CODES))
        packed = _entry(tensors, prefix).contiguous().view(torch.uint8).reshape(-1)
        absmax, nested, offset = _entry(tensors, f"{prefix}.absmax"), None, None
        if "nested_offset" in state:
            nested = _entry(tensors, f"{prefix}.nested_absmax").float()
            if state.get("nested_blocksize") != NESTED_BLOCK_SIZE:
                raise ValueError(f"{key}: expected nested_blocksize 256, got {state.get('nested_blocksize')!r}")
            _expect_codes(tensors, f"{prefix}.nested_quant_map", dynamic_codes())
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
        weight = cls(packed, absmax, block_size, shape, dtype, nested, offset)
        check_weight(weight, prefix)
        return replace(weight, packed=_shaped(packed, shape))


def _entry(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"expected the entry {key!r}, got none")
    return tensors[key]


def _expect_codes(tensors: Mapping[str, Tensor], key: str, expected: Tensor) -> None:
    got = _entry(tensors, key).float().cpu()
    if got.shape != expected.shape or not torch.equal(got, expected):
        raise ValueError(f"{key}: expected the standard code book of {expected.numel()} values, got another one")


def _shaped(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    return packed.reshape(shape[0], shape[1] // 2) if len(shape) == 2 and shape[1] % 2 == 0 else packed


def check_weight(weight: NF4Weight, name: str) -> None:
    """Raises ValueError, naming the part, unless all parts of weight have the sizes its shape asks for."""
    n = math.prod(weight.shape)
    blocks = -(-n // weight.block_size)
    expected: dict[str, tuple[Tensor, int, torch.dtype]] = {"packed": (weight.packed, -(-n // 2), torch.uint8)}
    if weight.nested_absmax is not None and weight.offset is not None:
        expected["absmax"] = (weight.absmax, blocks, torch.uint8)
        expected["nested_absmax"] = (weight.nested_absmax, -(-blocks // NESTED_BLOCK_SIZE), torch.float32)
        expected["offset"] = (weight.offset, 1, torch.float32)
    else:
        expected["absmax"] = (weight.absmax, blocks, torch.float32)
    for part, (tensor, numel, dtype) in expected.items():
        if tensor.numel() != numel or tensor.dtype != dtype:
            raise ValueError(
                f"{name}.{part}: expected {numel} values of {dtype} for shape {weight.shape} in blocks of "
                f"{weight.block_size}, got {tensor.numel()} of {tensor.dtype}"
            )


def quantize_nf4(w: Tensor, block_size: int = 64, double_quant: bool = False) -> NF4Weight:
    """Quantizes w, of any shape, to 4-bit NormalFloat (QLoRA, arXiv 2305.14314, section 3).

    w: float32, bfloat16 or float16; need not be contiguous. Codes and absmax are bitsandbytes' bit for bit.
    Raises ValueError for a bad block_size and for NaN or infinite weights, TypeError for another dtype.

    >>> q = quantize_nf4(torch.randn(16, 64))
    >>> q.nbytes, dequantize_nf4(q).shape
    (576, torch.Size([16, 64]))
    """
    NF4Config(block_size, double_quant)
    if w.dtype not in FLOAT_DTYPES:
        raise TypeError(f"w: expected dtype float32, bfloat16 or float16, got {w.dtype}")
    w = w.detach()
    packed, absmax = _quantize_nf4(w, block_size)
    # A block's absmax is finite exactly if all its weights are, so this reads n / block_size values, not n.
    readable = not (torch.compiler.is_compiling() or absmax.is_meta)
    if readable and absmax.numel() and not math.isfinite(absmax.amax().item()):
        bad = int((~torch.isfinite(w)).sum())
        raise ValueError(f"w: expected finite weights, got {bad} NaN or infinite of {w.numel()}")
    shape = tuple(w.shape)
    packed = _shaped(packed, shape)
    if not double_quant:
        return NF4Weight(packed, absmax, block_size, shape, w.dtype)
    codes, nested_absmax, offset = _quantize_absmax(absmax)
    return NF4Weight(packed, codes, block_size, shape, w.dtype, nested_absmax, offset)


def dequantize_nf4(q: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """``code * absmax`` in float32, rounded once to dtype (default: q.dtype). Shape: q.shape.

    Raises TypeError for a dtype other than float32, bfloat16 and float16, ValueError if q's parts do not fit.
    """
    dtype = q.dtype if dtype is None else dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    if not torch.compiler.is_compiling():
        check_weight(q, "q")
    return _dequantize_nf4(q.packed, q.absmax, q.nested_absmax, q.offset, q.block_size, list(q.shape), dtype)


@torch.library.register_fake("peftkern::quantize_nf4")
def _(w: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = w.numel()
    packed = w.new_empty(((n + 1) // 2,), dtype=torch.uint8)
    return packed, w.new_empty(((n + block_size - 1) // block_size,), dtype=torch.float32)


@torch.library.register_fake("peftkern::dequantize_nf4")
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("peftkern::quantize_absmax")
def _(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = absmax.numel()
    nested = absmax.new_empty(((n + NESTED_BLOCK_SIZE - 1) // NESTED_BLOCK_SIZE,))
    return absmax.new_empty((n,), dtype=torch.uint8), nested, absmax.new_empty(())


@torch.library.register_fake("peftkern::dequantize_absmax")
def _(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    return codes.new_empty((codes.numel(),), dtype=torch.float32)
