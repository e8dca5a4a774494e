# SPDX-License-Identifier: Apache-2.0
"""HF PEFT models on our kernels: ``patch`` gives PEFT's layers a subclass whose forward makes one fused call where it
can and is PEFT's own where it cannot. Parameters, names and every other method stay PEFT's.

A class swap, not a replaced ``forward``: accelerate and others set ``forward`` on instances, some libraries replace it
on PEFT's classes, and both keep working.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .modules import NF4Linear
from .ops import NF4Weight, adapted_linear, dequantize_nf4, quantize_nf4
from .ops.dora_norm import dora_linear, dora_norm
from .ops.library import FLOAT_DTYPES, ops
from .ops.multi_lora import make_plan, planned_multi_lora_linear, stacked
from .ops.tensor_cache import TensorCache

_CACHES = ("_peftkern_plan", "_peftkern_cache")  # attributes of a patched layer that are never copied or saved


def patch(model: nn.Module) -> nn.Module:
    """Runs the layers of an HF PEFT model on peftkern's kernels, in place; returns model.

    Fused are LoRA (with rsLoRA, DoRA, several active adapters, ``adapter_names``) and AdaLoRA on ``nn.Linear``,
    transformers' ``Conv1D``, bitsandbytes' ``Linear4bit`` in NF4 and ``peftkern.NF4Linear``. Whatever is not, an
    adapter kind or a hook on an inner module, runs PEFT's own forward; ``peftkern.explain(model)`` says which and why.
    State dict, names, saving, merging, adding, choosing and deleting adapters are unchanged, and a pickled model loads
    without peftkern, unpatched. New is that ``adapter_names`` may be given in training.

    Layers that a later ``add_adapter`` makes are patched too. Raises ValueError if model has no layer of PEFT's.

    >>> import peft
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), peft.LoraConfig(target_modules=["0"]))
    >>> patch(model)(torch.randn(2, 16)).shape
    torch.Size([2, 8])
    """
    found = False
    for module in list(model.modules()):
        fused = _fused_classes().get(type(module))
        if fused is not None:
            module.__class__ = fused
        found = found or is_peft_layer(module)
    if not found:
        raise ValueError(
            "model: expected one with HF PEFT adapters, got one without a PEFT layer; see peft.get_peft_model"
        )
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undoes :func:`patch`; nothing happens to a model that is not patched. Returns model."""
    for module in list(model.modules()):
        if isinstance(module, _Patched):
            for name in _CACHES:
                module.__dict__.pop(name, None)
            if type(module) in _fused_classes().values():  # not what FSDP has made of it since
                module.__class__ = module._peftkern_class
    return model


def is_peft_layer(module: nn.Module) -> bool:
    """Is module one of PEFT's adapter layers, patched or not?"""
    return any(c.__module__.startswith("peft.tuners.") and c.__name__ == "BaseTunerLayer" for c in type(module).__mro__)


def explain_layer(module: nn.Module) -> str:
    """One line about a PEFT layer: fused, or why not."""
    name = _peft_name(module)
    if not isinstance(module, _PatchedLayer):
        if type(module) in _fused_classes():
            return f"{name}: HF PEFT's own forward: not patched; peftkern.patch(model) does it"
        return f"{name}: HF PEFT's own forward: this kind of layer is not fused"
    reason = module._why_not()
    return f"{name}, patched: HF PEFT's own forward: {reason}" if reason else f"{name}, patched: {module._fused_text()}"


