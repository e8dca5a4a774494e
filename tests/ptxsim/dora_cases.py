# SPDX-License-Identifier: Apache-2.0
"""Cases of DoRA's norms (csrc/cuda/row_norms.cu)."""

from __future__ import annotations

import itertools

import torch

from peftkern import reference

from .ops import BF16, F16, F32, DoraNorm, SquaredRowNorms
from .problem import DTYPES, Problem, assert_sums, random


def _squared_row_norms(rows, columns, dtype=F32, block_size=0, misaligned=0) -> Problem:
    """block_size: of NF4; 0 for a dense weight."""
    problem, n = Problem(), rows * columns
    if block_size:
        data, absmax = torch.randint(256, (-(-n // 2),), dtype=torch.uint8), torch.rand(-(-n // block_size))
        values = reference.dequantize_nf4(data, absmax, block_size, (rows, columns), torch.float32)
    else:
        data, absmax = random(rows, columns, dtype=dtype), None
        values = data
    problem.args = SquaredRowNorms(
        weight=problem.place("weight", data, misaligned),
        absmax=None if absmax is None else problem.place("absmax", absmax), dtype=dtype, block_size=block_size or 64,
        rows=rows, columns=columns, out=problem.reserve("out", rows, torch.float64),
    )  # fmt: skip

    def check() -> None:
        expected = values.double().square().sum(1)
        assert_sums(problem.result("out", torch.float64).float(), expected, expected, "squared_row_norms")

    problem.check = check
    return problem


def _dora_norm(rows, rank, B=F32, cancels=False) -> Problem:
    """cancels: the row of W is minus that of s B A, and what is left is the rounding of the two."""
    problem, scaling, columns = Problem(), 0.75, 24
    A, b = torch.randn(rank, columns), random(rows, rank, dtype=B)
    delta = scaling * b.double() @ A.double()
    W = -delta if cancels else torch.randn(rows, columns).double()
    w2, P, G = W.square().sum(1), (A.double() @ W.T).float(), A.double() @ A.double().T
    problem.args = DoraNorm(
        w2=problem.place("w2", w2), P=problem.place("P", P) if rank else None,
        G=problem.place("G", G) if rank else None, B=problem.place("B", b) if rank else None, B_dtype=B, rows=rows,
        rank=rank, scaling=scaling, norm=problem.reserve("norm", rows),
    )  # fmt: skip

    def check() -> None:
        norm, expected = problem.result("norm").double(), (W + delta).square().sum(1)
        cross = 2 * scaling * (b.double().abs() * P.double().T.abs()).sum(1)
        error, unit = (norm.square() - expected).abs(), 2**-24  # P is rounded, and the norm
        assert (error <= unit * cross + 2.01 * unit * expected + 1e-12).all() and not norm.isnan().any(), error.max()

    problem.check = check
    return problem


dora_builders = {"squared_row_norms": _squared_row_norms, "dora_norm": _dora_norm}


def dora_cases():
    for dtype, (rows, columns) in itertools.product(DTYPES, ((9, 300), (8, 256), (1, 7), (3, 0), (0, 64))):
        yield "squared_row_norms", dict(rows=rows, columns=columns, dtype=dtype)
    yield "squared_row_norms", dict(rows=9, columns=304, dtype=BF16, misaligned=1)
    yield "squared_row_norms", dict(rows=9, columns=41)  # a chunk of one column
    # rows of whole blocks; that begin inside of a block, of a chunk, of a byte; an odd number of weights
    for columns, block_size in itertools.product((256, 96, 300, 33, 1), (32, 64, 4096)):
        yield "squared_row_norms", dict(rows=9, columns=columns, block_size=block_size)
    yield "squared_row_norms", dict(rows=0, columns=64, block_size=64)
    for dtype, rank in itertools.product(DTYPES, (0, 1, 8, 40)):
        yield "dora_norm", dict(rows=21, rank=rank, B=dtype)
    yield "dora_norm", dict(rows=21, rank=8, B=F16, cancels=True)
    yield "dora_norm", dict(rows=0, rank=4)


def dora_scheduled():
    yield "squared_row_norms", dict(rows=9, columns=300, dtype=BF16)
    yield "squared_row_norms", dict(rows=9, columns=300, block_size=64)
    yield "dora_norm", dict(rows=21, rank=40, B=BF16)
