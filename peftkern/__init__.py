# SPDX-License-Identifier: Apache-2.0
"""peftkern: kernels for parameter-efficient fine-tuning. The names below are the public API."""

from .adapt import adapt, memory_footprint, merge, trainable_parameters, unmerge
from .adapter_io import load_adapter, save_adapter
from .config import LoraConfig
from .info import cpu_isa, empty_cpu_cache, explain, info, set_cpu_isa
from .modules import LoRALinear, NF4Linear, QLoRALinear
from .ops import (
    NF4Config,
    NF4Weight,
    adapted_linear,
    dequantize_nf4,
    lora_linear,
    multi_lora_linear,
    nf4_linear,
    quantize_nf4,
)
from .patch import patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "LoRALinear",
    "LoraConfig",
    "NF4Config",
    "NF4Linear",
    "NF4Weight",
    "QLoRALinear",
    "adapt",
    "adapted_linear",
    "cpu_isa",
    "dequantize_nf4",
    "empty_cpu_cache",
    "explain",
    "info",
    "load_adapter",
    "lora_linear",
    "memory_footprint",
    "merge",
    "multi_lora_linear",
    "nf4_linear",
    "patch",
    "quantize_nf4",
    "save_adapter",
    "set_cpu_isa",
    "trainable_parameters",
    "unmerge",
    "unpatch",
]
