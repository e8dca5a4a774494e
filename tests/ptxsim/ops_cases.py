# SPDX-License-Identifier: Apache-2.0
"""What the launchers are run on: cases, each of which makes its memory, its arguments and the values they should give.

Values come from peftkern/reference.py in float64, or bit for bit where the definition is exact.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from peftkern import reference

from . import buffer
from .cudart import Device, Recorder, host_library
from .ops import (
    BF16,
    F16,
    F32,
    OPS,
    ColumnSums,
    DequantizeAbsmax,
    DequantizeNf4,
    Dropout,
    Factor,
    ImportanceUpdate,
    JacobiSvd,
    LowRankDown,
    LowRankGrad,
    LowRankUp,
    MaskRanks,
    OrthogonalFactor,
    Orthogonality,
    OrthogonalityGrad,
    QuantizeAbsmax,
    QuantizeNf4,
    RankMask,
    TripletLayer,
)

DTYPES = (F32, BF16, F16)
TORCH_DTYPE = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16}
SEED = -0x6DCBA9876F543211  # both halves are used, and the sign bit is set

UPDATED_IN_PLACE = ("y", "vectors", "sensitivity", "uncertainty", "masked")
"""Writing another operand that a case places is reported."""

SUM_TOLERANCE = 2e-6
"""Error of an fp32 sum relative to the sum of its terms' magnitudes; 3e-7 is the largest these cases show."""


_random_numbers = threading.Lock()  # torch's generator belongs to all threads


