# SPDX-License-Identifier: Apache-2.0
"""Adapters for a whole model: put them in, merge them, count them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .config import (
    AdaLoraConfig,
    LoraConfig,
    fits_pattern,
    is_excluded,
    is_target,
    read_config,
    with_default_targets,
    with_task_heads,
)
from .modules import AdaLoRALinear, AdaptedLinear, BaseWeight, LoRAEmbedding, LoRALinear, NF4Linear, TiedLoRALinear
from .modules.conv1d import is_conv1d, new_conv1d
from .modules.lora import Quantize, quantize_config
from .modules.nf4_experts import stack_bytes
from .ops import NF4Config
from .whole_modules import find_saved_modules, shared_names, tied_sources, train_whole, with_tied


def adapt(model: nn.Module, config: Any, quantize: Quantize = None) -> nn.Module:
    """Replaces the layers of model that config targets by LoRALinear, LoRAEmbedding or AdaLoRALinear, in place, and
    freezes everything else but modules_to_save. Linear layers, transformers' Conv1D and, for LoRA, embeddings.

    config: a LoraConfig or an AdaLoraConfig, ours or peft's. quantize: "nf4" or an NF4Config turns the weights of the
    linear ones to NF4 (QLoRA). A module with several names is adapted once, under the first. Returns model.
    Raises ValueError, before anything is changed, if no layer matches, if model has adapters already, if a weight to be
    quantized is tied to another module, or if config asks for what is not supported. Warns where a weight is tied.

    >>> model = adapt(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), LoraConfig(r=2))
    >>> type(model[0]).__name__, len(trainable_parameters(model))
    ('LoRALinear', 4)
    """
    config = with_default_targets(model, with_task_heads(read_config(config, default_targets=True)))
    nf4 = quantize_config(quantize)
    if next(adapted_layers(model), None) is not None:
        raise ValueError("model: expected one without adapters, got one that adapt() has been called on")
    if any(type(m).__module__.startswith("peft.") for m in model.modules()):
        raise ValueError("model: expected one without adapters, got one with HF PEFT's; call merge_and_unload() first")
    targets, saved = find_targets(model, config), find_saved_modules(model, config)
    tied = _tied_targets(model, targets, nf4)
    tied_to = tied_sources(model) if getattr(config, "ensure_weight_tying", False) else {}
    if tied_to:
        tied = {}
    _warn_of_unused_patterns(config, targets)
    trained = [(p, p.requires_grad) for p in model.parameters()]
    replacements: dict[int, nn.Module] = {}
    for name, linear in targets.items():
        try:
            source = replacements.get(id(tied_to.get(name)))
            if isinstance(source, LoRAEmbedding) and isinstance(linear, nn.Linear):
                layer: AdaptedLinear = TiedLoRALinear.from_tied(linear, source)
            else:
                layer = _adapted(config, name, linear, nf4)
            replacements[id(linear)] = layer.train(linear.training)
        except Exception as error:
            for p, requires_grad in trained:
                p.requires_grad_(requires_grad)
            if isinstance(error, (ValueError, TypeError)):
                raise type(error)(f"{name}: {error}") from error
            raise
    for name, others in tied.items():
        warnings.warn(
            f"{name}: its weight is also {', '.join(others)}; the adapter is for {name} alone, and merging unties them",
            stacklevel=2,
        )
    replace_modules(model, replacements)
    adapters = {id(p) for _, layer in adapted_layers(model) for p in layer.adapter_parameters().values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in adapters)
    for name in saved:
        train_whole(model, name, keep_tied=bool(tied_to))
    for bias in trainable_biases(model, config.bias, dict(adapted_layers(model))).values():
        bias.requires_grad_(True)
    model.peftkern_config = config
    return model


def _warn_of_unused_patterns(config: LoraConfig | AdaLoraConfig, targets: Mapping[str, nn.Module]) -> None:
    """A typing error there would otherwise leave a layer at r, as in HF PEFT, which warns too."""
    for field in ("rank_pattern", "alpha_pattern") if isinstance(config, LoraConfig) else ():
        patterns = getattr(config, field)
        unused = sorted(p for p in patterns if not any(fits_pattern(p, name) for name in targets))
        if unused:
            warnings.warn(f"{field}: {unused} match no layer that gets an adapter", stacklevel=3)


def _tied_targets(model: nn.Module, targets: Mapping[str, nn.Module], nf4: NF4Config | None) -> dict[str, list[str]]:
    """The targets whose weight is also a parameter of other modules, and its names there."""
    tied = {}
    for name, others in shared_names(model, targets).items():
        if nf4 is not None and not isinstance(targets[name], (nn.Embedding, NF4Linear)):
            raise ValueError(
                f"quantize: expected weights of one module each, that of {name} is also {', '.join(others)}; quantized "
                "it would be untied, and take more memory than now. Leave it out with exclude_modules, or untie it"
            )
        tied[name] = others
    return tied


def _adapted(config: LoraConfig | AdaLoraConfig, name: str, layer: nn.Module, nf4: NF4Config | None) -> AdaptedLinear:
    options: dict[str, Any] = {
        "lora_alpha": config.alpha_of(name), "lora_dropout": config.lora_dropout,
        "init_lora_weights": config.init_lora_weights,
    }  # fmt: skip
    if isinstance(config, LoraConfig):
        options |= {"r": config.rank_of(name), "use_rslora": config.use_rslora, "use_dora": config.use_dora}
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding.from_embedding(layer, **options)
    options["quantize"] = None if isinstance(layer, NF4Linear) else nf4
    if isinstance(config, LoraConfig):
        return LoRALinear.from_linear(layer, **options)
    adalora = AdaLoRALinear.from_linear(layer, r=config.init_r, **options)
    if config.rank_of(name) < config.init_r:
        adalora.keep_triplets(torch.tensor(config.present_in(name)))
    return adalora


def find_targets(model: nn.Module, config: LoraConfig | AdaLoraConfig) -> dict[str, nn.Module]:
    """The layers config asks for, by their first name. Raises ValueError if there is none, or if it names what is no
    such layer."""
    modules = {name: m for name, m in model.named_modules() if name}
    # nn.MultiheadAttention reads the weight of its out_proj and never calls it: an adapter there would do nothing.
    uncalled = {id(m.out_proj) for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    linears = {
        name: m for name, m in modules.items() if (isinstance(m, nn.Linear) and id(m) not in uncalled) or is_conv1d(m)
    }
    embeddings = isinstance(config, LoraConfig)
    if config.target_modules == "all-linear":
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        asked = {name: m for name, m in linears.items() if m is not head and not is_excluded(config, name)}
    else:
        asked = {name: m for name, m in modules.items() if is_target(config, name)}
    targets = {name: m for name, m in asked.items() if name in linears or (embeddings and isinstance(m, nn.Embedding))}
    if not targets:
        some = ", ".join(list(linears)[:8]) or "none"
        raise ValueError(
            f"target_modules: expected the names of linear layers, {config.target_modules!r} matches none; "
            f"the model has {len(linears)}: {some}{', ...' if len(linears) > 8 else ''}"
        )
    if getattr(config, "ensure_weight_tying", False):
        targets = with_tied(model, targets)
    for name, module in asked.items():
        if name not in targets:
            raise ValueError(
                f"target_modules: expected linear layers {'and embeddings ' if embeddings else ''}that are called, "
                f"{config.target_modules!r} matches {name!r}, a {type(module).__name__}; exclude_modules leaves it out"
            )
    return targets


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Puts replacements[id(m)] wherever m is a child, at every name of a shared module."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # In eval mode its fast path reads the weights of its layers instead of calling them; this is the
                    # attribute with which torch itself turns that off.
                    parent.activation_relu_or_gelu = 0


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(name, layer) of every adapted layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLinear))


def trainable_biases(model: nn.Module, bias: str, layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The biases that a config's ``bias`` field lets train, by their name in an HF PEFT checkpoint. layers: those that
    have an adapter or are to get one."""
    if bias == "none":
        return {}
    biases = {name: getattr(m, "bias", None) for name, m in layers.items()}  # an embedding has none
    found = {f"{name}.base_layer.bias": bias for name, bias in biases.items() if bias is not None}
    if bias == "all":
        for name, p in model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if leaf == "bias" and owner not in layers:
                found[name] = p
    return found


