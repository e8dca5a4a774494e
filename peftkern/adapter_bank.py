# SPDX-License-Identifier: Apache-2.0
"""Many adapters over one base model: loaded from disk as they are asked for, one of them for each item of a batch."""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .adapt import adapted_layers, find_targets, replace_modules
from .adapter_io import CONFIG_NAME, PREFIX, WEIGHTS_NAME, _read_config_file, _read_weights
from .config import LoraConfig, check_only_adds
from .modules import BaseWeight, NF4Linear
from .modules.nf4_linear import check_is_linear
from .ops import adapted_linear
from .ops.library import FLOAT_DTYPES
from .ops.multi_lora import plan_of_items, planned_multi_lora_linear

Mix = Mapping[str, float]
"""{adapter: weight}: their updates, added with these weights."""

Choice = str | Mix | None
"""What one item of a batch gets: an adapter, a mix of some, or the base model."""


@dataclass
class BankCounters:
    """What the bank has done since it was made: adapters asked for that were in memory (hits), that had to be loaded
    (loads), and that were dropped for others (evictions)."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0


class _Selected:
    """The slot of each item of the batch, shared by all layers of a bank; None: the base model."""

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self._plans: dict[tuple[int, int], Tensor] = {}

    def choose(self, index: Tensor | None) -> Tensor | None:
        previous, self.index = self.index, index
        self._plans = {}
        return previous

    def plan(self, rows: int, capacity: int) -> Tensor:
        """Made once for all layers, and again if the index has been written to."""
        assert self.index is not None
        if self.index.is_inference():  # no version to tell whether it has been written to
            return plan_of_items(self.index, rows, capacity)
        key = (rows, self.index._version)
        if key not in self._plans:
            self._plans[key] = plan_of_items(self.index, rows, capacity)
        return self._plans[key]


class BankLinear(BaseWeight):
    """A frozen linear layer with room for ``capacity`` adapters: what AdapterBank puts in place of nn.Linear and
    NF4Linear. The state dict is that of the layer it replaces.

    lora_A: [capacity, max_rank, in_features]; lora_B: [capacity, out_features, max_rank]; ranks: int32 [capacity];
    scalings: float32 [capacity]. Rank 0: the layer has no adapter in that slot.
    """

    def __init__(self, linear: nn.Linear, capacity: int, max_rank: int, dtype: torch.dtype, selected: _Selected):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.set_base_weight(linear.base_weight() if isinstance(linear, NF4Linear) else linear.weight)
        self.bias = linear.bias
        device = self.weight.device
        for name, shape, kind in (
            ("lora_A", (capacity, max_rank, self.in_features), dtype),
            ("lora_B", (capacity, self.out_features, max_rank), dtype),
            ("ranks", (capacity,), torch.int32),
            ("scalings", (capacity,), torch.float32),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device), persistent=False)
        self._selected = selected
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features], in x's dtype. The rows of x belong to the items of the batch in
        order, equally many to each."""
        index, weight = self._selected.index, self.base_weight()
        if index is None:
            return adapted_linear(x, weight, bias=self.bias)
        items, capacity = index.shape[0], self.lora_A.shape[0]
        rows = math.prod(x.shape[:-1])
        if (x.shape[0] if x.dim() > 2 else rows) % items:
            raise RuntimeError(
                f"x: expected a batch of {items} or a multiple, as many adapters are selected, got {list(x.shape)}"
            )
        if torch.compiler.is_compiling():  # a plan that is kept would be a change of state in the graph
            plan = plan_of_items(index, rows, capacity)
        else:
            plan = self._selected.plan(rows, capacity)
        return planned_multi_lora_linear(
            x, weight, self.lora_A, self.lora_B, plan, scaling=self.scalings, ranks=self.ranks, bias=self.bias
        )

    def _apply(self, fn, recurse=True):
        """``.to(dtype)`` casts the weight and the adapters, but not the scalings: the op wants them in float32."""
        scalings = self.scalings
        super()._apply(fn, recurse)
        self.scalings = scalings.to(self.lora_A.device)
        return self

    @torch.no_grad()
    def write(self, slot: int, factors: Factors | None) -> None:
        """Puts an adapter into a slot, in place; None: nothing."""
        self.ranks[slot] = 0
        if factors is None:
            return
        rank = factors.A.shape[0]
        self.lora_A[slot, :rank] = factors.A.to(self.lora_A)
        self.lora_B[slot, :, :rank] = factors.B.to(self.lora_B)
        self.scalings[slot], self.ranks[slot] = factors.scaling, rank

    def read(self, slot: int) -> Factors | None:
        rank = int(self.ranks[slot])
        if not rank:
            return None
        return Factors(self.lora_A[slot, :rank], self.lora_B[slot, :, :rank], float(self.scalings[slot]))

    def extra_repr(self) -> str:
        capacity, max_rank, _ = self.lora_A.shape
        return f"in_features={self.in_features}, out_features={self.out_features}, {capacity=}, {max_rank=}"


