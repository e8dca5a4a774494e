# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk in HF PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``, both directions.

Keys: ``base_model.model.<layer>.lora_A.weight`` [r, in] and ``.lora_B.weight`` [out, r]; trained biases as PEFT names
them. Saving writes temporary files and renames them; loading checks everything before it changes anything.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapt import adapt, adapted_layers, find_targets, trainable_biases
from .config import LoraConfig, matches, read_config
from .files import write_whole
from .modules import LoRALinear
from .ops.library import FLOAT_DTYPES

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
ADAPTER_NAMES = (".lora_A.weight", ".lora_B.weight")


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Writes model's adapter to directory, which is made if need be; returns it. HF PEFT, vLLM and others read it.

    A model sharded by FSDP2 is gathered: every process calls this, the first one writes.

    Raises RuntimeError if model has no adapter, OSError if the disk fails, in which case what was there before is
    still whole.
    """
    model = _unwrapped(model)
    tensors, config = _adapter_tensors(model), _config_of(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    sharded = any(_is_sharded(t) for t in tensors.values())
    contiguous = {name: _whole(t.detach()).cpu().contiguous() for name, t in tensors.items()}
    if config.target_modules == "all-linear":  # as HF PEFT does, for readers that know names only
        config = replace(config, target_modules=_exact_targets(model, dict(adapted_layers(model))))
    text = json.dumps(config.to_peft_dict(), indent=2, sort_keys=True) + "\n"
    files = {
        folder / WEIGHTS_NAME: lambda path: save_file(contiguous, path, metadata={"format": "pt"}),
        folder / CONFIG_NAME: lambda path: path.write_text(text),
    }
    if not sharded or dist.get_rank() == 0:
        write_whole(files)
    if sharded:
        dist.barrier()  # no process reads before the files are there
    return folder


def _is_sharded(t: Tensor) -> bool:
    """A DTensor? Without importing torch.distributed.tensor, which takes longer than all of peftkern."""
    return hasattr(t, "full_tensor")


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if _is_sharded(t) else t


def _copy_into(target: Tensor, source: Tensor) -> None:
    """Each process has read the whole source, and keeps its part of a sharded target."""
    if _is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        source = source.to(target.device, target.dtype)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Loads an adapter that save_adapter or HF PEFT saved; adapts model first if it has none. Returns model.

    A model without adapters gets them in the dtype of the file; in one that has some, their dtype stays.

    Raises FileNotFoundError for a missing file, ValueError, naming the file and what was expected, for a damaged one,
    for an option that is not supported and for tensors that do not fit, RuntimeError for a merged model. model is then
    unchanged.
    """
    folder = Path(directory)
    config, tensors = _read_config_file(folder / CONFIG_NAME), _read_weights(folder / WEIGHTS_NAME)
    wrapped, model = model, _unwrapped(model)
    layers = dict(adapted_layers(model))
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(f"{merged[0]}: expected an unmerged layer to load an adapter into; call unmerge() first")
    if layers:
        expected = {name: tuple(t.shape) for name, t in _adapter_tensors(model).items()}
    else:
        expected = _shapes_after_adapt(model, config)
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    _check_names_and_shapes(expected, got, folder / WEIGHTS_NAME)
    if not layers:
        adapt(model, config)
    scalings = _scalings(model, config)
    with torch.no_grad():
        for name, target in _adapter_tensors(model).items():
            if not layers and name.endswith(ADAPTER_NAMES):  # the file's dtype is the one the adapter was trained in
                # a copy: what safetensors returns is the mapped file, which another program may overwrite
                target.data = tensors[name].to(target.device, copy=True)
            else:
                _copy_into(target, tensors[name])
    for layer, (alpha, scaling) in scalings.items():
        layer.lora_alpha, layer.scaling, layer.use_rslora = alpha, scaling, config.use_rslora
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


def _config_of(model: nn.Module) -> LoraConfig:
    config = getattr(model, "peftkern_config", None)
    if config is not None:
        return config
    layers = dict(adapted_layers(model))  # put in by hand: say what each layer says
    first = next(iter(layers.values()))
    for name, layer in layers.items():
        if layer.use_rslora != first.use_rslora:
            raise RuntimeError(
                f"{name}: expected use_rslora={first.use_rslora}, one value for all layers of an adapter"
            )
    # "^": the pattern means this layer alone, and not another whose name ends so
    return LoraConfig(
        r=first.r, lora_alpha=first.lora_alpha, lora_dropout=first.lora_dropout, use_rslora=first.use_rslora,
        target_modules=_exact_targets(model, layers),
        rank_pattern={f"^{re.escape(name)}": m.r for name, m in layers.items() if m.r != first.r},
        alpha_pattern={
            f"^{re.escape(name)}": m.lora_alpha for name, m in layers.items() if m.lora_alpha != first.lora_alpha
        },
        bias="lora_only" if any(m.bias is not None and m.bias.requires_grad for m in layers.values()) else "none",
    )  # fmt: skip


def _exact_targets(model: nn.Module, layers: Mapping[str, nn.Module]) -> str | list[str]:
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
    for name, layer in layers.items():
        if not isinstance(layer, LoRALinear):
            raise RuntimeError(f"{name}: expected a LoRALinear, got {type(layer).__name__}")
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
    biases = trainable_biases(model, _config_of(model).bias, layers)
    return tensors | {PREFIX + name: bias for name, bias in biases.items()}


def _read_config_file(path: Path) -> LoraConfig:
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
        if t.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{path}: {name}: expected dtype float32, bfloat16 or float16, got {t.dtype}")
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"{path}: {name}: expected finite values, got NaN or infinity")
    return tensors


def _shapes_after_adapt(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """What _adapter_tensors would hold if model, which has no adapters, were adapted."""
    layers = find_targets(model, config)
    expected: dict[str, tuple[int, ...]] = {}
    for name, linear in layers.items():
        rank = config.rank_of(name)
        expected[f"{PREFIX}{name}.lora_A.weight"] = (rank, linear.in_features)
        expected[f"{PREFIX}{name}.lora_B.weight"] = (linear.out_features, rank)
    biases = trainable_biases(model, config.bias, layers)
    return expected | {PREFIX + name: tuple(bias.shape) for name, bias in biases.items()}


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
