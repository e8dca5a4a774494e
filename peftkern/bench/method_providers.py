# SPDX-License-Identifier: Apache-2.0
"""Who does the work of the cases of single methods: a bank of adapters, DoRA, AdaLoRA, compression."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import peftkern
from peftkern import reference
from peftkern.ops import jacobi_svd, mask_ranks, orthogonality_penalty, rank_mask, update_importance
from peftkern.ops.dora_norm import dora_norm as peftkern_dora_norm
from peftkern.ops.library import ops
from peftkern.ops.rank_allocation import TripletTable, state_layout
from peftkern.ops.tensor_cache import TensorCache

from . import providers
from .cases import Case
from .measure import Call, copies
from .providers import OURS, TOLERANCE, Work, close, equal, weight_of

BETA1, BETA2 = 0.85, 0.85


def _normal(case: Case, *shape: int, seed: int, scale: float = 1.0, dtype: str = "float32") -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values * scale).to(case.device, getattr(torch, dtype))


def close_all(expected: Sequence[Tensor], tolerance: float) -> Callable[[object], None]:
    def check(result: object) -> None:
        assert isinstance(result, Sequence)
        for got, tensor in zip(result, expected, strict=True):
            close(tensor, tolerance)(got)

    return check


# ---- a bank of adapters, forward and backward


def multi_lora(case: Case) -> Work:
    """Equally many rows of each of 8 adapters, as a batch of 8 users; without dropout."""
    adapters, n, fan_in, fan_out = 8, case.rows, case.in_features, case.out_features
    w = weight_of(case)
    A = _normal(case, adapters, case.r, fan_in, seed=1, scale=fan_in**-0.5).requires_grad_()
    B = _normal(case, adapters, fan_out, case.r, seed=2, scale=case.r**-0.5 / 4).requires_grad_()
    x = _normal(case, n, fan_in, seed=3, dtype=case.dtype).requires_grad_()
    dy = _normal(case, n, fan_out, seed=4, dtype=case.dtype)
    index = torch.arange(n, device=case.device) % adapters
    rows = [(index == a).nonzero().view(-1) for a in range(adapters)]
    leaves = [x, A, B]

    def step(forward: Callable[[], Tensor]) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            y = forward()
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        return call

    def loop() -> Tensor:
        y = functional.linear(x, w)
        for a, own in enumerate(rows):
            h = functional.linear(x[own].to(A.dtype), A[a])
            y = y.index_add(0, own, (2.0 * functional.linear(h, B[a])).to(y.dtype))
        return y

    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    y = reference.multi_lora_linear(exact[0], w.cpu().double(), *exact[1:], index.cpu(), scaling=2.0)
    expected = [y.detach(), *torch.autograd.grad(y, exact, dy.cpu().double())]
    check = close_all([t.float().to(case.device) for t in expected], TOLERANCE[case.dtype])
    tokens = n * (3 * fan_in + 2 * fan_out) * w.element_size()
    work = Work(
        flops=4.0 * n * w.numel() + 6.0 * n * case.r * (fan_in + fan_out),
        nbytes=tokens + 2.0 * w.nbytes + 3.0 * (A.nbytes + B.nbytes),
    )
    work.add(OURS, lambda: step(lambda: peftkern.multi_lora_linear(x, w, A, B, index, scaling=2.0)), check)
    work.add("a loop over the adapters, plain torch", lambda: step(loop), check)
    return work


# ---- DoRA


def _row_norms(case: Case, quantized: bool) -> Work:
    w = weight_of(case)
    weights: list[Tensor] | list[peftkern.NF4Weight]
    if quantized:
        q = peftkern.quantize_nf4(w, case.block_size)
        nbytes = q.packed.nbytes + q.absmax.nbytes
        weights = [
            peftkern.NF4Weight(q.packed.clone(), q.absmax, q.block_size, q.shape, q.dtype)
            for _ in range(copies(nbytes, case.device))
        ]
        parts = [(v.packed, v.absmax, None, None, v.block_size, *v.shape) for v in weights]
        dense = peftkern.dequantize_nf4(q, torch.float32)
    else:
        nbytes, dense = w.nbytes, w
        weights = [w.clone() for _ in range(copies(nbytes, case.device))]
        parts = [(v, None, None, None, case.block_size, *v.shape) for v in weights]
    at = len(weights)
    check = close(dense.double().square().sum(1), 1e-5)
    work = Work(flops=2.0 * w.numel(), nbytes=nbytes + 8.0 * case.out_features)
    work.add(OURS, lambda: lambda i: ops.squared_row_norms(*parts[i % at]), check)

    def plain(i: int) -> Tensor:
        v = weights[i % at]
        values = peftkern.dequantize_nf4(v, torch.float32) if quantized else v.float()
        return values.square().sum(1)

    work.add("dequantized, then plain torch" if quantized else "plain torch", lambda: plain, check)
    return work


def row_norms(case: Case) -> Work:
    """|W[n]|^2 of a dense weight: once for each adapter, as the weight is frozen."""
    return _row_norms(case, quantized=False)


def nf4_row_norms(case: Case) -> Work:
    return _row_norms(case, quantized=True)


def dora_norm(case: Case) -> Work:
    """The norms of the rows of W + s B A, in each step, with |W[n]|^2 at hand."""
    w = weight_of(case)
    A = _normal(case, case.r, case.in_features, seed=1, scale=case.in_features**-0.5)
    B = _normal(case, case.out_features, case.r, seed=2, scale=case.r**-0.5 / 4)
    weights = [w.clone() for _ in range(copies(w.nbytes, case.device))]
    caches = [TensorCache() for _ in weights]
    at = len(weights)
    for weight, cache in zip(weights, caches, strict=True):
        peftkern_dora_norm(weight, A, B, 2.0, cache=cache)
    check = close((w.double() + 2.0 * B.double() @ A.double()).norm(dim=1), TOLERANCE[case.dtype])
    # P = A W^T, G = A A^T and B's products with both
    flops = 2.0 * case.r * (w.numel() + case.in_features * case.r + case.out_features * (case.r + 1))
    work = Work(flops=flops, nbytes=w.nbytes + A.nbytes + B.nbytes + 12.0 * case.out_features)
    work.add(OURS, lambda: lambda i: peftkern_dora_norm(weights[i % at], A, B, 2.0, cache=caches[i % at]), check)

    def peft(i: int) -> Tensor:
        return torch.linalg.norm(weights[i % at] + (2.0 * (B @ A)).to(w.dtype), dim=1)

    work.add("HF PEFT's, in plain torch", lambda: peft, check)
    return work


# ---- AdaLoRA: `layers` layers of the case's shape


class _Triplets(nn.Module):
    """A, E and B of a layer under HF PEFT's names, with gradients."""

    def __init__(self, case: Case, seed: int) -> None:
        super().__init__()
        shapes = {"A": (case.r, case.in_features), "E": (case.r, 1), "B": (case.out_features, case.r)}
        for i, (name, shape) in enumerate(shapes.items()):
            p = nn.Parameter(_normal(case, *shape, seed=6 * seed + i, scale=0.3 * max(shape) ** -0.5))
            p.grad = _normal(case, *shape, seed=6 * seed + i + 3)
            setattr(self, f"lora_{name}", nn.ParameterDict({"default": p}))


