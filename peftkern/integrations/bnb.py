# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' 4-bit models and checkpoints as ours, byte for byte. bitsandbytes itself is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import NF4Linear
from ..ops import NF4Config, NF4Weight, quantize_nf4
from ..ops.nf4 import check_weight


class BnbCheckpoint(NF4Config):
    """The quantization_config under which ``load_bnb`` has transformers read a checkpoint of bitsandbytes."""

    quant_method = "peftkern_bnb"


def load_bnb(path: str | Path, model_class: Any = None, **kwargs: Any) -> Any:
    """A transformers model from a checkpoint that bitsandbytes quantized to NF4, with NF4Linear in place of Linear4bit.

    path: folder or hub id, safetensors, sharded or not. model_class: by default the class named in its config.json.
    kwargs: for from_pretrained (dtype, device_map, ...). The packed weights and their scales are taken over byte for
    byte; block size, double quantization and which layers are quantized are read from the tensors.
    Raises ValueError naming the tensor for fp4 and int8 weights and for quantized weights that the model has no
    nn.Linear for; RuntimeError for damaged entries, which transformers names in its log; ImportError without it.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in _FOR_CONFIG if k in kwargs})
    found = getattr(config, "quantization_config", None) or {}
    if found.get("quant_method") not in ("bitsandbytes", None) or not (
        found.get("load_in_4bit") or found.get("load_in_8bit")
    ):
        raise ValueError(f"path: expected a checkpoint quantized by bitsandbytes, got quantization_config={found!r}")
    config.quantization_config = BnbCheckpoint().to_dict()
    if model_class is None:
        name = (config.architectures or [""])[0]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise ValueError(f"model_class: expected one, transformers has no architecture {name!r} of config.json")
    return model_class.from_pretrained(path, config=config, **kwargs)


_FOR_CONFIG = ("trust_remote_code", "revision", "token", "cache_dir", "subfolder", "local_files_only")


def convert_bnb(model: nn.Module) -> nn.Module:
    """Replaces every bitsandbytes Linear4bit of model by an NF4Linear that shares its bytes, in place; returns model.

    A transformers model is then saved and reloaded as one that NF4Config quantized. The product runs in the dtype of
    the activations; bitsandbytes casts them to ``bnb_4bit_compute_dtype`` first.
    Raises ValueError, before anything is changed, naming the layer, for fp4, int8 and other states of bitsandbytes'
    layers, for a layer inside an HF PEFT adapter, and if there is none to convert.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("peft.") and any(_is_bnb(child) for child in module.children()):
            raise ValueError(f"{name}: expected a model without HF PEFT's adapters; convert it before get_peft_model")
        if _is_bnb(module):
            if kind.__name__ != "Linear4bit":
                raise ValueError(f"{name}: expected bitsandbytes' Linear4bit, got {kind.__name__}")
            found[name] = module
    if not found:
        raise ValueError("model: expected one with bitsandbytes' Linear4bit layers, got one without")
    weights = {name: _read_layer(name, layer) for name, layer in found.items()}
    for name, layer in found.items():
        model.set_submodule(name, nf4_linear_with(weights[name], layer.bias).train(layer.training))
    _declare(model, next(iter(weights.values())))
    return model


def nf4_linear_with(weight: NF4Weight, bias: nn.Parameter | None) -> NF4Linear:
    """An NF4Linear that holds weight and bias as they are."""
    layer = NF4Linear.__new__(NF4Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.set_base_weight(weight)
    layer.bias = bias
    return layer


def _is_bnb(module: nn.Module) -> bool:
    return any(c.__module__.startswith("bitsandbytes.nn") and issubclass(c, nn.Linear) for c in type(module).__mro__)


@torch.no_grad()
def _read_layer(name: str, layer: Any) -> NF4Weight:
    p = layer.weight
    if getattr(p, "quant_type", None) != "nf4":
        raise ValueError(f"{name}.weight: expected quant_type 'nf4', got {getattr(p, 'quant_type', None)!r}")
    state = getattr(p, "quant_state", None)
    if state is None:
        if not p.is_floating_point() or getattr(p, "bnb_quantized", False):
            raise ValueError(f"{name}.weight: expected a quant_state, got none; was the model moved or loaded fully?")
        return quantize_nf4(p.data, p.blocksize, p.compress_statistics)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name}.weight: expected bitsandbytes' storage layout, got its layout for inference on the CPU, with "
            "rounded scales; convert the model before its first call in eval mode"
        )
    packed = p.data.contiguous().view(torch.uint8).reshape(-1)
    nested: Tensor | None = None
    offset: Tensor | None = None
    if state.nested:
        if state.state2.blocksize != 256:
            raise ValueError(f"{name}.weight: expected nested blocks of 256, got {state.state2.blocksize}")
        nested, offset = state.state2.absmax, torch.as_tensor(state.offset, dtype=torch.float32, device=packed.device)
    shape = tuple(state.shape)
    weight = NF4Weight(packed, state.absmax, state.blocksize, shape, state.dtype, nested, offset)
    check_weight(weight, f"{name}.weight")
    if shape[1] % 2 == 0:
        packed = packed.reshape(shape[0], shape[1] // 2)
    return NF4Weight(packed, state.absmax, state.blocksize, shape, state.dtype, nested, offset)


def _declare(model: Any, weight: NF4Weight) -> None:
    """Tells transformers that the model is now ours, so that it is saved and trained as such."""
    if not hasattr(model, "hf_quantizer"):
        return
    from .transformers import NF4Quantizer, kept_linears

    config = NF4Config(weight.block_size, weight.double_quant, kept_linears(model))
    model.hf_quantizer = NF4Quantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(model, mark):
            delattr(model, mark)
