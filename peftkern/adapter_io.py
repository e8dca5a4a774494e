# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk in HF PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``, both directions.

Keys: ``base_model.model.<layer>.lora_A.weight`` [r, in] and ``.lora_B.weight`` [out, r], with DoRA
``.lora_magnitude_vector`` [out]; of embeddings ``.lora_embedding_A`` [r, num] and ``.lora_embedding_B`` [dim, r]; of
AdaLoRA ``.lora_A``, ``.lora_E`` [r, 1] and ``.lora_B``, without the triplets that config.rank_pattern marks False;
trained biases and modules_to_save as PEFT names them; with an adapter on a transformers model's ``embed_tokens`` or
``lm_head`` their frozen weights too, ``.base_layer.weight``, and of a model whose vocabulary has been resized both
embeddings, ``.weight``, as PEFT does. Saving writes temporary files and renames
them; loading checks everything before it changes anything.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapt import adapt, adapted_layers, find_targets, trainable_biases
from .config import AdaLoraConfig, LoraConfig, matches, read_config, with_task_heads
from .files import write_whole
from .modules import AdaLoRALinear, AdaptedLinear, LoRAEmbedding, LoRALinear, TiedLoRALinear
from .modules.adalora import rank_axis
from .modules.adapted import features_of
from .ops.library import FLOAT_DTYPES
from .sharded_triplets import is_sharded
from .whole_modules import find_saved_modules

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
ADAPTER_NAMES = (
    ".lora_A.weight", ".lora_B.weight", ".lora_A", ".lora_E", ".lora_B", ".lora_embedding_A", ".lora_embedding_B",
    ".lora_magnitude_vector",
)  # fmt: skip
# Names of layers, in target_modules, with which HF PEFT saves the frozen weights of embedding and head too.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")
Config = LoraConfig | AdaLoraConfig


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    drop_masked: bool = True,
    save_embedding_layers: bool | str = "auto",
) -> Path:
    """Writes model's adapter to directory, which is made if need be; returns it. HF PEFT, vLLM and others read it.

    drop_masked: of an AdaLoRA adapter leave out the triplets whose E is 0, as HF PEFT does; False keeps them, to go on
    training exactly. save_embedding_layers: write the frozen embeddings of a transformers model too; "auto": if they
    have adapters, or if vocab_size is another one than in the model's folder. A model sharded by FSDP2 is gathered:
    every process calls this, the first one writes.

    Raises RuntimeError if model has no adapter, OSError if the disk fails, in which case what was there before is
    still whole.
    """
    model = _unwrapped(model)
    tensors, config = _adapter_tensors(model), _config_of(model)
    tensors |= _frozen_embeddings(model, config, dict(adapted_layers(model)), save_embedding_layers)
    sharded = any(is_sharded(t) for t in tensors.values())
    if isinstance(config, AdaLoraConfig):
        tensors, config = _sliced(model, tensors, config, drop_masked)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: _whole(t.detach()).cpu().contiguous() for name, t in tensors.items()}
    seen: set[int] = set()
    for name, t in contiguous.items():  # safetensors refuses two names for one memory: those of a tied weight
        if t.data_ptr() in seen:
            contiguous[name] = t.clone()
        seen.add(t.data_ptr())
    if config.target_modules == "all-linear":  # as HF PEFT does, for readers that know names only
        config = replace(config, target_modules=exact_targets(model, dict(adapted_layers(model))))
    values = config.to_peft_dict() | {"fan_in_fan_out": _fan_in_fan_out(model)}
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    files = {
        folder / WEIGHTS_NAME: lambda path: save_file(contiguous, path, metadata={"format": "pt"}),
        folder / CONFIG_NAME: lambda path: path.write_text(text),
    }
    if not sharded or dist.get_rank() == 0:
        write_whole(files)
    if sharded:
        dist.barrier()  # no process reads before the files are there
    return folder


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if is_sharded(t) else t


