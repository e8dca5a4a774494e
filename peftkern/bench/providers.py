# SPDX-License-Identifier: Apache-2.0
"""Who does the work of a case. Each provider's result is checked before it is timed; one that is not installed, or
gives another result, is left out and named in the report with the reason."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

import peftkern
from peftkern import reference

from .cases import Case
from .measure import Call, copies

OURS = "peftkern"
FLOOR = "frozen layer"
"""What the layer costs without any adapter: no peer, but the floor for one."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
"""Of the largest element of the expected result. One wrong block or one missing term is far above it."""

MOST_ELEMENTS_IN_PLAIN_TORCH = 1 << 25  # the plain quantization holds some ten temporaries of this size


class WrongResult(Exception):
    """A provider's result is not the expected one."""


@dataclass
class Work:
    """The providers of a case, checked, and the least that any of them has to do."""

    flops: float
    nbytes: float
    calls: dict[str, Call] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # provider -> reason

    def add(self, name: str, call: Callable[[], Call], check: Callable[[object], None]) -> None:
        """Makes a provider's call, checks the result of its first turn, and keeps it. Ours has to pass."""
        try:
            made = call()
            check(made(0))
            self.calls[name] = made
        except (
            AssertionError,
            ImportError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
            WrongResult,
        ) as error:
            if name.startswith(OURS):
                raise
            self.left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]


def close(expected: Tensor, tolerance: float) -> Callable[[object], None]:
    """A check against the expected tensor, relative to its largest element."""

    def check(result: object) -> None:
        assert isinstance(result, Tensor)
        if result.shape != expected.shape:
            raise WrongResult(f"shape {tuple(result.shape)}, expected {tuple(expected.shape)}")
        dtype = torch.promote_types(expected.dtype, torch.float32)
        largest = max(expected.abs().max().item(), 1e-30)
        error = (result.to(dtype) - expected.to(dtype)).abs().max().item() / largest
        if not error <= tolerance:
            raise WrongResult(f"off by {error:.1e} of the largest element, allowed {tolerance:.0e}")

    return check


def equal(expected: Tensor) -> Callable[[object], None]:
    """A check bit for bit."""

    def check(result: object) -> None:
        if not torch.equal(result, expected):
            raise WrongResult("not equal bit for bit")

    return check


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao and bitsandbytes report what they lack when they are imported."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed")


def bitsandbytes():
    require("bitsandbytes")
    with _quiet():
        import bitsandbytes as bnb
        import bitsandbytes.functional
    return bnb


def torchao_nf4():
    require("torchao")
    with _quiet():
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
    return nf4_tensor


def weight_of(case: Case, dtype: torch.dtype | None = None) -> Tensor:
    """[out, in], of the size a trained weight has."""
    w = torch.randn(case.out_features, case.in_features, generator=torch.Generator().manual_seed(0))
    return (w / case.in_features**0.5).to(case.device, dtype or getattr(torch, case.dtype))


def _nf4_bytes(n: int, block_size: int) -> float:
    return n / 2 + 4 * n / block_size


# ---- quantize and dequantize: rotating buffers, so that neither end of the work is in a cache


def dequantize(case: Case) -> Work:
    w = weight_of(case)
    n, shape, size = w.numel(), tuple(w.shape), case.block_size
    work = Work(flops=0, nbytes=_nf4_bytes(n, size) + n * w.element_size())
    q = peftkern.quantize_nf4(w, size)
    on_cpu = q.packed.cpu(), q.absmax.cpu()
    expected = reference.dequantize_nf4(*on_cpu, size, shape, w.dtype).to(case.device)
    qs = [replace(q, packed=q.packed.clone()) for _ in range(copies(int(work.nbytes), case.device))]
    at = len(qs)
    work.add(OURS, lambda: lambda i: peftkern.dequantize_nf4(qs[i % at], w.dtype), equal(expected))
    if n <= MOST_ELEMENTS_IN_PLAIN_TORCH:
        work.add(
            "plain torch",
            lambda: lambda i: reference.dequantize_nf4(qs[i % at].packed, q.absmax, size, shape, w.dtype),
            equal(expected),
        )

    def bnb() -> Call:
        functional_ = bitsandbytes().functional
        packed, state = functional_.quantize_4bit(w, blocksize=size, quant_type="nf4")
        all_packed = [packed.clone() for _ in range(at)]
        return lambda i: functional_.dequantize_4bit(all_packed[i % at], state)

    def ao() -> Call:
        tensors = [torchao_nf4().to_nf4(w, size, 256)]
        tensors += [deepcopy(tensors[0]) for _ in range(at - 1)]
        return lambda i: tensors[i % at].get_original_weight()

    work.add("bitsandbytes", bnb, equal(expected))
    work.add("torchao (its own format)", ao, close(w, 0.2))
    return work


