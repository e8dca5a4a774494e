# SPDX-License-Identifier: Apache-2.0
"""Batches whose items choose their adapter by name: the choice, made once for all layers and kept for the next call,
and the adapters of a layer as the one op takes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.multi_lora import make_plan, planned_multi_lora_linear, stacked
from .bases import Inputs
from .watched import Watched

if TYPE_CHECKING:
    from .layer import Part, PatchedLayer, Plan


_version, _weight = attrgetter("_version"), itemgetter("weight")


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
        self.names, self.scalings = names, scalings
        self.factors = A + B  # held, so that no other tensor can come to lie at their address
        self.stamps = None if any(t.is_inference() for t in self.factors) else _stamps(self.factors)
        self.A, self.B, self.ranks = stacked(A, B, None)
        with torch.inference_mode(False):
            self.scaling = torch.tensor(scalings, dtype=torch.float32, device=self.A.device)


class Mixture:
    """What a layer does with a batch, as long as its plan holds."""

    def __init__(self, plan: Plan, batch: Batch, used: Sequence[Part], every: Sequence[Part]) -> None:
        self.plan, self.batch, self.used, self.every = plan, batch, used, every
        self.watched = Watched([plan.base, *(module for part in used for module in part.modules)])
        self.dropouts = [part.dropout for part in used if type(part.dropout) is nn.Dropout]
        # In training the adapters that get a gradient; in inference all there are, so that other batches find them.
        self.bank: Bank | None = None
        self._inside_used = [part.modules[i]._parameters for i in (0, 1) for part in used]
        self._kept: tuple | None = None  # stamps and scalings of used, when bank was found good
        self._scalings = itemgetter(*(part.name for part in used)) if used else None

    def dropout_p(self) -> float | None:
        """None: the adapters differ."""
        if not self.dropouts:
            return 0.0
        rates = {d.p if d.training else 0.0 for d in self.dropouts}
        if len(self.dropouts) < len(self.used):
            rates.add(0.0)
        return rates.pop() if len(rates) == 1 else None

    def find_bank(self, layer: PatchedLayer) -> Bank | None:
        """None: the adapters cannot be stacked."""
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() or compiling:
            return _stack(layer, self.used if torch.is_grad_enabled() else self.every)
        try:
            stamps = _stamps(list(map(_weight, self._inside_used)))
        except (KeyError, RuntimeError):  # parametrized; inference tensors have no version
            return _stack(layer, self.every)
        kept = (stamps, self._scalings(layer.scaling))
        if self.bank is None or self._kept != kept:
            scalings = [layer.scaling[part.name] for part in self.used]
            self.bank = layer._peftkern_bank = self._from_layer(layer, stamps, scalings)
            self._kept = kept
        return self.bank

    def _from_layer(self, layer: PatchedLayer, stamps: list[tuple], scalings: list[float]) -> Bank | None:
        """The one that another batch has stacked, if nothing has changed."""
        bank = layer._peftkern_bank
        if bank is not None and bank.stamps is not None:
            place = {name: i for i, name in enumerate(bank.names)}
            at = [place.get(part.name, -1) for part in self.used]
            if min(at) >= 0 and [bank.scalings[i] for i in at] == scalings:
                of_bank = [bank.stamps[i] for i in at] + [bank.stamps[len(place) + i] for i in at]
                if of_bank == stamps:
                    return bank
        return _stack(layer, self.every)


def _stack(layer: PatchedLayer, parts: Sequence[Part]) -> Bank | None:
    A, B = [part.modules[0].weight for part in parts], [part.modules[1].weight for part in parts]
    if any(t.dtype != group[0].dtype or t.device != group[0].device for group in (A, B) for t in group):
        return None
    return Bank(tuple(part.name for part in parts), A, B, [float(layer.scaling[part.name]) for part in parts])


def _stamps(tensors: list[Tensor]) -> list[tuple]:
    """What tells that nothing was written or assigned to them."""
    return list(zip(map(Tensor.data_ptr, tensors), map(_version, tensors), strict=True))


def mixed_linear(inputs: Inputs, bank: Bank, batch: Batch, dropout_p: float) -> Tensor:
    x, weight, bias, result_dtype = inputs
    rows = batch.rows(bank.names, x.shape[:-1], x.device)
    y = planned_multi_lora_linear(
        x, weight, bank.A, bank.B, rows, scaling=bank.scaling, ranks=bank.ranks, bias=bias, dropout_p=dropout_p
    )
    return y if y.dtype == result_dtype else y.to(result_dtype)
