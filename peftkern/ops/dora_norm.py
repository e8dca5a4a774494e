# SPDX-License-Identifier: Apache-2.0
"""DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): the norms of the adapted weight's rows, and the layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adapted_linear import adapted_linear
from .nf4 import NF4Weight, dequantize_nf4
from .tensor_cache import TensorCache

_ROWS = 256  # of a dense weight that are squared at a time


@torch.no_grad()
def dora_norm(
    weight: Tensor | NF4Weight, A: Tensor, B: Tensor, scaling: float = 1.0, *, cache: TensorCache | None = None
) -> Tensor:
    """The norms of the rows of ``W + scaling * B A``, without that matrix or ``B A``: float32 [out_features]. It has no
    gradient, as DoRA takes its norm for a constant.

    weight: [out, in], dense or NF4; A: [r, in]; B: [out, r]. With P = W Aᵀ and G = A Aᵀ::

        norm[n]^2 = |W[n]|^2 + 2 scaling B[n] · P[n] + scaling^2 B[n] G B[n]ᵀ

    P is one product of r rows with the weight, in float32: a weight of another dtype is cast for it, an NF4
    one dequantized (on the CPU only where r is above 8). |W[n]|^2 is that of a frozen weight: a cache keeps
    it between calls. The three terms are added in float64, but P is float32: the square is off by some 1e-7 of the
    squares that are added. Where ``scaling * B A`` cancels a row of W, that is all there is: up to 3e-4 of
    |W[n]| + |scaling B A[n]|.

    >>> W, A, B = torch.randn(8, 16), torch.randn(2, 16), torch.randn(8, 2)
    >>> torch.allclose(dora_norm(W, A, B, 0.5), (W + 0.5 * B @ A).norm(dim=1), rtol=1e-5)
    True
    """
    if A.dim() != 2 or B.dim() != 2 or tuple(weight.shape) != (B.shape[0], A.shape[1]) or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"A, B: expected [r, in] and [out, r] for a weight {list(weight.shape)}, "
            f"got {list(A.shape)}, {list(B.shape)}"
        )

    def squares() -> Tensor:
        return _squared_rows(weight)

    stored = [weight.packed, weight.absmax] if isinstance(weight, NF4Weight) else [weight]
    w2 = squares() if cache is None else cache.get("dora_norm", (), stored, squares)
    A, B = A.float(), B.float()
    P = adapted_linear(A, weight).T.double()
    B = B.double()
    quadratic = ((B @ (A.double() @ A.double().T)) * B).sum(dim=1)
    squared = w2 + 2 * scaling * (B * P).sum(dim=1) + scaling**2 * quadratic
    return squared.clamp_(min=0).sqrt_().float()


def _squared_rows(weight: Tensor | NF4Weight) -> Tensor:
    """float64 [out]: the sums of the squares of the rows, a few rows at a time."""
    if not isinstance(weight, NF4Weight):
        return torch.cat([rows.double().square().sum(dim=1) for rows in weight.split(_ROWS)])
    return dequantize_nf4(weight, torch.float32).double().square().sum(dim=1)


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