def quantize(case: Case) -> Work:
    w = weight_of(case)
    n, size = w.numel(), case.block_size
    work = Work(flops=0, nbytes=_nf4_bytes(n, size) + n * w.element_size())
    ws = [w.clone() for _ in range(copies(int(work.nbytes), case.device))]
    at = len(ws)
    ours = peftkern.quantize_nf4(w, size)
    expected = reference.quantize_nf4(w.cpu(), size)[0] if n <= MOST_ELEMENTS_IN_PLAIN_TORCH else ours.packed
    check = equal(expected.reshape(-1).to(case.device))
    work.add(OURS, lambda: lambda i: peftkern.quantize_nf4(ws[i % at], size), lambda q: check(q.packed.reshape(-1)))
    if n <= MOST_ELEMENTS_IN_PLAIN_TORCH:
        work.add("plain torch", lambda: lambda i: reference.quantize_nf4(ws[i % at], size), lambda r: check(r[0]))

    def bnb() -> Call:
        functional_ = bitsandbytes().functional
        return lambda i: functional_.quantize_4bit(ws[i % at], blocksize=size, quant_type="nf4")

    def ao() -> Call:
        if n > MOST_ELEMENTS_IN_PLAIN_TORCH:
            raise ValueError("too large for torchao's temporaries")
        to_nf4 = torchao_nf4().to_nf4
        return lambda i: to_nf4(ws[i % at], size, 256)

    work.add("bitsandbytes", bnb, lambda r: check(r[0].reshape(-1)))
    work.add("torchao (its own format)", ao, lambda t: close(w, 0.2)(t.get_original_weight()))
    return work


# ---- the NF4 linear layer


def _bnb_linear(case: Case, w: Tensor) -> nn.Module:
    bnb = bitsandbytes()
    layer = bnb.nn.Linear4bit(
        case.in_features, case.out_features, bias=False, quant_type="nf4", compute_dtype=w.dtype,
        compress_statistics=False,
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        w.clone(), requires_grad=False, quant_type="nf4", blocksize=case.block_size, compress_statistics=False
    )
    return layer.to(case.device)