def _peft_name(module: nn.Module) -> str:
    cls = getattr(module, "_peftkern_class", type(module))
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
    pairs = [(lora.Linear, _LoraForward), (adalora.SVDLinear, _AdaLoraForward), (LoraModel, _PatchedModel),
             (AdaLoraModel, _PatchedModel)]  # fmt: skip
    with contextlib.suppress(ImportError):  # without bitsandbytes PEFT does not define these
        from peft.tuners.adalora.bnb import SVDLinear4bit
        from peft.tuners.lora.bnb import Linear4bit

        pairs += [(Linear4bit, _LoraForward), (SVDLinear4bit, _AdaLoraForward)]
    fused = {
        theirs: type(theirs.__name__, (mixin, theirs), {"_peftkern_class": theirs, "__module__": __name__})
        for theirs, mixin in pairs
    }
    # Not a method __deepcopy__: PeftModel looks names up in the LoraModel inside it, and would be copied by that one's.
    copy._deepcopy_dispatch |= dict.fromkeys(fused.values(), _deepcopy)
    return fused


@cache
def _conv1d() -> type | None:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        return None
    return Conv1D


@cache
def _bnb_linear() -> tuple[type, ...]:
    try:
        from bitsandbytes.nn import Linear4bit, LinearNF4
    except ImportError:
        return ()
    return (Linear4bit, LinearNF4)


@cache
def _dora_variant() -> type | None:
    try:
        from peft.tuners.lora.variants import DoraLinearVariant
    except ImportError:
        return None
    return DoraLinearVariant


class _Patched:
    """Copying keeps the patched class, pickling stores PEFT's: the file loads where peftkern is not installed."""

    _peftkern_class: ClassVar[type]

    def __reduce_ex__(self, protocol):
        # not copyreg.__newobj__, which insists on the object's own class
        return copyreg._reconstructor, (self._peftkern_class, object, None), _plain_state(self)

    def __copy__(self):
        new = type(self).__new__(type(self))
        new.__setstate__(_plain_state(self))
        return new


def _deepcopy(module: nn.Module, memo: dict) -> nn.Module:
    new = memo[id(module)] = type(module).__new__(type(module))
    new.__setstate__(copy.deepcopy(_plain_state(module), memo))
    return new


def _plain_state(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in _CACHES}


class _PatchedModel(_Patched):
    """Of PEFT's LoraModel and AdaLoraModel."""

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(*args, **kwargs)
        patch(self)  # the layers that this made

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT takes adapter_names in eval mode only. It asks self.training once, on the way in."""
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        training = self.training
        if training and kwargs.get("adapter_names") is not None:
            if any(getattr(m, "gradient_checkpointing", False) for m in self.modules()):
                raise ValueError(
                    "adapter_names: expected gradient checkpointing off, its second forward does not get them"
                )
            self.training = False
        try:
            hooks.__enter__()
        finally:
            self.training = training
        try:
            yield
        finally:
            hooks.__exit__(None, None, None)


class _Part(NamedTuple):
    """One active adapter of a layer."""

    name: str
    modules: tuple[nn.Module, ...]  # whose hooks would not run
    dropout: nn.Module
    dora: nn.Module | None


class _Plan(NamedTuple):
    """What does not change between calls, valid while active is the layer's ``_active_adapter``."""

    active: Any
    base_reason: str | None  # why PEFT's own forward has to run, whatever the adapters
    reason: str | None  # and with the active ones
    parts: list[_Part]  # the active ones
    mixable: dict[str, _Part]  # those that adapter_names may name


