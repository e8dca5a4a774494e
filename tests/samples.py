# SPDX-License-Identifier: Apache-2.0
"""THE CASE LIST: every question the tests ask of an op (value, gradient, finite differences, fakes, instruction sets,
repeatability, compilation) is asked of these samples. A new shape or option is one line here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

import peftkern
from peftkern import NF4Config, NF4Weight, reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Sample:
    """One call of adapted_linear: x [*rows, fan_in], weight [fan_out, fan_in], rank r (None: no adapter)."""

    rows: tuple[int, ...]
    fan_in: int
    fan_out: int
    r: int | None
    x: torch.dtype = F32
    weight: torch.dtype | NF4Config = F32
    adapter: torch.dtype = F32
    dropout: float = 0.0
    lam: bool = False
    out_scale: bool = False
    bias: bool = False

    def __str__(self) -> str:
        def short(value):
            return f"nf4-{value.block_size}" if isinstance(value, NF4Config) else str(value).removeprefix("torch.")

        options = "".join(f"-{name}" for name in ("lam", "out_scale", "bias") if getattr(self, name))
        size = "x".join(map(str, (*self.rows, self.fan_in, self.fan_out)))
        dtypes = "-".join(map(short, (self.x, self.weight, self.adapter)))
        return f"{size}-r{self.r}-{dtypes}-p{self.dropout}{options}"

    def make(self, device: str = "cpu") -> Call:
        return _make(self, device).copy()


@dataclass
class Call:
    """The arguments of a sample, those that can train as leaves that do."""

    x: Tensor
    weight: Tensor | NF4Weight
    trainable: dict[str, Tensor]  # A, B, lam, out_scale, bias, as far as the sample has them
    scaling: float
    dropout_p: float
    seed: Tensor

    def copy(self) -> Call:
        trainable = {k: t.detach().clone().requires_grad_() for k, t in self.trainable.items()}
        return replace(self, x=self.x.detach().clone().requires_grad_(), trainable=trainable)

    def to(self, device: str) -> Call:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, (Tensor, NF4Weight))}
        return replace(self, **moved, trainable={k: t.to(device) for k, t in self.trainable.items()}).copy()

    def run(self) -> Tensor:
        return peftkern.adapted_linear(
            self.x, self.weight, scaling=self.scaling, dropout_p=self.dropout_p, seed=self.seed, **self.trainable
        )

    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.x, **self.trainable}

    def dense_weight(self) -> Tensor:
        """The weight every path has to use: NF4 in the dtype of x, a dense one cast to it."""
        if isinstance(self.weight, NF4Weight):
            q = self.weight
            return reference.dequantize_nf4(q.packed.cpu(), q.float_absmax().cpu(), q.block_size, q.shape, self.x.dtype)
        return self.weight.to(self.x.dtype).cpu()

    def reference(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The fp64 output, and fp64 leaves of the inputs for its gradient."""
        leaves = {k: t.detach().cpu().double().requires_grad_() for k, t in self.inputs().items()}
        x, terms = leaves["x"], {k: t for k, t in leaves.items() if k != "x"}
        options = {"scaling": self.scaling, "dropout_p": self.dropout_p, "seed": int(self.seed)}
        y = reference.adapted_linear(x, self.dense_weight().double(), **options, **terms)
        return y, leaves


@cache
def _make(s: Sample, device: str) -> Call:
    g = torch.Generator().manual_seed(sum(map(ord, str(s))))

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = F32) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(dtype).to(device)

    fan_in_scale = max(s.fan_in, 1) ** -0.5
    dense = normal(s.fan_out, s.fan_in, scale=fan_in_scale)
    if isinstance(s.weight, NF4Config):
        weight = peftkern.quantize_nf4(dense, s.weight.block_size, s.weight.double_quant)
    else:
        weight = dense.to(s.weight)
    trainable = {}
    if s.r is not None:
        trainable["A"] = normal(s.r, s.fan_in, scale=fan_in_scale, dtype=s.adapter)
        trainable["B"] = normal(s.fan_out, s.r, scale=max(s.r, 1) ** -0.5, dtype=s.adapter)
    if s.lam:
        trainable["lam"] = normal(s.r or 0, dtype=s.adapter)
    if s.out_scale:
        trainable["out_scale"] = normal(s.fan_out, dtype=s.adapter)
    if s.bias:
        trainable["bias"] = normal(s.fan_out, dtype=s.adapter)
    x = normal(*s.rows, s.fan_in, dtype=s.x)
    return Call(x, weight, trainable, 0.7, s.dropout, torch.tensor(0x1234_5678_9ABC_DEF, device=device))


NF4 = NF4Config(64)
ALL = {"lam": True, "out_scale": True, "bias": True}

