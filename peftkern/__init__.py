# SPDX-License-Identifier: Apache-2.0
"""peftkern: kernels for parameter-efficient fine-tuning. The names below are the public API."""

from .ops import NF4Config, NF4Weight, adapted_linear, dequantize_nf4, lora_linear, nf4_linear, quantize_nf4
