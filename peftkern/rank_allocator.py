# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA for a whole model: who gets how much rank, when, and what becomes of the rest (Zhang et al. 2023, arXiv
2303.10512, algorithm 1, in the form HF PEFT gives it; docs/adalora.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import adapted_layers, plain_linear, replace_modules
from .adapter_io import exact_targets
from .config import AdaLoraConfig, LoraConfig, read_config
from .modules import AdaLoRALinear, LoRALinear
from .modules.adalora import rank_axis
from .ops import mask_ranks, orthogonality_penalty, rank_mask, update_importance
from .ops.rank_allocation import TripletTable, state_layout
from .sharded_triplets import ShardedTriplets, is_sharded

PRUNE = ("never", "final", "always")
FORMS = ("peft", "paper")


class RankAllocator:
    """Scores the triplets of all AdaLoRALinear layers of a model after every optimizer step, and masks the worst as the
    budget falls from init_r to target_r a layer.

    optimizer: the one that trains the adapters; the allocator hooks itself onto its ``step``, so there is nothing more
    to call. None: call ``update_and_allocate()`` after every ``optimizer.step()``, before ``zero_grad()``.
    config: an AdaLoraConfig, ours or peft's; by default the one the model was adapted with.
    prune: masked triplets are only zeroed, and can come back, as in HF PEFT ("never"); or are removed, with their
    optimizer state: once the ranks are final ("final"), or at every allocation ("always").
    exact: keep exactly the budget where scores are equal; False prunes all of them, as HF PEFT.
    process_group: the processes that train replicas of the model (default: all, if torch.distributed is initialised);
    all take the scores of its first. Under FSDP2 the averages are sharded like the parameters: create the allocator
    after fully_shard, with prune="never".

    A step that a GradScaler skips does not count. Layers whose lora_E is frozen are left alone; one that got no
    gradient counts as one with gradient zero. ``step`` counts optimizer steps from 1, ``budget`` is the current one.
    Raises ValueError naming the argument if there is nothing to allocate or the optimizer does not hold it.

    >>> config = AdaLoraConfig(init_r=4, target_r=2, total_step=5)
    >>> model = adapt(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)
    >>> optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    >>> allocator = RankAllocator(model, optimizer=optimizer)
    >>> for _ in range(5):
    ...     loss = model(torch.randn(3, 8)).square().mean() + 0.1 * orthogonality(model)
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> allocator.budget, sum(allocator.ranks().values())
    (4, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        config: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        prune: str = "never",
        exact: bool = False,
        process_group: Any = None,
    ) -> None:
        config = getattr(model, "peftkern_config", None) if config is None else read_config(config)
        if not isinstance(config, AdaLoraConfig):
            raise ValueError(f"config: expected an AdaLoraConfig, got {type(config).__name__}")
        if prune not in PRUNE:
            raise ValueError(f"prune: expected one of {PRUNE}, got {prune!r}")
        self.layers = {name: m for name, m in adalora_layers(model).items() if m.lora_E.requires_grad}
        if not self.layers:
            raise ValueError("model: expected AdaLoRALinear layers that train, got none; call adapt() first")
        self.config, self.prune, self.exact, self.process_group = config, prune, exact, process_group
        self.optimizer = _innermost(optimizer)
        self.step = 0
        self.initial_budget = sum(layer.init_r for layer in self.layers.values())
        self.target_budget = config.target_r * len(self.layers)
        self.budget = self.initial_budget
        self.sensitivity: Tensor | None = None  # averages, flat (ops.rank_allocation.state_layout)
        self.uncertainty: Tensor | None = None
        self.scores: Tensor | None = None  # [triplets], of the last update
        self.keep: Tensor | None = None  # bool [triplets], of the last allocation
        self._handle = None
        if self.optimizer is not None:
            _check_holds(self.optimizer, self.layers)
            self._handle = self.optimizer.register_step_post_hook(self._after_step)
        self._collect()
        self._waits = self.optimizer is None  # to be called: layers warn if an optimizer steps and it is not
        for layer in self.layers.values():
            layer.warns_without_allocator, layer.version_to_allocate = self._waits, layer.lora_E._version

    # ---- the schedule

    def schedule(self, step: int) -> tuple[int, bool]:
        """``(budget, allocate)`` of an optimizer step, counted from 1: how many triplets there may be, and whether the
        ranks are decided anew."""
        c = self.config
        final = c.total_step - c.tfinal
        if step <= c.tinit:
            return self.initial_budget, False
        if step > final:
            return self.target_budget, False
        left = 1 - (step - c.tinit) / (final - c.tinit)
        budget = int((self.initial_budget - self.target_budget) * left**3 + self.target_budget)
        return budget, step % c.deltaT == 0 or step == final

    def update_and_allocate(self, step: int | None = None) -> None:
        """What HF PEFT's method of this name does, for training without a hooked optimizer: call it after
        ``optimizer.step()`` and before ``zero_grad()``. step: its number (default: one more than the last).

        Raises RuntimeError if an optimizer is hooked, whose step has done it already.
        """
        if self._handle is not None:
            raise RuntimeError(
                "update_and_allocate: the optimizer given to this RankAllocator calls it after every step; "
                "leave the call out, or create the allocator without optimizer"
            )
        for layer in self.layers.values() if self._waits else ():
            layer.warns_without_allocator = False
        self._waits = False
        self._advance(self.step + 1 if step is None else step, None)

    def remove(self) -> None:
        """Unhooks the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A GradScaler lets fused optimizers unscale and skip by themselves and sets these two for the time of the step;
        # all others it gives unscaled gradients, and does not call when it skips.
        found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is None or not bool(found_inf):
            self._advance(self.step + 1, grad_scale)

    @torch.no_grad()
    def _advance(self, step: int, grad_scale: Tensor | None) -> None:
        if self._resizes != AdaLoRALinear.resizes:
            self._follow_ranks()
        self.step = step
        self.budget, allocate = self.schedule(step)
        final = self.config.total_step - self.config.tfinal
        table = None  # of addresses, read once for the update and the masks
        if step < final or (allocate and self.scores is None):
            table = self._table() if self._shards is None else None
            self._update(grad_scale, table)
        if allocate:
            self._allocate(step == final, table)
        elif step > final and self.keep is not None and self.prune == "never":
            self._mask(self.keep)

    def _update(self, grad_scale: Tensor | None, table: Tensor | None) -> None:
        if self.sensitivity is None or self.uncertainty is None:
            dtype = torch.promote_types(torch.float32, self._E[0].dtype)
            self.sensitivity = torch.zeros(self._state_size, dtype=dtype, device=self._E[0].device)
            self.uncertainty = torch.zeros_like(self.sensitivity)
        betas = self.config.beta1, self.config.beta2
        if self._shards is not None:
            self.scores = self._shards.update(self.sensitivity, self.uncertainty, *betas, grad_scale)
            return
        self.scores = update_importance(
            self._A, self._E, self._B, self.sensitivity, self.uncertainty, *betas, grad_scale, table
        )

    def _allocate(self, last: bool, table: Tensor | None) -> None:
        assert self.scores is not None
        keep = rank_mask(self._agreed(self.scores), self.budget, self.exact)
        if last:  # nothing is scored any more
            self.sensitivity = self.uncertainty = self.scores = None
        self.keep = keep
        self._mask(keep, table)
        if self.prune == "always" or (self.prune == "final" and last):
            pieces = keep.split([layer.r for layer in self.layers.values()])
            _remove_triplets(dict(zip(self.layers.values(), pieces, strict=True)), self.optimizer)
            self._follow_ranks()

    def _mask(self, keep: Tensor, table: Tensor | None = None) -> None:
        if self._shards is not None:
            self._shards.mask(keep)
        else:
            mask_ranks(self._E, keep, table)

    def _agreed(self, scores: Tensor) -> Tensor:
        """The first rank's scores. Replicas have the same gradients, but not the same sums on different processors."""
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            first = 0 if self.process_group is None else dist.get_global_rank(self.process_group, 0)
            dist.broadcast(scores, src=first, group=self.process_group)
        return scores

    # ---- which triplets there are

    def _collect(self) -> None:
        layers = self.layers.values()
        self._A, self._E = [m.lora_A for m in layers], [m.lora_E for m in layers]
        self._B = [m.lora_B for m in layers]
        self._present = [list(m.present) for m in layers]
        self._slices, self._state_size = state_layout([(m.r, m.in_features, m.out_features) for m in layers])
        self._resizes = AdaLoRALinear.resizes
        self._shards = None
        if any(is_sharded(t) for t in (*self._A, *self._E, *self._B)):
            if self.prune != "never":
                raise ValueError(f'prune: expected "never" for a model that FSDP2 has sharded, got {self.prune!r}')
            self._shards = ShardedTriplets(self._A, self._E, self._B)
            self._state_size = self._shards.state_size
        else:
            self._table = TripletTable(self._A, self._E, self._B)
        devices = {str(t.device) for t in self._E}
        if len(devices) > 1:
            raise ValueError(f"model: expected all adapters on one device, got {sorted(devices)}")

    def _follow_ranks(self) -> None:
        """Cuts the state down to the triplets that are left after layers were pruned."""
        old, slices = self._present, self._slices
        self._collect()
        if old == self._present:
            return
        for name, before, now in zip(self.layers, old, self._present, strict=True):
            if any(new and not was for was, new in zip(before, now, strict=True)):
                raise RuntimeError(
                    f"{name}: expected a rank that only falls; load_state_dict() of the allocator is missing"
                )
        left = [
            torch.tensor([new for was, new in zip(before, now, strict=True) if was], dtype=torch.bool)
            for before, now in zip(old, self._present, strict=True)
        ]
        every = torch.cat(left)
        if self.scores is not None:
            self.scores = self.scores[every.to(self.scores.device)]
        if self.keep is not None:
            self.keep = self.keep[every.to(self.keep.device)]
        for name in ("sensitivity", "uncertainty"):
            state = getattr(self, name)
            if state is None:
                continue
            smaller = state.new_zeros(self._state_size)
            for layer, pieces, targets, keep in zip(self.layers.values(), slices, self._slices, left, strict=True):
                index = keep.nonzero().view(-1).to(state.device)
                for parameter, source, target in zip(layer.adapter_parameters(), pieces, targets, strict=True):
                    axis = rank_axis(parameter)
                    shape = (-1, keep.numel()) if axis else (keep.numel(), -1)
                    smaller[target] = state[source].view(shape).index_select(axis, index).view(-1)
            setattr(self, name, smaller)

    def ranks(self) -> dict[str, int]:
        """The number of triplets of every layer that are neither removed nor masked. Waits for the device."""
        if self._resizes != AdaLoRALinear.resizes:
            self._follow_ranks()
        sizes = [layer.r for layer in self.layers.values()]
        if self.keep is None:
            return dict(zip(self.layers, sizes, strict=True))
        return {name: int(k.sum()) for name, k in zip(self.layers, self.keep.cpu().split(sizes), strict=True)}

    # ---- resuming

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, with the model's and the optimizer's own states; torch.save takes it."""
        if self._resizes != AdaLoRALinear.resizes:
            self._follow_ranks()
        tensors = {name: getattr(self, name) for name in ("sensitivity", "uncertainty", "scores", "keep")}
        copies = {name: None if t is None else t.clone() for name, t in tensors.items()}
        present = dict(zip(self.layers, (list(p) for p in self._present), strict=True))
        return {"step": self.step, "budget": self.budget, "present": present, **copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what state_dict() gave. Load the adapter first.

        Raises ValueError, and changes nothing, if the state belongs to other layers or other ranks than the model has.
        """
        self._collect()
        present = dict(zip(self.layers, self._present, strict=True))
        if list(state["present"]) != list(present):
            raise ValueError(
                f"state: expected one of {len(present)} layers {list(present)[:2]}..., got {len(state['present'])} "
                f"layers {list(state['present'])[:2]}..."
            )
        for name, expected in present.items():
            if state["present"][name] != expected:
                raise ValueError(
                    f"state: {name}: expected {sum(expected)} triplets, as the model has, got one with "
                    f"{sum(state['present'][name])}; load the adapter that belongs to it first"
                )
        triplets = sum(map(sum, self._present))
        sizes = {
            "sensitivity": self._state_size, "uncertainty": self._state_size, "scores": triplets, "keep": triplets,
        }  # fmt: skip
        for name, size in sizes.items():
            if state[name] is not None and tuple(state[name].shape) != (size,):
                raise ValueError(f"state: {name}: expected shape [{size}], got {list(state[name].shape)}")
        self.step, self.budget = int(state["step"]), int(state["budget"])
        for name in sizes:
            setattr(self, name, None if state[name] is None else state[name].to(self._E[0].device, copy=True))


