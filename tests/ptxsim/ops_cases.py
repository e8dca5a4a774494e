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
    JacobiSvd,
    LowRankDown,
    LowRankGrad,
    LowRankUp,
    QuantizeAbsmax,
    QuantizeNf4,
)

DTYPES = (F32, BF16, F16)
TORCH_DTYPE = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16}
SEED = -0x6DCBA9876F543211  # both halves are used, and the sign bit is set

UPDATED_IN_PLACE = ("y", "vectors")
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
        writable = name in UPDATED_IN_PLACE
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


CASES = [*_low_rank_cases(), *_nf4_cases(), *_jacobi_cases()]

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
]
"""One or more per kernel, for the questions that ask many runs: random schedules and mutations."""