class _Nf4Layer:
    """What the cases of an NF4 linear layer share: inputs, buffers to rotate over, the expected result."""

    def __init__(self, case: Case) -> None:
        self.case, self.w = case, weight_of(case)
        dtype, m = self.w.dtype, case.rows
        g = torch.Generator().manual_seed(1)
        self.x = torch.randn(m, case.in_features, generator=g).to(case.device, dtype)
        self.dy = torch.randn(m, case.out_features, generator=g).to(case.device, dtype)
        self.q = peftkern.quantize_nf4(self.w, case.block_size)
        self.dense = peftkern.dequantize_nf4(self.q, dtype)
        n, size = self.w.numel(), self.w.element_size()
        self.packed_copies = copies(n // 2, case.device)
        self.dense_copies = copies(n * size, case.device)
        self.work = Work(
            flops=2.0 * m * n,
            nbytes=_nf4_bytes(n, case.block_size) + m * (case.in_features + case.out_features) * size,
        )

    def nf4_weights(self) -> list[peftkern.NF4Weight]:
        return [replace(self.q, packed=self.q.packed.clone()) for _ in range(self.packed_copies)]

    def dense_weights(self) -> list[Tensor]:
        return [self.dense.clone() for _ in range(self.dense_copies)]


def nf4_forward(case: Case) -> Work:
    s = _Nf4Layer(case)
    work, x, dtype = s.work, s.x, s.w.dtype
    check = close(functional.linear(x.float(), s.dense.float()), TOLERANCE[case.dtype])
    qs, ws = s.nf4_weights(), s.dense_weights()

    def plain(i: int) -> Tensor:
        q = qs[i % len(qs)]
        return functional.linear(x, reference.dequantize_nf4(q.packed, q.absmax, case.block_size, q.shape, dtype))

    def repacked() -> Call:
        layers = [_bnb_linear(case, s.w).eval()]
        with torch.no_grad():
            layers[0](x)  # repacks
            layers += [deepcopy(layers[0]) for _ in range(s.packed_copies - 1)]

        def call(i: int) -> Tensor:
            with torch.no_grad():
                return layers[i % len(layers)](x)

        return call

    def training() -> Call:
        layer = _bnb_linear(case, s.w).train()
        x_train = x.clone().requires_grad_()
        return lambda i: layer(x_train)

    def ao() -> Call:
        module = torchao_nf4()
        weight = module.to_nf4(s.w, case.block_size, 256)
        x_train = x.clone().requires_grad_()
        return lambda i: module.linear_nf4(x_train, weight)

    work.add(OURS, lambda: lambda i: peftkern.nf4_linear(x, qs[i % len(qs)]), check)
    work.add("dense F.linear", lambda: lambda i: functional.linear(x, ws[i % len(ws)]), check)
    work.add("plain torch", lambda: plain, check)
    work.add("bitsandbytes, repacked for inference", repacked, check)
    work.add("bitsandbytes", training, check)
    work.add("torchao (its own format)", ao, close(functional.linear(x.float(), s.w.float()), 0.3))
    return work


def nf4_dx(case: Case) -> Work:
    """The gradient of the activations alone, through a graph that is kept."""
    s = _Nf4Layer(case)
    x = s.x.requires_grad_()
    check = close(s.dy.float() @ s.dense.float(), TOLERANCE[case.dtype])

    def backward(y: Tensor) -> Call:
        return lambda i: torch.autograd.grad(y, x, s.dy, retain_graph=True)[0]

    def ao() -> Call:
        module = torchao_nf4()
        return backward(module.linear_nf4(x, module.to_nf4(s.w, case.block_size, 256)))

    s.work.add(OURS, lambda: backward(peftkern.nf4_linear(x, s.q)), check)
    s.work.add("dense F.linear", lambda: backward(functional.linear(x, s.dense)), check)
    s.work.add("bitsandbytes", lambda: backward(_bnb_linear(case, s.w).train()(x)), check)
    s.work.add("torchao (its own format)", ao, close(s.dy.float() @ s.w.float(), 0.3))
    return s.work


# ---- adapted layers, forward and backward


class _PlainLoRA(nn.Module):
    """The layer as one writes it in plain torch."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, case: Case) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.A, self.B = nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.dropout, self.scaling = nn.Dropout(case.dropout), 2.0

    def forward(self, x: Tensor) -> Tensor:
        h = functional.linear(self.dropout(x).to(self.A.dtype), self.A)
        y = functional.linear(x, self.weight) + functional.linear(h, self.B) * self.scaling
        return y.to(x.dtype)


class _UnslothLoRA(nn.Module):
    """Unsloth's function for one projection. It has no dropout, takes a batch of sequences, and needs a GPU."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        super().__init__()
        require("unsloth")
        with _quiet():
            from unsloth.kernels.fast_lora import LoRA_W
        self.function = LoRA_W
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.A, self.B = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x[None], self.weight, None, self.A, self.B, 2.0)[0]


def _peft_layer(base: nn.Module, a: Tensor, b: Tensor, case: Case, adapters_in_fp32: bool) -> nn.Module:
    require("peft")
    import peft

    config = peft.LoraConfig(r=case.r, lora_alpha=2 * case.r, lora_dropout=case.dropout, target_modules=["0"])
    with _quiet():
        model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=adapters_in_fp32)
    layer = model.base_model.model[0]
    layer.lora_A.default.weight.data.copy_(a)
    layer.lora_B.default.weight.data.copy_(b)
    return layer


def _stack(make: Callable[[], nn.Module], layers: int) -> nn.Module:
    return nn.Sequential(*(make() for _ in range(layers))).train()


def _set_dropout(module: nn.Module, p: float) -> None:
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            m.p = p
        elif isinstance(m, peftkern.LoRALinear):
            m.lora_dropout = p


