# SPDX-License-Identifier: Apache-2.0
"""The cases of csrc/jacobi_svd.h and csrc/rank_allocation.h."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from peftkern import reference

from .ops import (
    BF16,
    F16,
    F32,
    ImportanceUpdate,
    JacobiSvd,
    MaskRanks,
    OrthogonalFactor,
    Orthogonality,
    OrthogonalityGrad,
    RankMask,
    TripletLayer,
)
from .problem import DTYPES, TORCH_DTYPE, Problem, assert_bits, assert_sums, random


def _case(op: str, **options) -> tuple[str, dict]:
    return op, options


# ---- the Jacobi SVD --------------------------------------------------------------------------------------------------


def _jacobi_svd(n, batch=1, kind="random") -> Problem:
    """kind "nearly": a sweep or two are enough; "low rank": half the columns depend on the others; "graded": columns
    from 1 down to 1e-12; "nan": does not converge."""
    problem = Problem()
    matrices = torch.rand(batch, n, n, dtype=torch.float64) * 2 - 1
    if kind == "nearly":
        matrices = torch.diag(torch.linspace(0.9, 0.1, n, dtype=torch.float64)) + 1e-9 * matrices
    elif kind == "low rank":
        matrices[..., n // 2 :] = matrices[..., : n - n // 2]
    elif kind == "graded":
        matrices *= torch.logspace(0, -12, n, dtype=torch.float64)
    elif kind == "zero":
        matrices *= 0
    elif kind == "nan":
        matrices[:, 0, 0] = float("nan")
    problem.args = JacobiSvd(
        vectors=problem.place("vectors", matrices.mT), values=problem.reserve("values", batch * n, torch.float64),
        sweeps=problem.reserve("sweeps", batch, torch.int32), batch=batch, n=n,
    )  # fmt: skip

    def check() -> None:
        sweeps = problem.result("sweeps", torch.int32)
        if kind == "nan":
            assert (sweeps == 61).all(), sweeps
            return
        assert (sweeps >= 1).all() and (sweeps <= (3 if kind == "nearly" else 15)).all(), sweeps
        if not n * batch:
            return
        values = problem.result("values", torch.float64, batch, n)
        vectors = problem.result("vectors", torch.float64, batch, n, n)
        for matrix, U, S in zip(matrices, vectors.mT, values, strict=True):
            expected = torch.linalg.svdvals(matrix)
            limit = 8 * n * torch.finfo(torch.float64).eps * expected[0]
            assert ((S.sort(descending=True).values - expected).abs() <= limit).all(), "jacobi_svd values"
            kept = U[:, limit < S]  # a column that is rounding has a direction that is rounding
            assert ((kept.mT @ kept - torch.eye(kept.shape[1])).abs() <= 1e-13).all(), "jacobi_svd vectors"
            rows = U.mT @ matrix  # S V^T
            assert ((rows @ rows.mT - torch.diag(S**2)).abs() <= 4 * limit * expected[0]).all(), "jacobi_svd rows"

    problem.check = check
    return problem


# ---- rank allocation -------------------------------------------------------------------------------------------------

LAYER_SHAPES = ((12, 64, 160), (3, 33, 37), (0, 8, 8), (1, 1, 1), (140, 7, 3), (5, 1030, 9), (8, 40, 300))
"""rank, in, out: whole chunks, ragged, no rank, single elements, more ranks than threads, long rows."""
MANY_LAYERS = tuple((1 + i % 3, 3 + i, 5) for i in range(70))
"""More than two launches hold."""


def _update_importance(
    shapes=LAYER_SHAPES, dtypes=(F32,), grads=(True, True, True), grad_scale=None, misaligned=0, kind="random"
) -> Problem:
    problem, beta1, beta2 = Problem(), 0.85, 0.7
    shapes = MANY_LAYERS if shapes == "many" else shapes
    array, parts, state, first = (TripletLayer * max(len(shapes), 1))(), [], 0, 0
    for i, (rank, columns, out) in enumerate(shapes):
        layer, dtype = array[i], dtypes[i % len(dtypes)]
        layer.dtype, layer.rank, layer.out, layer.first, layer.state = dtype, rank, out, first, state
        setattr(layer, "in", columns)
        pieces = []
        at = state
        for name, shape, has_grad in zip("AEB", ((rank, columns), (rank, 1), (out, rank)), grads, strict=True):
            p, g = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
            if kind == "nan" and p.numel():
                g[-1, -1] = float("nan")
            setattr(layer, name, problem.place(f"{name} {i}", p, misaligned))
            if has_grad:
                setattr(layer, f"grad_{name}", problem.place(f"grad_{name} {i}", g, misaligned))
            pieces.append((p, g if has_grad else None, at))
            at += -(-p.numel() // 16) * 16
        parts.append(pieces)
        state, first = at, first + rank
    sensitivity, uncertainty = torch.rand(state), torch.rand(state)
    problem.args = ImportanceUpdate(
        layers=array, layer_count=len(shapes), triplets=first, beta1=beta1, beta2=beta2,
        grad_scale=problem.place("grad_scale", torch.tensor([grad_scale])) if grad_scale else None,
        sensitivity=problem.place("sensitivity", sensitivity, misaligned),
        uncertainty=problem.place("uncertainty", uncertainty, misaligned),
        scores=problem.reserve("scores", first), workspace=problem.reserve("workspace", 8 * first),
    )  # fmt: skip

    def check() -> None:
        new = [problem.result(name) for name in ("sensitivity", "uncertainty")]
        expected_state = [sensitivity.clone(), uncertainty.clone()]
        scores = []
        for pieces in parts:
            elements = []
            for p, g, at in pieces:
                here = slice(at, at + p.numel())
                old = (sensitivity[here].reshape(p.shape), uncertainty[here].reshape(p.shape))
                inverse = torch.tensor(1.0) / grad_scale if grad_scale else torch.tensor(1.0)
                averages = reference.update_importance(
                    p.float(), None if g is None else g.float() * inverse, *old, beta1, beta2
                )
                for target, values in zip(expected_state, averages, strict=True):
                    target[here] = values.reshape(-1)
                elements.append(averages[0].double() * averages[1].double())
            scores.append(reference.triplet_scores(*elements))
        for got, expected, name in zip(new, expected_state, ("sensitivity", "uncertainty"), strict=True):
            finite = ~expected.isnan()  # also the padding, which nobody may write
            assert_bits(got[finite], expected[finite], name)
            assert got[~finite].isnan().all(), name
        expected = torch.cat(scores) if scores else torch.zeros(0)
        got = problem.result("scores")
        assert got.isnan().equal(expected.isnan()), "scores"
        finite = ~expected.isnan()
        assert_sums(got[finite], expected[finite], expected[finite].abs(), "scores")

    problem.check = check
    return problem


def _scores_of(kind: str, n: int) -> torch.Tensor:
    scores = torch.randn(n)
    if kind == "ties":
        scores = (scores * 2).round()  # -0 among them
    elif kind == "equal":
        scores = torch.full((n,), 0.25)
    elif kind == "zero":
        scores = torch.where(scores < 0, -0.0, 0.0)
    elif kind == "special":
        scores[::5], scores[1::5], scores[2::10] = float("nan"), float("inf"), -float("inf")
        scores[3::10] = 1e-45
    elif kind == "close":
        scores = (torch.randint(16, (n,), dtype=torch.int32) + 0x3F800000).view(torch.float32)
    return scores


def _rank_mask(n, budget, exact=False, kind="random", misaligned=0) -> Problem:
    problem, scores = Problem(), _scores_of(kind, n)
    problem.args = RankMask(
        scores=problem.place("scores", scores, misaligned), triplets=n, budget=budget, exact=exact,
        keep=problem.reserve("keep", n, torch.uint8, misaligned),
    )  # fmt: skip

    def check() -> None:
        expected = reference.rank_mask(scores, budget, exact)
        assert_bits(problem.result("keep", torch.uint8), expected.to(torch.uint8), "rank_mask")

    problem.check = check
    return problem


def _mask_ranks(ranks=(12, 0, 3, 200, 1), dtypes=(F32, BF16, F16)) -> Problem:
    problem, array, values, first = Problem(), (TripletLayer * max(len(ranks), 1))(), [], 0
    for i, rank in enumerate(ranks):
        layer, dtype = array[i], dtypes[i % len(dtypes)]
        values.append(random(rank, dtype=dtype))
        layer.dtype, layer.rank, layer.first = dtype, rank, first
        layer.E = problem.place(f"masked {i}", values[-1])
        first += rank
    keep = torch.rand(first) < 0.5
    problem.args = MaskRanks(layers=array, layer_count=len(ranks), keep=problem.place("keep", keep.to(torch.uint8)))

    def check() -> None:
        at = 0
        for i, E in enumerate(values):
            expected = torch.where(keep[at : at + len(E)], E, torch.zeros_like(E))
            assert_bits(problem.result(f"masked {i}", E.dtype), expected, f"mask_ranks of layer {i}")
            at += len(E)

    problem.check = check
    return problem


FACTOR_SHAPES = ((12, 160, True), (12, 64, False), (3, 33, True), (0, 8, False), (1, 1, True), (37, 20, True),
                 (70, 131, False), (16, 300, False))  # fmt: skip
"""rank, columns, rank_major: tiles whole and ragged, of A and B, more ranks than columns, than a slab of D."""
MANY_FACTORS = tuple((1 + i % 3, 4 + i, bool(i % 2)) for i in range(130))


def _factors_of(problem: Problem, shapes, dtypes, misaligned: int):
    """The array, every factor as [rank, columns], and the number of deviations."""
    array, values, at = (OrthogonalFactor * max(len(shapes), 1))(), [], 0
    for i, (rank, columns, rank_major) in enumerate(shapes):
        dtype = dtypes[i % len(dtypes)]
        stored = random(*((rank, columns) if rank_major else (columns, rank)), dtype=dtype)
        array[i].data = problem.place(f"factor {i}", stored, misaligned)
        array[i].dtype, array[i].rank_major, array[i].rank, array[i].columns = dtype, rank_major, rank, columns
        array[i].deviation = at
        values.append((stored if rank_major else stored.T).double())
        at += rank**2
    return array, values, at


def _orthogonality(shapes=FACTOR_SHAPES, dtypes=(F32,), squared=False, misaligned=0, kind="random") -> Problem:
    """kind "orthogonal": rows of the identity, of norm 0."""
    problem, shapes = Problem(), MANY_FACTORS if shapes == "many" else shapes
    array, values, deviations = _factors_of(problem, shapes, dtypes, misaligned)
    if kind == "orthogonal":
        for i, (rank, columns, rank_major) in enumerate(shapes):
            values[i] = torch.eye(rank, columns)
            stored = values[i] if rank_major else values[i].T
            array[i].data = problem.place(f"factor {i}", stored.to(TORCH_DTYPE[array[i].dtype]))
    problem.args = Orthogonality(
        factors=array, factor_count=len(shapes), squared=squared, deviations=problem.reserve("deviations", deviations),
        norms=problem.reserve("norms", len(shapes)), value=problem.reserve("value", 1),
    )  # fmt: skip

    def check() -> None:
        grams = [x @ x.T - torch.eye(len(x), dtype=x.dtype) for x in values]
        magnitudes = [x.abs() @ x.abs().T + torch.eye(len(x), dtype=x.dtype) for x in values]
        if grams:
            flat = [torch.cat([m.reshape(-1) for m in matrices]).double() for matrices in (grams, magnitudes)]
            assert_sums(problem.result("deviations"), *flat, "deviations")
        norms = torch.tensor([g.double().norm() for g in grams], dtype=torch.float64)
        bounds = torch.tensor([m.double().norm() for m in magnitudes], dtype=torch.float64)
        assert_sums(problem.result("norms"), norms, bounds, "norms")
        value = norms.square().sum() if squared else norms.mean() if len(norms) else norms.sum()
        bound = (bounds.square() * 2).sum() if squared else bounds.mean() if len(norms) else bounds.sum()
        assert_sums(problem.result("value"), value.reshape(1), bound.reshape(1), "value")
        if kind == "orthogonal":
            assert not problem.result("deviations").any() and not problem.result("value").any()

    problem.check = check
    return problem


def _orthogonality_grad(shapes=FACTOR_SHAPES, dtypes=(F32,), squared=False, misaligned=0, zero_norm=False) -> Problem:
    problem, upstream = Problem(), torch.tensor([-1.5])
    shapes = MANY_FACTORS if shapes == "many" else shapes
    array, values, deviations = _factors_of(problem, shapes, dtypes, misaligned)
    D = torch.zeros(deviations)
    norms = torch.rand(len(shapes)) + 0.5
    if zero_norm:
        norms[::2] = 0.0
    matrices = []
    for i, x in enumerate(values):
        d = (x @ x.T - torch.eye(len(x), dtype=x.dtype)).float()
        D[array[i].deviation : array[i].deviation + d.numel()] = d.reshape(-1)
        matrices.append(d.double())
        array[i].grad = problem.reserve(f"grad {i}", x.numel(), TORCH_DTYPE[array[i].dtype], misaligned)
    problem.args = OrthogonalityGrad(
        factors=array, factor_count=len(shapes), squared=squared, upstream=problem.place("upstream", upstream),
        deviations=problem.place("deviations", D), norms=problem.place("norms", norms),
    )  # fmt: skip

    def check() -> None:
        for i, (x, d) in enumerate(zip(values, matrices, strict=True)):
            norm = norms[i].item()
            c = upstream.item() * (4 if squared else 2 / (len(shapes) * norm) if norm else 0.0)
            expected, magnitude = c * d @ x, abs(c) * d.abs() @ x.abs()
            if not array[i].rank_major:
                expected, magnitude = expected.T, magnitude.T
            got = problem.result(f"grad {i}", TORCH_DTYPE[array[i].dtype], *expected.shape)
            assert_sums(got, expected, magnitude, f"grad of factor {i}")

    problem.check = check
    return problem


allocation_builders = {
    "jacobi_svd": _jacobi_svd,
    "update_importance": _update_importance,
    "rank_mask": _rank_mask,
    "mask_ranks": _mask_ranks,
    "orthogonality": _orthogonality,
    "orthogonality_grad": _orthogonality_grad,
}


def _jacobi_cases():
    for n in (0, 1, 2, 3, 5, 8, 16, 17, 33, 36):  # a bye, more columns than lanes, more pairs than warps
        yield _case("jacobi_svd", n=n, batch=2)
    for kind in ("low rank", "graded", "zero", "nan"):
        yield _case("jacobi_svd", n=9, kind=kind)
    yield _case("jacobi_svd", n=4, batch=0)
    for n in (96, 97):  # the last in shared memory, the first in global memory
        yield _case("jacobi_svd", n=n, kind="nearly")


def _rank_allocation_cases():
    for dtype in DTYPES:
        yield _case("update_importance", dtypes=(dtype,))
        yield _case("update_importance", dtypes=(dtype,), shapes=((5, 80, 24), (9, 24, 33)), misaligned=1)
    yield _case("update_importance", dtypes=DTYPES, grad_scale=1000.0)
    for grads in itertools.product((False, True), repeat=3):
        yield _case("update_importance", shapes=((4, 24, 10),), grads=grads)
    yield _case("update_importance", shapes=((2, 20, 10),), kind="nan")
    # B's columns in steps of a block, the last one whole, and short of one
    for shape in ((512, 8, 16), (511, 8, 16)):
        yield _case("update_importance", shapes=(shape,))
    for shapes in ("many", ((0, 5, 5),), ()):
        yield _case("update_importance", shapes=shapes)
    for kind, exact in itertools.product(("random", "ties", "equal", "zero", "special", "close"), (False, True)):
        for budget in (1, 20, 69, 79, 80):
            yield _case("rank_mask", n=80, budget=budget, exact=exact, kind=kind)
        yield _case("rank_mask", n=2100, budget=1300, exact=exact, kind=kind)
    for n, budget in ((1, 0), (1, 1), (80, 0), (80, -5), (80, 81), (80, 2**40), (0, 3), (1024, 512), (1025, 3)):
        yield _case("rank_mask", n=n, budget=budget, exact=bool(n % 2), misaligned=n % 2)
    for ranks in ((12, 0, 3, 200, 1), (2,) * 70, (0,), ()):
        yield _case("mask_ranks", ranks=ranks)
    for op, squared in itertools.product(("orthogonality", "orthogonality_grad"), (False, True)):
        for dtypes in ((F32,), (BF16,), (F16,), DTYPES):
            yield _case(op, dtypes=dtypes, squared=squared, misaligned=len(dtypes) // 2)
        for shapes in ("many", ((0, 5, True),), ()):
            yield _case(op, shapes=shapes, squared=squared)
    yield _case("orthogonality", kind="orthogonal", shapes=((4, 9, True), (12, 70, False)))
    yield _case("orthogonality_grad", zero_norm=True)
    yield _case("orthogonality_grad", shapes=((63, 70, True),))  # ranks that are one short of a step


def allocation_cases() -> Iterator[tuple[str, dict]]:
    yield from _jacobi_cases()
    yield from _rank_allocation_cases()


def allocation_scheduled() -> Iterator[tuple[str, dict]]:
    yield _case("jacobi_svd", n=9, batch=2)
    yield _case("update_importance", shapes=((3, 300, 40), (2, 20, 30)))
    yield _case("rank_mask", n=1500, budget=700, exact=True, kind="ties")
    yield _case("mask_ranks", ranks=(3, 40))
    yield _case("orthogonality", shapes=((5, 80, True), (18, 20, False)))
    yield _case("orthogonality_grad", shapes=((5, 80, True), (18, 20, False)))