def _copy_into(target: Tensor, source: Tensor) -> None:
    """Each process has read the whole source, and keeps its part of a sharded target."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        source = source.to(target.device, target.dtype)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Loads an adapter that save_adapter or HF PEFT saved; adapts model first if it has none. Returns model.

    A model without adapters gets them in the dtype of the file; in one that has some, their dtype stays. AdaLoRA layers
    take the ranks of the file. Modules that train as a whole keep their dtype.

    Raises FileNotFoundError for a missing file, ValueError, naming the file and what was expected, for a damaged one,
    for an option that is not supported and for tensors that do not fit, RuntimeError for a merged model. model is then
    unchanged.
    """
    folder = Path(directory)
    config, tensors = with_task_heads(_read_config_file(folder / CONFIG_NAME)), _read_weights(folder / WEIGHTS_NAME)
    wrapped, model = model, _unwrapped(model)
    layers = dict(adapted_layers(model))
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(f"{merged[0]}: expected an unmerged layer to load an adapter into; call unmerge() first")
    if layers:
        _check_method(layers, config, folder / CONFIG_NAME)
        saved, own = find_saved_modules(model, config), find_saved_modules(model, _config_of(model))
        if saved.keys() != own.keys():
            raise ValueError(
                f"{folder / CONFIG_NAME}: modules_to_save: expected {sorted(own)}, which train in the model, got "
                f"{sorted(saved)}"
            )
        expected = {name: tuple(t.shape) for name, t in _adapter_tensors(model).items()}
        if isinstance(config, AdaLoraConfig):
            expected |= _shapes_of_layers(layers, config)
    else:
        expected = _shapes_after_adapt(model, config)
    tensors = {name: t for name, t in tensors.items() if not _is_of_wrapper(name)}
    frozen = _embeddings(model, layers or find_targets(model, config))
    frozen = {name: t for name, t in frozen.items() if name in tensors and name not in expected}
    expected |= {name: tuple(t.shape) for name, t in frozen.items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    _check_names_and_shapes(expected, got, folder / WEIGHTS_NAME)
    if not layers:
        adapt(model, config)
    elif isinstance(config, AdaLoraConfig):
        for name, layer in layers.items():
            if layer.present != config.present_in(name):
                layer.resize(config.present_in(name))
    scalings = _scalings(model, config) if isinstance(config, LoraConfig) else {}
    with torch.no_grad():
        tied = tuple(f"{PREFIX}{name}." for name, layer in adapted_layers(model) if isinstance(layer, TiedLoRALinear))
        for name, target in _adapter_tensors(model).items():
            if name.startswith(tied):
                continue  # the same numbers as its embedding's
            if not layers and name.endswith(ADAPTER_NAMES):  # the file's dtype is the one the adapter was trained in
                # a copy: what safetensors returns is the mapped file, which another program may overwrite
                target.data = tensors[name].to(target.device, copy=True)
            else:
                _copy_into(target, tensors[name])
        for name, target in frozen.items():
            _copy_into(target, tensors[name])
    for layer, (alpha, scaling) in scalings.items():
        layer.lora_alpha, layer.scaling, layer.use_rslora = alpha, scaling, config.use_rslora
        layer.lora_dropout = config.lora_dropout
    if isinstance(config, AdaLoraConfig):
        for _, layer in adapted_layers(model):
            layer.set_scaling(config.lora_alpha, config.init_r)
            layer.lora_dropout = config.lora_dropout
    model.peftkern_config = config
    return wrapped


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and data parallelism, which put a prefix before every name."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _config_of(model: nn.Module) -> Config:
    config = getattr(model, "peftkern_config", None)
    if config is not None:
        return config
    layers = dict(adapted_layers(model))  # put in by hand: say what each layer says
    first = next(iter(layers.values()))
    if isinstance(first, AdaLoRALinear):
        return _adalora_config_of(model, first, layers)
    for name, layer in layers.items():
        for field in ("use_rslora", "use_dora"):
            if getattr(layer, field) != getattr(first, field):
                raise RuntimeError(
                    f"{name}: expected {field}={getattr(first, field)}, one value for all layers of an adapter"
                )
    # "^": the pattern means this layer alone, and not another whose name ends so
    return LoraConfig(
        r=first.r, lora_alpha=first.lora_alpha, lora_dropout=first.lora_dropout, use_rslora=first.use_rslora,
        use_dora=first.use_dora, target_modules=exact_targets(model, layers),
        rank_pattern={f"^{re.escape(name)}": m.r for name, m in layers.items() if m.r != first.r},
        alpha_pattern={
            f"^{re.escape(name)}": m.lora_alpha for name, m in layers.items() if m.lora_alpha != first.lora_alpha
        },
        bias="lora_only" if any(m.bias is not None and m.bias.requires_grad for m in layers.values()) else "none",
        ensure_weight_tying=any(isinstance(m, TiedLoRALinear) for m in layers.values()),
    )  # fmt: skip


def _adalora_config_of(model: nn.Module, first: AdaLoRALinear, layers: Mapping[str, AdaptedLinear]) -> AdaLoraConfig:
    for name, layer in layers.items():
        for field in ("init_r", "lora_alpha"):
            if getattr(layer, field, None) != getattr(first, field):
                raise RuntimeError(
                    f"{name}: expected {field}={getattr(first, field)}, one value for all layers of an adapter, "
                    f"got {getattr(layer, field, None)!r}"
                )
    return AdaLoraConfig(
        init_r=first.init_r, total_step=1, lora_alpha=first.lora_alpha, lora_dropout=first.lora_dropout,
        target_modules=exact_targets(model, layers),
        bias="lora_only" if any(m.bias is not None and m.bias.requires_grad for m in layers.values()) else "none",
    )  # fmt: skip


def _sliced(
    model: nn.Module, tensors: dict[str, Tensor], config: AdaLoraConfig, drop_masked: bool
) -> tuple[dict[str, Tensor], AdaLoraConfig]:
    """The tensors without the triplets that are masked, and the config with the rank pattern that says so.

    A triplet is masked if its E is 0, but not in an adapter all of whose E are: that one has not been trained.
    """
    tensors, pattern = dict(tensors), {}
    layers = dict(adapted_layers(model))
    E = {name: _whole(layer.lora_E.detach()) for name, layer in layers.items()}
    drop_masked = drop_masked and any(bool(e.any()) for e in E.values())
    for name, layer in layers.items():
        keep = (E[name] != 0).view(-1) if drop_masked else torch.ones(layer.r, dtype=torch.bool)
        kept = iter(keep.tolist())
        pattern[f"{name}.lora_E"] = [was and next(kept) for was in layer.present]
        if not bool(keep.all()):
            for parameter in layer.adapter_parameters():
                key = f"{PREFIX}{name}.{parameter}"
                tensors[key] = _whole(tensors[key]).index_select(rank_axis(parameter), keep.nonzero().view(-1))
    whole = all(all(present) for present in pattern.values())
    return tensors, replace(config, rank_pattern=None if whole else pattern)


def exact_targets(model: nn.Module, layers: Mapping[str, Any]) -> str | list[str]:
    """A target_modules that matches these layers and no other module: their names, or, where one is also the ending of
    another name, a pattern."""
    names = sorted(layers)
    matched = [name for name, _ in model.named_modules() if matches(name, names)]
    return names if sorted(matched) == names else "|".join(re.escape(name) for name in names)


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the adapter by its name in the file."""
    layers = dict(adapted_layers(model))
    if not layers:
        raise RuntimeError("model: expected one with adapters, got one without; call adapt() first")
    tensors: dict[str, Tensor] = {}
    kind = LoRALinear if isinstance(next(iter(layers.values())), LoRALinear) else AdaLoRALinear
    for name, layer in layers.items():
        if not isinstance(layer, kind):
            raise RuntimeError(f"{name}: expected {_article(kind)}, got {type(layer).__name__}")
        for parameter, t in layer.adapter_parameters().items():
            tensors[f"{PREFIX}{name}.{parameter}{layer.file_suffixes.get(parameter, '')}"] = t
    config = _config_of(model)
    return tensors | _trained_tensors(model, config, layers)


def _trained_tensors(model: nn.Module, config: Config, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What trains beside the adapters of layers: biases, and whole modules."""
    tensors: dict[str, Tensor] = dict(trainable_biases(model, config.bias, layers))
    for name, module in find_saved_modules(model, config).items():
        tensors |= {f"{name}.{leaf}": t for leaf, t in module.state_dict(keep_vars=True).items()}
    return {PREFIX + name: t for name, t in tensors.items()}


def _frozen_embeddings(
    model: nn.Module, config: Config, layers: Mapping[str, nn.Module], save: bool | str
) -> dict[str, Tensor]:
    """The frozen weights of embedding and head that HF PEFT saves."""
    if save not in (True, False, "auto"):
        raise ValueError(f'save_embedding_layers: expected True, False or "auto", got {save!r}')
    targets = config.target_modules
    if isinstance(targets, str):
        named = (name for name, _ in model.named_modules() if name.rpartition(".")[2] in EMBEDDING_NAMES)
        asked = targets != "all-linear" and any(matches(name, targets) for name in named)
    else:
        asked = any(name in targets for name in EMBEDDING_NAMES)
    if save == "auto":
        save = asked or _is_resized(model, config)
    if not save:
        return {}
    if not hasattr(model, "get_input_embeddings"):
        if not asked:
            warnings.warn("save_embedding_layers: the model does not say which layers those are", stacklevel=3)
        return {}
    whole = tuple(f"{PREFIX}{name}." for name in find_saved_modules(model, config))  # which are saved anyway
    found = _embeddings(model, layers)
    return {n: t for n, t in found.items() if (".base_layer." in n or not asked) and not n.startswith(whole)}


def _embeddings(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Weights of input and output embedding of a transformers model, by HF PEFT's names. layers: those that have an
    adapter or are to get one."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    return {
        f"{PREFIX}{name}.{'base_layer.' if name in layers else ''}{leaf}": t
        for name, module in model.named_modules()
        if any(module is end for end in ends)
        for leaf, t in module.state_dict(keep_vars=True).items()  # of a merged layer the unmerged weight
        if not leaf.startswith("lora_")
    }


def _is_resized(model: nn.Module, config: Config) -> bool:
    """Does the config in the folder that the model was read from have another size of vocabulary?"""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    folder = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    if not size or not folder or not (Path(folder) / "config.json").exists():
        return False
    return size != type(model.config).from_pretrained(folder).vocab_size


def _is_of_wrapper(name: str) -> bool:
    """Of the two copies that HF PEFT makes of a module to save it also saves the biases with bias="all", and all there
    is if the module is an embedding of another size. What counts has the module's own name."""
    return ".original_module." in name or ".modules_to_save." in name


def _fan_in_fan_out(model: nn.Module) -> bool:
    """As HF PEFT leaves it: what holds for the last layer that is linear."""
    linear = [layer for _, layer in adapted_layers(model) if not isinstance(layer, LoRAEmbedding)]
    return bool(linear) and linear[-1].fan_in_fan_out


def _article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _check_method(layers: Mapping[str, AdaptedLinear], config: Config, path: Path) -> None:
    kind = AdaLoRALinear if isinstance(config, AdaLoraConfig) else LoRALinear
    for name, layer in layers.items():
        if not isinstance(layer, kind):
            method = "ADALORA" if isinstance(layer, AdaLoRALinear) else "LORA"
            raise ValueError(
                f"{path}: expected peft_type {method}, as {name} is {_article(type(layer))}, got an adapter for "
                f"{kind.__name__}"
            )
        dora = getattr(config, "use_dora", False)
        if layer.use_dora != dora:
            raise ValueError(f"{path}: expected use_dora={layer.use_dora}, as {name} has it, got {dora}")
        if isinstance(layer, AdaLoRALinear) and layer.init_r != config.init_r:
            raise ValueError(f"{path}: expected init_r {layer.init_r}, as in {name}, got {config.init_r}")


def _read_config_file(path: Path) -> Config:
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # also of bytes that are no text, of numbers and nesting without end
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    try:
        return read_config(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, it is truncated or damaged: {error}") from error
    for name, t in tensors.items():
        if t.dtype not in FLOAT_DTYPES and ".lora_" in name:  # a whole module may have buffers of integers
            raise ValueError(f"{path}: {name}: expected dtype float32, bfloat16 or float16, got {t.dtype}")
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"{path}: {name}: expected finite values, got NaN or infinity")
    return tensors


def _shapes_of_layers(layers: Mapping[str, nn.Module], config: Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the adapter tensors of layers in a file with this config."""
    expected: dict[str, tuple[int, ...]] = {}
    adalora = isinstance(config, AdaLoraConfig)
    for name, layer in layers.items():
        key, rank = PREFIX + name, config.rank_of(name)
        in_features, out_features = features_of(layer)
        if isinstance(layer, nn.Embedding):
            A, B = "lora_embedding_A", "lora_embedding_B"
        else:
            A, B = ("lora_A", "lora_B") if adalora else ("lora_A.weight", "lora_B.weight")
        expected[f"{key}.{A}"], expected[f"{key}.{B}"] = (rank, in_features), (out_features, rank)
        if adalora:
            expected[f"{key}.lora_E"] = (rank, 1)
        elif config.use_dora:
            expected[f"{key}.lora_magnitude_vector"] = (out_features,)
    return expected


def _shapes_after_adapt(model: nn.Module, config: Config) -> dict[str, tuple[int, ...]]:
    """What _adapter_tensors would hold if model, which has no adapters, were adapted."""
    layers = find_targets(model, config)
    trained = _trained_tensors(model, config, layers)
    return _shapes_of_layers(layers, config) | {name: tuple(t.shape) for name, t in trained.items()}


def _check_names_and_shapes(expected: dict[str, tuple[int, ...]], got: dict[str, tuple[int, ...]], path: Path) -> None:
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{path}: expected {len(expected)} tensors for this model; {len(missing)} missing (e.g. {missing[:2]}), "
            f"{len(extra)} unknown (e.g. {extra[:2]})"
        )
    for name, shape in expected.items():
        if got[name] != shape:
            raise ValueError(f"{path}: {name}: expected shape {list(shape)}, got {list(got[name])}")


def _scalings(model: nn.Module, config: LoraConfig) -> dict[LoRALinear, tuple[float, float]]:
    result = {}
    for name, layer in adapted_layers(model):
        alpha = config.alpha_of(name)
        result[layer] = (alpha, alpha / (layer.r**0.5 if config.use_rslora else layer.r))
    return result
