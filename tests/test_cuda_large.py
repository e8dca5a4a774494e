# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic of the CUDA kernels past 2^31 elements, without the memory: in the simulator the first and the last
block of a launch run, and of each large operand only the parts exist that they should touch, at the addresses they have
in the whole. An index that wraps at 32 bits lands where nothing is, or on another value.
"""

from __future__ import annotations

import bisect
import itertools

import numpy as np
import pytest
import torch
from conftest import assert_close
from ptxsim import buffer, cudart
from ptxsim.cudart import Device
from ptxsim.ops import (
    BF16,
    F32,
    ColumnSums,
    DequantizeNf4,
    Dropout,
    Factor,
    LowRankDown,
    LowRankGrad,
    LowRankUp,
    Nf4Forward,
    Nf4Gradient,
    Nf4Matrix,
)
from ptxsim.problem import SEED, TORCH_DTYPE, as_bytes, random, threshold_of

from peftkern import reference

pytestmark = pytest.mark.slow

EDGE = 512
"""Rows or columns that exist at each end: more than a block touches."""

_bases = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def simulator():
    cudart.require()


class EndsOnly(Device):
    """The first and the last block of every launch."""

    def options(self, name: str) -> dict:
        return {"blocks": (0, -1)}


class Large:
    """A matrix [rows, columns] of which only ends exist: the first and last EDGE rows, or columns of all rows. A small
    one exists."""

    def __init__(self, device: Device, rows: int, columns: int, dtype: torch.dtype, name: str, writable: bool = False):
        self.address, self.columns, self.dtype = (1 << 50) + (next(_bases) << 40), columns, dtype
        self.values: list[tuple[int, torch.Tensor, object]] = []  # first element, values, buffer
        if rows > 2 * EDGE:
            spans = [(0, EDGE * columns), ((rows - EDGE) * columns, EDGE * columns)]
        elif columns <= 2 * EDGE:
            spans = [(0, rows * columns)]
        else:
            spans = [(row * columns + at, EDGE) for row in range(rows) for at in (0, columns - EDGE)]
        for first, count in spans:
            values = torch.randn(count).to(dtype) if dtype.is_floating_point else torch.randint(256, (count,)).to(dtype)
            memory = buffer.window(
                self.address + first * dtype.itemsize, as_bytes(values).numpy(), name, writable=writable
            )
            if writable:
                memory.state[:] = 0
            self.values.append((first, values, memory))
            device.buffers.append(memory)

    def part(self, row: int, rows: int, column: int, columns: int) -> torch.Tensor:
        pieces = []
        for start in ((row + i) * self.columns + column for i in range(rows)):
            first, values, _ = self.values[bisect.bisect(self.values, start, key=lambda span: span[0]) - 1]
            pieces.append(values[start - first :][:columns])
        return torch.stack(pieces)

    def written(self):
        """Each run of elements that a kernel wrote: index of the first, values."""
        for first, _, memory in self.values:
            done = memory.initialised()[:: self.dtype.itemsize]
            edges = np.flatnonzero(np.diff(np.concatenate([[0], done.astype(np.int8), [0]])))
            content = torch.from_numpy(memory.numpy(np.uint8).copy()).view(self.dtype)
            for begin, end in edges.reshape(-1, 2):
                yield first + int(begin), content[begin:end]


def small(device: Device, values: torch.Tensor, name: str) -> int:
    device.buffers.append(buffer(as_bytes(values).numpy(), name=name, writable=False))
    return device.buffers[-1].address


def test_dequantize_nf4():
    n, device = 2**32 + 24, EndsOnly("sm_80")
    packed = Large(device, -(-n // 2 // EDGE), EDGE, torch.uint8, "packed")
    absmax = Large(device, -(-n // 64 // 8), 8, torch.float32, "absmax")
    out = Large(device, -(-n // EDGE), EDGE, torch.bfloat16, "out", writable=True)
    device.run("dequantize_nf4", DequantizeNf4(packed.address, absmax.address, n, 64, out.address, BF16))
    seen = 0
    for first, got in out.written():
        (start, codes, _), (scale_start, scales, _) = (t.values[first > 0] for t in (packed, absmax))
        codes = codes[first // 2 - start :][: got.numel() // 2]
        expected = reference.dequantize_nf4(codes, scales[first // 64 - scale_start :], 64, got.shape, torch.bfloat16)
        assert torch.equal(got, expected)
        seen = max(seen, first + got.numel())
    assert seen == n, "the last block did not write the end"


@pytest.mark.parametrize("rank_major", [True, False])
def test_low_rank_down_and_up(rank_major):
    rows, columns, rank, p = 2**22 + 3, 1024, 5, 0.2
    threshold = threshold_of(p)
    f = torch.randn(rank, columns)
    for op in ("low_rank_down", "low_rank_up"):
        device = EndsOnly("sm_80")
        x = Large(device, rows, columns, torch.bfloat16, "x or y", writable=False)
        u = Large(device, rows, rank, torch.float32, "u or out", writable=op == "low_rank_down")
        dropout = Dropout(small(device, torch.tensor([SEED]), "seed"), threshold, 32768 / (32768 - threshold))
        factor = Factor(small(device, f if rank_major else f.T.contiguous(), "factor"), F32, rank_major)
        size = dict(rows=rows, columns=columns, rank=rank, factor=factor, alpha=1.0, dropout=dropout)
        if op == "low_rank_down":
            device.run(op, LowRankDown(x=x.address, x_dtype=BF16, out=u.address, **size))
        else:
            for _, _, memory in x.values:
                memory.writable, memory.state[:] = True, 0
            device.run(op, LowRankUp(u=u.address, y=x.address, y_dtype=BF16, accumulate=False, **size))
        seen = 0
        for first, got in (u if op == "low_rank_down" else x).written():
            width = rank if op == "low_rank_down" else columns
            row, end = first // width, -(-(first + got.numel()) // width)
            edge = int(row > EDGE)
            keep = _keep(row, end, 0, columns, threshold)
            base = x.values[edge][0] // columns
            inner = slice(row - base, end - base)
            scale = 32768 / (32768 - threshold)
            if op == "low_rank_down":
                values = x.values[edge][1].reshape(-1, columns)[inner].double()
                whole = (values * keep * scale) @ f.double().T
            else:
                whole = keep * scale * (u.values[edge][1].reshape(-1, rank)[inner].double() @ f.double())
            part = whole.reshape(-1)[first - row * width :][: got.numel()]
            assert_close(got, part, TORCH_DTYPE[F32] if op == "low_rank_down" else torch.bfloat16, op)
            seen = max(seen, first + got.numel())
        assert seen == rows * (rank if op == "low_rank_down" else columns), "the last block did not write the end"


def _keep(row: int, end: int, column: int, columns: int, threshold: int) -> torch.Tensor:
    """reference.dropout_mask for rows [row, end) and so many columns from one on, both multiples of 8."""
    rows, chunk = torch.arange(row, end)[:, None], torch.arange(column // 8, (column + columns) // 8)[None, :]
    words = reference.philox4x32(rows & 0xFFFFFFFF, chunk, rows >> 32, torch.zeros_like(rows), SEED, rounds=7)
    lanes = torch.stack([lane for word in words for lane in (word & 0x7FFF, (word >> 16) & 0x7FFF)], dim=-1)
    return (lanes >= threshold).flatten(1)


def test_low_rank_grad():
    """Wide instead of long: a block walks down all rows of its columns."""
    rows, columns, rank, device = 3, 2**30 + 40, 3, EndsOnly("sm_80")
    x, u = Large(device, rows, columns, torch.bfloat16, "x"), random(rows, rank)
    grad = Large(device, rank, columns, torch.float32, "grad", writable=True)
    args = LowRankGrad(
        u=small(device, u, "u"), x=x.address, x_dtype=BF16, rows=rows, columns=columns, rank=rank, alpha=1.0,
        dropout=Dropout(None, 0, 1.0), grad=grad.address, grad_dtype=F32, rank_major=True,
    )  # fmt: skip
    device.run("low_rank_grad", args)
    seen = 0
    for first, got in grad.written():
        j, column = divmod(first, columns)
        expected = u[:, j].double() @ x.part(0, rows, column, got.numel()).double()
        assert_close(got, expected, torch.float32, "low_rank_grad")
        seen = max(seen, first + got.numel())
    assert seen == columns * rank, "the last block did not write the end"


def test_column_sums():
    """Wide, as above."""
    rows, columns, device = 3, 2**30 + 40, EndsOnly("sm_80")
    g, z = (Large(device, rows, columns, torch.bfloat16, name) for name in "gz")
    scale = Large(device, 1, columns, torch.float32, "scale")
    q = Large(device, rows, columns, torch.bfloat16, "q", writable=True)
    sums, dots = (Large(device, 1, columns, torch.float32, name, writable=True) for name in ("sums", "dots"))
    args = ColumnSums(
        g=g.address, dtype=BF16, rows=rows, columns=columns, z=z.address, scale=scale.address, q=q.address,
        sums=sums.address, dots=dots.address,
    )  # fmt: skip
    device.run("column_sums", args)
    for out, height in ((q, rows), (sums, 1), (dots, 1)):
        seen = 0
        for first, got in out.written():
            row, column = divmod(first, columns)
            values = g.part(0, rows, column, got.numel())
            if out is q:
                assert torch.equal(got, (values[row] * scale.part(0, 1, column, got.numel())[0]).to(torch.bfloat16))
            else:
                factors = z.part(0, rows, column, got.numel()).double() if out is dots else 1.0
                assert_close(got, (values.double() * factors).sum(0), torch.float32, "column_sums")
            seen = max(seen, first + got.numel())
        assert seen == columns * height, "the last block did not write the end"


class LargeNf4:
    """A weight [out, columns] in blocks of 64."""

    def __init__(self, device: Device, out: int, columns: int):
        self.packed = Large(device, out, columns // 2, torch.uint8, "packed")
        self.absmax = Large(device, out, columns // 64, torch.float32, "absmax")
        self.matrix = Nf4Matrix(packed=self.packed.address, absmax=self.absmax.address, out=out, block_size=64)
        setattr(self.matrix, "in", columns)

    def part(self, row: int, rows: int, column: int, columns: int) -> torch.Tensor:
        """In float64; from a block's first column on."""
        blocks = -(-columns // 64)
        packed = self.packed.part(row, rows, column // 2, 32 * blocks)
        absmax = self.absmax.part(row, rows, column // 64, blocks)
        values = reference.dequantize_nf4(packed, absmax.flatten(), 64, (rows, 64 * blocks), torch.bfloat16)
        return values[:, :columns].double()


@pytest.mark.parametrize(("rows", "out"), [(2**22 + 3, 520), (260, 2**23 + 40)], ids=["tall", "wide"])
def test_nf4_forward(rows, out):
    """x and y, or the weight's bytes and y, past 2^31."""
    device, columns, rank = EndsOnly("sm_80"), 512, 3
    x, weight = Large(device, rows, columns, torch.bfloat16, "x"), LargeNf4(device, out, columns)
    u, f = Large(device, rows, rank, torch.float32, "u"), Large(device, out, rank, torch.float32, "factor")
    y = Large(device, rows, out, torch.bfloat16, "y", writable=True)
    args = Nf4Forward(
        x=x.address, x_dtype=BF16, rows=rows, weight=weight.matrix, u=u.address, rank=rank,
        factor=Factor(f.address, F32, False), alpha=8.0, y=y.address, splits=1,
    )  # fmt: skip
    device.run("nf4_forward", args)
    seen = 0
    for first, got in y.written():
        row, column = divmod(first, out)
        product = x.part(row, 1, 0, columns).double() @ weight.part(column, got.numel(), 0, columns).T
        low_rank = u.part(row, 1, 0, rank).double() @ f.part(column, got.numel(), 0, rank).double().T
        assert_close(got, (product + 8 * low_rank)[0], torch.bfloat16, "nf4_forward")
        seen = max(seen, first + got.numel())
    assert seen == rows * out, "the last block did not write the end"


@pytest.mark.parametrize(("rows", "columns"), [(2**22 + 3, 576), (260, 2**23 + 64)], ids=["tall", "wide"])
def test_nf4_gradient(rows, columns):
    """q and dx, or the weight's bytes and dx, past 2^31."""
    device, out, rank, threshold = EndsOnly("sm_80"), 520, 3, threshold_of(0.2)
    q, weight = Large(device, rows, out, torch.bfloat16, "q"), LargeNf4(device, out, columns)
    dh, f = Large(device, rows, rank, torch.float32, "dh"), Large(device, rank, columns, torch.float32, "factor")
    dx = Large(device, rows, columns, torch.bfloat16, "dx", writable=True)
    scale = 32768 / (32768 - threshold)
    args = Nf4Gradient(
        q=q.address, q_dtype=BF16, rows=rows, weight=weight.matrix, dh=dh.address, rank=rank,
        factor=Factor(f.address, F32, True), dx=dx.address,
        dropout=Dropout(small(device, torch.tensor([SEED]), "seed"), threshold, scale),
    )  # fmt: skip
    device.run("nf4_gradient", args)
    seen = 0
    for first, got in dx.written():
        row, column = divmod(first, columns)
        product = q.part(row, 1, 0, out).double() @ weight.part(0, out, column, got.numel())
        low_rank = dh.part(row, 1, 0, rank).double() @ f.part(0, rank, column, got.numel()).double()
        keep = _keep(row, row + 1, column, got.numel(), threshold)
        assert_close(got, (product + scale * keep * low_rank)[0], torch.bfloat16, "nf4_gradient")
        seen = max(seen, first + got.numel())
    assert seen == rows * columns, "the last block did not write the end"