class _PatchedLayer(_Patched):
    _peftkern_plan: _Plan | None = None
    _peftkern_cache: TensorCache | None = None

    # ---- what LoRA and AdaLoRA say of themselves

    _kind: ClassVar[str]

    def _adapter_reason(self, name: str) -> str | None:
        """Why the adapter cannot be fused, or None."""
        raise NotImplementedError(f"{type(self).__name__}._adapter_reason")

    def _part(self, name: str) -> _Part:
        """The modules of an adapter that can be fused."""
        raise NotImplementedError(f"{type(self).__name__}._part")

    def _factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
        """A [r, in], B [out, r], lam [r] or None, scaling."""
        raise NotImplementedError(f"{type(self).__name__}._factors")

    # ---- the call

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not self._disable_adapters and not self.merged_adapters:
            y = None
            if not kwargs:
                y = self._fused(x)
            elif kwargs.keys() == {"adapter_names"}:
                y = self._mixed(x, kwargs["adapter_names"])
            if y is not None:
                return y
        return super().forward(x, *args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor | None:
        plan = self._plan()
        if plan.reason is not None or self._hooked(plan.parts):
            return None
        inputs = self._base_inputs(x)
        if inputs is None:
            return None
        x, weight, bias, result_dtype = inputs
        if len(plan.parts) > 1:
            return self._several(x, weight, bias, result_dtype, plan.parts)
        part = plan.parts[0]
        A, B, lam, scaling = self._factors(part.name)
        if not self._accepts(x, A, B):
            return None
        p = _active_p(part.dropout)
        if part.dora is not None:
            y = self._dora(x, weight, bias, part, A, B, scaling)
        else:
            y = adapted_linear(x, weight, A, B, lam=lam, bias=bias, scaling=scaling, dropout_p=p)
        return y if y.dtype == result_dtype else y.to(result_dtype)

    def _several(
        self, x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, result_dtype: torch.dtype, parts: list[_Part]
    ) -> Tensor | None:
        """sum_i s_i B_i A_i is one low-rank product of the ranks together, with the scalings in lam. With dropout it is
        not: PEFT draws a mask for each adapter."""
        if any(_active_p(part.dropout) for part in parts):
            return None
        factors = [self._factors(part.name) for part in parts]
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
        self, x: Tensor, weight: Tensor | NF4Weight, bias: Tensor | None, part: _Part, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        norm = dora_norm(weight, A, B, s, cache=self._tensor_cache())
        dropout = part.dropout if self.training and type(part.dropout) is not nn.Identity else None
        return dora_linear(x, weight, A, B, part.dora.weight / norm, scaling=s, bias=bias, dropout=dropout)

    def _mixed(self, x: Tensor, adapter_names: list[str]) -> Tensor | None:
        """A batch whose items choose their adapter."""
        plan = self._plan()
        used = sorted({name for name in adapter_names if name in self.lora_A})
        if plan.base_reason or len(adapter_names) != len(x) or not plan.mixable.keys() >= set(used):
            return None
        if not used:
            return self.base_layer(x)
        parts = [plan.mixable[name] for name in used]
        rates = {_active_p(part.dropout) for part in parts}
        if len(rates) > 1 or self._hooked(parts):
            return None
        # In inference all there are, so that another batch finds them stacked; in training those that get a gradient.
        names = used if torch.is_grad_enabled() else list(plan.mixable)
        factors = [self._factors(name) for name in names]
        inputs = self._base_inputs(x)
        if inputs is None or not all(
            self._accepts(x, A, B) and A.dtype == factors[0][0].dtype and B.dtype == factors[0][1].dtype
            for A, B, _, _ in factors
        ):
            return None
        x, weight, bias, result_dtype = inputs
        factors_A, factors_B, scalings = [f[0] for f in factors], [f[1] for f in factors], tuple(f[3] for f in factors)
        A, B, ranks = self._tensor_cache().get(
            "mixed", (), [*factors_A, *factors_B], lambda: stacked(factors_A, factors_B, None)
        )
        place = {name: i for i, name in enumerate(names)}
        index = tuple(place.get(name, -1) for name in adapter_names)
        rows = _rows_by_adapter(index, tuple(x.shape[:-1]), len(names), x.device)
        y = planned_multi_lora_linear(
            x, weight, A, B, rows, scaling=_scalings(scalings, x.device), ranks=ranks, bias=bias, dropout_p=rates.pop()
        )
        return y if y.dtype == result_dtype else y.to(result_dtype)

    # ---- can it be fused?

    def _plan(self) -> _Plan:
        plan = self._peftkern_plan
        if plan is None or plan.active is not self._active_adapter:
            plan = self._make_plan()
            if not torch.compiler.is_compiling():
                self._peftkern_plan = plan
        return plan

    def _make_plan(self) -> _Plan:
        base_reason = self._base_reason()
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
        return _Plan(self._active_adapter, base_reason, reason, parts, mixable)

    def _base_reason(self) -> str | None:
        base = self.base_layer
        kind = type(base)
        if kind not in (nn.Linear, NF4Linear, _conv1d(), *_bnb_linear()):
            return f"the base layer is a {kind.__module__.split('.')[0]} {kind.__name__}"
        if (kind is _conv1d()) != getattr(self, "fan_in_fan_out", False):
            return "fan_in_fan_out does not fit the base layer"
        return None

    def _hooked(self, parts: list[_Part]) -> bool:
        """Would a call of one of the modules inside run more than its forward?"""
        if _has_hooks(self.base_layer):
            return True
        for part in parts:
            for module in part.modules:
                if _has_hooks(module):
                    return True
        return not torch.compiler.is_compiling() and (
            torch_module._has_any_global_hook() or torch._C._are_functorch_transforms_active()
        )

    def _base_inputs(self, x: Tensor) -> tuple[Tensor, Tensor | NF4Weight, Tensor | None, torch.dtype] | None:
        """x, weight and bias as the base layer would multiply them, and the dtype of its result."""
        base = self.base_layer
        kind = type(base)
        weight, bias = base.weight, base.bias
        if (type(x) is not Tensor and type(x) is not nn.Parameter) or x.dtype not in FLOAT_DTYPES:
            return None
        if weight.requires_grad or x.device != weight.device or not _has_kernels(x.device.type):
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if kind is NF4Linear:
            return x, base.base_weight(), bias, dtype
        if kind in _bnb_linear():
            q = _bnb_weight(base, dtype)
            return None if q is None else (x.to(dtype), q, bias, x.dtype)
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return None
        if weight.dtype not in FLOAT_DTYPES or not (autocast or x.dtype == weight.dtype):
            return None  # without autocast a mixture is PEFT's error to raise
        return x, weight.t() if kind is _conv1d() else weight, bias, dtype

    def _accepts(self, x: Tensor, A: Tensor, B: Tensor) -> bool:
        if A.dtype not in FLOAT_DTYPES or B.dtype not in FLOAT_DTYPES or A.device != x.device or B.device != x.device:
            return False
        if type(A) is not nn.Parameter and type(A) is not Tensor:
            return False
        casts = getattr(self, "cast_input_dtype_enabled", True)
        return casts or A.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)

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
        base = self.base_layer
        if self._hooked(plan.parts):
            return "an inner module has a hook or a forward of its own, which a fused call would not run"
        if base.weight.requires_grad:
            return "the base weight trains"
        if not _has_kernels(base.weight.device.type):
            return f"no kernels for {base.weight.device.type}"
        if len(plan.parts) > 1 and any(_active_p(part.dropout) for part in plan.parts):
            return "several active adapters with dropout: each has a mask of its own"
        return _bnb_reason(base) if type(base) in _bnb_linear() else None

    def _fused_text(self) -> str:
        parts = self._make_plan().parts
        base = {NF4Linear: "NF4 base", nn.Linear: "dense base", _conv1d(): "Conv1D base"}
        kinds = ["DoRA" if part.dora is not None else type(self)._kind for part in parts]
        text = f"one fused call, {' + '.join(kinds)} on a {base.get(type(self.base_layer), 'bitsandbytes NF4 base')}"
        rates = sorted({p for part in parts if (p := _active_p(part.dropout))})
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


