# SPDX-License-Identifier: Apache-2.0
"""The cases of the backward pass on tensor cores: dx of an NF4 layer, and low-rank products split among blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from .gemm_cases import LOW_RANK_TOLERANCE, nf4_weight
from .ops import BF16, F16, F32, Factor, Nf4Gradient
from .problem import (
    DTYPES,
    SUM_TOLERANCE,
    TORCH_DTYPE,
    Problem,
    assert_bits,
    assert_sums,
    drop,
    dropout_argument,
    random,
)


def _nf4_gradient(
    rows, out, columns, rank=0, q=BF16, factor=F32, p=0.0, block_size=64, nested=False, identity=False, misaligned=0
) -> Problem:
    """identity: q is one, so dx is the weight, bit for bit that of dequantize_nf4. misaligned: dh, F and dx."""
    problem, dtype = Problem(), TORCH_DTYPE[q]
    values = torch.eye(rows, out).to(dtype) if identity else random(rows, out, dtype=q)
    matrix, weight = nf4_weight(problem, out, columns, block_size, nested, dtype)
    dh, f = random(rows, rank) * 0.1, random(rank, columns, dtype=factor) * 0.1
    problem.args = Nf4Gradient(
        q=problem.place("q", values), q_dtype=q, rows=rows, weight=matrix,
        dh=problem.place("dh", dh, misaligned) if rank else None, rank=rank,
        factor=Factor(problem.place("factor", f, misaligned) if rank else None, factor, True),
        dropout=dropout_argument(problem, p), dx=problem.reserve("dx", rows * columns, dtype, misaligned),
    )  # fmt: skip

    def check() -> None:
        got = problem.result("dx", dtype, rows, columns)
        if identity:
            return assert_bits(got, weight.to(dtype) + 0.0, "nf4_gradient's weight")  # no sum is -0
        low_rank, size = drop(dh.double() @ f.double(), p), drop(dh.double().abs() @ f.double().abs(), p)
        expected = values.double() @ weight + low_rank
        magnitude = values.double().abs() @ weight.abs()
        assert_sums(got, expected, magnitude + (1 + LOW_RANK_TOLERANCE / SUM_TOLERANCE) * size, "nf4_gradient")

    problem.check = check
    return problem


gradient_builders = {"nf4_gradient": _nf4_gradient}

RANKS = (1, 3, 8, 16, 24, 64, 128, 256)


def gradient_cases() -> Iterator[tuple[str, dict]]:
    for i, (rank, p) in enumerate(itertools.product((0, *RANKS), (0.0, 0.1))):
        how = dict(q=BF16 + i // 2 % 2, factor=i % 3, p=p, nested=bool(i % 4 // 2))
        yield "nf4_gradient", dict(rows=(37, 5)[i % 2], out=136, columns=192, rank=rank, **how)
    for block_size in (32, 64, 128, 1024, 4096):
        for nested in (False, True):
            yield "nf4_gradient", dict(rows=70, out=72, columns=192, block_size=block_size, nested=nested)
            for q in (BF16, F16):
                yield "nf4_gradient", dict(rows=64, out=64, columns=320, block_size=block_size, nested=nested,
                                           q=q, identity=True)  # fmt: skip
    yield "nf4_gradient", dict(rows=200, out=200, columns=128, block_size=32, identity=True)
    for q in (BF16, F16):
        # tiles of 64 and 128 rows, which only a wide matrix has
        yield "nf4_gradient", dict(rows=70, out=72, columns=64 * 128, rank=5, q=q, p=0.1)
        yield "nf4_gradient", dict(rows=130, out=72, columns=64 * 128, rank=3, q=q, p=0.1)
        yield "nf4_gradient", dict(rows=35, out=0, columns=64, rank=4, q=q)
        yield "nf4_gradient", dict(rows=0, out=64, columns=64, rank=4, q=q)
        yield "nf4_gradient", dict(rows=33, out=512, columns=64, rank=12, q=q, p=0.2, misaligned=1)

    # the low-rank products: whole tiles and ragged ones, in one part and in several
    for i, (rank, p) in enumerate(itertools.product(RANKS, (0.0, 0.1))):
        a, b, rank_major = i % 3, (i + 1) % 3, bool(i % 4 // 2)
        yield "low_rank_down", dict(rows=20, columns=600, rank=rank, x=a, factor=b, rank_major=rank_major, p=p)
        yield "low_rank_down", dict(rows=150, columns=264, rank=rank, x=b, factor=a, rank_major=not rank_major, p=p)
        yield "low_rank_grad", dict(rows=530, columns=72, rank=rank, x=a, grad=b, rank_major=rank_major, p=p)
        yield "low_rank_grad", dict(rows=72, columns=264, rank=rank, x=b, grad=a, rank_major=not rank_major, p=p)
    for a, b, rank_major in itertools.product(DTYPES, DTYPES, (False, True)):
        yield "low_rank_down", dict(rows=9, columns=512, rank=48, x=a, factor=b, rank_major=rank_major, p=0.1)
        yield "low_rank_grad", dict(rows=512, columns=64, rank=48, x=a, grad=b, rank_major=rank_major, p=0.1)
    for x in DTYPES:  # more parts than a cluster has blocks
        yield "low_rank_down", dict(rows=3, columns=1024 * 17, rank=2, x=x)
        yield "low_rank_grad", dict(rows=1024 * 16 + 5, columns=16, rank=2, x=x, rank_major=bool(x), sums=x != F32)
    for x in DTYPES:  # enough tiles for a sum in one part
        yield "low_rank_down", dict(rows=128 * 200, columns=8, rank=2, x=x)
        yield "low_rank_grad", dict(rows=600, columns=128 * 140, rank=2, x=x)


def gradient_scheduled() -> Iterator[tuple[str, dict]]:
    yield "nf4_gradient", dict(rows=37, out=200, columns=192, rank=5, q=BF16, p=0.1)
    yield "nf4_gradient", dict(rows=37, out=136, columns=64, rank=20, q=F16, factor=BF16, nested=True, block_size=32)
    yield "low_rank_down", dict(rows=20, columns=600, rank=5, x=BF16, p=0.1)
    yield "low_rank_grad", dict(rows=530, columns=72, rank=5, x=F32, p=0.1)
