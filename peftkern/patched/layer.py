# SPDX-License-Identifier: Apache-2.0
"""HF PEFT's layers with a forward that makes one fused call where it can, and is PEFT's own where it cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..modules import NF4Linear
from ..ops import NF4Weight, adapted_linear, dequantize_nf4, quantize_nf4
from ..ops.dora_norm import dora_linear, dora_norm
from ..ops.library import FLOAT_DTYPES
from ..ops.tensor_cache import TensorCache
from .bases import base_inputs, bnb_linear, bnb_reason, has_kernels, kind_reason, quant_state, text_of
from .batch import Bank, Batch, Mixture, mixed_linear
from .copies import Patched
from .watched import Watched

# Two names of torch's own that have no public form. Without them nothing is fused.
_hooks_everywhere = getattr(torch_module, "_has_any_global_hook", None)
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)

_UNMERGED = "peftkern-unmerged"  # of PEFT's own cache in the layer, which survives unpatch and pickle


class Part(NamedTuple):
    """One adapter of a layer that can be fused."""

    name: str
    modules: tuple[nn.Module, ...]  # lora_A and lora_B first, where they are modules: whose hooks would not run
    dropout: nn.Module
    dora: nn.Module | None


class Plan(NamedTuple):
    """What does not change between calls. Valid while the layer still has what it rests on; not only PEFT's methods
    write to a layer's dictionaries."""

    active: Any
    base: nn.Module
    quant_state: Any
    inside: tuple  # copies of _inside()
    base_reason: str | None  # why PEFT's own forward has to run, whatever the adapters
    reason: str | None  # and with the active ones
    parts: list[Part]  # the active ones
    mixable: dict[str, Part]  # those that adapter_names may name
    watched: Watched  # the base and the modules of parts


