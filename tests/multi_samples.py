# SPDX-License-Identifier: Apache-2.0
"""The case list of multi_lora_linear, as samples.py is that of adapted_linear."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from samples import BF16, F16, F32, NF4, NF4Config
from torch import Tensor

import peftkern
from peftkern import NF4Weight, reference


@dataclass(frozen=True)
class MultiSample:
    """One call: x [*rows, fan_in], weight [fan_out, fan_in], a bank of `adapters` adapters of rank r."""

    rows: tuple[int, ...]
    fan_in: int
    fan_out: int
    adapters: int
    r: int
    x: torch.dtype = F32
    weight: torch.dtype | NF4Config = F32
    adapter: torch.dtype = F32
    dropout: float = 0.0
    index: str = "rows"  # "items": an index for each item of the batch; "one", "none": all rows alike; "sorted"
    ranks: bool = False  # ranks of their own, from 0 to r
    scalings: bool = False  # scalings of their own
    bias: bool = False
    index_dtype: torch.dtype = torch.int64

    def __str__(self) -> str:
        def short(value):
            return f"nf4-{value.block_size}" if isinstance(value, NF4Config) else str(value).removeprefix("torch.")

        options = "".join(f"-{name}" for name in ("ranks", "scalings", "bias") if getattr(self, name))
        size = "x".join(map(str, (*self.rows, self.fan_in, self.fan_out)))
        dtypes = "-".join(map(short, (self.x, self.weight, self.adapter)))
        index = self.index + ("32" if self.index_dtype == torch.int32 else "")
        return f"{size}-{self.adapters}r{self.r}-{dtypes}-p{self.dropout}-{index}{options}"

    def make(self) -> MultiCall:
        g = torch.Generator().manual_seed(sum(map(ord, str(self))))

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = F32) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).to(dtype)

        weight = normal(self.fan_out, self.fan_in, scale=max(self.fan_in, 1) ** -0.5)
        if isinstance(self.weight, NF4Config):
            weight = peftkern.quantize_nf4(weight, self.weight.block_size, self.weight.double_quant)
        else:
            weight = weight.to(self.weight)
        leading = self.rows[:1] if self.index == "items" else self.rows
        index = torch.randint(-1, self.adapters, leading, generator=g)
        if self.index in ("one", "none"):
            index.fill_(self.adapters - 1 if self.index == "one" else -1)
        elif self.index == "sorted":
            index = index.sort().values
        trainable = {
            "A": normal(self.adapters, self.r, self.fan_in, scale=max(self.fan_in, 1) ** -0.5, dtype=self.adapter),
            "B": normal(self.adapters, self.fan_out, self.r, scale=max(self.r, 1) ** -0.5, dtype=self.adapter),
        }
        if self.bias:
            trainable["bias"] = normal(self.fan_out, dtype=self.adapter)
        ranks = torch.randint(0, self.r + 1, (self.adapters,), generator=g).int() if self.ranks else None
        scaling = torch.rand(self.adapters, generator=g) + 0.5 if self.scalings else 0.7
        seed = torch.tensor(0x1234_5678_9ABC_DEF)
        call = MultiCall(
            normal(*self.rows, self.fan_in, dtype=self.x), weight, trainable, index.to(self.index_dtype), ranks,
            scaling, self.dropout, seed,
        )  # fmt: skip
        return call.copy()


@dataclass
class MultiCall:
    """The arguments of a sample, those that can train as leaves that do."""

    x: Tensor
    weight: Tensor | NF4Weight
    trainable: dict[str, Tensor]  # A, B, and bias if the sample has one
    index: Tensor
    ranks: Tensor | None
    scaling: float | Tensor
    dropout_p: float
    seed: Tensor

    def copy(self) -> MultiCall:
        trainable = {k: t.detach().clone().requires_grad_() for k, t in self.trainable.items()}
        return replace(self, x=self.x.detach().clone().requires_grad_(), trainable=trainable)

    def to(self, device: str) -> MultiCall:
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, (Tensor, NF4Weight))}
        return replace(self, **moved, trainable={k: t.to(device) for k, t in self.trainable.items()}).copy()

    def options(self) -> dict:
        return {"scaling": self.scaling, "ranks": self.ranks, "dropout_p": self.dropout_p, "seed": self.seed}

    def run(self) -> Tensor:
        terms = dict(self.trainable)
        return peftkern.multi_lora_linear(
            self.x, self.weight, terms.pop("A"), terms.pop("B"), self.index, **self.options(), **terms
        )

    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.x, **self.trainable}

    def tensors(self) -> list[Tensor]:
        """Everything a kernel may read."""
        q = self.weight
        parts = [q.packed, q.absmax] if isinstance(q, NF4Weight) else [q]
        others = [t for t in (self.ranks, self.scaling) if isinstance(t, Tensor)]
        return [*parts, self.index, self.seed, *others, *self.inputs().values()]

    def dense_weight(self) -> Tensor:
        """The weight every path has to use: NF4 in the dtype of x, a dense one cast to it."""
        q = self.weight
        if isinstance(q, NF4Weight):
            return reference.dequantize_nf4(q.packed.cpu(), q.float_absmax().cpu(), q.block_size, q.shape, self.x.dtype)
        return q.to(self.x.dtype).cpu()

    def reference(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The fp64 output, and fp64 leaves of the inputs for its gradient."""
        leaves = {k: t.detach().cpu().double().requires_grad_() for k, t in self.inputs().items()}
        terms = dict(leaves)
        cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in self.options().items()}
        y = reference.multi_lora_linear(
            terms.pop("x"), self.dense_weight().double(), terms.pop("A"), terms.pop("B"), self.index.cpu(),
            **cpu | {"seed": int(self.seed)}, **terms,
        )  # fmt: skip
        return y, leaves

    def row_index(self) -> Tensor:
        """The adapter of each row, flat."""
        rows = math.prod(self.x.shape[:-1])
        return self.index.reshape(-1).repeat_interleave(rows // max(self.index.numel(), 1))


OWN = {"ranks": True, "scalings": True, "bias": True}

MULTI_SAMPLES = [
    # decode and prefill, plain; the common mix of dtypes; NF4
    MultiSample((8,), 64, 48, 8, 8),
    MultiSample((4, 16), 64, 48, 4, 16, BF16, BF16, dropout=0.05, index="items"),
    MultiSample((3, 8), 128, 64, 3, 16, BF16, NF4, dropout=0.05, index="items", scalings=True),
    MultiSample((6,), 128, 50, 5, 6, BF16, NF4, **OWN),
    MultiSample((2, 3, 5), 64, 96, 4, 16, F32, NF4Config(32, double_quant=True), dropout=0.3, **OWN),
    # both in bf16, which has a kernel of its own on some CPUs
    MultiSample((24,), 96, 80, 4, 12, BF16, BF16, BF16, dropout=0.1, **OWN),
    MultiSample((9,), 301, 33, 3, 17, BF16, BF16, BF16, dropout=0.1, ranks=True),
    MultiSample((24,), 96, 80, 4, 12, F16, F16, F32, dropout=0.1, **OWN),
    # ragged: no size a multiple of a vector, a tile or a block; more rows of one adapter than a chunk of rows
    MultiSample((7,), 33, 37, 3, 3, dropout=0.25, **OWN),
    MultiSample((67,), 129, 131, 2, 5, BF16, BF16, dropout=0.5, bias=True, index_dtype=torch.int32),
    MultiSample((300,), 515, 70, 2, 17, dropout=0.1, scalings=True),
    MultiSample((150,), 40, 1030, 1, 20, BF16, NF4Config(128), dropout=0.1, index="one"),
    MultiSample((5, 9), 21, 15, 7, 7, F16, NF4Config(32), F16, dropout=0.2, index="items", **OWN),
    # more adapters than rows; all rows alike; no row with an adapter
    MultiSample((5,), 48, 40, 100, 4, dropout=0.1, **OWN),
    MultiSample((40,), 32, 24, 4, 8, index="one", bias=True),
    MultiSample((40,), 32, 24, 4, 8, index="none", dropout=0.1, bias=True),
    MultiSample((50,), 32, 24, 4, 8, index="sorted", index_dtype=torch.int32),
    # ranks: zero, one, above the widest register tile
    MultiSample((8,), 32, 24, 3, 0, dropout=0.1, bias=True),
    MultiSample((8,), 32, 24, 3, 1, dropout=0.1),
    MultiSample((40,), 48, 72, 3, 100, BF16, BF16, BF16, dropout=0.1, **OWN),
    # empty and single
    MultiSample((0,), 32, 24, 2, 4, dropout=0.1, **OWN),
    MultiSample((2, 0, 3), 32, 24, 2, 4, BF16, NF4),
    MultiSample((), 32, 24, 2, 4, index="one", bias=True),
    MultiSample((1,), 1, 1, 1, 1, dropout=0.5, bias=True),
    # dtype mixes: x, weight and adapter each on its own
    *(
        MultiSample((12,), 64, 40, 3, 8, x, w, a, dropout=0.1, bias=True)
        for x in (F32, BF16, F16)
        for w in (F32, BF16)
        for a in (F32, BF16, F16)
    ),
]
