# SPDX-License-Identifier: Apache-2.0
"""peftkern: kernels for parameter-efficient fine-tuning. The names below are the public API."""

from .adapt import adapt, memory_footprint, merge, trainable_parameters, unmerge
from .adapter_bank import AdapterBank
from .adapter_io import load_adapter, save_adapter
from .autotune import autotune
from .compress import Compression, compress
from .config import AdaLoraConfig, LoraConfig
from .info import cpu_isa, empty_cpu_cache, explain, info, set_cpu_isa
from .integrations import convert_bnb, load_bnb
from .modules import AdaLoRALinear, LoRALinear, NF4Linear, QLoRALinear
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
from .prepare import prepare
from .rank_allocator import RankAllocator, orthogonality, prune_ranks, to_lora
from .router import Router

__version__ = "0.1.0"

__all__ = [
    "AdaLoRALinear",
    "AdaLoraConfig",
    "AdapterBank",
    "Compression",
    "LoRALinear",
    "LoraConfig",
    "NF4Config",
    "NF4Linear",
    "NF4Weight",
    "QLoRALinear",
    "RankAllocator",
    "Router",
    "adapt",
    "adapted_linear",
    "autotune",
    "compress",
    "convert_bnb",
    "cpu_isa",
    "dequantize_nf4",
    "empty_cpu_cache",
    "explain",
    "info",
    "load_adapter",
    "load_bnb",
    "lora_linear",
    "memory_footprint",
    "merge",
    "multi_lora_linear",
    "nf4_linear",
    "orthogonality",
    "patch",
    "prepare",
    "prune_ranks",
    "quantize_nf4",
    "save_adapter",
    "set_cpu_isa",
    "to_lora",
    "trainable_parameters",
    "unmerge",
    "unpatch",
]