def adalora_layers(model: nn.Module) -> dict[str, AdaLoRALinear]:
    """The AdaLoRALinear layers of model by name."""
    return {name: layer for name, layer in adapted_layers(model) if isinstance(layer, AdaLoRALinear)}


def _innermost(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer itself inside wrappers like accelerate's, which do not call hooks."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _check_holds(optimizer: torch.optim.Optimizer, layers: Mapping[str, AdaLoRALinear]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, layer in layers.items() if id(layer.lora_E) not in held]
    if missing:
        raise ValueError(
            f"optimizer: expected one that trains the adapters, it lacks the lora_E of {len(missing)} of {len(layers)} "
            f"layers, e.g. of {missing[0]!r}"
        )


def orthogonality(model: nn.Module, form: str = "peft") -> Tensor:
    """The term that keeps the rows of every lora_A and the columns of every lora_B orthonormal: float32 [], to be added
    to the loss, times orth_reg_weight.

    form "peft": the mean over all lora_A and lora_B of ``||A A^T - I||_F`` and ``||B^T B - I||_F``, as HF PEFT and the
    published code have it; "paper": the sum of the squares, equation 4. Raises ValueError for another form or a model
    without AdaLoRALinear.

    >>> layer = AdaLoRALinear(16, 16, r=4)
    >>> bool(orthogonality(layer) > 0)
    True
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
    layers = adalora_layers(model).values()
    if not layers:
        raise ValueError("model: expected one with AdaLoRALinear layers, got none")
    A, B = ([t.full_tensor() if is_sharded(t) else t for t in factors]
            for factors in ([m.lora_A for m in layers], [m.lora_B for m in layers]))  # fmt: skip
    return orthogonality_penalty(A, B, squared=form == "paper")


@torch.no_grad()
def prune_ranks(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Removes every triplet whose E is 0 from parameters, gradients and the state of optimizer, so that time and memory
    fall with the rank; the outputs stay the same. Returns the rank of every layer.

    The parameters stay the same objects. Wrap the model in DistributedDataParallel afterwards, not before: it has
    buffers of their sizes. Raises RuntimeError if every E is 0, as before the first step, if a layer is merged or
    sharded, or if the optimizer keeps a state that cannot be cut; nothing is changed then.

    >>> layer = AdaLoRALinear(16, 8, r=4)
    >>> layer.lora_E.data.copy_(torch.tensor([[1.0], [0.0], [2.0], [0.0]])).shape
    torch.Size([4, 1])
    >>> prune_ranks(layer), layer.lora_B.shape
    ({'': 2}, torch.Size([8, 2]))
    """
    layers = adalora_layers(model)
    if any(is_sharded(p) for layer in layers.values() for p in layer.adapter_parameters().values()):
        raise RuntimeError("model: expected whole parameters to remove triplets from, got ones FSDP2 has sharded")
    keep = {layer: (layer.lora_E != 0).view(-1) for layer in layers.values()}
    if not any(bool(k.any()) for k in keep.values()):
        raise RuntimeError("model: expected AdaLoRALinear layers of which some E is not 0, got none")
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(f"{name}: expected an unmerged layer; call unmerge() first")
    _remove_triplets(keep, _innermost(optimizer))
    return {name: layer.r for name, layer in layers.items()}


def _remove_triplets(keep: Mapping[AdaLoRALinear, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    for layer in keep:
        for name, p in layer.adapter_parameters().items():
            for key, value in (optimizer.state.get(p, {}) if optimizer else {}).items():
                whole = isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point()
                if isinstance(value, Tensor) and value.numel() > 1 and not whole:
                    raise RuntimeError(
                        "optimizer: expected a state whose tensors are shaped like their parameters, got "
                        f"{key!r} {list(value.shape)} of {value.dtype} for a {name} {list(p.shape)}"
                    )
    for layer, kept in keep.items():
        if bool(kept.all()):
            continue
        shapes = {name: p.shape for name, p in layer.adapter_parameters().items()}
        index = layer.keep_triplets(kept)
        for name, p in layer.adapter_parameters().items():
            state = optimizer.state.get(p, {}) if optimizer else {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == shapes[name]:
                    state[key] = value.index_select(rank_axis(name), index)


@torch.no_grad()
def to_lora(model: nn.Module) -> nn.Module:
    """Turns every AdaLoRALinear of model into a LoRALinear that computes the same, in place, and returns model.

    E and the scaling go into lora_A, so the scaling is 1 and readers that know no per-layer ranks (vLLM) are right too;
    triplets whose E is 0 are left out, and a layer that has no other becomes a plain one. save_adapter then writes an
    ordinary LoRA adapter. Raises ValueError if there is no AdaLoRALinear, RuntimeError if one is merged or every E is
    0.
    """
    layers = adalora_layers(model)
    if not layers:
        raise ValueError("model: expected one with AdaLoRALinear layers, got none")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(f"{merged[0]}: expected an unmerged layer; call unmerge() first")
    keep = {name: (layer.lora_E != 0).view(-1) for name, layer in layers.items()}
    ranks = {name: int(k.sum()) for name, k in keep.items()}
    if not any(ranks.values()):
        raise RuntimeError("model: expected AdaLoRALinear layers of which some E is not 0, got none")
    replacements = {
        id(layer): _as_lora(layer, keep[name]) if ranks[name] else plain_linear(layer) for name, layer in layers.items()
    }
    if id(model) in replacements:
        raise ValueError("model: expected a module that holds AdaLoRALinear layers, got such a layer itself")
    replace_modules(model, replacements)
    config = getattr(model, "peftkern_config", None)
    left = {name: rank for name, rank in ranks.items() if rank}
    if config is not None:
        model.peftkern_config = _lora_config(model, config, left)
    return model


def _as_lora(layer: AdaLoRALinear, keep: Tensor) -> LoRALinear:
    index = keep.nonzero().view(-1)
    A, E, B = (p.index_select(rank_axis(name), index) for name, p in layer.adapter_parameters().items())
    lora = LoRALinear.from_linear(
        plain_linear(layer), r=len(index), lora_alpha=len(index), lora_dropout=layer.lora_dropout,
        adapter_dtype=layer.lora_A.dtype,
    )  # fmt: skip
    lora.lora_A.copy_(layer.scaling * E.float() * A.float())
    lora.lora_B.copy_(B)
    for name, p in lora.adapter_parameters().items():
        p.requires_grad_(layer.adapter_parameters()[name].requires_grad)
    return lora.train(layer.training)


def _lora_config(model: nn.Module, config: AdaLoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    import re

    r = max(ranks.values())
    pattern: Sequence[tuple[str, int]] = [(f"^{re.escape(name)}", rank) for name, rank in ranks.items() if rank != r]
    return LoraConfig(
        r=r, lora_alpha=r, lora_dropout=config.lora_dropout, target_modules=exact_targets(model, ranks),
        rank_pattern=dict(pattern), alpha_pattern=dict(pattern), bias=config.bias, task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path, modules_to_save=config.modules_to_save,
    )  # fmt: skip
