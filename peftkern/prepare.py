# SPDX-License-Identifier: Apache-2.0
"""A quantized model, ready for adapters to be trained on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

UPCAST = ("all", "norms", "none")


def prepare(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    upcast: str = "all",
) -> nn.Module:
    """Freezes model, casts what is left in 16 bits to float32, and turns on activation checkpointing, in place.

    What HF PEFT's ``prepare_model_for_kbit_training`` does for bitsandbytes models. Call it before the adapters are
    put in. Packed NF4 weights and their scales are left alone.
    upcast: "all", every float16 and bfloat16 parameter, as PEFT; "norms", those of normalization layers only, which
        spares the memory of float32 embeddings and head, but the 16-bit head then needs autocast; "none".
    use_gradient_checkpointing: for models with transformers' ``gradient_checkpointing_enable``, with
        gradient_checkpointing_kwargs, by default ``{"use_reentrant": False}``; the outputs of the input embeddings
        then require gradients.
    It does not choose adapters, the optimizer or autocast: with float32 activations NF4 products run in float32, so
    train under bfloat16 autocast (``bf16=True`` in TrainingArguments).
    Returns model. Raises ValueError for another upcast, for a model that has adapters, which would be frozen, and if
    checkpointing is asked for and model has none.

    >>> model = prepare(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).bfloat16(), use_gradient_checkpointing=False)
    >>> model[1].weight.dtype, any(p.requires_grad for p in model.parameters())
    (torch.float32, False)
    """
    if upcast not in UPCAST:
        raise ValueError(f"upcast: expected one of {UPCAST}, got {upcast!r}")
    if any(".lora_" in f".{name}" for name, _ in model.named_parameters()):
        raise ValueError("model: expected one without adapters, which would be frozen; call prepare() before them")
    if use_gradient_checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(
            f"use_gradient_checkpointing: expected a transformers model, a {type(model).__name__} has no "
            "gradient_checkpointing_enable; pass False"
        )
    model.requires_grad_(False)
    for module in model.modules():
        if upcast == "all" or (upcast == "norms" and "norm" in type(module).__name__.lower()):
            for p in module.parameters(recurse=False):
                if p.dtype in (torch.float16, torch.bfloat16):
                    p.data = p.data.float()
    if use_gradient_checkpointing:
        kwargs = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        # The name of the switch changed within transformers 5.
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        # Reentrant checkpointing gives no gradients to parameters if no input requires one; Trainer may choose it.
        model.enable_input_require_grads()
    return model