def _triplets(case: Case) -> tuple[nn.ModuleList, list[list[nn.Parameter]]]:
    """The layers, and A, E and B of all of them."""
    layers = nn.ModuleList(_Triplets(case, seed) for seed in range(case.layers))
    return layers, [[getattr(layer, f"lora_{name}")["default"] for layer in layers] for name in "AEB"]


def importance(case: Case) -> Work:
    """The averages of all elements and the scores of the triplets, for each step of the optimizer."""
    layers, (A, E, B) = _triplets(case)
    _, size = state_layout([(case.r, case.in_features, case.out_features)] * case.layers)
    elements = sum(p.numel() for p in layers.parameters())
    first, scores = [], []  # of the first step
    for layer in zip(A, E, B, strict=True):
        zeros = [torch.zeros_like(p, dtype=torch.float64) for p in layer]
        new = [
            reference.update_importance(p.detach().double(), p.grad.double(), z, z, BETA1, BETA2)
            for p, z in zip(layer, zeros, strict=True)
        ]
        first += [s for s, _ in new]
        scores.append(reference.triplet_scores(*(s * u for s, u in new)))
    work = Work(flops=10.0 * elements, nbytes=24.0 * elements + 4.0 * case.r * case.layers)  # p, g; s, u there and back

    def ours() -> Call:
        table = TripletTable(A, E, B)
        state = torch.zeros(2, size, device=case.device)
        return lambda i: update_importance(A, E, B, state[0], state[1], BETA1, BETA2, None, table())

    def peft() -> Call:
        providers.require("peft")
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import RankAllocator

        config = AdaLoraConfig(init_r=case.r, target_r=1, total_step=10**6, beta1=BETA1, beta2=BETA2)
        allocator = RankAllocator(layers, config, "default")

        def call(i: int) -> list[Tensor]:
            allocator.update_ipt(layers)
            return list(allocator.exp_avg_ipt.values())

        return call

    work.add(OURS, ours, close(torch.cat(scores), TOLERANCE["float32"]))
    work.add("HF PEFT, without the scores", peft, close_all(first, TOLERANCE["float32"]))
    return work


