# SPDX-License-Identifier: Apache-2.0
"""What the launchers are run on: cases, each of which makes its memory, its arguments and the values they should give.

Values come from peftkern/reference.py in float64, or bit for bit where the definition is exact.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import zlib
from dataclasses import dataclass

import torch

from peftkern import reference

from .allocation_cases import allocation_builders, allocation_cases, allocation_scheduled
from .cudart import Device, Recorder, host_library
from .dora_cases import dora_builders, dora_cases, dora_scheduled
from .gemm_cases import gemm_builders, gemm_cases, gemm_scheduled
from .gradient_cases import gradient_builders, gradient_cases, gradient_scheduled
from .multi_cases import multi_builders, multi_cases, multi_scheduled
from .ops import (
    BF16,
    F16,
    F32,
    OPS,
    ColumnSums,
    DequantizeAbsmax,
    DequantizeNf4,
    Factor,
    LowRankDown,
    LowRankGrad,
    LowRankUp,
    QuantizeAbsmax,
    QuantizeNf4,
)
from .problem import (
    DTYPES,
    SEED,
    TORCH_DTYPE,
    Problem,
    assert_bits,
    assert_sums,
    drop,
    dropout_argument,
    random,
    threshold_of,
)

__all__ = [
    "CASES", "SCHEDULED", "SEED", "TORCH_DTYPE", "Case", "Problem", "case", "drop", "dropout_argument", "threshold_of",
]  # fmt: skip

_random_numbers = threading.Lock()  # torch's generator belongs to all threads


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
    problem.reserve_workspace()

    def check() -> None:
        dropped = drop(values, p)
        got = problem.result("out", torch.float32, rows, rank)
        assert_sums(got, alpha * dropped @ f.T, alpha * dropped.abs() @ f.abs().T, "low_rank_down")

    problem.check = check
    return problem


def _low_rank_up(
    rows, columns, rank, y=F32, factor=F32, rank_major=True, p=0.0, out_scale=True, bias=True, z=True, misaligned=0,
    accumulate=True,
) -> Problem:  # fmt: skip
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
        y=problem.place("y", before, misaligned) if accumulate
        else problem.reserve("y", rows * columns, TORCH_DTYPE[y], misaligned),
        y_dtype=y, accumulate=accumulate,
    )  # fmt: skip

    def check() -> None:
        dtype = TORCH_DTYPE[y]
        start = before.double() * accumulate
        expected = start + alpha * drop(u.double() @ f, p)
        magnitude = start.abs() + alpha * drop(u.double().abs() @ f.abs(), p)
        if z:
            assert_sums(problem.result("z", dtype, rows, columns), expected, magnitude, "low_rank_up z")
        if out_scale:
            expected, magnitude = expected * scale, magnitude * scale.abs()
        if bias:
            expected, magnitude = expected + shift, magnitude + shift.abs()
        assert_sums(problem.result("y", dtype, rows, columns), expected, magnitude, "low_rank_up y")

    problem.check = check
    return problem


def _low_rank_grad(rows, columns, rank, x=F32, grad=F32, rank_major=True, p=0.0, sums=False, misaligned=0) -> Problem:
    problem, alpha = Problem(), 1.5
    values, u = random(rows, columns, dtype=x), random(rows, rank)
    problem.args = LowRankGrad(
        u=problem.place("u", u, misaligned), x=problem.place("x", values, misaligned), x_dtype=x, rows=rows,
        columns=columns, rank=rank, alpha=alpha, dropout=dropout_argument(problem, p),
        grad=problem.reserve("grad", rank * columns, TORCH_DTYPE[grad]), grad_dtype=grad, rank_major=rank_major,
        sums=problem.reserve("sums", columns) if sums else None,
    )  # fmt: skip
    problem.reserve_workspace()

    def check() -> None:
        dropped, left = drop(values, p), u.double().T
        expected, magnitude = alpha * left @ dropped, alpha * left.abs() @ dropped.abs()
        got = problem.result("grad", TORCH_DTYPE[grad], *((rank, columns) if rank_major else (columns, rank)))
        assert_sums(got if rank_major else got.T, expected, magnitude, "low_rank_grad")
        if sums:
            kept = dropped / problem.args.dropout.scale
            assert_sums(problem.result("sums"), kept.sum(0), kept.abs().sum(0), "low_rank_grad, sums")

    problem.check = check
    return problem


def _column_sums(rows, columns, g=F32, q=True, sums=True, dots=True, misaligned=0) -> Problem:
    problem, dtype = Problem(), TORCH_DTYPE[g]
    values, z, scale = random(rows, columns, dtype=g), random(rows, columns, dtype=g), random(columns)
    problem.args = ColumnSums(
        g=problem.place("g", values, misaligned), dtype=g, rows=rows, columns=columns,
        z=problem.place("z", z) if dots else None,
        scale=problem.place("scale", scale, misaligned) if q else None,
        q=problem.reserve("q", rows * columns, dtype, misaligned) if q else None,
        sums=problem.reserve("sums", columns) if sums else None,
        dots=problem.reserve("dots", columns) if dots else None,
    )  # fmt: skip
    problem.reserve_workspace()

    def check() -> None:
        if q:
            assert_bits(problem.result("q", dtype, rows, columns), (values * scale).to(dtype), "column_sums q")
        for name, wanted, terms in (("sums", sums, values.double()), ("dots", dots, values.double() * z.double())):
            if wanted:
                assert_sums(problem.result(name), terms.sum(0), terms.abs().sum(0), f"column_sums {name}")

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


def _quantize_absmax(n, kind="random", misaligned=0) -> Problem:
    """kind "ties": a mean of 0, values halfway between two codes in one block, and the next ones in another."""
    problem = Problem()
    if kind == "ties":
        codes = reference.dynamic_codes()
        halfway = ((codes[1:] + codes[:-1]) / 2)[-128:]
        halves = [torch.cat([v[1:], torch.ones(1)]) for v in (halfway, halfway.nextafter(torch.tensor(2.0)))]
        absmax = torch.cat([sign * v for v in halves for sign in (1, -1)])[:n]
    else:
        absmax = {"random": torch.randn(n).abs() * 0.05, "constant": torch.full((n,), 0.25), "zero": torch.zeros(n)}[
            kind
        ]
    problem.args = QuantizeAbsmax(
        absmax=problem.place("absmax", absmax, misaligned), n=n,
        codes=problem.reserve("codes", n, torch.uint8, misaligned),
        nested_absmax=problem.reserve("nested_absmax", -(-n // 256)), offset=problem.reserve("offset", 1),
    )  # fmt: skip
    problem.reserve_workspace(torch.float64)

    def check() -> None:
        codes, nested, offset = reference.quantize_absmax(absmax)
        assert_bits(problem.result("offset"), offset.reshape(1), "quantize_absmax offset")
        assert_bits(problem.result("nested_absmax"), nested, "quantize_absmax nested_absmax")
        assert_bits(problem.result("codes", torch.uint8), codes, "quantize_absmax codes")

    problem.check = check
    return problem


def _dequantize_absmax(n, kind="random", misaligned=0) -> Problem:
    """kind "codes": their values themselves."""
    problem = Problem()
    codes, nested = torch.randint(256, (n,), dtype=torch.uint8), torch.rand(-(-n // 256)) * 0.1
    offset = torch.rand(1)
    if kind == "codes":
        codes, nested, offset = torch.arange(n).to(torch.uint8), torch.ones_like(nested), torch.zeros(1)
    problem.args = DequantizeAbsmax(
        codes=problem.place("codes", codes, misaligned), nested_absmax=problem.place("nested_absmax", nested),
        offset=problem.place("offset", offset), n=n, absmax=problem.reserve("absmax", n, misaligned=misaligned),
    )  # fmt: skip

    def check() -> None:
        assert_bits(problem.result("absmax"), reference.dequantize_absmax(codes, nested, offset), "dequantize_absmax")

    problem.check = check
    return problem


_builders = gemm_builders | multi_builders | allocation_builders | gradient_builders | dora_builders
_BUILDERS = {op: _builders.get(op) or globals()[f"_{op}"] for op in OPS}


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
    for dtype in DTYPES:  # so many blocks that each has all columns: two stages, the last one of one column
        yield case("low_rank_down", rows=128 * 128 + 1, columns=257, rank=8, x=dtype, factor=BF16)
    # every pair of dtypes in both layouts and every width of a tile, where all accesses are vectors
    for a, b, rank_major in itertools.product(DTYPES, DTYPES, (False, True)):
        for rank in (8, 16, 32):
            yield case("low_rank_down", rows=40, columns=192, rank=rank, x=a, factor=b, rank_major=rank_major, p=0.1)
        yield case("low_rank_up", rows=40, columns=192, rank=16, y=a, factor=b, rank_major=rank_major, p=0.1)
        for rank in (8, 16):
            yield case("low_rank_grad", rows=70, columns=64, rank=rank, x=a, grad=b, rank_major=rank_major, p=0.1)
    yield case("low_rank_grad", rows=65, columns=64, rank=8, x=BF16)  # a stage of one row
    # the sums of the columns ride along: one slab and several, no rows, ragged columns
    for rows, columns, x in ((70, 64, F16), (600, 136, BF16), (520, 133, F16), (0, 40, BF16)):
        for rank in (8, 40):
            yield case("low_rank_grad", rows=rows, columns=columns, rank=rank, x=x, p=0.1 * (rank == 8), sums=True)
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
        yield case("low_rank_up", rows=67, columns=131, rank=5, y=DTYPES[bias + z], p=0.1, **extras, accumulate=False)
    everything = dict(q=True, sums=True, dots=True)
    for g, only in itertools.product(DTYPES, (None, "q", "sums", "dots")):
        wanted = everything if only is None else {name: name == only for name in everything}
        # ragged; whole tiles; none; one; slabs whose last has one row, some; one slab by the columns; no columns
        for rows, columns in ((37, 131), (300, 64), (0, 40), (1, 1), (513, 16), (900, 72), (64, 4096), (5, 0)):
            yield case("column_sums", rows=rows, columns=columns, g=g, **wanted)
        yield case("column_sums", rows=65, columns=40, g=g, **wanted, misaligned=1)
    for without in everything:  # pairs
        yield case("column_sums", rows=770, columns=40, g=BF16, **everything | {without: False})
    yield case("column_sums", rows=1024 * 16, columns=8, g=BF16, **everything)  # more slabs than a cluster has blocks


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
    yield case("quantize_absmax", n=530, misaligned=1)
    yield case("quantize_absmax", n=64 * 4096 + 5)  # one part has two steps
    yield case("dequantize_absmax", n=256, kind="codes")
    yield case("dequantize_absmax", n=530, misaligned=1)


_other_cases = gemm_cases(), gradient_cases(), multi_cases(), allocation_cases(), dora_cases()
_other_scheduled = gemm_scheduled(), gradient_scheduled(), multi_scheduled(), allocation_scheduled(), dora_scheduled()

CASES = [
    *_low_rank_cases(),
    *_nf4_cases(),
    *(case(op, **options) for op, options in itertools.chain(*_other_cases)),
]

SCHEDULED = [
    case("low_rank_down", rows=33, columns=136, rank=5, x=F32, factor=BF16, rank_major=False, p=0.2),
    *(case("low_rank_down", rows=40, columns=136, rank=rank, x=BF16, p=0.1) for rank in (8, 16, 40)),
    case("low_rank_up", rows=70, columns=136, rank=20, y=BF16, p=0.1),
    case("low_rank_up", rows=70, columns=136, rank=20, y=F32, factor=F16, rank_major=False),
    *(case("low_rank_grad", rows=200, columns=40, rank=rank, x=BF16, p=0.1) for rank in (8, 12)),
    case("column_sums", rows=600, columns=40, g=BF16),
    case("quantize_nf4", n=3001, block_size=64, w=BF16),
    case("quantize_nf4", n=9000, block_size=1024, w=F32),
    case("dequantize_nf4", n=3001, block_size=64, out=BF16),
    case("quantize_absmax", n=3000),
    case("dequantize_absmax", n=3000),
    *(case(op, **options) for op, options in itertools.chain(*_other_scheduled)),
]
"""One or more per kernel, for the questions that ask many runs: random schedules and mutations."""
