# SPDX-License-Identifier: Apache-2.0
"""HF PEFT's RankAllocator for AdaLoRA on our kernels: its schedule, its masks, and one call for all layers where it
makes a dozen for each parameter.

The averages lie in two flat tensors. PEFT's dictionaries of them hold views, so that whoever reads, saves or replaces
those finds what is there in PEFT, and any method of PEFT's can go on from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import mask_ranks, rank_mask, update_importance
from ..ops.rank_allocation import state_layout
from .bases import has_kernels
from .copies import Patched


class Triplets:
    """The factors that an allocator ranks: a name and A [r, in], E [r, 1], B [out, r] of each layer."""

    def __init__(self, names: list[str], A: list[Tensor], E: list[Tensor], B: list[Tensor]) -> None:
        self.names, self.A, self.E, self.B = names, A, E, B  # names with %s for lora_A, lora_E, lora_B
        self.sizes = [e.shape[0] for e in E]

    def per_layer(self, flat: list[Any]) -> dict[str, list[Any]]:
        """Values of all triplets by PEFT's name of the layer's E."""
        result, at = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            result[name % "lora_E"] = flat[at : at + size]
            at += size
        return result


class State:
    """The averages of all factors, and PEFT's dictionaries of views into them."""

    def __init__(self, triplets: Triplets) -> None:
        self.triplets = triplets
        shapes = [(a.shape[0], a.shape[1], b.shape[0]) for a, b in zip(triplets.A, triplets.B, strict=True)]
        slices, size = state_layout(shapes)
        self.sensitivity = torch.zeros(size, dtype=torch.float32, device=triplets.E[0].device)
        self.uncertainty = torch.zeros_like(self.sensitivity)
        self.ipt: dict[str, Tensor] = {}
        self.exp_avg_ipt: dict[str, Tensor] = {}
        self.exp_avg_unc: dict[str, Tensor] = {}
        zero = torch.zeros((), device=self.sensitivity.device)
        for name, pieces, *factors in zip(triplets.names, slices, triplets.A, triplets.E, triplets.B, strict=True):
            for kind, piece, p in zip(("lora_A", "lora_E", "lora_B"), pieces, factors, strict=True):
                # PEFT asks whether a name is in ipt, and writes its value before it reads it
                self.ipt[name % kind] = zero.expand(p.shape)
                self.exp_avg_ipt[name % kind] = self.sensitivity[piece].view(p.shape)
                self.exp_avg_unc[name % kind] = self.uncertainty[piece].view(p.shape)
        self.scores: Tensor | None = None  # of the last update, good while the averages have this version:
        self.version = (-1, -1)

    def versions(self) -> tuple[int, int]:
        return self.sensitivity._version, self.uncertainty._version

    def is_in(self, allocator: FusedAllocator) -> bool:
        """Are the dictionaries of the allocator still the views?"""
        mine, theirs = (self.exp_avg_ipt, self.exp_avg_unc), (allocator.exp_avg_ipt, allocator.exp_avg_unc)
        return all(_same(t.values(), m.values()) for m, t in zip(mine, theirs, strict=True))


