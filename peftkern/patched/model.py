# SPDX-License-Identifier: Apache-2.0
"""HF PEFT's LoraModel and AdaLoraModel: new layers are patched too, adapter_names reach all layers without a hook on
each, and AdaLoRA's orthogonality term is one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..ops import orthogonality_penalty
from .allocator import FusedAllocator
from .batch import Batch
from .copies import Patched
from .layer import PatchedLayer


class PatchedModel(Patched):
    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(*args, **kwargs)
        from ..patch import patch

        patch(self)  # the layers that this made
        self.__dict__.get("rankallocator", self).__dict__.pop("_peftkern_layers", None)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT walks over every module inside every adapter and registers a hook on each layer, on each call. Beside
        that, it takes adapter_names in eval mode only; it asks self.training once, on the way in."""
        names, training = kwargs.get("adapter_names"), self.training
        if names is None or torch.compiler.is_compiling():
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        layers, others, checkpointing = _layers_of(self.model)
        if training and checkpointing:
            raise ValueError("adapter_names: expected gradient checkpointing off, its second forward does not get them")
        plain = kwargs.get("alora_offsets") is None and (kwargs.get("num_beams") or 1) == 1
        known = {"__base__"}.union(*(layer.lora_A.keys() for layer in layers))
        if plain and not others and known.issuperset(names):
            with _given_to(layers, Batch.of(names)):
                yield
            return
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        self.training = False
        try:
            hooks.__enter__()
        finally:
            self.training = training
        try:
            yield
        finally:
            hooks.__exit__(None, None, None)


@contextlib.contextmanager
def _given_to(layers: list[nn.Module], batch: Batch) -> Iterator[None]:
    for layer in layers:
        layer.__dict__["_peftkern_batch"] = batch
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_peftkern_batch", None)


def _layers_of(model: nn.Module) -> tuple[list[nn.Module], bool, bool]:
    """The patched layers; are there other modules that take adapter_names; does one checkpoint gradients? Without
    looking into the adapters, where nearly all modules are."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    layers, others, checkpointing, stack, seen = [], False, False, [model], set()
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, PatchedLayer):
            layers.append(module)
            stack.append(module._modules["base_layer"])
            continue
        others = others or isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        checkpointing = checkpointing or getattr(module, "gradient_checkpointing", False)
        stack += module._modules.values()
    return layers, others, checkpointing


class PatchedAdaLoraModel(PatchedModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's, whose orthogonality term is half a dozen calls for each factor."""
        allocator = self.__dict__.get("rankallocator")
        triplets = None
        if isinstance(allocator, FusedAllocator) and not torch.compiler.is_compiling():
            triplets = allocator.triplets(self.model)
        if triplets is None or allocator.adapter_name != self.trainable_adapter_name:
            return super().forward(*args, **kwargs)
        weight = self.peft_config[self.trainable_adapter_name].orth_reg_weight
        if weight < 0:
            return super().forward(*args, **kwargs)  # which refuses it
        outputs = self.model.forward(*args, **kwargs)
        if isinstance(getattr(outputs, "loss", None), torch.Tensor):
            outputs.loss += weight * orthogonality_penalty(triplets.A, triplets.B)
        return outputs
