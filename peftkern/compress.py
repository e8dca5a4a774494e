# SPDX-License-Identifier: Apache-2.0
"""SVD compression of LoRA adapters: the nearest adapter of fewer ranks, and what it leaves out.

The update of a layer, s B A, is never formed. With column norms of B moved into A, rows of A in falling order:

    A^T = Q_A R,  B R^T = Q C  (QR),  C = U S V^T  (n x n, jacobi_svd)   ->   s B A = (Q U) s S (Q_A V)^T

Truncation keeps the first k columns: B' = Q U_k S_k^(1/2), A' = S_k^(-1/2) (Q U_k)^T B A, scaled by s as before. No
matrix of that rank is nearer (Eckart and Young 1936). All in float64; accuracy: docs/compress.md.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import adapter_io
from .adapt import adapted_layers, plain_linear, replace_modules
from .adapter_io import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from .config import AdaLoraConfig, LoraConfig, check_only_adds, matches, read_config
from .files import write_whole
from .modules import AdaptedLinear, LoRAEmbedding, LoRALinear
from .modules.adalora import adalora_scaling
from .ops import jacobi_svd

_CHUNK_BYTES = 1 << 28  # float64 matrices held at a time
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_A_KEY = re.compile(r"(.*?)\.?lora_A(|\.weight|\.default\.weight)")


@dataclass(frozen=True)
class CompressedLayer:
    """What happened to a layer. singular_values: float64 [min(rank_before, in, out)] of its s B A, descending."""

    rank_before: int
    rank: int
    singular_values: Tensor

    @property
    def energy(self) -> float:
        """``||s B A||_F^2``."""
        return _energy(self.singular_values)

    @property
    def discarded_energy(self) -> float:
        """``||s B A - s B' A'||_F^2``, before the factors are rounded to their dtype."""
        return _energy(self.singular_values[self.rank :])


@dataclass(frozen=True)
class Compression:
    """What :func:`compress` did: its layers by name; the new config, of a model or a folder or where one was given; the
    new tensors, of a state dict."""

    layers: dict[str, CompressedLayer] = field(repr=False)
    config: LoraConfig | None = field(default=None, repr=False)
    state_dict: dict[str, Tensor] | None = field(default=None, repr=False)

    @property
    def rank_before(self) -> int:
        return sum(layer.rank_before for layer in self.layers.values())

    @property
    def rank(self) -> int:
        return sum(layer.rank for layer in self.layers.values())

    @property
    def energy(self) -> float:
        return sum(layer.energy for layer in self.layers.values())

    @property
    def discarded_energy(self) -> float:
        return sum(layer.discarded_energy for layer in self.layers.values())

    def __str__(self) -> str:
        """A line a layer: ranks before and after, and the part of its energy that is gone."""
        rows = [(name or "layer", layer.rank_before, layer.rank, layer) for name, layer in self.layers.items()]
        rows.append(("all", self.rank_before, self.rank, self))
        width = max(len(name) for name, *_ in rows)
        return "\n".join(
            f"{name:{width}}  rank {before:5} -> {after:5}  energy discarded {_part(r):.2e}"
            for name, before, after, r in rows
        )


def compress(
    adapter: nn.Module | Mapping[str, Tensor] | str | os.PathLike,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    *,
    output: str | os.PathLike | None = None,
    config: Any = None,
) -> Compression:
    """Replaces each layer's update by the nearest one of lower rank. Exactly one of

    rank: the largest rank a layer keeps.
    energy: the part of ``||s B A||_F^2`` that each layer keeps at least, 0 < energy <= 1, e.g. 0.99.
    budget: the sum of ranks over all layers; the largest singular values of the whole adapter stay.

    adapter: a model with adapters, which is changed in place (its lora_A and lora_B are new parameters: make the
    optimizer afterwards); a folder that holds an adapter in HF PEFT's format, which is written anew to the folder
    ``output``; or a state dict of lora_A [r, in] and lora_B [out, r] by PEFT's names or ours, with its config (ours,
    peft's, or the dict of an adapter_config.json) if the layers' scalings differ. What AdaLoRA trained becomes plain
    LoRA, its lora_E [r, 1] folded in.

    Scalings, dtypes and everything else of the adapter stay. A layer of rank 0 becomes a plain linear layer, and is
    listed in exclude_modules; it keeps rank 1 if its bias trains, or if no other layer would be left. Singular values
    below n eps times the layer's largest (float64, n = min(r, in, out)) count as zero. No matrix of out x in elements
    is formed.

    Raises ValueError or TypeError naming the argument for anything else than the above, RuntimeError for a model
    without adapters or with merged ones; nothing is changed then.

    >>> model = nn.Sequential(LoRALinear(64, 32, r=8), LoRALinear(32, 16, r=8, init_lora_weights=False))
    >>> report = compress(model, energy=0.9)
    >>> report.layers["0"].rank, type(model[0]).__name__, model[1].r < 8, report.rank_before
    (0, 'Linear', True, 16)
    """
    goal = _checked_goal(rank, energy, budget)
    is_path = isinstance(adapter, (str, os.PathLike))
    if is_path and output is None:
        raise ValueError("output: expected the folder to write the compressed adapter to, got None")
    if not is_path and output is not None:
        raise ValueError(f"output: expected None unless adapter is a folder, got {output!r}")
    if config is not None and not isinstance(adapter, Mapping):
        raise ValueError("config: expected None unless adapter is a state dict; a model or folder has its own")
    with torch.no_grad():
        if is_path:
            return _compress_folder(Path(adapter), Path(output), goal)
        if isinstance(adapter, nn.Module):
            return _compress_model(adapter_io._unwrapped(adapter), goal)
        if isinstance(adapter, Mapping):
            return _compress_tensors(adapter, None if config is None else read_config(config), goal, "state dict")
    raise TypeError(f"adapter: expected a model, a folder or a state dict, got {type(adapter).__name__}")


# ---- what to keep ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Goal:
    rank: int | None
    energy: float | None
    budget: int | None


def _checked_goal(rank: int | None, energy: float | None, budget: int | None) -> _Goal:
    given = [name for name, v in (("rank", rank), ("energy", energy), ("budget", budget)) if v is not None]
    if len(given) != 1:
        raise ValueError(f"expected exactly one of rank, energy and budget, got {' and '.join(given) or 'none'}")
    for name, value in (("rank", rank), ("budget", budget)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
    if energy is not None and (isinstance(energy, bool) or not 0.0 < energy <= 1.0):
        raise ValueError(f"energy: expected 0 < energy <= 1, got {energy!r}")
    return _Goal(rank, energy, budget)


def _ranks(layers: dict[str, _Factors], goal: _Goal, needed: set[str]) -> dict[str, int]:
    """The rank each layer keeps; those in `needed` keep at least 1."""
    values = {name: layer.singular_values for name, layer in layers.items()}
    useful = {name: _numerical_rank(s) for name, s in values.items()}
    if goal.rank is not None:
        ranks = {name: min(goal.rank, useful[name]) for name in layers}
    elif goal.energy is not None:
        ranks = {name: min(_rank_of_energy(s, goal.energy), useful[name]) for name, s in values.items()}
    else:
        ranks = _ranks_of_budget(values, useful, goal.budget, needed)
    ranks |= {name: max(1, ranks[name]) for name in needed}
    if not any(ranks.values()):
        ranks[next(iter(ranks))] = 1  # HF PEFT refuses an adapter without layers
    return ranks


def _numerical_rank(s: Tensor) -> int:
    return int((s > len(s) * torch.finfo(s.dtype).eps * s[:1]).sum())


def _rank_of_energy(s: Tensor, energy: float) -> int:
    """The fewest singular values with at least that part of the sum of squares."""
    tails = s.square().flip(0).cumsum(0).flip(0)  # tails[k]: without the first k; small ones are added first
    return int((tails > (1.0 - energy) * tails[:1]).sum())


def _ranks_of_budget(
    values: dict[str, Tensor], useful: dict[str, int], budget: int, needed: set[str]
) -> dict[str, int]:
    if len(needed) > budget:
        raise ValueError(f"budget: expected >= {len(needed)}, a rank for each layer that needs one, got {budget}")
    names = list(values)
    found = []  # singular value, layer; of equal ones the first stay
    for i, name in enumerate(names):
        kept = values[name][: max(useful[name], 1 if name in needed else 0)].tolist()
        found += [(math.inf if j == 0 and name in needed else s, i) for j, s in enumerate(kept)]
    found.sort(key=lambda item: -item[0])
    count = Counter(i for _, i in found[:budget])
    return {name: count[i] for i, name in enumerate(names)}


def _energy(s: Tensor) -> float:
    return float(s.square().flip(0).sum()) if s.numel() else 0.0


def _part(r: CompressedLayer | Compression) -> float:
    return r.discarded_energy / r.energy if r.energy else 0.0


# ---- the decomposition -----------------------------------------------------------------------------------------------


@dataclass
class _Factors:
    """A layer's update scaling * B diag(lam) A, and its decomposition once it is there."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    scaling: float
    lam: Tensor | None = None  # [r]
    singular_values: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    left: Tensor | None = None  # Q U S^(1/2), [out, n], in the dtype of B
    mix: Tensor | None = None  # S^(-1/2) (Q U)^T B diag(lam), float64 [n, r]: A' = mix A

    def wide(self) -> tuple[Tensor, Tensor]:
        """A and B diag(lam), in float64."""
        B = self.B.double()
        return self.A.double(), B if self.lam is None else B * self.lam.double()

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """A' [rank, in] and B' [out, rank]; zeros of a layer that has lost every rank."""
        if not self.A.shape[0]:
            return self.A.new_zeros(rank, self.A.shape[1]), self.B.new_zeros(self.B.shape[0], rank)
        A = self.mix[:rank] @ self.A.double()
        return A.to(self.A.dtype), self.left[:, :rank].contiguous()


