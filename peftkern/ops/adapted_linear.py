# SPDX-License-Identifier: Apache-2.0
"""The adapted linear layer, ``y = out_scale * (x W^T + s * ((drop(x) A^T) * lam) B^T) + bias``, and its gradient.

The formula with its reference is in reference.py, the C++ side of this file in csrc/adapted_linear.h.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import FLOAT_DTYPES, ops
from .nf4 import NF4Weight

_forward = ops.adapted_linear.default
_backward = ops.adapted_linear_backward.default

# Bits of adapted_linear_backward's `needs` (csrc/adapted_linear.h, enum Needs).
NEEDS_X, NEEDS_A, NEEDS_B, NEEDS_LAM, NEEDS_OUT_SCALE, NEEDS_BIAS = 1, 2, 4, 8, 16, 32


class _AdaptedLinear(torch.autograd.Function):
    """Old-style forward(ctx, ...): setup_context costs 12 us a call, register_autograd 10 us."""

    @staticmethod
    def forward(
        ctx, x, weight, absmax, nested_absmax, offset, A, B, lam, out_scale, bias,
        block_size, out_features, scaling, dropout_p, seed,
    ):  # fmt: skip
        trains_A, trains_B, trains_lam, trains_out_scale = ctx.needs_input_grad[5:9]
        y, *saved = _forward(
            x, weight, absmax, nested_absmax, offset, block_size, out_features, A, B, lam, out_scale,
            bias, scaling, dropout_p, seed, trains_B or trains_lam, trains_out_scale,
        )  # fmt: skip
        # x is kept only for dA, h only for dB and dlam, z only for dout_scale; a dropout mask never.
        ctx.save_for_backward(
            x if trains_A else None, weight, absmax, nested_absmax, offset, A, B, lam, out_scale,
            saved[0] if trains_B or trains_lam else None, saved[-1] if trains_out_scale else None, seed,
        )  # fmt: skip
        ctx.constants = block_size, x.shape[-1], scaling, dropout_p, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        # once_differentiable costs 4 us a call; it is for create_graph=True, which alone runs this with gradients on
        return (_differentiate_once if torch.is_grad_enabled() else _differentiate)(ctx, grad)


def _differentiate(ctx, grad):
    x, weight, absmax, nested_absmax, offset, A, B, lam, out_scale, h, z, seed = ctx.saved_tensors
    block_size, in_features, scaling, dropout_p, bias_dtype = ctx.constants
    wants = ctx.needs_input_grad
    if wants[1]:
        raise RuntimeError("weight: its gradient is not computed; the base of an adapted layer is frozen")
    needs = (
        (NEEDS_X if wants[0] else 0) | (NEEDS_A if wants[5] else 0) | (NEEDS_B if wants[6] else 0)
        | (NEEDS_LAM if wants[7] else 0) | (NEEDS_OUT_SCALE if wants[8] else 0) | (NEEDS_BIAS if wants[9] else 0)
    )  # fmt: skip
    gradients = _backward(
        grad, x, weight, absmax, nested_absmax, offset, block_size, in_features, h, z, A, B,
        lam, out_scale, scaling, dropout_p, seed, needs,
    )  # fmt: skip
    if needs & NEEDS_BIAS:
        *gradients, dbias = gradients
        gradients.append(dbias.to(bias_dtype))
    following = iter(gradients)
    return tuple([next(following) if wanted else None for wanted in wants])


_differentiate_once = once_differentiable(_differentiate)


def draw_seed(device: torch.device) -> Tensor:
    """int64 [], from torch's own generator of the device, so manual_seed and checkpointing behave as users expect."""
    return torch.randint(2**62, (), dtype=torch.int64, device=device)


def base_arguments(
    x: Tensor, weight: Tensor | NF4Weight
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]:
    """weight as the ops take it: (data, absmax, nested_absmax, offset, block_size, out_features)."""
    if isinstance(weight, NF4Weight):
        if len(weight.shape) != 2:
            raise RuntimeError(f"weight: expected an NF4 weight of shape [out, in], got {list(weight.shape)}")
        out_features, in_features = weight.shape
        if x.dim() == 0 or x.shape[-1] != in_features:
            raise RuntimeError(
                f"x: expected shape [..., {in_features}] for weight {list(weight.shape)}, got {list(x.shape)}"
            )
        return weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.block_size, out_features
    if weight.dim() != 2:
        raise RuntimeError(f"weight: expected shape [out, in], got {list(weight.shape)}")
    return weight, None, None, None, 64, weight.shape[0]


