# SPDX-License-Identifier: Apache-2.0
"""HF PEFT models on our kernels: ``patch`` gives PEFT's layers a subclass whose forward makes one fused call where it
can and is PEFT's own where it cannot. Parameters, names and every other method stay PEFT's.

A class swap, not a replaced ``forward``: accelerate and others set ``forward`` on instances, some libraries replace it
on PEFT's classes, and both keep working.
"""

from __future__ import annotations

import contextlib
from functools import cache

from torch import nn

from .patched.allocator import FusedAllocator
from .patched.copies import CACHES, Patched, keep_class_in_deep_copies
from .patched.layer import AdaLoraForward, LoraForward, PatchedLayer
from .patched.model import PatchedAdaLoraModel, PatchedModel


def patch(model: nn.Module) -> nn.Module:
    """Runs the layers of an HF PEFT model on peftkern's kernels, in place; returns model.

    Fused are LoRA (with rsLoRA, DoRA, several active adapters, ``adapter_names``) and AdaLoRA on ``nn.Linear``,
    transformers' ``Conv1D``, bitsandbytes' ``Linear4bit`` in NF4 and ``peftkern.NF4Linear``, and AdaLoRA's rank
    allocation (``model.base_model.update_and_allocate``). Whatever is not, an adapter kind or a hook on an inner
    module, runs PEFT's own forward; ``peftkern.explain(model)`` says which and why. State dict, names, saving, merging,
    adding, choosing and deleting adapters are unchanged, and a pickled model loads without peftkern, unpatched. New is
    that ``adapter_names`` may be given in training.

    Layers that a later ``add_adapter`` makes are patched too. Raises ValueError if model has no layer of PEFT's.

    >>> import peft, torch
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), peft.LoraConfig(target_modules=["0"]))
    >>> patch(model)(torch.randn(2, 16)).shape
    torch.Size([2, 8])
    """
    found = False
    for module in list(model.modules()):
        for part in (module, _allocator_of(module)):
            fused = _fused_classes().get(type(part))
            if fused is not None:
                part.__class__ = fused
        found = found or is_peft_layer(module)
    if not found:
        raise ValueError(
            "model: expected one with HF PEFT adapters, got one without a PEFT layer; see peft.get_peft_model"
        )
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes :func:`patch`; nothing happens to a model that is not patched. Returns model."""
    for module in list(model.modules()):
        if isinstance(module, Patched):
            for name in CACHES:
                module.__dict__.pop(name, None)
            if type(module) in _fused_classes().values():  # not what FSDP has made of it since
                module.__class__ = module._peftkern_class
        allocator = _allocator_of(module)
        if isinstance(allocator, FusedAllocator):
            allocator.hand_back()
    return model


def _allocator_of(module: nn.Module) -> object:
    """PEFT's AdaLoraModel keeps its RankAllocator beside its modules."""
    return module.__dict__.get("rankallocator")


def is_peft_layer(module: nn.Module) -> bool:
    """Is module one of PEFT's adapter layers, patched or not?"""
    return any(c.__module__.startswith("peft.tuners.") and c.__name__ == "BaseTunerLayer" for c in type(module).__mro__)


def explain_layer(module: nn.Module) -> str:
    """One line about a PEFT layer: fused, or why not."""
    name = _peft_name(module)
    if not isinstance(module, PatchedLayer):
        if type(module) in _fused_classes():
            return f"{name}: HF PEFT's own forward: not patched; peftkern.patch(model) does it"
        return f"{name}: HF PEFT's own forward: this kind of layer is not fused"
    reason = module._why_not()
    return f"{name}, patched: HF PEFT's own forward: {reason}" if reason else f"{name}, patched: {module._fused_text()}"


def explain_allocator(module: nn.Module) -> str | None:
    """One line about the RankAllocator of PEFT's AdaLoraModel, None for other modules."""
    allocator = _allocator_of(module)
    if allocator is None:
        return None
    name = _peft_name(allocator)
    if not isinstance(allocator, FusedAllocator):
        return f"{name}: HF PEFT's own, not patched; peftkern.patch(model) does it"
    reason = allocator.why_not(module.model)
    return f"{name}, patched: HF PEFT's own: {reason}" if reason else f"{name}, patched: one call for all layers"


def _peft_name(of: object) -> str:
    cls = getattr(of, "_peftkern_class", type(of))
    return f"{cls.__module__.split('.')[2]}.{cls.__name__}"  # peft.tuners.<method>.<file>


@cache
def _fused_classes() -> dict[type, type]:
    """{class of PEFT: our subclass}. Both have the same name, which PEFT looks at in places."""
    try:
        from peft.tuners.adalora import AdaLoraModel
        from peft.tuners.adalora import layer as adalora
        from peft.tuners.lora import LoraModel
        from peft.tuners.lora import layer as lora
    except ImportError:
        return {}
    pairs = [(lora.Linear, LoraForward), (adalora.SVDLinear, AdaLoraForward), (LoraModel, PatchedModel),
             (AdaLoraModel, PatchedAdaLoraModel), (adalora.RankAllocator, FusedAllocator)]  # fmt: skip
    with contextlib.suppress(ImportError):  # without bitsandbytes PEFT does not define these
        from peft.tuners.adalora.bnb import SVDLinear4bit
        from peft.tuners.lora.bnb import Linear4bit

        pairs += [(Linear4bit, LoraForward), (SVDLinear4bit, AdaLoraForward)]
    fused = {
        theirs: type(theirs.__name__, (mixin, theirs), {"_peftkern_class": theirs, "__module__": __name__})
        for theirs, mixin in pairs
    }
    keep_class_in_deep_copies(list(fused.values()))
    return fused