@dataclass(frozen=True)
class Factors:
    """An adapter of one layer: A [r, in], B [out, r], scaling."""

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(frozen=True)
class _Stored:
    """An adapter on disk, as it was checked."""

    folder: Path
    scalings: dict[str, float]  # by layer


class AdapterBank:
    """Adapters in HF PEFT's LoRA format over one base model, chosen for each item of a batch.

    model: any module; its linear layers (nn.Linear, NF4Linear) that target_modules names, as in LoraConfig, get room
        for adapters, in place. Outside of ``select`` the model computes what it did before.
    capacity: adapters in memory at a time; the least recently used one goes when room is needed. max_rank: the largest
        rank, and for a mix the largest sum of ranks. dtype: in which adapters are kept. All of it is allocated now.

    Adapters may have any ranks up to max_rank, rank and alpha patterns, rsLoRA, and leave out layers. Adding, swapping
    and loading write into memory that is there, so a compiled model keeps its graph. Adapters do not train here; for
    that, ``adapt`` a model, and ``save_adapter``. One thread at a time.

    Raises ValueError for a bad argument, or naming adapter and layer where a file does not fit.

    >>> bank = AdapterBank(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), capacity=2, max_rank=4)
    >>> with bank.select(None):
    ...     bank.model(torch.randn(3, 8)).shape, bank.names, bank.nbytes
    (torch.Size([3, 4]), [], 928)
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: str | list[str] = "all-linear",
        *,
        capacity: int = 8,
        max_rank: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value in (("capacity", capacity), ("max_rank", max_rank)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        if next(adapted_layers(model), None) is not None or any(isinstance(m, BankLinear) for m in model.modules()):
            raise ValueError("model: expected one without adapters, got one that has some, or a bank")
        targets = find_targets(model, LoraConfig(target_modules=target_modules))
        for name, linear in targets.items():
            try:
                check_is_linear(linear)
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
        self.model, self.capacity, self.max_rank = model, capacity, max_rank
        self.counters = BankCounters()
        self._trained = [(p, p.requires_grad) for p in model.parameters()]
        self._replaced = targets
        self._selected = _Selected()
        self._layers = {
            name: BankLinear(linear, capacity, max_rank, dtype, self._selected) for name, linear in targets.items()
        }
        replace_modules(model, {id(targets[name]): layer for name, layer in self._layers.items()})
        self._stored: dict[str, _Stored] = {}
        self._slots: OrderedDict[Any, int] = OrderedDict()  # name or mix -> slot, least recently used first
        self._pinned: set[str] = set()
        self._in_use: list[set[Any]] = []  # of the selections that are open

    # ---- which adapters there are ------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Every adapter that was added."""
        return list(self._stored)

    @property
    def resident(self) -> list[str]:
        """Those in memory, least recently used first."""
        return [key for key in self._slots if isinstance(key, str)]

    @property
    def nbytes(self) -> int:
        """Memory for adapters, full or not."""
        buffers = (b for layer in self._layers.values() for b in layer.buffers(recurse=False))
        return sum(b.nbytes for b in buffers)

    def add(self, name: str, directory: str | os.PathLike) -> None:
        """Makes an adapter known that save_adapter or HF PEFT saved. The files are checked now, and read when it is
        first selected. Raises ValueError if name is taken or the files do not fit, FileNotFoundError if there are none.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a string, got {name!r}")
        if name in self._stored:
            raise ValueError(f"{name}: expected a new name, an adapter is called so; replace() swaps it")
        self._stored[name] = self._check(name, Path(directory))

    def replace(self, name: str, directory: str | os.PathLike) -> None:
        """Swaps a known adapter for another one, in memory too if it is there. A failure leaves the old one."""
        self._known(name)
        stored = self._check(name, Path(directory))
        if name in self._slots:
            factors = self._read(name, stored)
            self._write(self._slots[name], factors)
        self._stored[name] = stored
        self._forget_mixes(name)

    def remove(self, name: str) -> None:
        """Forgets an adapter. Raises RuntimeError while it is selected, also as a part of a mix."""
        self._known(name)
        if any(
            name == key or name in dict(key if isinstance(key, tuple) else ()) for used in self._in_use for key in used
        ):
            raise RuntimeError(f"{name}: expected an adapter that is not selected, to remove it")
        self._forget_mixes(name)
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._write(slot, {})
        self._pinned.discard(name)
        del self._stored[name]

    def pin(self, name: str) -> None:
        """Loads an adapter and keeps it in memory until unpin(). Raises RuntimeError if no room is left for others."""
        self._known(name)
        if len(self._pinned | {name}) > self.capacity:
            raise RuntimeError(f"{name}: expected at most {self.capacity} pinned adapters, the capacity of the bank")
        self._load([name])
        self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Lets an adapter be dropped again when room is needed."""
        self._known(name)
        self._pinned.discard(name)

    # ---- choosing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def select(self, choices: Choice | Sequence[Choice] | Tensor) -> Iterator[AdapterBank]:
        """Within it, the model applies these adapters.

        choices: a name for the whole batch, or a list with one choice for each item: a name, None for the base model,
        or a mix {name: weight}. A mix takes a slot like an adapter, whose factors are those of its parts side by side,
        the weights in B; so it costs its ranks once, and nothing for each token. A batch may also be a multiple of the
        list, as with beams: consecutive items belong together.
        Or an int64 tensor of slots (``slots()``), used as it is: for CUDA graphs, which read it anew at each replay.

        What is missing is loaded, in place of what was not used for longest, but never of what is selected or pinned.
        Raises KeyError for an unknown name, RuntimeError if more adapters are asked for than there is room.
        """
        if isinstance(choices, Tensor):
            keys, index = [], choices
            if index.dim() != 1 or not index.numel():
                raise ValueError(f"choices: expected a tensor of slots, one for each item, got {list(index.shape)}")
        else:
            whole = choices is None or isinstance(choices, (str, Mapping))
            keys = [self._key(choice) for choice in ([choices] if whole else choices)]
            if not keys:
                raise ValueError("choices: expected one for each item of the batch, got none")
            index = self._load(keys)
        self._in_use.append({key for key in keys if key is not None})
        previous = self._selected.choose(None if all(k is None for k in keys) and keys else index)
        try:
            yield self
        finally:
            self._selected.choose(previous)
            self._in_use.pop()

    def slots(self, choices: Sequence[Choice]) -> Tensor:
        """int64 [len(choices)] on the device of the model: where each choice is, after loading what is missing; -1 for
        None. Valid while the adapters are not dropped: pin() them."""
        return self._load([self._key(choice) for choice in choices])

    def close(self) -> nn.Module:
        """Puts the original layers back. Returns model."""
        for name, layer in self._layers.items():
            original = self._replaced[name]
            if isinstance(original, NF4Linear):
                original.set_base_weight(layer.base_weight())  # which may have moved
            else:
                original.weight = layer.weight
            original.bias = layer.bias
            original.train(layer.training)
        replace_modules(self.model, {id(layer): self._replaced[name] for name, layer in self._layers.items()})
        for parameter, requires_grad in self._trained:
            parameter.requires_grad_(requires_grad)
        self._slots.clear()
        return self.model

    # ---- within ------------------------------------------------------------------------------------------------------

    def _known(self, name: str) -> _Stored:
        if name not in self._stored:
            some = ", ".join(self.names[:8]) or "none"
            raise KeyError(f"{name}: expected the name of an adapter of the bank ({some})")
        return self._stored[name]

    def _key(self, choice: Choice) -> Any:
        """Of a choice in _slots: its name, or the sorted parts of a mix."""
        if choice is None:
            return None
        if isinstance(choice, str):
            self._known(choice)
            return choice
        if not isinstance(choice, Mapping) or not choice:
            raise ValueError(f"choices: expected names, None or {{name: weight}}, got {choice!r}")
        for name, weight in choice.items():
            self._known(name)
            if not math.isfinite(weight):
                raise ValueError(f"choices: {name}: expected a finite weight, got {weight!r}")
        return tuple(sorted((name, float(weight)) for name, weight in choice.items()))

    def _load(self, keys: Sequence[Any]) -> Tensor:
        """The slots of keys, after loading what is missing."""
        wanted = dict.fromkeys(key for key in keys if key is not None)
        held = set(wanted) | self._pinned | {key for used in self._in_use for key in used}
        if len(held) > self.capacity:
            raise RuntimeError(
                f"choices: expected at most {self.capacity} adapters at a time, the capacity of the bank, got "
                f"{len(held)} that are asked for, selected or pinned"
            )
        for key in wanted:
            if key in self._slots:
                self.counters.hits += 1
            else:
                factors = self._read(key)  # before anything is dropped for it
                free = set(range(self.capacity)) - set(self._slots.values())
                if free:
                    slot = min(free)
                else:
                    slot = self._slots.pop(next(k for k in self._slots if k not in held))
                    self.counters.evictions += 1
                self._write(slot, factors)
                self._slots[key] = slot
                self.counters.loads += 1
            self._slots.move_to_end(key)
        device = next(iter(self._layers.values())).lora_A.device
        return torch.tensor([-1 if key is None else self._slots[key] for key in keys], device=device)

    def _write(self, slot: int, factors: Mapping[str, Factors]) -> None:
        for name, layer in self._layers.items():
            layer.write(slot, factors.get(name))

    def _forget_mixes(self, name: str) -> None:
        """Mixes with this part, unless they are selected, are made anew when they are next asked for."""
        for key in [k for k in self._slots if isinstance(k, tuple) and name in dict(k)]:
            if not any(key in used for used in self._in_use):
                self._write(self._slots.pop(key), {})

    def _read(self, key: Any, stored: _Stored | None = None) -> dict[str, Factors]:
        """By layer."""
        if isinstance(key, tuple):
            return self._read_mix(dict(key))
        stored = stored or self._stored[key]
        again = self._check(key, stored.folder)  # the files may be others than those that were added
        try:
            tensors = _read_weights(stored.folder / WEIGHTS_NAME)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        return {
            layer: Factors(
                tensors[f"{PREFIX}{layer}.lora_A.weight"], tensors[f"{PREFIX}{layer}.lora_B.weight"], scaling
            )
            for layer, scaling in again.scalings.items()
        }

    def _read_mix(self, parts: dict[str, float]) -> dict[str, Factors]:
        loaded = {}
        for name in parts:
            if name in self._slots:
                read = {layer: m.read(self._slots[name]) for layer, m in self._layers.items()}
                loaded[name] = {layer: f for layer, f in read.items() if f is not None}
            else:
                loaded[name] = self._read(name)
        mixed = {}
        for layer, module in self._layers.items():
            here = [(weight, loaded[name][layer]) for name, weight in parts.items() if layer in loaded[name]]
            if not here:
                continue
            rank = sum(f.A.shape[0] for _, f in here)
            if rank > self.max_rank:
                raise ValueError(
                    f"mix of {', '.join(parts)}: {layer}: expected ranks that add up to at most {self.max_rank}, "
                    f"max_rank of the bank, got {rank}"
                )
            device = module.lora_A.device
            mixed[layer] = Factors(
                torch.cat([f.A.to(device).float() for _, f in here]),
                torch.cat([f.B.to(device).float() * (weight * f.scaling) for weight, f in here], dim=1), 1.0,
            )  # fmt: skip
        return mixed

    def _check(self, name: str, folder: Path) -> _Stored:
        """Config, names and shapes, without reading the tensors."""
        path = folder / WEIGHTS_NAME
        try:
            config = _read_config_file(folder / CONFIG_NAME)
            check_only_adds(config)
            if config.bias != "none":
                raise ValueError(f'{folder / CONFIG_NAME}: bias: expected "none", got {config.bias!r}')
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file")
            try:
                with safe_open(path, "pt") as file:
                    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{path}: expected a whole safetensors file: {error}") from error
            return _Stored(folder, self._fit(config, shapes, path))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _fit(self, config: LoraConfig, shapes: dict[str, tuple[int, ...]], path: Path) -> dict[str, float]:
        """The scaling of each layer of a file, whose tensors fit."""
        scalings = {}
        for key in shapes:
            layer, _, leaf = key.removeprefix(PREFIX).partition(".lora_")
            if not key.startswith(PREFIX) or leaf not in ("A.weight", "B.weight"):
                raise ValueError(f"{path}: expected lora_A and lora_B of linear layers, got {key!r}")
            module = self._layers.get(layer)
            if module is None:
                raise ValueError(
                    f"{path}: {layer}: expected a layer of the bank ({len(self._layers)} of the model match its "
                    "target_modules), got another one"
                )
            rank = config.rank_of(layer)
            if rank > self.max_rank:
                raise ValueError(f"{path}: {layer}: expected r <= {self.max_rank}, max_rank of the bank, got {rank}")
            both = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
            for kind, expected in both.items():
                got = shapes.get(f"{PREFIX}{layer}.lora_{kind}.weight")
                if got != expected:
                    raise ValueError(
                        f"{path}: {layer}.lora_{kind}: expected shape {list(expected)}, got {got and list(got)}"
                    )
            scalings[layer] = config.alpha_of(layer) / (math.sqrt(rank) if config.use_rslora else rank)
        if not scalings:
            raise ValueError(f"{path}: expected lora_A and lora_B of some layers, got none")
        return scalings