@dataclass
class Problem:
    """A case in memory: run it once on a device."""

    args: object = None
    buffers: dict = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)  # bytes before the first element
    inputs: dict[str, bytes] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None

    def place(self, name: str, values: torch.Tensor, misaligned: int = 0) -> int:
        """Device memory that holds values, `misaligned` elements after an aligned address. Returns the pointer."""
        data = as_bytes(values).numpy()
        lead = np.full(misaligned * values.element_size(), 0xFF, np.uint8)  # NaN in every dtype
        writable = name.split()[0] in UPDATED_IN_PLACE
        self.buffers[name] = buffer(np.concatenate([lead, data]), name=name, writable=writable)
        self.offsets[name] = lead.size
        self.inputs[name] = self.buffers[name].numpy(np.uint8).tobytes()
        return self.buffers[name].address + lead.size

    def reserve(self, name: str, count: int, dtype: torch.dtype = torch.float32, misaligned: int = 0) -> int:
        """Uninitialised device memory for `count` values."""
        lead = misaligned * dtype.itemsize
        self.buffers[name] = buffer.empty(lead + count * dtype.itemsize, name=name)
        self.offsets[name] = lead
        return self.buffers[name].address + lead

    def result(self, name: str, dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
        data = self.buffers[name].numpy(np.uint8)[self.offsets[name] :].copy()
        values = torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
        return values.reshape(shape or (-1,))

    def run(self, device: Device, op: str) -> dict[str, bytes]:
        """launch_<op>, with every check of the simulator; all outputs complete. Returns what was written."""
        device.buffers = list(self.buffers.values())
        device.run(op, self.args)
        outputs = {}
        for name, memory in self.buffers.items():
            content, lead = memory.numpy(np.uint8).tobytes(), self.offsets[name]
            if not memory.writable:
                continue
            if name in self.inputs:
                assert content[:lead] == self.inputs[name][:lead], f"{op}: written before the start of {name}"
            else:
                written = memory.initialised()
                missing = int((~written[lead:]).sum())
                assert not missing, f"{op}: {missing} of {written.size - lead} bytes of {name} were never written"
                assert not written[:lead].any(), f"{op}: written before the start of {name}"
            outputs[name] = content
        return outputs


@dataclass(frozen=True)
class Case:
    op: str
    options: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        return "-".join([self.op, *(f"{k}{v}" for k, v in self.options)]).replace(" ", "")

    def make(self) -> Problem:
        with _random_numbers:
            torch.manual_seed(zlib.crc32(str(self).encode()))
            return _BUILDERS[self.op](**dict(self.options))

    def run(self, device: Device, check: bool = True) -> dict[str, bytes]:
        problem = self.make()
        outputs = problem.run(device, self.op)
        if check:
            problem.check()
        return outputs

    def run_on_recorder(self, recorder: Recorder) -> int:
        """Asks the launcher which kernels it would run. Returns its error."""
        problem = self.make()  # its buffers live until the end of this function
        with recorder.active():
            return getattr(host_library(), f"ptxsim_{self.op}")(ctypes.byref(problem.args))


def case(op: str, **options) -> Case:
    return Case(op, tuple(options.items()))


# ---- values ----------------------------------------------------------------------------------------------------------


def random(*shape: int, dtype: int = F32) -> torch.Tensor:
    return torch.randn(shape).to(TORCH_DTYPE[dtype])


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else torch.empty(0, dtype=torch.uint8)


def threshold_of(p: float) -> int:
    return int(p * 32768 + 0.5)


def dropout_argument(problem: Problem, p: float) -> Dropout:
    threshold = threshold_of(p)
    if not threshold:
        return Dropout(None, 0, 1.0)
    seed = problem.place("seed", torch.tensor([SEED]))
    return Dropout(seed, threshold, 32768 / (32768 - threshold))


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """reference.dropout in float64; a dropped NaN is 0, as the definition in csrc/dropout.h says."""
    x = x.double()
    if not threshold_of(p) or not x.numel():
        return x
    keep = reference.dropout_mask(*x.shape, threshold_of(p), SEED)
    return torch.where(keep, reference.dropout(torch.where(keep, x, 0.0), p, SEED), 0.0)


def assert_sums(got: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, what: str) -> None:
    """Every value within SUM_TOLERANCE of its own sum of magnitudes, plus half a unit in the last place."""
    if not got.numel():
        return
    info = torch.finfo(got.dtype)
    rounding = 0.501 * info.eps * expected.abs() + (0.501 * info.eps * info.tiny if got.dtype != torch.float32 else 0)
    error = (got.double() - expected).abs()
    excess = error - (SUM_TOLERANCE * magnitude + rounding + 1e-30)
    worst = torch.unravel_index(excess.argmax(), excess.shape)
    assert not (excess > 0).any() and not error.isnan().any(), (
        f"{what}: got {got[worst].item()}, expected {expected[worst].item()} at {tuple(map(int, worst))}; "
        f"error {error[worst].item():.2e} of magnitude {magnitude[worst].item():.3g}"
    )


def assert_bits(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert as_bytes(got).equal(as_bytes(expected)), (
        f"{what}: {int((got != expected).sum())} of {got.numel()} values differ"
    )


# ---- the low-rank kernels --------------------------------------------------------------------------------------------


def _factor(problem: Problem, columns: int, rank: int, dtype: int, rank_major: bool, misaligned: int):
    """The argument, and F [rank, columns] in float64."""
    values = random(*((rank, columns) if rank_major else (columns, rank)), dtype=dtype)
    address = problem.place("factor", values, misaligned) if values.numel() else None
    return Factor(address, dtype, rank_major), (values if rank_major else values.T).double()


def _low_rank_down(rows, columns, rank, x=F32, factor=F32, rank_major=True, p=0.0, misaligned=0) -> Problem:
    problem, alpha = Problem(), 0.75
    values = random(rows, columns, dtype=x)
    argument, f = _factor(problem, columns, rank, factor, rank_major, misaligned)
    problem.args = LowRankDown(
        x=problem.place("x", values, misaligned), x_dtype=x, rows=rows, columns=columns, rank=rank, factor=argument,
        alpha=alpha, dropout=dropout_argument(problem, p), out=problem.reserve("out", rows * rank),
    )  # fmt: skip

    def check() -> None:
        dropped = drop(values, p)
        got = problem.result("out", torch.float32, rows, rank)
        assert_sums(got, alpha * dropped @ f.T, alpha * dropped.abs() @ f.abs().T, "low_rank_down")

    problem.check = check
    return problem


def _low_rank_up(
    rows, columns, rank, y=F32, factor=F32, rank_major=True, p=0.0, out_scale=True, bias=True, z=True, misaligned=0
) -> Problem:
    problem, alpha = Problem(), 1.25
    u, before = random(rows, rank), random(rows, columns, dtype=y)
    scale, shift = random(columns), random(columns)
    argument, f = _factor(problem, columns, rank, factor, rank_major, misaligned)
    problem.args = LowRankUp(
        u=problem.place("u", u, misaligned), rows=rows, columns=columns, rank=rank, factor=argument, alpha=alpha,
        dropout=dropout_argument(problem, p),
        out_scale=problem.place("out_scale", scale, misaligned) if out_scale else None,
        bias=problem.place("bias", shift) if bias else None,
        z=problem.reserve("z", rows * columns, TORCH_DTYPE[y]) if z else None,
        y=problem.place("y", before, misaligned), y_dtype=y,
    )  # fmt: skip

    def check() -> None:
        dtype = TORCH_DTYPE[y]
        expected = before.double() + alpha * drop(u.double() @ f, p)
        magnitude = before.double().abs() + alpha * drop(u.double().abs() @ f.abs(), p)
        if z:
            assert_sums(problem.result("z", dtype, rows, columns), expected, magnitude, "low_rank_up z")
        if out_scale:
            expected, magnitude = expected * scale, magnitude * scale.abs()
        if bias:
            expected, magnitude = expected + shift, magnitude + shift.abs()
        assert_sums(problem.result("y", dtype, rows, columns), expected, magnitude, "low_rank_up y")

    problem.check = check
    return problem


def _low_rank_grad(rows, columns, rank, x=F32, grad=F32, rank_major=True, p=0.0, misaligned=0) -> Problem:
    problem, alpha = Problem(), 1.5
    values, u = random(rows, columns, dtype=x), random(rows, rank)
    problem.args = LowRankGrad(
        u=problem.place("u", u, misaligned), x=problem.place("x", values, misaligned), x_dtype=x, rows=rows,
        columns=columns, rank=rank, alpha=alpha, dropout=dropout_argument(problem, p),
        grad=problem.reserve("grad", rank * columns, TORCH_DTYPE[grad]), grad_dtype=grad, rank_major=rank_major,
    )  # fmt: skip

    def check() -> None:
        dropped, left = drop(values, p), u.double().T
        expected, magnitude = alpha * left @ dropped, alpha * left.abs() @ dropped.abs()
        got = problem.result("grad", TORCH_DTYPE[grad], *((rank, columns) if rank_major else (columns, rank)))
        assert_sums(got if rank_major else got.T, expected, magnitude, "low_rank_grad")

    problem.check = check
    return problem


def _column_sums(rows, columns, g=F32, z=False, misaligned=0) -> Problem:
    problem = Problem()
    values, factors = random(rows, columns, dtype=g), random(rows, columns, dtype=g)
    problem.args = ColumnSums(
        g=problem.place("g", values, misaligned), z=problem.place("z", factors) if z else None, g_dtype=g, rows=rows,
        columns=columns, out=problem.reserve("out", columns),
    )  # fmt: skip

    def check() -> None:
        terms = values.double() * (factors.double() if z else 1.0)
        assert_sums(problem.result("out"), terms.sum(0), terms.abs().sum(0), "column_sums")

    problem.check = check
    return problem


# ---- NF4 -------------------------------------------------------------------------------------------------------------


def _between_division_and_reciprocal() -> torch.Tensor:
    """absmax a = values[0] and values w for which w / a and w * (1 / a) have different codes."""
    codes = torch.tensor(reference.NF4_CODES)
    thresholds = (codes[1:] + codes[:-1]) / 2
    while True:
        a = torch.rand(()) + 0.5
        at = thresholds * a
        w = torch.cat([at, *(torch.nextafter(at, torch.tensor(end)) for end in (-9.0, 9.0))])
        differ = torch.bucketize(w / a, thresholds) != torch.bucketize(w * (1.0 / a), thresholds)
        if differ.any():
            return torch.cat([a[None], w[differ]])


def _quantize_nf4(n, block_size, w=F32, special=True, misaligned=0) -> Problem:
    """special: blocks of zeros, of ties between two codes, and with NaN and infinities, as far as n has room;
    "division": a last block whose codes tell a division from a multiplication by the reciprocal.
    """
    problem = Problem()
    values = random(n) * 0.02
    blocks = values[: n // block_size * block_size].view(-1, block_size)
    if special == "division":
        telling = _between_division_and_reciprocal()
        values[(n - 1) // block_size * block_size :][: len(telling)] = telling
    elif special and len(blocks) > 3:
        codes = torch.tensor(reference.NF4_CODES)
        blocks[1] = 0.0
        blocks[2] = ((codes[1:] + codes[:-1]) / 2)[torch.randint(15, (block_size,))]
        blocks[2, 0] = 1.0
    if special is True and len(blocks) > 6:
        blocks[3, 5], blocks[4, 7], blocks[5, 1] = float("inf"), float("nan"), float("-inf")
    values = values.to(TORCH_DTYPE[w])
    problem.args = QuantizeNf4(
        w=problem.place("w", values, misaligned), w_dtype=w, n=n, block_size=block_size,
        packed=problem.reserve("packed", -(-n // 2), torch.uint8, misaligned),
        absmax=problem.reserve("absmax", -(-n // block_size)),
    )  # fmt: skip

    def check() -> None:
        packed, absmax = reference.quantize_nf4(values, block_size)
        finite = absmax.isfinite()
        got = problem.result("absmax")
        assert_bits(got[finite], absmax[finite], "quantize_nf4 absmax")
        assert not got[~finite].isfinite().any(), "quantize_nf4: a NaN or an infinity is missing in absmax"
        defined = finite.repeat_interleave(block_size // 2)[: packed.numel()]
        assert_bits(problem.result("packed", torch.uint8)[defined], packed[defined], "quantize_nf4 packed")

    problem.check = check
    return problem


def _dequantize_nf4(n, block_size, out=F32, misaligned=0) -> Problem:
    problem, dtype = Problem(), TORCH_DTYPE[out]
    packed = torch.randint(256, (-(-n // 2),), dtype=torch.uint8)
    absmax = torch.rand(-(-n // block_size)) * 0.1
    problem.args = DequantizeNf4(
        packed=problem.place("packed", packed, misaligned), absmax=problem.place("absmax", absmax), n=n,
        block_size=block_size, out=problem.reserve("out", n, dtype, misaligned), out_dtype=out,
    )  # fmt: skip

    def check() -> None:
        expected = reference.dequantize_nf4(packed, absmax, block_size, (n,), dtype)
        assert_bits(problem.result("out", dtype), expected, "dequantize_nf4")

    problem.check = check
    return problem


def _quantize_absmax(n, kind="random") -> Problem:
    """kind "ties": a mean of 0 and values halfway between two codes."""
    problem = Problem()
    if kind == "ties":
        codes = reference.dynamic_codes()
        halfway = torch.cat([(codes[1:] + codes[:-1]) / 2, torch.ones(1)])[-128:]
        absmax = torch.cat([halfway, -halfway]).repeat(-(-n // 256))[:n]
    else:
        absmax = {"random": torch.randn(n).abs() * 0.05, "constant": torch.full((n,), 0.25), "zero": torch.zeros(n)}[
            kind
        ]
    problem.args = QuantizeAbsmax(
        absmax=problem.place("absmax", absmax), n=n, codes=problem.reserve("codes", n, torch.uint8),
        nested_absmax=problem.reserve("nested_absmax", -(-n // 256)), offset=problem.reserve("offset", 1),
    )  # fmt: skip

    def check() -> None:
        codes, nested, offset = reference.quantize_absmax(absmax)
        assert_bits(problem.result("offset"), offset.reshape(1), "quantize_absmax offset")
        assert_bits(problem.result("nested_absmax"), nested, "quantize_absmax nested_absmax")
        assert_bits(problem.result("codes", torch.uint8), codes, "quantize_absmax codes")

    problem.check = check
    return problem


def _dequantize_absmax(n) -> Problem:
    problem = Problem()
    codes, nested = torch.randint(256, (n,), dtype=torch.uint8), torch.rand(-(-n // 256)) * 0.1
    offset = torch.rand(1)
    problem.args = DequantizeAbsmax(
        codes=problem.place("codes", codes), nested_absmax=problem.place("nested_absmax", nested),
        offset=problem.place("offset", offset), n=n, absmax=problem.reserve("absmax", n),
    )  # fmt: skip

    def check() -> None:
        assert_bits(problem.result("absmax"), reference.dequantize_absmax(codes, nested, offset), "dequantize_absmax")

    problem.check = check
    return problem


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


_BUILDERS = {op: globals()[f"_{op}"] for op in OPS}


# ---- the cases -------------------------------------------------------------------------------------------------------

RANKS = (0, 1, 5, 8, 16, 40, 300)
# ragged; whole tiles; one row; none; more rows and columns than a tile by a few
SHAPES = ((37, 131), (64, 256), (1, 64), (0, 64), (33, 72))
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 4096)


def _low_rank_cases():
    for (i, rank), (j, (rows, columns)), p in itertools.product(enumerate(RANKS), enumerate(SHAPES), (0.0, 0.3)):
        if rank == 300 and columns == 256:
            continue  # slow, and asks nothing that 40 does not
        size = dict(rows=rows, columns=columns, rank=rank)
        dtype, other, dropped = (i + j) % 3, (i + 2 * j + (p > 0)) % 3, p > 0
        rank_major = bool((i + j + dropped) % 2)
        extras = dict(out_scale=bool((i + j) % 2), bias=bool(j % 2) != dropped, z=bool(i % 2))
        yield case("low_rank_down", **size, x=dtype, factor=other, rank_major=rank_major, p=p)
        yield case("low_rank_up", **size, y=dtype, factor=other, rank_major=rank_major, p=p, **extras)
        yield case("low_rank_grad", **size, x=dtype, grad=other, rank_major=rank_major, p=p)
    # every pair of dtypes in both layouts and every width of a tile, where all accesses are vectors
    for a, b, rank_major in itertools.product(DTYPES, DTYPES, (False, True)):
        for rank in (8, 16, 32):
            yield case("low_rank_down", rows=40, columns=192, rank=rank, x=a, factor=b, rank_major=rank_major, p=0.1)
        yield case("low_rank_up", rows=40, columns=192, rank=16, y=a, factor=b, rank_major=rank_major, p=0.1)
        for rank in (8, 16):
            yield case("low_rank_grad", rows=70, columns=64, rank=rank, x=a, grad=b, rank_major=rank_major, p=0.1)
    for op, dtype in (("low_rank_down", "x"), ("low_rank_up", "y"), ("low_rank_grad", "x")):
        # pointers that are not 16-byte aligned, with sizes that are
        yield case(op, rows=35, columns=80, rank=12, **{dtype: BF16}, p=0.2, misaligned=1)
        yield case(op, rows=35, columns=80, rank=24, **{dtype: F32}, rank_major=False, p=0.2, misaligned=3)
        # narrow, single column, no columns
        yield case(op, rows=100, columns=8, rank=20, **{dtype: F16}, rank_major=False, p=0.5)
        yield case(op, rows=300, columns=1, rank=3, **{dtype: BF16}, p=0.05)
        yield case(op, rows=5, columns=0, rank=8, **{dtype: BF16}, p=0.1)
    # every combination of the optional operands, with and without a product
    for out_scale, bias, z in itertools.product((False, True), repeat=3):
        extras = dict(out_scale=out_scale, bias=bias, z=z)
        yield case("low_rank_up", rows=20, columns=136, rank=0, y=BF16, **extras)
        yield case("low_rank_up", rows=20, columns=136, rank=4, y=F16, p=0.1, **extras)
    for g, z in itertools.product(DTYPES, (False, True)):
        for rows, columns in ((37, 131), (300, 64), (0, 40), (1, 1), (513, 16), (64, 4096), (5, 0)):
            yield case("column_sums", rows=rows, columns=columns, g=g, z=z)
        yield case("column_sums", rows=65, columns=40, g=g, z=z, misaligned=1)


def _nf4_cases():
    for block_size, dtype in itertools.product(BLOCK_SIZES, DTYPES):
        # whole blocks; a short one, odd and even; one of whole chunks; one value; less than a chunk, than a block; none
        whole = block_size * 7
        sizes = (whole, block_size * 9 + 13, whole + 6, block_size * 2 + 8, 1, 7, block_size - 1, 0)
        for n in sizes:
            yield case("quantize_nf4", n=n, block_size=block_size, w=dtype)
            yield case("dequantize_nf4", n=n, block_size=block_size, out=dtype)
        for n in (block_size * 3 + 17, block_size * 3 + 18):
            yield case("quantize_nf4", n=n, block_size=block_size, w=dtype, misaligned=1)
            yield case("dequantize_nf4", n=n, block_size=block_size, out=dtype, misaligned=1)
    for n in (255, 256):
        yield case("quantize_nf4", n=n, block_size=64, special="division")
    for n in (0, 1, 255, 256, 257, 5000, 65539):
        yield case("quantize_absmax", n=n)
        yield case("dequantize_absmax", n=n)
    yield case("quantize_absmax", n=600, kind="constant")
    yield case("quantize_absmax", n=600, kind="zero")
    yield case("quantize_absmax", n=512, kind="ties")


def _jacobi_cases():
    for n in (0, 1, 2, 3, 5, 8, 16, 17, 33, 36):  # a bye, more columns than lanes, more pairs than warps
        yield case("jacobi_svd", n=n, batch=2)
    for kind in ("low rank", "graded", "zero", "nan"):
        yield case("jacobi_svd", n=9, kind=kind)
    yield case("jacobi_svd", n=4, batch=0)
    for n in (96, 97):  # the last in shared memory, the first in global memory
        yield case("jacobi_svd", n=n, kind="nearly")


def _rank_allocation_cases():
    for dtype in DTYPES:
        yield case("update_importance", dtypes=(dtype,))
        yield case("update_importance", dtypes=(dtype,), shapes=((5, 80, 24), (9, 24, 33)), misaligned=1)
    yield case("update_importance", dtypes=DTYPES, grad_scale=1000.0)
    for grads in itertools.product((False, True), repeat=3):
        yield case("update_importance", shapes=((4, 24, 10),), grads=grads)
    yield case("update_importance", shapes=((2, 20, 10),), kind="nan")
    for shapes in ("many", ((0, 5, 5),), ()):
        yield case("update_importance", shapes=shapes)
    for kind, exact in itertools.product(("random", "ties", "equal", "zero", "special", "close"), (False, True)):
        for budget in (1, 20, 69, 79, 80):
            yield case("rank_mask", n=80, budget=budget, exact=exact, kind=kind)
        yield case("rank_mask", n=2100, budget=1300, exact=exact, kind=kind)
    for n, budget in ((1, 0), (1, 1), (80, 0), (80, -5), (80, 81), (80, 2**40), (0, 3), (1024, 512), (1025, 3)):
        yield case("rank_mask", n=n, budget=budget, exact=bool(n % 2), misaligned=n % 2)
    for ranks in ((12, 0, 3, 200, 1), (2,) * 70, (0,), ()):
        yield case("mask_ranks", ranks=ranks)
    for op, squared in itertools.product(("orthogonality", "orthogonality_grad"), (False, True)):
        for dtypes in ((F32,), (BF16,), (F16,), DTYPES):
            yield case(op, dtypes=dtypes, squared=squared, misaligned=len(dtypes) // 2)
        for shapes in ("many", ((0, 5, True),), ()):
            yield case(op, shapes=shapes, squared=squared)
    yield case("orthogonality", kind="orthogonal", shapes=((4, 9, True), (12, 70, False)))
    yield case("orthogonality_grad", zero_norm=True)


CASES = [*_low_rank_cases(), *_nf4_cases(), *_jacobi_cases(), *_rank_allocation_cases()]

SCHEDULED = [
    case("low_rank_down", rows=33, columns=136, rank=5, x=F32, factor=BF16, rank_major=False, p=0.2),
    *(case("low_rank_down", rows=40, columns=136, rank=rank, x=BF16, p=0.1) for rank in (8, 16, 40)),
    case("low_rank_up", rows=70, columns=136, rank=20, y=BF16, p=0.1),
    case("low_rank_up", rows=70, columns=136, rank=20, y=F32, factor=F16, rank_major=False),
    *(case("low_rank_grad", rows=200, columns=40, rank=rank, x=BF16, p=0.1) for rank in (8, 12)),
    case("column_sums", rows=200, columns=40, g=BF16, z=True),
    case("quantize_nf4", n=3001, block_size=64, w=BF16),
    case("quantize_nf4", n=9000, block_size=1024, w=F32),
    case("dequantize_nf4", n=3001, block_size=64, out=BF16),
    case("quantize_absmax", n=3000),
    case("dequantize_absmax", n=3000),
    case("jacobi_svd", n=9, batch=2),
    case("update_importance", shapes=((3, 300, 40), (2, 20, 30))),
    case("rank_mask", n=1500, budget=700, exact=True, kind="ties"),
    case("mask_ranks", ranks=(3, 40)),
    case("orthogonality", shapes=((5, 80, True), (18, 20, False))),
    case("orthogonality_grad", shapes=((5, 80, True), (18, 20, False))),
]
"""One or more per kernel, for the questions that ask many runs: random schedules and mutations."""