class _LoraForward(_PatchedLayer):
    """Of PEFT's lora.Linear and lora.bnb.Linear4bit."""

    _kind = "LoRA"

    def _adapter_reason(self, name: str) -> str | None:
        if name in self.lora_variant and type(self.lora_variant[name]) is not _dora_variant():
            return f"the LoRA variant {type(self.lora_variant[name]).__name__.removesuffix('LinearVariant')}"
        if self.lora_bias.get(name):
            return "lora_bias"
        A, B = self.lora_A[name], self.lora_B[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear:
            return "lora_A and lora_B are not plain nn.Linear"
        return _dropout_reason(self.lora_dropout[name])

    def _part(self, name: str) -> _Part:
        dropout, modules = self.lora_dropout[name], [self.lora_A[name], self.lora_B[name], self.lora_dropout[name]]
        dora = self.lora_magnitude_vector[name] if name in self.lora_variant else None
        return _Part(name, tuple(modules if dora is None else [*modules, dora]), dropout, dora)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
        return self.lora_A[name].weight, self.lora_B[name].weight, None, self.scaling[name]


class _AdaLoraForward(_PatchedLayer):
    """Of PEFT's adalora.SVDLinear and adalora.bnb.SVDLinear4bit."""

    _kind = "AdaLoRA"

    def _adapter_reason(self, name: str) -> str | None:
        return _dropout_reason(self.lora_dropout[name])

    def _part(self, name: str) -> _Part:
        return _Part(name, (self.lora_dropout[name],), self.lora_dropout[name], None)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, Tensor | None, float]:
        # ranknum is a tensor on the device: as a factor of lam it needs no read-back
        lam = (self.lora_E[name] / (self.ranknum[name] + 1e-5)).reshape(-1)
        return self.lora_A[name], self.lora_B[name], lam, float(self.scaling[name])


