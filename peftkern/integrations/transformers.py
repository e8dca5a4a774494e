# SPDX-License-Identifier: Apache-2.0
"""The quantizer behind ``from_pretrained(..., quantization_config=peftkern.NF4Config(...))``.

transformers builds the model on the meta device, calls ``_process_model_before_weight_loading``, then converts and
places one checkpoint tensor after the other: the dense model is never in memory.
"""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import replace
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from ..modules import NF4Linear
from ..modules.base_weight import weight_parameters
from ..modules.nf4_experts import expert_weight, is_experts, nf4_experts_forward, quantize_experts, quantize_stack
from ..ops import NF4Config, NF4Weight, quantize_nf4
from ..ops.nf4 import check_weight
from .bnb import nf4_linear_with

log = logging.getLogger(__name__)

ALL_EXPERTS_FUNCTIONS["peftkern_nf4"] = nf4_experts_forward


class _Quantize(ConversionOps):
    """A dense checkpoint tensor to the NF4 parameters of its module."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model=None, **kwargs: Any) -> dict[str, nn.Parameter]:
        result: dict[str, nn.Parameter] = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, leaf = get_module_from_name(model, name)
            path = name.removesuffix(leaf)
            try:
                if isinstance(module, NF4Linear):
                    result |= {f"{path}{part}": p for part, p in self._linear(module, value, path).items()}
                else:
                    config, transposed = module.nf4_experts[leaf].config, module.is_transposed
                    stack = quantize_stack(value, config, transposed)
                    result |= {f"{name}{end}": nn.Parameter(t, requires_grad=False) for end, t in stack.items()}
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from error
        return result

    def _linear(self, module: NF4Linear, value: Tensor, path: str) -> dict[str, nn.Parameter]:
        if path.removesuffix(".") in self.hf_quantizer.transposed:
            value = value.T
        shape = (module.out_features, module.in_features)
        if tuple(value.shape) != shape:
            raise ValueError(f"expected shape {shape}, got {tuple(value.shape)} in the checkpoint")
        config = module.nf4_config
        assert config is not None
        return weight_parameters(quantize_nf4(value, config.block_size, config.double_quant))


class NF4Quantizer(HfQuantizer):
    """Every nn.Linear and Conv1D, and the fused weights of experts, to NF4, but for ``modules_to_not_convert``, the
    output head and tied weights. ``is_loaded_in_4bit`` stays unset: it means bitsandbytes to transformers, accelerate
    and TRL, which would then import it or cast what trains to bfloat16."""

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.transposed: set[str] = set()  # names of layers that were Conv1D, whose checkpoint weight is [in, out]
        self.has_experts = False

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                'device_map: expected no "disk" while a dense checkpoint is quantized (the dense weights would be read '
                "back); save_pretrained the NF4 model, and offload when that is loaded"
            )

    def _process_model_before_weight_loading(self, model, **kwargs: Any) -> None:
        config: NF4Config = self.quantization_config
        kept = self.get_modules_to_not_convert(
            model, list(config.modules_to_not_convert or ()), model._keep_in_fp32_modules, add_default_skips=True
        )
        for name, module in list(model.named_modules()):
            if not should_convert_module(name, kept):
                continue
            if type(module) is nn.Linear or type(module) is Conv1D:
                if type(module) is Conv1D:
                    self.transposed.add(name)
                    module = _as_linear(module)
                model.set_submodule(name, NF4Linear.from_linear(module, config.block_size, config.double_quant))
            elif isinstance(module, nn.Linear):
                log.warning(
                    "%s: stays as it is, not NF4: a %s computes something of its own", name, type(module).__name__
                )
            elif is_experts(module):
                self.has_experts = True
                quantize_experts(module, config)
                module.config = copy.copy(module.config)  # the choice is this module's, not that of the whole model
                module.config._experts_implementation_internal = "peftkern_nf4"
            else:
                _refuse_stacked_weights(name, module)
        for p in model.parameters():
            if not p.is_floating_point():
                p._is_hf_initialized = True  # transformers would draw normal values for what it offloads to disk

    def _process_model_after_weight_loading(self, model, **kwargs: Any):
        for name, module in model.named_modules():
            if isinstance(module, NF4Linear):
                _check_loaded(name, module.base_weight())
            for leaf, stack in getattr(module, "nf4_experts", {}).items():
                for expert in range(stack.experts):
                    _check_loaded(f"{name}.{leaf}[{expert}]", expert_weight(module, leaf, expert))
        if self.has_experts:
            # They are saved as they are, not split again into the experts of the original checkpoint.
            model._weight_conversions = [c for c in model._weight_conversions if not _makes_experts(c)]
        return model

    def param_needs_quantization(self, model, param_name: str, **kwargs: Any) -> bool:
        module, leaf = get_module_from_name(model, param_name)
        return (isinstance(module, NF4Linear) and leaf == "weight") or leaf in getattr(module, "nf4_experts", ())

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def adjust_max_memory(self, max_memory: dict) -> dict:
        return {device: 0.9 * size for device, size in max_memory.items()}  # room for the dense tensor being quantized

    def _dequantize(self, model, dtype: torch.dtype | None = None):
        if self.has_experts:
            raise NotImplementedError("dequantize: expected a model without experts in NF4")
        for name, module in list(model.named_modules()):
            if isinstance(module, NF4Linear):
                dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                dense.weight, dense.bias = nn.Parameter(module.dequantize(dtype)), module.bias
                model.set_submodule(name, dense.train(module.training))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks this of a quantized model without HF PEFT's adapters; it may have ours."""
        return True

    @property
    def is_compileable(self) -> bool:
        return not self.has_experts  # how many rows each expert gets is read back