def _decompose(layers: Iterable[_Factors]) -> None:
    """Fills in the decompositions, a chunk of layers at a time, cores of one size together."""
    chunk: list[_Factors] = []
    size = 0
    for layer in layers:
        if not layer.A.shape[0]:
            continue
        size += 8 * (2 * layer.B.numel() + layer.A.numel())
        if chunk and size > _CHUNK_BYTES:
            _decompose_chunk(chunk)
            chunk, size = [], 8 * (2 * layer.B.numel() + layer.A.numel())
        chunk.append(layer)
    _decompose_chunk(chunk)


def _decompose_chunk(layers: list[_Factors]) -> None:
    cores: dict[tuple, list[tuple[_Factors, Tensor, Tensor]]] = {}
    for layer in layers:
        Q, C = _core(*layer.wide())
        cores.setdefault((C.shape[0], C.device), []).append((layer, Q, C))
    for group in cores.values():
        U, S = jacobi_svd(torch.stack([C for _, _, C in group]))
        for (layer, Q, _), u, s in zip(group, U, S, strict=True):
            root = s.sqrt()
            directions = Q @ u
            layer.left = (directions * root).to(layer.B.dtype)
            layer.mix = (directions.mT @ layer.wide()[1]) / torch.where(root > 0, root, torch.inf)[:, None]
            layer.singular_values = (abs(layer.scaling) * s).cpu()


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Q [out, n] of orthonormal columns and C [n, n]: B A has the singular values of C, and Q times its left singular
    vectors. n = min(r, in, out). Columns of C are graded; rounding is relative to each, so that small ones survive."""
    norms = B.norm(dim=0)
    B, A = B / torch.where(norms > 0, norms, 1.0), A * norms[:, None]
    order = A.norm(dim=1).argsort(descending=True, stable=True)
    R = torch.linalg.qr(A[order].mT, mode="r").R
    Q, C = torch.linalg.qr(B[:, order] @ R.mT)
    if C.shape[0] < C.shape[1]:  # fewer rows than ranks: C = L Q', which leaves out Q'
        C = torch.linalg.qr(C.mT, mode="r").R.mT
    return Q, C


# ---- the three kinds of adapter --------------------------------------------------------------------------------------


def _compress_model(model: nn.Module, goal: _Goal) -> Compression:
    layers = dict(adapted_layers(model))
    if not layers:
        raise RuntimeError("adapter: expected a model with adapters, got one without; call adapt() first")
    factors = {name: _factors_of(name, layer) for name, layer in layers.items()}
    config = _lora_config(adapter_io._config_of(model))
    biased = {name for name, layer in layers.items() if layer.bias is not None and layer.bias.requires_grad}
    _decompose(factors.values())
    ranks = _ranks(factors, goal, biased | ({""} & layers.keys()))
    config = _new_config(config, factors, ranks)
    replacements: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        if ranks[name] == 0:
            replacements[id(layer)] = plain_linear(layer)
            continue
        new = layer if isinstance(layer, LoRALinear) else _lora_layer(layer, config)
        A, B = factors[name].truncated(ranks[name])
        new.lora_A = nn.Parameter(A, layer.lora_A.requires_grad)
        new.lora_B = nn.Parameter(B, layer.lora_B.requires_grad)
        new.r, new.lora_alpha = ranks[name], config.alpha_of(name)
        new.use_rslora, new.scaling = config.use_rslora, new.lora_alpha / _divisor(config, new.r)
        if new is not layer:
            replacements[id(layer)] = new
    replace_modules(model, replacements)
    if hasattr(model, "peftkern_config"):
        model.peftkern_config = config
    return Compression(_report(factors, ranks), config)


def _factors_of(name: str, layer: AdaptedLinear) -> _Factors:
    if layer.merged:
        raise RuntimeError(f"{name}: expected an unmerged layer, got a merged one; call unmerge() first")
    terms = {key: value for key, value in layer.terms().items() if value is not None and key != "dropout_p"}
    extra = terms.keys() - {"A", "B", "lam", "scaling"}
    if extra or not {"A", "B"} <= terms.keys() or isinstance(layer, LoRAEmbedding):
        raise ValueError(f"{name}: expected a layer that adds s B A to its weight, got a {type(layer).__name__}")
    for part in ("A", "B", "lam"):
        if part in terms and not bool(terms[part].isfinite().all()):
            raise ValueError(f"{name}: expected a finite adapter, got NaN or infinity in {part}")
    lam = terms.get("lam")
    return _Factors(terms["A"], terms["B"], terms.get("scaling", 1.0), None if lam is None else lam.reshape(-1))


def _lora_layer(layer: AdaptedLinear, config: LoraConfig) -> LoRALinear:
    """A LoRALinear on the base of a layer of another method, still without its factors."""
    new = LoRALinear.__new__(LoRALinear)
    AdaptedLinear.__init__(new, layer.in_features, layer.out_features)
    new.fan_in_fan_out = layer.fan_in_fan_out
    new.set_base_weight(layer.base_weight())
    new.bias, new.lora_dropout = layer.bias, getattr(layer, "lora_dropout", config.lora_dropout)
    return new.train(layer.training)


def _compress_folder(source: Path, output: Path, goal: _Goal) -> Compression:
    config = adapter_io._read_config_file(source / CONFIG_NAME)
    tensors = adapter_io._read_weights(source / WEIGHTS_NAME)
    result = _compress_tensors(tensors, config, goal, str(source / WEIGHTS_NAME))
    values, new = result.config.to_peft_dict(), result.state_dict
    if isinstance(config, AdaLoraConfig):  # in HF PEFT's files only LoRA's names end so
        new = {f"{key}.weight" if key.endswith(("lora_A", "lora_B")) else key: t for key, t in new.items()}
    else:
        fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "exclude_modules")
        values = json.loads((source / CONFIG_NAME).read_text()) | {name: values[name] for name in fields}
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    write_whole(
        {
            output / WEIGHTS_NAME: lambda path: save_file(new, path, metadata={"format": "pt"}),
            output / CONFIG_NAME: lambda path: path.write_text(text),
        }
    )
    return replace(result, state_dict=None)


def _compress_tensors(
    tensors: Mapping[str, Tensor], config: LoraConfig | AdaLoraConfig | None, goal: _Goal, source: str
) -> Compression:
    if config is not None:
        try:
            check_only_adds(config)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    keys = _adapter_keys(tensors, source)
    factors = {
        name: _Factors(
            tensors[a], tensors[b], _scaling(config, name), None if e is None else tensors[e].reshape(-1)
        )
        for name, (a, b, e) in keys.items()
    }  # fmt: skip
    if config is not None:
        for name, (a, *_) in keys.items():
            if config.rank_of(name) != tensors[a].shape[0]:
                raise ValueError(f"{source}: {a}: expected rank {config.rank_of(name)} as in its config, got "
                                 f"{list(tensors[a].shape)}")  # fmt: skip
    biased = {name for name in keys if any(key.endswith(f"{name}.base_layer.bias") for key in tensors)}
    _decompose(factors.values())
    ranks = _ranks(factors, goal, biased)
    replaced = {key for group in keys.values() for key in group}
    new = {key: t for key, t in tensors.items() if key not in replaced}
    for name, (a, b, _) in keys.items():
        if ranks[name]:
            new[a], new[b] = factors[name].truncated(ranks[name])
    return Compression(
        _report(factors, ranks), None if config is None else _new_config(_lora_config(config), factors, ranks), new
    )  # fmt: skip


def _scaling(config: LoraConfig | AdaLoraConfig | None, name: str) -> float:
    if config is None:
        return 1.0
    if isinstance(config, AdaLoraConfig):
        return adalora_scaling(config.lora_alpha, config.init_r)
    return config.alpha_of(name) / _divisor(config, config.rank_of(name))


def _adapter_keys(tensors: Mapping[str, Tensor], source: str) -> dict[str, tuple[str, str, str | None]]:
    """The keys of lora_A, lora_B and, of AdaLoRA, lora_E of each layer."""
    keys: dict[str, tuple[str, str, str | None]] = {}
    for a in tensors:
        if "lora_" not in a:
            continue
        found = _A_KEY.fullmatch(a)
        if found is None:
            partner = a.replace("lora_B", "lora_A", 1).replace("lora_E", "lora_A", 1)
            if partner == a or _A_KEY.fullmatch(partner) is None or partner not in tensors:
                raise ValueError(f"{source}: {a}: expected lora_A and lora_B of linear layers, in pairs, and no others")
            continue
        b, e = a.replace("lora_A", "lora_B", 1), a.replace("lora_A", "lora_E", 1)
        A, B, E = tensors[a], tensors.get(b), tensors.get(e)
        fits = B is not None and A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1]
        if not fits or min(A.shape[1], B.shape[0]) < 1 or (E is None and A.shape[0] < 1):
            got = "nothing" if B is None else f"{list(A.shape)} and {list(B.shape)}"
            raise ValueError(f"{source}: {a}: expected shapes [r, in] of it and [out, r] of {b}, got {got}")
        if E is not None and E.numel() != A.shape[0]:
            raise ValueError(f"{source}: {e}: expected shape [{A.shape[0]}, 1], the rank of {a}, got {list(E.shape)}")
        for key in (a, b) if E is None else (a, b, e):
            if tensors[key].dtype not in _FLOATS or not bool(tensors[key].isfinite().all()):
                raise ValueError(f"{source}: {key}: expected finite floats, got {tensors[key].dtype} or NaN, infinity")
        keys[found[1].removeprefix(PREFIX)] = (a, b, None if E is None else e)
    if not keys:
        raise ValueError(f"{source}: expected lora_A and lora_B of at least one layer, got {list(tensors)[:4]}")
    return keys


def _report(factors: dict[str, _Factors], ranks: dict[str, int]) -> dict[str, CompressedLayer]:
    return {
        name: CompressedLayer(layer.A.shape[0], ranks[name], layer.singular_values) for name, layer in factors.items()
    }


# ---- the config ------------------------------------------------------------------------------------------------------


def _divisor(config: LoraConfig, rank: int) -> float:
    return rank**0.5 if config.use_rslora else rank


def _lora_config(config: Any) -> LoraConfig:
    """What a config of another method says about the model, as one of plain LoRA."""
    check_only_adds(config)
    if type(config) is LoraConfig:
        return config
    names = (
        "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
        "bias", "task_type", "base_model_name_or_path",
    )  # fmt: skip
    return LoraConfig(**{name: getattr(config, name) for name in names if hasattr(config, name)})


def _new_config(config: LoraConfig, factors: dict[str, _Factors], ranks: dict[str, int]) -> LoraConfig:
    """config with the new ranks and the old scalings. r is the largest rank, and lora_alpha such that most layers are
    scaled rightly by readers that know no patterns and take one scaling, lora_alpha / r, and ranks from the tensors."""
    kept = {name: rank for name, rank in ranks.items() if rank}
    r = max(kept.values())
    usual = Counter(factors[name].scaling for name in kept).most_common(1)[0][0]
    alpha = _tidy(usual * _divisor(config, r))
    alphas = {name: _tidy(factors[name].scaling * _divisor(config, rank)) for name, rank in kept.items()}
    dropped = sorted(name for name in ranks if name not in kept)
    # "^": the pattern means this layer alone, and not another whose name ends so
    return replace(
        config, r=r, lora_alpha=alpha,
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in kept.items() if rank != r},
        alpha_pattern={f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        exclude_modules=_excluded(config.exclude_modules, dropped, kept),
    )  # fmt: skip


def _tidy(alpha: float) -> float:
    """2 for 2.0, as people write it."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _excluded(before: str | list[str] | None, dropped: list[str], kept: Iterable[str]) -> str | list[str] | None:
    """exclude_modules with the dropped layers: HF PEFT (0.21) refuses rank 0, and an adapter may name layers not to
    touch."""
    if not dropped:
        return before
    names = dropped + (before if isinstance(before, list) else [])
    if not isinstance(before, str) and not any(matches(name, names) for name in kept):
        return names
    patterns = [re.escape(name) for name in dropped]
    if isinstance(before, str):
        patterns.append(f"(?:{before})")
    elif before:
        patterns += [rf"(?:.*\.)?{re.escape(name)}" for name in before]
    return "|".join(patterns)
