# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules: parameters, merging and state dicts over the ops."""

from .adalora import AdaLoRALinear
from .adapted import AdaptedLinear
from .base_weight import BaseWeight
from .embedding import LoRAEmbedding
from .lora import LoRALinear, QLoRALinear
from .nf4_linear import NF4Linear
from .tied import TiedLoRALinear

__all__ = [
    "AdaLoRALinear",
    "AdaptedLinear",
    "BaseWeight",
    "LoRAEmbedding",
    "LoRALinear",
    "NF4Linear",
    "QLoRALinear",
    "TiedLoRALinear",
]
