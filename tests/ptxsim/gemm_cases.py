# SPDX-License-Identifier: Apache-2.0
"""The cases of csrc/nf4_product.h: products with an NF4 weight that dequantize it on the way."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from peftkern import reference

from .ops import BF16, F16, F32, Factor, Nf4Forward, Nf4Matrix
from .problem import DTYPES, SUM_TOLERANCE, TORCH_DTYPE, Problem, assert_bits, assert_sums, random

LOW_RANK_TOLERANCE = 3 * 2**-18
"""Of a term u F relative to itself: 2^-18 that the sum of two bf16 values leaves of u, as much of F, and the product of
their low parts, of at most 2^-9 each, which is not made (csrc/cuda/nf4_forward.cu)."""


def nf4_weight(problem: Problem, out: int, columns: int, block_size: int, nested: bool, dtype: torch.dtype):
    """The argument, and W [out, columns] with the bits of dequantize_nf4, in float64."""
    blocks = -(-out * columns // block_size)
    packed = torch.randint(256, (out * columns // 2,), dtype=torch.uint8)
    matrix = Nf4Matrix(packed=problem.place("packed", packed), out=out, block_size=block_size)
    setattr(matrix, "in", columns)
    if nested:
        codes, groups = torch.randint(256, (blocks,), dtype=torch.uint8), torch.rand(-(-blocks // 256)) * 0.1
        offset = torch.rand(1) * 0.2
        matrix.codes, matrix.nested_absmax = problem.place("codes", codes), problem.place("nested_absmax", groups)
        matrix.offset = problem.place("offset", offset)
        absmax = reference.dequantize_absmax(codes, groups, offset)
    else:
        absmax = torch.rand(blocks) * 0.1 + 0.01
        matrix.absmax = problem.place("absmax", absmax)
    return matrix, reference.dequantize_nf4(packed, absmax, block_size, (out, columns), dtype).double()


def _nf4_forward(
    rows, out, columns, rank=0, x=BF16, factor=F32, block_size=64, nested=False, out_scale=False, bias=False, z=False,
    splits=1, identity=False, misaligned=0, y=None,
) -> Problem:  # fmt: skip
    """identity: x is one, so y is the weight, bit for bit that of dequantize_nf4. y: its dtype, if not that of x.
    misaligned: y, z, u, F, out_scale and bias begin so many elements after an aligned address."""
    problem, dtype, alpha = Problem(), TORCH_DTYPE[x], 0.75
    y_dtype = x if y is None else y
    values = torch.eye(rows, columns).to(dtype) if identity else random(rows, columns, dtype=x)
    u, f = random(rows, rank), random(out, rank, dtype=factor)
    scale, shift = random(out), random(out)
    matrix, w = nf4_weight(problem, out, columns, block_size, nested, dtype)
    args = problem.args = Nf4Forward(
        x=problem.place("x", values), x_dtype=x, rows=rows, weight=matrix,
        u=problem.place("u", u, misaligned) if rank else None, rank=rank,
        factor=Factor(problem.place("factor", f, misaligned) if rank else None, factor, False), alpha=alpha,
        out_scale=problem.place("out_scale", scale, misaligned) if out_scale else None,
        bias=problem.place("bias", shift, misaligned) if bias else None,
        z=problem.reserve("z", rows * out, dtype, misaligned) if z else None,
        y=problem.reserve("y", rows * out, TORCH_DTYPE[y_dtype], misaligned), y_dtype=y_dtype, splits=splits,
    )  # fmt: skip
    if args.workspace_size():
        args.workspace = problem.reserve("workspace", args.workspace_size())

    def check() -> None:
        if identity:
            got = problem.result("y", dtype, rows, out)
            return assert_bits(got, w.T[:rows].to(dtype) + 0.0, "nf4_forward's weight")  # no sum is -0
        low_rank = LOW_RANK_TOLERANCE / SUM_TOLERANCE
        terms, magnitude = values.double() @ w.T, values.double().abs() @ w.T.abs()
        expected = terms + alpha * u.double() @ f.double().T
        magnitude += (1 + low_rank) * alpha * u.double().abs() @ f.double().T.abs()
        if z:
            assert_sums(problem.result("z", dtype, rows, out), expected, magnitude, "nf4_forward z")
        if out_scale:
            expected, magnitude = expected * scale, magnitude * scale.abs()
        if bias:
            expected, magnitude = expected + shift, magnitude + shift.abs()
        assert_sums(problem.result("y", TORCH_DTYPE[y_dtype], rows, out), expected, magnitude, "nf4_forward y")

    problem.check = check
    return problem


gemm_builders = {"nf4_forward": _nf4_forward}


def gemm_cases() -> Iterator[tuple[str, dict]]:
    # every height of a tile, whole and ragged, one more than a tile; each with another rank, block size and dtype
    shapes = itertools.cycle(((128, 64), (200, 192), (132, 128), (130, 64), (37, 256)))
    ranks, blocks = itertools.cycle((0, 16, 3, 8, 24, 1)), itertools.cycle((64, 32, 256, 4096, 128))
    for i, rows in enumerate((1, 5, 8, 9, 16, 31, 32, 33, 64, 70, 128, 130)):
        for x in (BF16, F16):
            out, columns = next(shapes)
            options = dict(x=x, factor=DTYPES[(i + x) % 3], rank=next(ranks), block_size=next(blocks))
            yield "nf4_forward", dict(rows=rows, out=out, columns=columns, **options, nested=bool((i + x) % 2))
    # ranks of several steps, in each dtype of F
    for rank, factor in itertools.product((17, 64), DTYPES):
        yield "nf4_forward", dict(rows=7, out=100, columns=64, rank=rank, factor=factor)
    yield "nf4_forward", dict(rows=40, out=128, columns=64, rank=128, factor=BF16)
    yield "nf4_forward", dict(rows=3, out=33, columns=64, rank=256)
    # two scales in a step, one for several rows, and rows that begin within a block, plain and nested
    for block_size, nested in itertools.product((32, 64, 256, 4096), (False, True)):
        yield "nf4_forward", dict(rows=3, out=259, columns=320, block_size=block_size, nested=nested)
    # the weights themselves, in each tile
    for rows, x, nested in itertools.product((8, 16, 32, 64, 128), (BF16, F16), (False, True)):
        block_size = 32 if nested == (x == F16) else 128
        options = dict(x=x, block_size=block_size, nested=nested, splits=1 + rows // 16 % 2)
        yield "nf4_forward", dict(rows=rows, out=140, columns=128, **options, identity=True)
    # more steps than stages, in each tile
    for rows in (8, 16, 32, 64, 128):
        yield "nf4_forward", dict(rows=rows, out=64, columns=512, rank=4, nested=True)
    # splits: even, uneven, more than steps
    for rows, columns, splits in ((1, 512, 2), (8, 320, 3), (12, 128, 2), (30, 192, 2), (60, 256, 4), (130, 128, 2),
                                  (2, 64, 3)):  # fmt: skip
        for x in (BF16, F16):
            options = dict(x=x, rank=8, splits=splits, block_size=32 if x == F16 else 64)
            yield "nf4_forward", dict(rows=rows, out=140, columns=columns, **options, bias=True, nested=x == F16)
    # more splits than a cluster has blocks: whole clusters, and a rest
    for rows, x in itertools.product((1, 9, 30, 40, 130), (BF16, F16)):
        yield "nf4_forward", dict(rows=rows, out=132, columns=1024, rank=4, x=x, splits=16)
    yield "nf4_forward", dict(rows=5, out=36, columns=768, rank=4, splits=12)
    # every combination of the optional operands, with vector stores and without
    for out_scale, bias, z in itertools.product((False, True), repeat=3):
        extras = dict(out_scale=out_scale, bias=bias, z=z)
        yield "nf4_forward", dict(rows=9, out=60, columns=64, rank=8, **extras)
        yield "nf4_forward", dict(rows=5, out=61, columns=64, x=F16, rank=6, factor=F16, **extras, misaligned=1)
    everything = dict(rank=8, out_scale=True, bias=True, z=True)
    yield "nf4_forward", dict(rows=20, out=64, columns=128, **everything, splits=2, misaligned=1)
    yield "nf4_forward", dict(rows=20, out=64, columns=128, **everything, factor=BF16, misaligned=2)
    # y in float32: of one block, of several, of a cluster and of several
    for rows, splits in ((7, 1), (9, 1), (30, 3), (70, 2), (130, 4), (5, 16)):
        yield "nf4_forward", dict(rows=rows, out=132, columns=1024, x=BF16, y=F32, splits=splits, nested=rows > 9)
    yield "nf4_forward", dict(rows=5, out=61, columns=64, x=F16, y=F32, **everything, misaligned=1)
    # nothing to do
    yield "nf4_forward", dict(rows=0, out=64, columns=64, rank=8)
    yield "nf4_forward", dict(rows=4, out=0, columns=64)
    # no sum but that over the rank
    yield "nf4_forward", dict(rows=4, out=40, columns=0, rank=8, bias=True)


def gemm_scheduled() -> Iterator[tuple[str, dict]]:
    for i, rows in enumerate((8, 12, 32, 40, 100)):
        options = dict(x=BF16 if i % 2 else F16, rank=5, block_size=32 if i % 2 else 64, nested=bool(i // 2 % 2))
        yield "nf4_forward", dict(rows=rows, out=70, columns=448, **options, splits=1 + i % 2)