class FusedAllocator(Patched):
    """Of PEFT's RankAllocator. float32 adapters, which is how PEFT makes them; others are left to PEFT, whose averages
    are in their dtype."""

    _peftkern_layers: tuple[nn.Module, list | None] | None = None
    _peftkern_triplets: Triplets | None = None
    _peftkern_state: State | None = None
    _peftkern_keep: tuple[list[bool], Tensor] | None = None

    def triplets(self, model: nn.Module) -> Triplets | None:
        """None: PEFT has to do it."""
        if self._peftkern_layers is None or self._peftkern_layers[0] is not model:
            self._peftkern_layers = (model, _owners(model, self.adapter_name))
        owners = self._peftkern_layers[1]
        if owners is None:
            return None
        names, dictionaries, key = owners
        A, E, B = ([d._parameters.get(key) for d in column] for column in dictionaries)
        last = self._peftkern_triplets
        if last is None or not (_same(A, last.A) and _same(E, last.E) and _same(B, last.B)):
            if _reason((*A, *E, *B)) is not None:
                return None
            last = self._peftkern_triplets = Triplets(names, A, E, B)
        return last

    def why_not(self, model: nn.Module) -> str | None:
        if self.triplets(model) is not None:
            return None
        owners = self._peftkern_layers[1]
        if owners is None:
            return "parameters of other kinds are ranked"
        return _reason([d._parameters.get(owners[2]) for d in chain(*owners[1])])

    # ---- what PEFT's methods do

    def reset_ipt(self) -> None:
        self._peftkern_state = None
        super().reset_ipt()

    def update_ipt(self, model: nn.Module) -> None:
        t = self.triplets(model)
        if t is None or _deepspeed() or any(p.grad is None for p in chain(t.A, t.E, t.B)):
            return super().update_ipt(model)  # which raises where a gradient is missing
        state = self._state(t)
        state.scores = update_importance(t.A, t.E, t.B, state.sensitivity, state.uncertainty, self.beta1, self.beta2)
        state.version = state.versions()
        return None

    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        t, state = self.triplets(model), self._peftkern_state
        if t is None or state is None or state.triplets is not t or state.scores is None:
            return super().mask_to_budget(model, budget)
        if state.version != state.versions() or not state.is_in(self):  # someone has written to the averages
            return super().mask_to_budget(model, budget)
        keep = rank_mask(state.scores, state.scores.numel() - (self.init_bgt - budget))
        mask_ranks(t.E, keep)
        return t.per_layer(keep.tolist())

    def mask_using_rank_pattern(self, model: nn.Module, rank_pattern: dict[str, list[bool]]) -> None:
        t = self.triplets(model)
        whole = self.adapter_name in next(iter(rank_pattern))
        names = [name % "lora_E" for name in t.names] if t else []
        pieces = [rank_pattern[n if whole else n.replace(f".{self.adapter_name}", "")] for n in names]
        if t is None or any(not isinstance(p, list) or len(p) != n for p, n in zip(pieces, t.sizes, strict=True)):
            return super().mask_using_rank_pattern(model, rank_pattern)
        flat = list(chain.from_iterable(pieces))
        if self._peftkern_keep is None or self._peftkern_keep[0] != flat:
            self._peftkern_keep = (flat, torch.tensor(flat, dtype=torch.bool, device=t.E[0].device))
        mask_ranks(t.E, self._peftkern_keep[1])
        return None

    # ---- the averages

    def _state(self, t: Triplets) -> State:
        """Taken over from PEFT's dictionaries where those are not ours already."""
        state = self._peftkern_state
        if state is not None and state.triplets is t and state.is_in(self):
            return state
        state = State(t)
        for ours, theirs in ((state.exp_avg_ipt, self.exp_avg_ipt), (state.exp_avg_unc, self.exp_avg_unc)):
            for name, average in ours.items():
                if name in self.ipt and name in theirs:
                    average.copy_(theirs[name])
        self.ipt, self.exp_avg_ipt, self.exp_avg_unc = state.ipt, state.exp_avg_ipt, state.exp_avg_unc
        self._peftkern_state = state
        return state

    def _plain_state(self) -> dict[str, Any]:
        plain = super()._plain_state()
        for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            plain[name] = {n: t.clone() for n, t in plain[name].items()}
        return plain

    def hand_back(self) -> None:
        """To PEFT's class, with the averages."""
        plain = self._plain_state()
        self.__dict__.clear()
        self.__dict__.update(plain)
        self.__class__ = self._peftkern_class


def _same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(map(is_, a, b))


def _owners(model: nn.Module, adapter: str) -> tuple[list[str], tuple[list, list, list], str] | None:
    """Names, the ParameterDicts that hold A, E and B of each layer, and the key; None where PEFT, which looks for parts
    of names, finds others too."""
    found: dict[str, dict[str, nn.Module]] = {}
    for name, _ in model.named_parameters():
        if "lora_" in name and adapter in name:
            owner, _, key = name.rpartition(".")
            kind = owner.rpartition(".")[2]
            if key != adapter or kind not in ("lora_A", "lora_E", "lora_B"):
                return None
            found.setdefault(name.replace(kind, "%s"), {})[kind] = model.get_submodule(owner)
    if not found or any(len(kinds) != 3 for kinds in found.values()):
        return None
    columns = tuple([kinds[kind] for kinds in found.values()] for kind in ("lora_A", "lora_E", "lora_B"))
    return list(found), columns, adapter


def _reason(factors: Iterable[Any]) -> str | None:
    """Why the factors are not for our kernels, or None."""
    factors = list(factors)
    if any(type(p) is not nn.Parameter for p in factors):
        return "the adapters are no plain parameters"
    if any(p.dtype != torch.float32 for p in factors):
        return "the adapters are not float32, and so are PEFT's averages"
    devices = {p.device for p in factors}
    if len(devices) > 1:
        return "the adapters are on several devices"
    if not has_kernels(factors[0].device.type):
        return f"no kernels for {factors[0].device.type}"
    if any(p.dim() != 2 or not p.is_contiguous() for p in factors):
        return "the adapters are not contiguous matrices"
    return None


def _deepspeed() -> bool:
    from peft.tuners.adalora import layer

    return layer.deepspeed_config() is not None