class BnbQuantizer(NF4Quantizer):
    """Reads what bitsandbytes wrote: a layer becomes an NF4Linear when its quantized weight arrives."""

    # {parameter: what a checkpoint stores it as}; transformers collects these before it calls the operation.
    serialized_names: ClassVar = {
        "weight": [
            "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
            "weight.quant_state.bitsandbytes__nf4",
        ]
    }  # fmt: skip

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _ReadBnb}

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, dtype=None, **kwargs: Any) -> None:
        self.dtype_plan = model._get_dtype_plan(dtype)
        self.expected: list[str] = []
        for file in checkpoint_files or ():
            if not str(file).endswith(".safetensors"):
                raise ValueError(f"path: expected safetensors files, got {file}")
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                    if key.endswith((".SCB", ".weight_format")):
                        raise ValueError(f"{key.rpartition('.')[0]}.weight: expected NF4, got int8 (LLM.int8())")
                    weight, mark, kind = key.partition(".quant_state.bitsandbytes__")
                    if mark and kind != "nf4":
                        raise ValueError(f"{weight}: expected NF4, got {kind}")
                    if mark:
                        self.expected.append(weight)

    def param_needs_quantization(self, model, param_name: str, **kwargs: Any) -> bool:
        return isinstance(get_module_from_name(model, param_name)[0], NF4Linear)

    def _process_model_after_weight_loading(self, model, **kwargs: Any):
        layers = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
        if len(layers) != len(self.expected):
            unread = [w for w in self.expected if w.removesuffix(".weight") not in layers]
            raise ValueError(
                f"{(unread or self.expected)[0]}: expected an nn.Linear of the model for each of the "
                f"{len(self.expected)} quantized weights, {len(self.expected) - len(layers)} have none"
            )
        for name, module in layers.items():
            _check_loaded(name, module.base_weight())
        some = next(iter(layers.values())).nf4_config if layers else NF4Config()
        assert some is not None
        self.quantization_config = replace(some, modules_to_not_convert=kept_linears(model))
        model.config.quantization_config = self.quantization_config
        model.quantization_method = self.quantization_config.quant_method
        model._weight_conversions = [
            c for c in model._weight_conversions if not any(isinstance(op, _ReadBnb) for op in _operations(c))
        ]
        return model


class _ReadBnb(ConversionOps):
    """The entries of one weight to the parameters of an NF4Linear, which it puts in place of the nn.Linear."""

    def __init__(self, hf_quantizer: BnbQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model=None, full_layer_name="", **kwargs: Any) -> dict[str, Tensor]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if len(tensors) == 1:  # not quantized
            return {key: self._cast(value, model, full_layer_name) for key, value in tensors.items()}
        name = full_layer_name.removesuffix(".weight")
        linear = model.get_submodule(name)
        if type(linear) is Conv1D:
            linear = _as_linear(linear)
        if type(linear) is not nn.Linear:
            raise ValueError(f"{full_layer_name}: expected an nn.Linear to load into, got {type(linear).__name__}")
        try:
            weight = NF4Weight.from_bnb(tensors)
        except ValueError as error:
            raise ValueError(f"{full_layer_name}: {error}") from error
        if weight.shape != (linear.out_features, linear.in_features):
            expected = [linear.out_features, linear.in_features]
            raise ValueError(f"{full_layer_name}: expected shape {expected}, got {list(weight.shape)}")
        layer = nf4_linear_with(weight, linear.bias)
        model.set_submodule(name, layer)
        return {"weight": layer.weight}

    def _cast(self, value: Tensor, model, name: str) -> Tensor:
        """transformers leaves what an operation loads in the dtype of the file."""
        if not value.is_floating_point():
            return value
        plan = self.hf_quantizer.dtype_plan
        kept = next((dtype for pattern, dtype in plan.items() if re.search(pattern, name)), None)
        return value.to(kept or model.get_parameter_or_buffer(name).dtype)


def kept_linears(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the linear layers that are not NF4."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, NF4Linear)]
    return tuple(names) or None


def _operations(conversion: Any) -> list:
    return getattr(conversion, "operations", [])


def _as_linear(conv: Conv1D) -> nn.Linear:
    linear = nn.Linear(conv.nx, conv.nf, bias=False, device="meta", dtype=conv.weight.dtype)
    linear.bias = conv.bias
    return linear


def _refuse_stacked_weights(name: str, module: nn.Module) -> None:
    """A module that is not torch's own and holds a 3-D parameter: most likely experts, most of the model's weight."""
    if type(module).__module__.startswith("torch."):
        return
    for leaf, p in module.named_parameters(recurse=False):
        if p.dim() == 3 and p.shape[0] > 1:
            raise ValueError(
                f"{name}.{leaf}: expected weights of known modules, got a parameter {list(p.shape)} of a "
                f"{type(module).__name__}, which cannot be quantized; modules_to_not_convert=[{name!r}] leaves it dense"
            )


def _check_loaded(name: str, weight: NF4Weight) -> None:
    try:
        check_weight(weight, name)
    except ValueError as error:
        raise ValueError(f"{error}; the checkpoint was written with another NF4Config") from error


def _makes_experts(conversion: Any) -> bool:
    """Does a weight conversion of transformers put experts together? Then it would take NF4 ones apart."""
    return any(re.search(r"(gate_up_proj|up_proj|down_proj)$", str(t)) for t in conversion.target_patterns)
