# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a bank of adapters, one of them for each row: ``x W^T + s_a (drop(x) A_a^T) B_a^T + bias``.

The formula with its reference is in reference.py, the C++ side of this file in csrc/multi_lora.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adapted_linear import (
    NEEDS_A,
    NEEDS_B,
    NEEDS_BIAS,
    NEEDS_X,
    _check_devices,
    base_arguments,
    cast_by_autocast,
    draw_seed,
    refuse_trainable_base,
)
from .library import ops
from .nf4 import NF4Weight

_plan = ops.multi_lora_plan.default
_forward = ops.multi_lora_linear.default
_backward = ops.multi_lora_linear_backward.default


class _MultiLoraLinear(torch.autograd.Function):
    """Old-style forward(ctx, ...), as in adapted_linear.py."""

    @staticmethod
    def forward(
        ctx, x, weight, absmax, nested_absmax, offset, A, B, bias,
        plan, ranks, scalings, block_size, out_features, scaling, dropout_p, seed,
    ):  # fmt: skip
        trains_A, trains_B = ctx.needs_input_grad[5:7]
        y, h = _forward(
            x, weight, absmax, nested_absmax, offset, block_size, out_features, A, B, plan, ranks,
            scalings, bias, scaling, dropout_p, seed, trains_B,
        )  # fmt: skip
        ctx.save_for_backward(
            x if trains_A else None, weight, absmax, nested_absmax, offset, A, B, h if trains_B else None, plan, ranks,
            scalings, seed,
        )  # fmt: skip
        ctx.in_features = x.shape[-1]
        ctx.block_size, ctx.scaling, ctx.dropout_p = block_size, scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, absmax, nested_absmax, offset, A, B, h, plan, ranks, scalings, seed = ctx.saved_tensors
        wants = ctx.needs_input_grad
        if wants[1]:
            raise RuntimeError("weight: its gradient is not computed; the base of an adapted layer is frozen")
        needs = (
            (NEEDS_X if wants[0] else 0) | (NEEDS_A if wants[5] else 0) | (NEEDS_B if wants[6] else 0)
            | (NEEDS_BIAS if wants[7] else 0)
        )  # fmt: skip
        dx, dA, dB, dbias = _backward(
            grad, x, weight, absmax, nested_absmax, offset, ctx.block_size, ctx.in_features, h, A, B,
            plan, ranks, scalings, ctx.scaling, ctx.dropout_p, seed, needs,
        )  # fmt: skip
        if needs & NEEDS_BIAS:
            dbias = dbias.to(ctx.bias_dtype)
        return (
            dx if wants[0] else None, None, None, None, None, dA if wants[5] else None, dB if wants[6] else None,
            dbias if wants[7] else None, *[None] * 8,
        )  # fmt: skip


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    adapter_index: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    ranks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """``x W^T + s_a (drop(x) A_a^T) B_a^T + bias`` with an adapter a of its own for each row of x, differentiable in x,
    A, B and bias. Rows without adapter are ``x W^T + bias``.

    x: [..., in]; weight: [out, in], dense or NF4; bias: [out]. y: [..., out] in x's dtype.
    A: [adapters, r, in], B: [adapters, out, r]; or sequences of [r_a, in] and [out, r_a], which are stacked here, each
    call. x, weight, A and B may each be float32, bfloat16 or float16 on its own; sums are in float32.
    adapter_index: int32 or int64, of x's leading shape, or [x.shape[0]], one for each item of the batch; -1: none.
    scaling: one number, or float32 [adapters]. ranks: int32 [adapters]; what A and B hold past ranks[a] does not count.
    dropout_p, training, seed: as for :func:`adapted_linear`, whose mask this is.

    Rows are sorted by adapter where they are, so on CUDA nothing waits for the device and a call can be captured in a
    graph, except with sequences. There an index or rank out of range counts as -1 or as the nearest one, as a check
    would have to wait; on the CPU it raises. A gradient is a sum in row order, the same for any number of threads.

    Raises RuntimeError naming the argument for a wrong shape, dtype, device or index; NotImplementedError if weight or
    scaling requires a gradient. Punica: arXiv 2310.18547; S-LoRA: arXiv 2311.03285.

    >>> x, w = torch.randn(3, 64), torch.randn(32, 64)
    >>> A, B = torch.randn(5, 8, 64), torch.randn(5, 32, 8)
    >>> y = multi_lora_linear(x, w, A, B, torch.tensor([4, -1, 0]), scaling=2.0)
    >>> bool(torch.allclose(y[1], x[1] @ w.T, atol=1e-4)), y.shape
    (True, torch.Size([3, 32]))
    """
    if not isinstance(A, Tensor) or not isinstance(B, Tensor):
        A, B, ranks = stacked(A, B, ranks)
    adapters = A.shape[0] if A.dim() else 0
    return planned_multi_lora_linear(
        x, weight, A, B, make_plan(adapter_index, x, adapters), scaling=scaling, ranks=ranks, bias=bias,
        dropout_p=dropout_p, training=training, seed=seed,
    )  # fmt: skip


def make_plan(adapter_index: Tensor, x: Tensor, adapters: int) -> Tensor:
    """Rows of x by adapter, for planned_multi_lora_linear: the same for every layer with x's leading shape."""
    if x.dim() == 0:
        raise RuntimeError("x: expected shape [..., in_features], got a scalar")
    if adapter_index.device != x.device:
        raise RuntimeError(f"adapter_index: expected the device of x ({x.device}), got {adapter_index.device}")
    leading = x.shape[:-1]
    if adapter_index.shape != leading and adapter_index.shape != leading[:1]:
        expected = " or ".join(dict.fromkeys(str(list(shape)) for shape in (leading, leading[:1])))
        raise RuntimeError(
            f"adapter_index: expected shape {expected} for x {list(x.shape)}, got {list(adapter_index.shape)}"
        )
    rows = 1
    for size in leading:
        rows = rows * size
    return _plan(adapter_index, rows, adapters)