def _adapted(case: Case, quantized: bool) -> Work:
    dtype, n = getattr(torch, case.dtype), case.in_features * case.out_features
    g = torch.Generator().manual_seed(1)
    w = weight_of(case)
    a = (torch.randn(case.r, case.in_features, generator=g) / case.in_features**0.5).to(case.device)
    b = (torch.randn(case.out_features, case.r, generator=g) / case.r**0.5 / 4).to(case.device)
    x = torch.randn(case.rows, case.in_features, generator=g).to(case.device, dtype).requires_grad_()
    dy = torch.randn(case.rows, case.out_features, generator=g).to(case.device, dtype)
    q = peftkern.quantize_nf4(w, case.block_size) if quantized else None
    dense = peftkern.dequantize_nf4(q, dtype) if q else w

    y = x.detach().double() if case.rows * n < 1 << 31 else x.detach().float()
    merged = dense.to(y.dtype) + 2.0 * b.to(y.dtype) @ a.to(y.dtype)
    for _ in range(case.layers):
        y = functional.linear(y, merged)
    dx = dy.to(y.dtype)
    for _ in range(case.layers):
        dx = dx @ merged

    size = w.element_size()
    tokens = case.rows * (3 * case.in_features + 2 * case.out_features) * size  # x twice, dx; y, dy
    weights = 2 * (_nf4_bytes(n, case.block_size) if quantized else n * size)
    work = Work(
        flops=case.layers * (4.0 * case.rows * n + 6.0 * case.rows * case.r * (case.in_features + case.out_features)),
        nbytes=case.layers * (tokens + weights),
    )
    tolerance = TOLERANCE[case.dtype] * case.layers

    def add(name: str, make: Callable[[], nn.Module]) -> None:
        def call() -> Call:
            stack = _stack(make, case.layers)

            def step(i: int) -> Tensor:
                x.grad = None
                stack.zero_grad()
                result = stack(x)
                result.backward(dy)
                return result

            _set_dropout(stack, 0.0)  # with dropout each draws another mask
            if name != FLOOR:
                close(y, tolerance)(step(0))
                close(dx, tolerance)(x.grad)
            _set_dropout(stack, case.dropout)
            return step

        work.add(name, call, lambda result: None)

    def linear() -> nn.Linear:
        layer = nn.Linear(
            case.in_features, case.out_features, bias=False, dtype=dtype, device=case.device
        ).requires_grad_(False)
        layer.weight.data.copy_(dense)
        return layer

    def ours() -> nn.Module:
        config = peftkern.NF4Config(case.block_size) if quantized else None
        layer = linear()
        layer.weight.data.copy_(w)
        adapted = peftkern.LoRALinear.from_linear(
            layer, r=case.r, lora_alpha=2 * case.r, lora_dropout=case.dropout, quantize=config
        )
        adapted.lora_A.data.copy_(a)
        adapted.lora_B.data.copy_(b)
        return adapted

    def peft(fp32: bool) -> Callable[[], nn.Module]:
        return lambda: _peft_layer(_bnb_linear(case, w) if quantized else linear(), a, b, case, fp32)

    def compiled() -> nn.Module:
        torch._dynamo.reset()  # otherwise it stops compiling after a few cases
        return torch.compile(_PlainLoRA(dense, a, b, case))

    def unsloth() -> nn.Module:
        return _UnslothLoRA(dense, a.to(dtype), b.to(dtype))

    add(OURS, ours)
    add(FLOOR, linear)
    if case.device == "cuda" and not quantized:
        add("Unsloth, without dropout", unsloth)
    add("HF PEFT + bitsandbytes" if quantized else "HF PEFT", peft(True))
    if dtype != torch.float32:
        add("HF PEFT, 16-bit adapters", peft(False))
    if not quantized:
        add("plain torch", lambda: _PlainLoRA(dense, a, b, case))
        if case.layers == 1:
            add("torch.compile", compiled)
    return work


def lora(case: Case) -> Work:
    return _adapted(case, quantized=False)


def qlora(case: Case) -> Work:
    return _adapted(case, quantized=True)


BUILD: dict[str, Callable[[Case], Work]] = {
    f.__name__: f for f in (quantize, dequantize, nf4_forward, nf4_dx, lora, qlora)
}


def with_every_isa(work: Work) -> None:
    """Adds our call once for each instruction set of this machine, besides the one it would choose."""
    from peftkern.ops.library import ops

    best = peftkern.cpu_isa()

    def on(isa: str) -> Call:
        def call(i: int) -> object:
            peftkern.set_cpu_isa(isa)
            try:
                return work.calls[OURS](i)
            finally:
                peftkern.set_cpu_isa("")

        return call

    for isa in ops.cpu_isas():
        if isa != best:
            work.calls[f"{OURS}, {isa}"] = on(isa)
