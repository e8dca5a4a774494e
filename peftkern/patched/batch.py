# SPDX-License-Identifier: Apache-2.0
"""Batches whose items choose their adapter by name: the choice, made once for all layers and kept for the next call,
and the adapters of a layer as the one op takes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.multi_lora import make_plan, planned_multi_lora_linear, stacked
from .bases import Inputs

if TYPE_CHECKING:
    from .layer import Part, PatchedLayer


class Batch:
    """The adapter of each item."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = list(names)
        self.used = sorted(set(names))
        self._rows: dict[tuple, Tensor] = {}

    @staticmethod
    def of(names: Sequence[str]) -> Batch:
        return Batch(tuple(names)) if torch.compiler.is_compiling() else _kept(tuple(names))

    def rows(self, adapters: tuple[str, ...], leading: torch.Size, device: torch.device) -> Tensor:
        """make_plan for rows of a shape and a bank of these adapters: equal layers share it."""
        key = (adapters, leading, device)
        rows = None if torch.compiler.is_compiling() else self._rows.get(key)
        if rows is None:
            place = {name: i for i, name in enumerate(adapters)}
            with torch.inference_mode(False):  # what is made in inference may be used in training
                index = torch.tensor([place.get(name, -1) for name in self.names], device=device)
                rows = make_plan(index, torch.empty((*leading, 0), device=device), len(adapters))
            if not torch.compiler.is_compiling():
                if len(self._rows) >= 64:  # decoding makes a shape a token where nothing is cached
                    self._rows.clear()
                self._rows[key] = rows
        return rows


@lru_cache(maxsize=64)
def _kept(names: tuple[str, ...]) -> Batch:
    return Batch(names)


class Bank:
    """The adapters of a layer, stacked."""

    def __init__(self, names: tuple[str, ...], A: list[Tensor], B: list[Tensor], scalings: list[float]) -> None:
        self.names = names
        self.factors = (A, B)  # held, so that no other tensor can come to lie at their address
        self.stamps: dict[str, tuple] = {}  # what tells whether an adapter still is what was stacked
        if not any(t.is_inference() for t in (*A, *B)):  # those have no version
            self.stamps = dict(zip(names, map(_stamp, A, B, scalings), strict=True))
        self.A, self.B, self.ranks = stacked(A, B, None)
        with torch.inference_mode(False):
            self.scaling = torch.tensor(scalings, dtype=torch.float32, device=self.A.device)

    @staticmethod
    def of(layer: PatchedLayer, used: Sequence[Part], every: Sequence[Part]) -> Bank | None:
        """None: the adapters cannot be stacked. In inference of all adapters there are, and kept, so that another batch
        finds them stacked; in training of those that get a gradient."""
        training = torch.is_grad_enabled()
        keep = not training and not torch.compiler.is_compiling()
        if keep and (bank := layer._peftkern_bank) is not None and bank._still_has(layer, used):
            return bank
        parts = used if training else every
        A, B = zip(*map(_weights, parts), strict=True)
        if any(t.dtype != group[0].dtype or t.device != group[0].device for group in (A, B) for t in group):
            return None
        scalings = [float(layer.scaling[part.name]) for part in parts]
        bank = Bank(tuple(part.name for part in parts), list(A), list(B), scalings)
        if keep:
            layer._peftkern_bank = bank
        return bank

    def _still_has(self, layer: PatchedLayer, parts: Sequence[Part]) -> bool:
        stamps, scaling = self.stamps, layer.scaling
        if not stamps:
            return False
        for part in parts:
            A, B = _weights(part)
            if A.is_inference() or stamps.get(part.name) != _stamp(A, B, scaling[part.name]):
                return False
        return True


def _weights(part: Part) -> tuple[Tensor, Tensor]:
    """Of lora_A and lora_B, past nn.Module's slow look-up unless they are parametrized."""
    A, B = part.held[0][1], part.held[1][1]
    a, b = A._parameters.get("weight"), B._parameters.get("weight")
    return A.weight if a is None else a, B.weight if b is None else b


def _stamp(A: Tensor, B: Tensor, scaling: float) -> tuple:
    return A.data_ptr(), A._version, B.data_ptr(), B._version, scaling


def mixed_linear(inputs: Inputs, bank: Bank, batch: Batch, dropout_p: float) -> Tensor:
    x, weight, bias, result_dtype = inputs
    rows = batch.rows(bank.names, x.shape[:-1], x.device)
    y = planned_multi_lora_linear(
        x, weight, bank.A, bank.B, rows, scaling=bank.scaling, ranks=bank.ranks, bias=bias, dropout_p=dropout_p
    )
    return y if y.dtype == result_dtype else y.to(result_dtype)
