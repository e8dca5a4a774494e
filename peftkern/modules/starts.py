# SPDX-License-Identifier: Apache-2.0
"""Starts of a LoRA adapter other than a random A and a zero B.

pissa: the r largest singular values of the weight (Meng et al. 2024, arXiv 2404.02948), exact or by a randomized SVD.
olora: the first r columns of its QR (Buyukakyuz 2024, arXiv 2406.01775). The weight keeps what is left, so that the
layer starts with its old output. orthogonal: both factors random, with B A = 0 up to rounding, as HF PEFT draws them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

STARTS = (True, False, "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_<n>")


def is_start(start: Any) -> bool:
    return isinstance(start, bool) or start in ("gaussian", "orthogonal") or is_decomposition(start)


def is_decomposition(start: Any) -> bool:
    return isinstance(start, str) and re.fullmatch(r"olora|pissa(_niter_\d+)?", start) is not None


def decompose(weight: Tensor, r: int, scaling: float, start: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a float32 weight [out, in]; scaling * B A is the part that they take over."""
    if r > min(weight.shape):
        raise ValueError(f"r: expected at most {min(weight.shape)}, the rank of the weight, for {start!r}, got {r}")
    if start == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r], Q[:, :r]
    if scaling <= 0:
        raise ValueError(f"lora_alpha: expected one above 0 for {start!r}, got a scaling of {scaling}")
    if start == "pissa":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=int(start.removeprefix("pissa_niter_")))
        Vh = V.mT
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def orthogonal_factors(r: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """A [r, in] in the span of the odd rows of a random orthogonal matrix, B [out, r] in that of the even ones."""
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = (torch.randn(in_features, r // 2) @ Q[0::2]).T / 10.0
    B = torch.randn(out_features, r // 2) @ Q[1::2] / 10.0
    return A, B
