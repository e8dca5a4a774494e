# SPDX-License-Identifier: Apache-2.0
"""DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): the norms of the adapted weight's rows, and the layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adapted_linear import adapted_linear, base_arguments
from .library import ops
from .nf4 import NF4Weight
from .tensor_cache import TensorCache

_dora_norm = ops.dora_norm.default
_squared_row_norms = ops.squared_row_norms.default


@torch.no_grad()
def dora_norm(
    weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float = 1.0, *, cache: TensorCache | None = None
) -> Tensor:
    """The norms of the rows of ``W + scaling * B A``, without that matrix or ``B A``: float32 [out_features]. It has no
    gradient, as DoRA takes its norm for a constant.

    weight: [out, in], dense or NF4; A: [r, in]; B: [out, r]. With P = W Aᵀ and G = A Aᵀ::

        norm[n]^2 = |W[n]|^2 + 2 scaling B[n] · P[n] + scaling^2 B[n] G B[n]ᵀ

    P is one product of r rows with the weight, in float32, autocast or not, and made as a layer makes its own: a weight
    of another dtype is cast for it, an NF4 one dequantized unless there is a kernel that need not. |W[n]|^2 is that of
    a frozen weight: a cache keeps it between calls. All but P is in float64, so the error is that of P, whose sums of
    ``in`` products are off by at most ``in * 2**-24`` of their magnitudes (by more if torch is told to use TF32, and on
    CUDA over an NF4 weight of a 16-bit layer, see below)::

        |error of norm[n]^2| <= in * 2**-24 * 2 |W[n]| · |scaling| |B[n]| |A| <= in * 2**-25 * size^2
        size = ||W[n]|| + || |scaling| |B[n]| |A| ||

    So where nothing cancels the norm is as good as float32 holds it. Where ``scaling * B A`` cancels a row of W, what
    is left is off by at most ``sqrt(in * 2**-25) * size``.

    A layer of 16-bit activations rounds its NF4 weight to their dtype. On CUDA, for an NF4 weight of such a ``dtype``
    with a multiple of 64 columns, P is the product of that layer with the rows of A for activations: both are rounded
    to the dtype, the sums float32, and no dequantized weight is in memory. |W[n]|^2 and G are as exact as ever. With
    eps = 2**-9 (bfloat16) or 2**-12 (float16, of values from 2**-14 up) that adds::

        |error of norm[n]^2| <= 2 eps * 2 |W[n]| · |scaling| |B[n]| |A| <= eps * size^2

    Where nothing cancels, norm[n] moves by at most half a unit of the dtype then, and mostly by far less, as roundings
    are random: the worst of 512 rows of 4096 columns was 1.1e-5 from float64 in bfloat16 where the adapter has a tenth
    of the size of the weight, 4.6e-5 where it has twice that of the weight. Parts high + low of A would leave 0.7 of
    it: the rest is the weight's.

    >>> W, A, B = torch.randn(8, 16), torch.randn(2, 16), torch.randn(8, 2)
    >>> torch.allclose(dora_norm(W, A, B, 0.5), (W + 0.5 * B @ A).norm(dim=1), rtol=1e-5)
    True
    """
    if A.dim() != 2 or B.dim() != 2 or tuple(weight.shape) != (B.shape[0], A.shape[1]) or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"A, B: expected [r, in] and [out, r] for a weight {list(weight.shape)}, "
            f"got {list(A.shape)}, {list(B.shape)}"
        )
    data, absmax, nested_absmax, offset, block_size, out_features = base_arguments(A, weight)
    base = (data, absmax, nested_absmax, offset, block_size)

    def squares() -> Tensor:
        return _squared_row_norms(*base, out_features, A.shape[1])

    stored = [t for t in base[:4] if t is not None]
    w2 = squares() if cache is None else cache.get("dora_norm", (), stored, squares)
    with torch.autocast(A.device.type, enabled=False):
        return _dora_norm(*base, A, B, w2, scaling, weight.dtype if isinstance(weight, NF4Weight) else torch.float32)


@torch.library.register_fake("peftkern::squared_row_norms")
def _(weight, absmax, nested_absmax, offset, block_size, out_features, in_features):
    return weight.new_empty((out_features,), dtype=torch.float64)


@torch.library.register_fake("peftkern::dora_norm")
def _(weight, absmax, nested_absmax, offset, block_size, A, B, w2, scaling, dtype):
    return A.new_empty((B.shape[0],), dtype=torch.float32)


def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    A: Tensor,
    B: Tensor,
    out_scale: Tensor,
    *,
    scaling: float,
    bias: Tensor | None,
    dropout: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """``out_scale * (x Wᵀ + scaling * (x Aᵀ) Bᵀ) + bias`` with out_scale = magnitude / norm.

    With dropout it is HF PEFT's: the adapted layer sees ``drop(x)``, and the plain weight what dropout took from x.
    """
    if dropout is None:
        return adapted_linear(x, weight, A, B, out_scale=out_scale, bias=bias, scaling=scaling)
    dropped = dropout(x)
    adapted = adapted_linear(dropped, weight, A, B, out_scale=out_scale, scaling=scaling)
    return adapted + adapted_linear(x - dropped, weight, bias=bias)