def merge(model: nn.Module, safe: bool = False, unload: bool = False) -> nn.Module:
    """Merges every adapter into its weight (AdaptedLinear.merge); with unload, the layers become plain nn.Linear or
    NF4Linear for good. Raises RuntimeError if there is none or one is merged already; with safe, ValueError, and all
    layers are as before, if a merged weight is not finite. Returns model."""
    layers = _layers_to_change(model, merged=False)
    for name, layer in layers:
        try:
            layer.merge(safe=safe)
        except Exception as error:
            for _, done in layers:
                if done.merged:
                    done.unmerge()
            if isinstance(error, ValueError):
                raise ValueError(f"{name}: {error}") from error
            raise
    if unload:
        replace_modules(model, {id(layer): plain_linear(layer) for _, layer in layers})
        if hasattr(model, "peftkern_config"):
            del model.peftkern_config
        _note_untied_embeddings(model)
    return model


def _note_untied_embeddings(model: nn.Module) -> None:
    """Sets tie_word_embeddings of a transformers model to what merging has made true, as HF PEFT does: a model loaded
    from its files would have one weight for both otherwise."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not model.get_input_embeddings().weight:
        config.tie_word_embeddings = False
        warnings.warn(
            "input and output embeddings are no longer tied after merging; config.tie_word_embeddings is now False",
            stacklevel=3,
        )


def unmerge(model: nn.Module) -> nn.Module:
    """Puts every original weight back, bit for bit. Raises RuntimeError if a layer is not merged. Returns model."""
    for _, layer in _layers_to_change(model, merged=True):
        layer.unmerge()
    return model


def _layers_to_change(model: nn.Module, merged: bool) -> list[tuple[str, AdaptedLinear]]:
    layers = list(adapted_layers(model))
    if not layers:
        raise RuntimeError("model: expected one with adapters, got one without; call adapt() first")
    wrong = [name for name, layer in layers if layer.merged != merged]
    if wrong:
        state = "merged" if merged else "unmerged"
        raise RuntimeError(f"model: expected all layers {state}, {len(wrong)} are not, e.g. {wrong[0]!r}")
    return layers


def plain_linear(layer: AdaptedLinear) -> nn.Module:
    """The layer without its adapter; weight and bias are shared. NF4 comes back as an NF4Linear, also of a Conv1D."""
    if isinstance(layer, LoRAEmbedding):
        return layer.plain()
    quantized = layer.nf4_config is not None
    if layer.fan_in_fan_out and not quantized:
        return new_conv1d(layer.weight, layer.bias).train(layer.training)
    plain = (NF4Linear if quantized else nn.Linear).__new__(NF4Linear if quantized else nn.Linear)
    nn.Module.__init__(plain)
    plain.in_features, plain.out_features = layer.in_features, layer.out_features
    if quantized:
        plain.set_base_weight(layer.base_weight())
    else:
        plain.weight = layer.weight
    plain.bias = layer.bias
    return plain.train(layer.training)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, each once: what an optimizer takes."""
    return [p for p in model.parameters() if p.requires_grad]