SAMPLES = [
    # the plain layer, the common training case (fp32 adapters on a bf16 or NF4 base), and every term at once
    Sample((32,), 64, 48, 8),
    Sample((2, 16), 64, 48, 16, BF16, BF16, dropout=0.05),
    Sample((2, 16), 128, 64, 16, BF16, NF4, dropout=0.05),
    Sample((2, 3, 5), 64, 96, 16, F32, NF4Config(32, double_quant=True), dropout=0.3, **ALL),
    Sample((24,), 96, 80, 12, BF16, BF16, BF16, dropout=0.1, **ALL),
    Sample((24,), 96, 80, 12, F16, F16, F32, dropout=0.1, **ALL),
    # ragged: no size a multiple of a vector, a tile or a block; more rows than a block of rows
    Sample((7,), 33, 37, 3, dropout=0.25, **ALL),
    Sample((600,), 40, 523, 3, BF16, BF16, BF16, dropout=0.1, **ALL),  # slabs on CUDA, spans on the CPU
    Sample((67,), 129, 131, 5, BF16, BF16, dropout=0.5, bias=True),
    Sample((131,), 515, 70, 17, F32, dropout=0.1),
    Sample((9,), 40, 1030, 20, BF16, NF4Config(128), dropout=0.1),
    Sample((3,), 21, 15, 7, F16, NF4Config(32), F16, dropout=0.2, **ALL),
    # few rows over NF4, each row of the weight a whole number of blocks: weights are looked up, not dequantized
    Sample((1,), 192, 37, None, F32, NF4Config(32), bias=True),
    Sample((2,), 128, 50, 6, BF16, NF4, dropout=0.1, **ALL),
    Sample((3,), 256, 9, 4, F16, NF4Config(128, double_quant=True), bias=True),
    Sample((2, 4), 64, 130, 8, BF16, NF4, BF16),
    Sample((3,), 512, 70, 4, BF16, NF4, bias=True),  # long and narrow: a sum that CUDA splits
    Sample((70,), 192, 150, 20, F16, NF4Config(32), BF16, out_scale=True),
    # ranks: none, zero, one, not a multiple of 8, above the widest register tile
    Sample((8,), 32, 24, None, bias=True),
    Sample((8,), 32, 24, None, BF16, NF4, bias=True),
    Sample((8,), 32, 24, None, out_scale=True, bias=True),
    Sample((8,), 32, 24, 0, dropout=0.1, bias=True),
    Sample((8,), 32, 24, 1, dropout=0.1, lam=True),
    Sample((40,), 48, 72, 100, BF16, BF16, BF16, dropout=0.1, lam=True),
    # empty and single
    Sample((0,), 32, 24, 4, dropout=0.1, **ALL),
    Sample((2, 0, 3), 32, 24, 4, BF16, NF4),
    Sample((), 32, 24, 4, bias=True),
    Sample((1,), 1, 1, 1, dropout=0.5, **ALL),
    # dtype mixes: x, weight and adapter each on its own
    *(
        Sample((12,), 64, 40, 8, x, w, a, dropout=0.1, lam=True, bias=True)
        for x in (F32, BF16, F16)
        for w in (F32, BF16, F16)
        for a in (F32, BF16, F16)
    ),
]

SMALL = [s for s in SAMPLES if s.fan_in <= 129 and s.x == F32 and s.adapter == F32]
"""For the questions that ask many evaluations."""


@dataclass(frozen=True)
class NF4Sample:
    """A tensor to quantize."""

    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    block_size: int = 64
    double_quant: bool = False
    layout: str = "contiguous"  # or transposed, expanded, strided, zeros

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = "x".join(map(str, self.shape))
        return f"{size}-{dtype}-{self.block_size}-{'dq-' if self.double_quant else ''}{self.layout}"

    def make(self, device: str = "cpu") -> Tensor:
        g = torch.Generator().manual_seed(sum(map(ord, str(self))))
        if self.layout == "zeros":
            w = torch.zeros(self.shape)
        elif self.layout == "transposed":
            w = torch.randn(self.shape[::-1], generator=g).permute(*reversed(range(len(self.shape))))
        elif self.layout == "strided":
            w = torch.randn((*self.shape[:-1], 2 * self.shape[-1]), generator=g)[..., ::2]
        elif self.layout == "expanded":
            w = torch.randn(self.shape[1:], generator=g).expand(self.shape)
        else:
            w = torch.randn(self.shape, generator=g)
        moved = w.to(device)
        return moved if self.dtype == F32 else moved.to(self.dtype)


NF4_SAMPLES = [
    *(
        NF4Sample(shape, dtype, block_size, double_quant)
        for shape, block_size in (((64, 64), 64), ((5, 33), 32), ((7, 96), 64), ((3, 1000), 128), ((9, 4099), 4096))
        for dtype in (F32, BF16, F16)
        for double_quant in (False, True)
    ),
    *(NF4Sample((3, 5000), F32, block_size) for block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096)),
    NF4Sample((1,)),
    NF4Sample((0,)),
    NF4Sample((0, 64), double_quant=True),
    NF4Sample(()),
    NF4Sample((4, 3, 5, 7), BF16),
    *(NF4Sample((36, 65), BF16, 64, layout=layout) for layout in ("transposed", "strided", "expanded", "zeros")),
    NF4Sample((300, 257), F32, 32, double_quant=True),  # more than one nested block
]