def budget_mask(case: Case) -> Work:
    """Which half of the triplets stays."""
    scores = _normal(case, case.r * case.layers, seed=1).abs()
    n = scores.numel()
    check = equal(reference.rank_mask(scores.cpu(), n // 2).to(case.device))
    work = Work(flops=0, nbytes=5.0 * n)
    work.add(OURS, lambda: lambda i: rank_mask(scores, n // 2), check)
    # as HF PEFT, which has its scores in a list and waits for the threshold
    work.add("plain torch", lambda: lambda i: scores > torch.kthvalue(scores, n - n // 2).values, check)
    return work


def masked_ranks(case: Case) -> Work:
    """Zeroes E where a triplet has lost its rank."""
    _, (A, E, B) = _triplets(case)
    keep = _normal(case, case.r * case.layers, seed=1) > 0
    pieces = keep.split(case.r)
    expected = [torch.where(k[:, None], e.detach(), 0) for e, k in zip(E, pieces, strict=True)]
    check = close_all(expected, 0.0)
    work = Work(flops=0, nbytes=5.0 * keep.numel())

    def ours() -> Call:
        table = TripletTable(A, E, B)

        def call(i: int) -> list[nn.Parameter]:
            with torch.no_grad():
                mask_ranks(E, keep, table())
            return E

        return call

    def peft(i: int) -> list[nn.Parameter]:
        with torch.no_grad():
            for e, k in zip(E, pieces, strict=True):
                e.masked_fill_(~k[:, None], 0.0)
        return E

    work.add(OURS, ours, check)
    work.add("HF PEFT's loop, in plain torch", lambda: peft, check)
    return work


def orthogonality(case: Case) -> Work:
    """The term of the loss and its gradient."""
    _, (A, _, B) = _triplets(case)
    factors, layers = [*A, *B], case.layers
    exact = [t.detach().double().requires_grad_() for t in factors]

    def step(penalty: Callable[[list[Tensor], list[Tensor]], Tensor], leaves: list[Tensor]) -> Call:
        def call(i: int) -> tuple[Tensor, ...]:
            value = penalty(leaves[:layers], leaves[layers:])
            return value.detach(), *torch.autograd.grad(value, leaves)

        return call

    def loop(a: list[Tensor], b: list[Tensor]) -> Tensor:
        grams = [t @ t.T for t in a] + [t.T @ t for t in b]
        return sum(torch.norm(g - torch.eye(len(g), out=torch.empty_like(g))) for g in grams) / len(grams)

    check = close_all(step(loop, exact)(0), TOLERANCE["float32"])
    elements = sum(t.numel() for t in factors)
    work = Work(flops=4.0 * case.r * elements, nbytes=3.0 * 4.0 * elements)  # read twice, the gradient written
    work.add(OURS, lambda: step(orthogonality_penalty, factors), check)
    work.add("HF PEFT's loop, in plain torch", lambda: step(loop, factors), check)
    return work


# ---- compression: the cores of `layers` layers, [r, r] each


def svd(case: Case) -> Work:
    A, B = (
        _normal(case, case.layers, n, case.r, seed=seed, dtype="float64")
        for seed, n in ((1, case.in_features), (2, case.out_features))
    )
    cores = torch.linalg.qr(B @ torch.linalg.qr(A).R.mT).R
    expected = torch.linalg.svdvals(cores)
    # singular values and left vectors by Golub and Reinsch (Golub and Van Loan, Matrix Computations, table 8.6.1)
    work = Work(flops=12.0 * case.layers * case.r**3, nbytes=2.0 * cores.nbytes + expected.nbytes)

    def check(result: object) -> None:
        U, S = result[:2]
        close(expected, 1e-12)(S)
        close(cores, 1e-12)(U @ (U.mT @ cores))

    work.add(OURS, lambda: lambda i: jacobi_svd(cores), check)
    work.add("torch.linalg.svd", lambda: lambda i: torch.linalg.svd(cores), check)
    return work


METHODS = (
    multi_lora, row_norms, nf4_row_norms, dora_norm, importance, budget_mask, masked_ranks, orthogonality, svd,
)  # fmt: skip
BUILD: dict[str, Callable[[Case], Work]] = providers.BUILD | {f.__name__: f for f in METHODS}