def memory_footprint(model: nn.Module) -> dict[str, float]:
    """Bytes of parameters and buffers, each storage counted once.

    total_bytes; quantized_bytes and quantized_params: of the NF4 weights with all their scales, and bits_per_param of
    those (0.0 if there are none); trainable_bytes and trainable_params; buffer_bytes.
    """
    seen: set[tuple] = set()

    def new_bytes(t: torch.Tensor) -> int:
        key = (t.device, t.data_ptr(), t.nbytes)
        if t.data_ptr() and key in seen:
            return 0
        seen.add(key)
        return t.nbytes

    report: dict[str, float] = dict.fromkeys(
        ("total_bytes", "quantized_bytes", "quantized_params", "bits_per_param", "trainable_bytes", "trainable_params",
         "buffer_bytes"), 0)  # fmt: skip
    for module in model.modules():
        quantized = isinstance(module, BaseWeight) and module.nf4_config is not None
        if quantized:
            report["quantized_bytes"] += module.base_weight().nbytes
            report["quantized_params"] += module.in_features * module.out_features
        for name, stack in getattr(module, "nf4_experts", {}).items():
            report["quantized_bytes"] += stack_bytes(module, name)
            report["quantized_params"] += stack.experts * stack.shape[0] * stack.shape[1]
        for p in module.parameters(recurse=False):
            size = new_bytes(p)
            report["total_bytes"] += size
            if p.requires_grad and size:
                report["trainable_bytes"] += size
                report["trainable_params"] += p.numel()
        for p in (getattr(module, "_unmerged", None) or {}).values():  # kept aside while merged
            report["total_bytes"] += new_bytes(p)
        for b in module.buffers(recurse=False):
            size = new_bytes(b)
            report["total_bytes"] += size
            report["buffer_bytes"] += size
    if report["quantized_params"]:
        report["bits_per_param"] = 8 * report["quantized_bytes"] / report["quantized_params"]
    return report