class PatchedLayer(Patched):
    _peftkern_plan: Plan | None = None
    _peftkern_cache: TensorCache | None = None
    _peftkern_bank: Bank | None = None
    _peftkern_mixture: Mixture | None = None
    _peftkern_batch: Batch | None = None  # set by the model for the time of a call with adapter_names

    # ---- what LoRA and AdaLoRA say of themselves

    _kind: ClassVar[str]

    def _adapter_reason(self, name: str) -> str | None:
        """Why the adapter cannot be fused, or None."""
        raise NotImplementedError(f"{type(self).__name__}._adapter_reason")

    def _part(self, name: str) -> Part:
        """The modules of an adapter that can be fused."""
        raise NotImplementedError(f"{type(self).__name__}._part")

    def _inside(self) -> tuple:
        """The layer's dictionaries or lists of what a plan rests on."""
        raise NotImplementedError(f"{type(self).__name__}._inside")

    def _factors(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """A [r, in], B [out, r], lam [r] or None, scaling."""
        raise NotImplementedError(f"{type(self).__name__}._factors")

    # ---- the call

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = self._peftkern_batch
        if not args and not self._disable_adapters and not self.merged_adapters:
            y = None
            if not kwargs:
                y = self._fused(x) if batch is None else self._mixed(x, batch)
            elif batch is None and kwargs.keys() == {"adapter_names"}:
                y = self._mixed(x, Batch.of(kwargs["adapter_names"]))
            if y is not None:
                return y
        if batch is not None:
            kwargs["adapter_names"] = batch.names
        return super().forward(x, *args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor | None:
        plan = self._plan()
        if plan.reason is not None or not self._undisturbed(plan.watched):
            return None
        inputs = base_inputs(plan.base, x)
        if inputs is None:
            return None
        x, weight, bias, result_dtype = inputs
        if len(plan.parts) > 1:
            return self._several(x, weight, bias, result_dtype, plan.parts)
        part = plan.parts[0]
        A, B, lam, scaling = self._factors(part)
        if not self._accepts(x, A, B):
            return None
        if part.dora is not None:
            y = self._dora(x, weight, bias, part, A, B, scaling)
        else:
            p = active_p(part.dropout)
            y = adapted_linear(x, weight, A, B, lam=lam, bias=bias, scaling=scaling, dropout_p=p)
        return y if y.dtype == result_dtype else y.to(result_dtype)

    def _several(
        self, x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, result_dtype: torch.dtype, parts: list[Part]
    ) -> Tensor | None:
        """sum_i s_i B_i A_i is one low-rank product of the ranks together, with the scalings in lam. With dropout it is
        not: PEFT draws a mask for each adapter."""
        if any(active_p(part.dropout) for part in parts):
            return None
        factors = [self._factors(part) for part in parts]
        if not all(self._accepts(x, A, B) for A, B, _, _ in factors):
            return None

        def join():
            lams = [torch.full(A.shape[:1], s, device=A.device) if lam is None else s * lam for A, _, lam, s in factors]
            return torch.cat([f[0] for f in factors]), torch.cat([f[1] for f in factors], dim=1), torch.cat(lams)

        tensors = [t for A, B, lam, _ in factors for t in (A, B, lam) if t is not None]
        A, B, lam = self._tensor_cache().get("several", tuple(f[3] for f in factors), tensors, join)
        y = adapted_linear(x, weight, A, B, lam=lam, bias=bias)
        return y if y.dtype == result_dtype else y.to(result_dtype)

    def _dora(
        self, x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, part: Part, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        norm = dora_norm(weight, A, B, s, cache=self._tensor_cache())
        dropout = part.dropout if self.training and type(part.dropout) is not nn.Identity else None
        return dora_linear(x, weight, A, B, part.dora.weight / norm, scaling=s, bias=bias, dropout=dropout)

    def _mixed(self, x: Tensor, batch: Batch) -> Tensor | None:
        """A batch whose items choose their adapter."""
        plan = self._plan()
        if plan.base_reason or len(batch.names) != len(x):
            return None
        mixture = self._peftkern_mixture
        if mixture is None or mixture.plan is not plan or mixture.batch is not batch:
            mixture = self._make_mixture(plan, batch)
            if mixture is None:
                return None
        if not mixture.used:
            return self.base_layer(x)
        p = mixture.dropout_p()
        if p is None or not self._undisturbed(mixture.watched):
            return None
        inputs = base_inputs(plan.base, x)
        if inputs is None:
            return None
        bank = mixture.find_bank(self)
        if bank is None or not self._accepts(inputs[0], bank.A, bank.B):
            return None
        return mixed_linear(inputs, bank, batch, p)

    def _make_mixture(self, plan: Plan, batch: Batch) -> Mixture | None:
        used = [name for name in batch.used if name in self.lora_A]
        if not plan.mixable.keys() >= set(used):
            return None
        mixture = Mixture(plan, batch, [plan.mixable[name] for name in used], tuple(plan.mixable.values()))
        if not torch.compiler.is_compiling():
            self._peftkern_mixture = mixture
        return mixture

    # ---- can it be fused?

    def _plan(self) -> Plan:
        plan = self._peftkern_plan
        if (
            plan is not None
            and plan.active is self._active_adapter
            and (torch.compiler.is_compiling() or self._still_fits(plan))
        ):
            return plan
        plan = self._make_plan()
        if not torch.compiler.is_compiling():
            self._peftkern_plan = plan
        return plan

    def _still_fits(self, plan: Plan) -> bool:
        return (
            plan.base is self._modules["base_layer"]
            and plan.inside == self._inside()  # dictionaries of modules, which are equal if they are the same
            and plan.quant_state is quant_state(plan.base)
        )

    def _make_plan(self) -> Plan:
        base = self.base_layer
        base_reason = kind_reason(base, getattr(self, "fan_in_fan_out", False))
        if _hooks_everywhere is None or _transforms_active is None:
            base_reason = "this torch does not tell whether hooks or transforms are active"
        reasons = {name: self._adapter_reason(name) for name in self.lora_A}
        every = {name: self._part(name) for name, reason in reasons.items() if reason is None}
        active = [name for name in self.active_adapters if name in self.lora_A]
        reason = base_reason or next(filter(None, map(reasons.get, active)), None)
        parts = [] if reason else [every[name] for name in active]
        if not active:
            reason = reason or "no active adapter has this layer"
        elif len(parts) > 1 and any(part.dora is not None for part in parts):
            reason = "several active adapters, one of them DoRA"
        mixable = {n: part for n, part in every.items() if part.dora is None and self._kind == "LoRA"}
        inside = tuple(held.copy() for held in self._inside())
        watched = Watched([base, *(module for part in parts for module in part.modules)])
        return Plan(self._active_adapter, base, quant_state(base), inside, base_reason, reason, parts, mixable, watched)

    @staticmethod
    def _undisturbed(watched: Watched) -> bool:
        """Would calling the modules inside run nothing but their forward?"""
        if not watched.undisturbed():
            return False
        return torch.compiler.is_compiling() or not (_hooks_everywhere() or _transforms_active())

    def _accepts(self, x: Tensor, A: Tensor, B: Tensor) -> bool:
        device = x.device
        if A.dtype not in FLOAT_DTYPES or B.dtype not in FLOAT_DTYPES or A.device != device or B.device != device:
            return False
        if type(A) is not nn.Parameter and type(A) is not Tensor:
            return False
        casts = getattr(self, "cast_input_dtype_enabled", True)
        return casts or A.dtype == x.dtype or torch.is_autocast_enabled(device.type)

    def _tensor_cache(self) -> TensorCache:
        cache = self._peftkern_cache
        if cache is None:
            cache = TensorCache()
            if not torch.compiler.is_compiling():
                self._peftkern_cache = cache
        return cache

    # ---- what explain() says

    def _why_not(self) -> str | None:
        if "forward" in self.__dict__:
            return "a forward is set on the instance"
        if self._disable_adapters:
            return "adapters are disabled"
        if self.merged_adapters:
            return "merged into the base weight"
        plan = self._make_plan()
        if plan.reason:
            return plan.reason
        if not self._undisturbed(plan.watched):
            return "an inner module has a hook or a forward of its own, which a fused call would not run"
        if plan.base.weight.requires_grad:
            return "the base weight trains"
        if not has_kernels(plan.base.weight.device.type):
            return f"no kernels for {plan.base.weight.device.type}"
        if len(plan.parts) > 1 and any(active_p(part.dropout) for part in plan.parts):
            return "several active adapters with dropout: each has a mask of its own"
        return bnb_reason(plan.base) if type(plan.base) in bnb_linear() else None

    def _fused_text(self) -> str:
        parts = self._make_plan().parts
        kinds = ["DoRA" if part.dora is not None else type(self)._kind for part in parts]
        text = f"one fused call, {' + '.join(kinds)} on a {text_of(self.base_layer)}"
        rates = sorted({p for part in parts if (p := active_p(part.dropout))})
        return text + (f", dropout {', '.join(map(str, rates))}" if rates else "")

    # ---- merging into an NF4Linear, which PEFT does not know

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.base_layer
        if type(base) is not NF4Linear:
            return super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return None
        q = base.base_weight()
        with torch.no_grad():
            merged = dequantize_nf4(q, torch.float32) + sum(self.get_delta_weight(name).float() for name in names)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
            new = replace(quantize_nf4(merged, q.block_size, q.double_quant), dtype=q.dtype)
        if _UNMERGED not in self._caches:
            self._cache_store(_UNMERGED, q)
        base.set_base_weight(new)
        self.merged_adapters += names
        return None

    def unmerge(self) -> None:
        """Of an NF4Linear exact: the original is kept."""
        if _UNMERGED not in self._caches:
            return super().unmerge()
        self.base_layer.set_base_weight(self._cache_pop(_UNMERGED))
        self.merged_adapters.clear()
        return None

    # ---- what makes a plan wrong

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        self._peftkern_plan = None
        super().update_layer(*args, **kwargs)
        self._peftkern_plan = None

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._peftkern_plan = None
        super().set_adapter(*args, **kwargs)

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._peftkern_plan = None
        super().delete_adapter(*args, **kwargs)


class LoraForward(PatchedLayer):
    """Of PEFT's lora.Linear and lora.bnb.Linear4bit."""

    _kind = "LoRA"

    def _adapter_reason(self, name: str) -> str | None:
        variant = self.lora_variant.get(name)
        if variant is not None and not is_dora(variant):
            return f"the LoRA variant {type(variant).__name__.removesuffix('LinearVariant')}"
        if self.lora_bias.get(name):
            return "lora_bias"
        if name not in self.lora_B or name not in self.lora_dropout or name not in self.scaling:
            return "parts of the adapter are missing"
        if type(self.lora_A[name]) is not nn.Linear or type(self.lora_B[name]) is not nn.Linear:
            return "lora_A and lora_B are not plain nn.Linear"
        if self.lora_A[name].bias is not None or self.lora_B[name].bias is not None:
            return "lora_A or lora_B has a bias"
        return _dropout_reason(self.lora_dropout[name])

    def _part(self, name: str) -> Part:
        modules = [self.lora_A[name], self.lora_B[name], self.lora_dropout[name]]
        dora = self.lora_magnitude_vector[name] if name in self.lora_variant else None
        return Part(name, tuple(modules if dora is None else [*modules, dora]), modules[2], dora)

    def _inside(self) -> tuple:
        modules = self._modules
        return (
            modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules,
            modules["lora_magnitude_vector"]._modules, self.lora_variant,
        )  # fmt: skip

    def _factors(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None, float]:
        A, B = part.modules[:2]
        return A.weight, B.weight, None, self.scaling[part.name]


class AdaLoraForward(PatchedLayer):
    """Of PEFT's adalora.SVDLinear and adalora.bnb.SVDLinear4bit."""

    _kind = "AdaLoRA"

    def _adapter_reason(self, name: str) -> str | None:
        return _dropout_reason(self.lora_dropout[name])

    def _part(self, name: str) -> Part:
        return Part(name, (self.lora_dropout[name],), self.lora_dropout[name], None)

    def _inside(self) -> tuple:
        return list(self.lora_A.keys()), self._modules["lora_dropout"]._modules

    def _factors(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None, float]:
        name = part.name
        # ranknum is a tensor on the device: as a factor of lam it needs no read-back
        lam = (self.lora_E[name].float() / (self.ranknum[name].float() + 1e-5)).reshape(-1)
        return self.lora_A[name], self.lora_B[name], lam, float(self.scaling[name])


def is_dora(variant: Any) -> bool:
    try:
        from peft.tuners.lora.variants import DoraLinearVariant
    except ImportError:
        return False
    return type(variant) is DoraLinearVariant


def active_p(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _dropout_reason(dropout: nn.Module) -> str | None:
    if type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and dropout.p < 1):
        return None
    return f"a dropout of {dropout}"