def plan_of_items(index: Tensor, rows: int, adapters: int) -> Tensor:
    """The plan of rows that belong to the items of index in order, equally many to each."""
    return _plan(index, rows, adapters)


def planned_multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    plan: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    ranks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`multi_lora_linear` with the plan that ``make_plan`` made for x and the number of adapters."""
    packed, absmax, nested_absmax, offset, block_size, out_features = base_arguments(x, weight)
    x = cast_by_autocast(x)
    scalings = None
    if isinstance(scaling, Tensor):
        scaling, scalings = 1.0, scaling
    if not training:
        dropout_p, seed = 0.0, None
    elif dropout_p > 0.0 and seed is None:
        seed = draw_seed(x.device)
    if torch.is_grad_enabled():
        refuse_trainable_base(packed)
        if scalings is not None and scalings.requires_grad:
            raise NotImplementedError("scaling: expected requires_grad=False, its gradient is not computed")
        return _MultiLoraLinear.apply(
            x, packed, absmax, nested_absmax, offset, A, B, bias, plan, ranks, scalings,
            block_size, out_features, float(scaling), float(dropout_p), seed,
        )  # fmt: skip
    return _forward(
        x, packed, absmax, nested_absmax, offset, block_size, out_features, A, B, plan, ranks, scalings,
        bias, float(scaling), float(dropout_p), seed, False,
    )[0]  # fmt: skip


def stacked(
    A: Tensor | Sequence[Tensor], B: Tensor | Sequence[Tensor], ranks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors of any ranks as [adapters, largest, in] and [adapters, out, largest], padded with zeros."""
    A, B = list(A), list(B)
    if ranks is not None:
        raise RuntimeError("ranks: expected None with A and B as sequences, whose ranks are their own")
    if not A or len(A) != len(B):
        raise RuntimeError(f"A and B: expected as many factors each, at least one, got {len(A)} and {len(B)}")
    for i, (a, b) in enumerate(zip(A, B, strict=True)):
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise RuntimeError(
                f"A[{i}] and B[{i}]: expected shapes [r, in] and [out, r], got {list(a.shape)} and {list(b.shape)}"
            )
        for name, t, first, axis in (("A", a, A[0], 1), ("B", b, B[0], 0)):
            if t.shape[axis] != first.shape[axis] or t.dtype != first.dtype or t.device != first.device:
                raise RuntimeError(
                    f"{name}[{i}]: expected the width, dtype and device of {name}[0] ({first.shape[axis]}, "
                    f"{first.dtype}, {first.device}), got {t.shape[axis]}, {t.dtype}, {t.device}"
                )
    own = [a.shape[0] for a in A]
    largest = max(own)
    stacked_a = torch.stack([torch.nn.functional.pad(a, (0, 0, 0, largest - a.shape[0])) for a in A])
    stacked_b = torch.stack([torch.nn.functional.pad(b, (0, largest - b.shape[1])) for b in B])
    # The zeros alone give the right values. The ranks save work, which on CUDA is not worth a copy from the host.
    mixed = min(own) < largest and not stacked_a.is_cuda
    return stacked_a, stacked_b, torch.tensor(own, dtype=torch.int32, device=stacked_a.device) if mixed else None


@torch.library.register_fake("peftkern::multi_lora_plan")
def _(adapter_index, rows, adapters):
    tiles = rows // 32 + adapters + 1  # max_row_tiles of csrc/multi_low_rank.h
    return adapter_index.new_empty((adapters + 2 + rows + 2 * tiles + adapters + 1,), dtype=torch.int64)


@torch.library.register_fake("peftkern::multi_lora_linear")
def _(
    x,
    weight,
    absmax,
    nested_absmax,
    offset,
    block_size,
    out_features,
    A,
    B,
    plan,
    ranks,
    scalings,
    bias,
    scaling,
    dropout_p,
    seed,
    save_h,
):
    _check_devices(
        "x",
        x,
        weight=weight,
        absmax=absmax,
        nested_absmax=nested_absmax,
        offset=offset,
        A=A,
        B=B,
        plan=plan,
        ranks=ranks,
        scaling=scalings,
        bias=bias,
        seed=seed,
    )
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    h = x.new_empty((rows, A.shape[1]) if save_h else (0,), dtype=torch.float32)
    return x.new_empty([*x.shape[:-1], out_features]), h


@torch.library.register_fake("peftkern::multi_lora_linear_backward")
def _(
    grad,
    x,
    weight,
    absmax,
    nested_absmax,
    offset,
    block_size,
    in_features,
    h,
    A,
    B,
    plan,
    ranks,
    scalings,
    scaling,
    dropout_p,
    seed,
    needs,
):
    def wanted(bit, shape, dtype):
        return grad.new_empty(shape if needs & bit else (0,), dtype=dtype)

    return (
        wanted(NEEDS_X, (*grad.shape[:-1], in_features), grad.dtype), wanted(NEEDS_A, A.shape, A.dtype),
        wanted(NEEDS_B, B.shape, B.dtype), wanted(NEEDS_BIAS, (grad.shape[-1],), torch.float32),
    )  # fmt: skip