def cast_by_autocast(x: Tensor) -> Tensor:
    """As ``F.linear`` does under autocast."""
    if x.dtype in FLOAT_DTYPES and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def refuse_trainable_base(weight: Tensor) -> None:
    if weight.requires_grad:
        raise NotImplementedError(
            "weight: expected requires_grad=False, the base of an adapted layer is frozen; "
            "call weight.requires_grad_(False) or weight.detach()"
        )


def adapted_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor | None = None,
    B: Tensor | None = None,
    *,
    lam: Tensor | None = None,
    out_scale: Tensor | None = None,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = out_scale * (x W^T + scaling * ((drop(x) A^T) * lam) B^T) + bias``, differentiable in all but weight.

    x: [..., in]; weight: [out, in], dense or NF4; A: [r, in] and B: [out, r], both or neither; lam: [r];
    out_scale, bias: [out]. y: [..., out] in x's dtype. Each may be float32, bfloat16 or float16 on its own; sums are
    in float32. Under autocast x is cast first, as for ``F.linear``.
    dropout_p: probability, 0 <= p < 1, of zeroing an element of x on the way to A, when training. seed: int64 [] that
    fixes the mask; drawn from torch's generator if None.

    Raises RuntimeError naming the argument for a wrong shape, dtype or device; NotImplementedError if weight requires
    a gradient. LoRA: Hu et al. 2021, arXiv 2106.09685.

    >>> x, w = torch.randn(4, 64), torch.randn(32, 64)
    >>> adapted_linear(x, w, torch.randn(8, 64), torch.zeros(32, 8), scaling=2.0).shape
    torch.Size([4, 32])
    """
    packed, absmax, nested_absmax, offset, block_size, out_features = base_arguments(x, weight)
    x = cast_by_autocast(x)
    if not training or A is None:
        dropout_p, seed = 0.0, None
    elif dropout_p > 0.0 and seed is None:
        seed = draw_seed(x.device)
    if torch.is_grad_enabled():
        refuse_trainable_base(packed)
        return _AdaptedLinear.apply(
            x, packed, absmax, nested_absmax, offset, A, B, lam, out_scale, bias,
            block_size, out_features, float(scaling), float(dropout_p), seed,
        )  # fmt: skip
    return _forward(
        x, packed, absmax, nested_absmax, offset, block_size, out_features, A, B, lam, out_scale, bias,
        scaling, dropout_p, seed, False, False,
    )[0]  # fmt: skip


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``x W^T + scaling * (drop(x) A^T) B^T + bias``: :func:`adapted_linear` for plain LoRA, which says the rest."""
    return adapted_linear(x, weight, A, B, scaling=scaling, bias=bias, dropout_p=dropout_p, training=training)


def nf4_linear(x: Tensor, q: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with W = dequantize_nf4(q, x.dtype). x: [..., in]; q: of shape [out, in]; y: [..., out]."""
    return adapted_linear(x, q, bias=bias)


def _check_devices(name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    for argument, t in tensors.items():
        if t is not None and t.device != reference.device:
            raise RuntimeError(f"{argument}: expected the device of {name} ({reference.device}), got {t.device}")


@torch.library.register_fake("peftkern::adapted_linear")
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
    lam,
    out_scale,
    bias,
    scaling,
    dropout_p,
    seed,
    save_h,
    save_z,
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
        lam=lam,
        out_scale=out_scale,
        bias=bias,
        seed=seed,
    )
    shape = [*x.shape[:-1], out_features]
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    rank = 0 if A is None else A.shape[0]
    results = [x.new_empty(shape)]
    if save_h:
        results.append(x.new_empty((rows, rank), dtype=torch.float32))
    if save_z:
        results.append(x.new_empty((rows, out_features)))
    return results


@torch.library.register_fake("peftkern::adapted_linear_backward")
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
    z,
    A,
    B,
    lam,
    out_scale,
    scaling,
    dropout_p,
    seed,
    needs,
):
    out_features = grad.shape[-1]
    rank = 0 if A is None else A.shape[0]
    gradients = (
        (NEEDS_X, (*grad.shape[:-1], in_features), grad), (NEEDS_A, (rank, in_features), A),
        (NEEDS_B, (out_features, rank), B), (NEEDS_LAM, (rank,), lam), (NEEDS_OUT_SCALE, (out_features,), out_scale),
        (NEEDS_BIAS, (out_features,), None),
    )  # fmt: skip
    return [
        grad.new_empty(shape, dtype=torch.float32 if like is None else like.dtype)
        for bit, shape, like in gradients
        if needs & bit
    ]


@torch.library.register_fake("peftkern::product_ways")
def _(x, grad, weight, absmax, nested_absmax, offset, block_size, A, B, lam, out_scale):
    return ["library", "library"]  # the one that takes everything: a device decides, and there is none