@lru_cache(maxsize=64)
def _rows_by_adapter(index: tuple[int, ...], leading: tuple[int, ...], adapters: int, device: torch.device) -> Tensor:
    """make_plan for the items of a batch: the same for all layers, so made by the first."""
    with torch.inference_mode(False):  # what is made in inference may be used in training
        return make_plan(torch.tensor(index, device=device), torch.empty((*leading, 0), device=device), adapters)


@lru_cache(maxsize=64)
def _scalings(scalings: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(scalings, dtype=torch.float32, device=device)


_UNMERGED = "peftkern-unmerged"  # of PEFT's own cache in the layer, which survives unpatch and pickle
_DEVICES = ("cpu", "cuda") if ops.cuda_archs() else ("cpu",)


def _has_kernels(device_type: str) -> bool:
    return device_type in _DEVICES


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in module.__dict__
    )  # fmt: skip


def _active_p(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def _dropout_reason(dropout: nn.Module) -> str | None:
    if type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and dropout.p < 1):
        return None
    return f"a dropout of {dropout}"


def _bnb_reason(base: nn.Module) -> str | None:
    """Why our product would not be bitsandbytes', on the way to the product itself."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return "the weight of bitsandbytes is not quantized yet"
    if state.quant_type != "nf4":
        return f"the weight of bitsandbytes is {state.quant_type}, not nf4"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has repacked the weight for its own inference kernels"
    if state.nested and state.state2.blocksize != 256:
        return f"double quantization in blocks of {state.state2.blocksize}"
    if base.weight.device.type == "cpu" and state.shape[1] % state.blocksize:
        return "bitsandbytes on the CPU dequantizes rows that are no multiple of a block in its own way"
    return None


def _bnb_weight(base: nn.Module, dtype: torch.dtype) -> NF4Weight | None:
    """The weight of a Linear4bit, sharing its storage, if the base layer would multiply by these values in dtype."""
    if not base.compute_type_is_set or base.compute_dtype not in (None, dtype) or _bnb_reason(base) is not None:
        return None
    state = base.weight.quant_state
    if state.dtype not in (dtype, torch.float32):  # it would be rounded to state.dtype on the way
        return None
    packed, shape = base.weight.detach().view(torch.uint8), tuple(state.shape)  # .data would hide changes in place
    if not state.nested:
        return NF4Weight(packed, state.absmax, state.blocksize, shape, state.dtype)
    return NF4Weight(packed, state.absmax, state.blocksize, shape, state.dtype, state.state2.absmax, state.offset)
