# SPDX-License-Identifier: Apache-2.0
"""Singular values and left singular vectors of small square matrices. Definition: csrc/jacobi_svd.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import ops

_jacobi_svd = ops.jacobi_svd.default

MAX_SIZE, MAX_SWEEPS = 1024, 60


def jacobi_svd(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``(U, S)`` of each matrix, ``matrix = U diag(S) V^T``, by one-sided Jacobi rotations, matrices in parallel.

    matrices: float64 [..., n, n], n <= 1024, need not be contiguous. U: [..., n, n], orthonormal columns; S: [..., n],
    descending. A singular value below 2^-200 of the largest is 0 and its column of U is 0 too. Singular values are
    relatively accurate, small ones too, where the columns scaled to norm 1 are well-conditioned (Demmel and Veselic
    1992); of other matrices relative to the largest, as LAPACK's are. V = matrix^T U / S.

    Raises RuntimeError for a wrong dtype or shape, and for NaN or infinity.

    >>> U, S = jacobi_svd(torch.tensor([[0.0, 2.0], [3.0, 0.0]], dtype=torch.float64))
    >>> S.tolist(), U.abs().tolist()
    ([3.0, 2.0], [[0.0, 1.0], [1.0, 0.0]])
    """
    if matrices.dim() < 2:
        raise RuntimeError(f"matrices: expected shape [..., n, n], got {list(matrices.shape)}")
    batch = matrices.detach().flatten(0, -3) if matrices.dim() > 2 else matrices.detach()[None]
    if not batch.numel():
        return torch.empty_like(matrices), matrices.new_empty(matrices.shape[:-1])
    # Entries below 1, by a power of two: exact.
    exponent = torch.frexp(batch.abs().amax((-2, -1))).exponent
    vectors, values, sweeps = _jacobi_svd(torch.ldexp(batch, -exponent[:, None, None]))
    readable = not (torch.compiler.is_compiling() or batch.is_meta)
    if readable and not bool(values.isfinite().all()):
        bad = int((~batch.isfinite()).sum())
        raise RuntimeError(f"matrices: expected finite values, got {bad} NaN or infinite of {batch.numel()}")
    if readable and int(sweeps.max()) > MAX_SWEEPS:
        raise RuntimeError(f"matrices: expected to converge in {MAX_SWEEPS} sweeps, {int(sweeps.argmax())} did not")
    values, order = values.sort(dim=-1, descending=True, stable=True)
    vectors = vectors.gather(1, order[:, :, None].expand_as(vectors))
    values = torch.ldexp(values, exponent[:, None])
    return vectors.mT.reshape(matrices.shape), values.reshape(matrices.shape[:-1])


@torch.library.register_fake("peftkern::jacobi_svd")
def _(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = matrices.new_empty(matrices.shape[:2])
    return matrices.new_empty(matrices.shape), values, matrices.new_empty(matrices.shape[:1], dtype=torch.int32)
