# SPDX-License-Identifier: Apache-2.0
"""modules_to_save: modules that train as a whole next to the adapters; and weights that several modules share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping

from torch import nn

from .config import AdaLoraConfig, LoraConfig, is_target
from .modules import AdaptedLinear


def find_saved_modules(model: nn.Module, config: LoraConfig | AdaLoraConfig) -> dict[str, nn.Module]:
    """The modules that config.modules_to_save names, by HF PEFT's rule: their names end so. Raises ValueError if none
    does, or if one cannot train."""
    endings = config.modules_to_save or []
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and any(name.endswith(ending) for ending in endings):
            found[name] = module
    if getattr(config, "ensure_weight_tying", False):
        found = with_tied(model, found)
    if endings and not found and not config.task_type:
        raise ValueError(f"modules_to_save: expected names of modules, {endings!r} matches none")
    for name, module in found.items():
        if any(isinstance(m, AdaptedLinear) for m in module.modules()) or is_target(config, name):
            raise ValueError(f"modules_to_save: expected modules without adapters to be named, {name!r} has one")
        for leaf, p in module.named_parameters():
            if not p.is_floating_point():
                raise ValueError(
                    f"modules_to_save: expected modules of floats to train, {name}.{leaf} is {p.dtype}; keep it out of "
                    "quantization, with modules_to_not_convert where from_pretrained quantizes"
                )
    return found


def train_whole(model: nn.Module, name: str, keep_tied: bool = False) -> None:
    """Makes the parameters of a module train. One that shares a parameter with a module outside becomes a copy first,
    as in HF PEFT, so that the other one stays as it is; not with keep_tied."""
    module = model.get_submodule(name)
    if keep_tied:
        module.requires_grad_(True)
        return
    own = {id(m) for m in module.modules()}
    inside = {id(p) for p in module.parameters()}
    others = [n for n, m in model.named_modules() if id(m) not in own and inside & set(map(id, m._parameters.values()))]
    if others:
        warnings.warn(
            f"{name}: it trains as a whole, and shares a weight with {', '.join(others)}, from which it is untied now",
            stacklevel=3,
        )
        trained = copy.deepcopy(module)
        for parent in list(model.modules()):
            for child_name, child in parent._modules.items():
                if child is module:
                    parent._modules[child_name] = trained
        module = trained
    module.requires_grad_(True)


def tied_sources(model: nn.Module) -> dict[str, nn.Embedding]:
    """The embedding whose weight a linear layer has, by the layer's name. Warns if there is none, as HF PEFT does."""
    embeddings = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    tied = {n: embeddings[id(m.weight)] for n, m in linears.items() if id(m.weight) in embeddings}
    if not tied:
        warnings.warn("ensure_weight_tying: the model has no linear layer tied to an embedding", stacklevel=3)
    return tied


def with_tied(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """modules, and those whose weight one of them has, embeddings first."""
    weights = {id(m.weight) for m in modules.values() if isinstance(m, (nn.Embedding, nn.Linear))}
    tied = {n: m for n, m in model.named_modules() if id(getattr(m, "weight", None)) in weights and n not in modules}
    together = {n: m for n, m in [*modules.items(), *tied.items()] if isinstance(m, (nn.Embedding, nn.Linear))}
    embeddings = {n: m for n, m in together.items() if isinstance(m, nn.Embedding)}
    return embeddings | dict(modules) | tied


def shared_names(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Of those layers whose weight other modules have too, its names there."""
    holders: dict[int, dict[int, str]] = {}  # parameter -> module -> name of the parameter
    for name, module in model.named_modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                holders.setdefault(id(p), {})[id(module)] = f"{name}.{leaf}" if name else leaf
    shared = {}
    for name, layer in layers.items():
        others = [n for module, n in holders[id(layer.weight)].items() if module != id(layer)]
        if others:
            shared[name] = others
    return shared
