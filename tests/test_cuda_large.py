# SPDX-License-Identifier: Apache-2.0
"""Index arithmetic of the CUDA kernels past 2^31 elements, without the memory: in the simulator the first and the last
block of a launch run, and of each large operand only the parts exist that they should touch, at the addresses they have
in the whole. An index that wraps at 32 bits lands where nothing is, or on another value.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable

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
    DequantizeAbsmax,
    DequantizeNf4,
    DoraNorm,
    Dropout,
    Factor,
    FactorBank,
    ImportanceUpdate,
    JacobiSvd,
    LowRankDown,
    LowRankGrad,
    LowRankUp,
    MultiLoraDown,
    MultiLoraGrad,
    MultiLoraUp,
    Nf4Forward,
    Nf4Gradient,
    Nf4Matrix,
    OrthogonalFactor,
    OrthogonalityGrad,
    QuantizeAbsmax,
    QuantizeNf4,
    RowGroups,
    SquaredRowNorms,
    TripletLayer,
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
    """The first and the last block of every launch, or those of `blocks`."""

    def __init__(self, blocks: tuple[int, ...] = (0, -1)):
        super().__init__("sm_90")  # with the rest of their clusters
        self.blocks = blocks

    def options(self, name: str) -> dict:
        return {"blocks": self.blocks}


class Large:
    """A matrix [rows, columns] of which only ends exist: the first and last EDGE rows, or columns of all rows. A small
    one exists. Or what `spans` says: first element and count of each.

    values: of the elements with these indices, else random. writable: nothing is in it yet.
    """

    def __init__(
        self, device: Device, rows: int, columns: int, dtype: torch.dtype, name: str, writable: bool = False,
        values: Callable[[torch.Tensor], torch.Tensor] | None = None, spans: list[tuple[int, int]] | None = None,
    ):  # fmt: skip
        self.address, self.columns, self.dtype = (1 << 50) + (next(_bases) << 40), columns, dtype
        self.values: list[tuple[int, torch.Tensor, object]] = []  # first element, values, buffer
        if spans is None and rows > 2 * EDGE:
            spans = [(0, EDGE * columns), ((rows - EDGE) * columns, EDGE * columns)]
        elif spans is None and columns <= 2 * EDGE:
            spans = [(0, rows * columns)]
        elif spans is None:
            spans = [(row * columns + at, EDGE) for row in range(rows) for at in (0, columns - EDGE)]
        for first, count in spans:
            if values:
                content = values(torch.arange(first, first + count))
            else:
                content = torch.randn(count) if dtype.is_floating_point else torch.randint(256, (count,))
            content = content.to(dtype)
            memory = buffer.window(
                self.address + first * dtype.itemsize, as_bytes(content).numpy(), name, writable=writable
            )
            if writable:
                memory.state[:] = 0
            self.values.append((first, content, memory))
            device.buffers.append(memory)

    def update(self) -> None:
        """What a kernel reads and writes."""
        for _, _, memory in self.values:
            memory.writable, memory.state[:] = True, 1

    def now(self) -> list[torch.Tensor]:
        """The contents of each span."""
        return [torch.from_numpy(memory.numpy(np.uint8).copy()).view(self.dtype) for _, _, memory in self.values]

    def part(self, row: int, rows: int, column: int, columns: int) -> torch.Tensor:
        pieces = []
        for start in ((row + i) * self.columns + column for i in range(rows)):
            first, values, _ = self.values[bisect.bisect(self.values, start, key=lambda span: span[0]) - 1]
            pieces.append(values[start - first :][:columns])
        return torch.stack(pieces)

    def flat(self, first: int, count: int) -> torch.Tensor:
        return self.part(0, 1, first, count)[0]

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


def test_quantize_nf4():
    n, device = 2**32 + 24, EndsOnly()
    w = Large(device, -(-n // EDGE), EDGE, torch.bfloat16, "w")
    packed = Large(device, -(-n // 2 // EDGE), EDGE, torch.uint8, "packed", writable=True)
    absmax = Large(device, -(-n // 64 // 8), 8, torch.float32, "absmax", writable=True)
    device.run("quantize_nf4", QuantizeNf4(w.address, BF16, n, 64, packed.address, absmax.address))
    seen = 0
    for (first, codes), (first_block, scales) in zip(packed.written(), absmax.written(), strict=True):
        expected = reference.quantize_nf4(w.flat(2 * first, 2 * codes.numel()), 64)
        assert first_block == first // 32 and codes.equal(expected[0]) and scales.equal(expected[1])
        seen = max(seen, 2 * (first + codes.numel()))
    assert seen == n, "the last block did not write the end"


def test_dequantize_nf4():
    n, device = 2**32 + 24, EndsOnly()
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


class OneStepSums(EndsOnly):
    """With so many blocks that absmax_sum_kernel takes one step in each, as it would take thousands in 64."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def _simulate(self, name: str, grid: tuple, *rest) -> None:
        if "absmax_sum" in name:
            super()._simulate(name, (-(-self.n // 4096), 1, 1), *rest)
            self.check_parts()
        else:
            super()._simulate(name, grid, *rest)


def test_quantize_absmax():
    n = 2**32 + 300
    device = OneStepSums(n)
    absmax = Large(device, -(-n // 300), 300, torch.float32, "absmax", values=lambda i: torch.rand(len(i)))
    codes = Large(device, -(-n // 300), 300, torch.uint8, "codes", writable=True)
    nested = Large(device, -(-n // 256), 1, torch.float32, "nested_absmax", writable=True)
    offset = Large(device, 1, 1, torch.float32, "offset", writable=True)
    workspace = Large(device, -(-n // 4096), 1, torch.float64, "workspace", writable=True)
    parts = torch.rand(64, dtype=torch.float64) * n / 64

    def check_parts() -> None:
        """Those two of the kernel, then 64 that make a mean."""
        (_, first), (last_part, last) = workspace.written()
        assert last_part == n // 4096
        for got, values in ((first, absmax.flat(0, 4096)), (last, absmax.flat(last_part * 4096, n % 4096))):
            torch.testing.assert_close(got, values.double().sum()[None], rtol=1e-14, atol=0)
        memory = workspace.values[0][2]
        memory.numpy(np.float64)[:64] = parts.numpy()
        memory.state[: 64 * 8] = 1

    device.check_parts = check_parts
    device.run(
        "quantize_absmax",
        QuantizeAbsmax(absmax.address, n, codes.address, nested.address, offset.address, workspace.address),
    )
    ((_, mean),) = offset.written()
    torch.testing.assert_close(mean, (parts.sum() / n).float()[None], rtol=1e-7, atol=0)
    midpoints = (reference.dynamic_codes()[1:] + reference.dynamic_codes()[:-1]) / 2
    seen = 0
    for (first, got), (first_block, scales) in zip(codes.written(), nested.written(), strict=True):
        assert first_block == first // 256
        values = absmax.flat(first, got.numel())
        for part, block, scale in zip(got.split(256), values.split(256), scales, strict=True):
            deviation = block - mean
            assert scale == deviation.abs().max()
            assert part.equal(torch.bucketize(deviation * (1 / scale), midpoints).to(torch.uint8))
        seen = max(seen, first + got.numel())
    assert seen == n, "the last block did not write the end"


def test_dequantize_absmax():
    n, device = 2**32 + 300, EndsOnly()
    codes = Large(device, -(-n // 300), 300, torch.uint8, "codes")
    nested = Large(device, -(-n // 256), 1, torch.float32, "nested_absmax")
    absmax, offset = Large(device, -(-n // 300), 300, torch.float32, "absmax", writable=True), torch.rand(1)
    args = DequantizeAbsmax(codes.address, nested.address, small(device, offset, "offset"), n, absmax.address)
    device.run("dequantize_absmax", args)
    seen = 0
    for first, got in absmax.written():
        scales = nested.flat(first // 256, -(-got.numel() // 256))
        assert got.equal(reference.dequantize_absmax(codes.flat(first, got.numel()), scales, offset))
        seen = max(seen, first + got.numel())
    assert seen == n, "the last block did not write the end"


@pytest.mark.parametrize("rank_major", [True, False])
def test_low_rank_down_and_up(rank_major):
    rows, columns, rank, p = 2**22 + 3, 1024, 5, 0.2
    threshold = threshold_of(p)
    f = torch.randn(rank, columns)
    for op in ("low_rank_down", "low_rank_up"):
        device = EndsOnly()
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
    rows, columns, rank, device = 3, 2**30 + 40, 3, EndsOnly()
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
    rows, columns, device = 3, 2**30 + 40, EndsOnly()
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


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("rows", "out"), [(2**22 + 3, 520), (260, 2**23 + 40)], ids=["tall", "wide"])
def test_nf4_forward(rows, out, splits):
    """x and y, or the weight's bytes and y, past 2^31; by single blocks, and by clusters of two."""
    device, columns, rank = EndsOnly(), 512, 3
    x, weight = Large(device, rows, columns, torch.bfloat16, "x"), LargeNf4(device, out, columns)
    u, f = Large(device, rows, rank, torch.float32, "u"), Large(device, out, rank, torch.float32, "factor")
    y = Large(device, rows, out, torch.bfloat16, "y", writable=True)
    args = Nf4Forward(
        x=x.address, x_dtype=BF16, rows=rows, weight=weight.matrix, u=u.address, rank=rank,
        factor=Factor(f.address, F32, False), alpha=8.0, y=y.address, y_dtype=BF16, splits=splits,
        workspace=small(device, torch.zeros(4), "workspace"),  # which clusters do not touch
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
    device, out, rank, threshold = EndsOnly(), 520, 3, threshold_of(0.2)
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


# ---- many adapters ---------------------------------------------------------------------------------------------------


class Tall:
    """So many rows that those of x and u end past 2^31 elements, of two adapters; a number is exchanged for the one
    beside it. The last tile of 128 rows has 5, and a block more than there are tiles follows."""

    rows, columns, rank, adapters, few = 2**23 + 12, 520, 264, 2, 133

    def __init__(self, device: Device):
        self.starts = (0, self.rows - self.few)
        offsets = small(device, torch.tensor([*self.starts, self.rows, self.rows]), "offsets")
        order = Large(device, self.rows, 1, torch.int64, "order", values=lambda entry: entry ^ 1)
        count = self.rows // 32 + self.adapters + 1
        tiles = Large(device, count, 2, torch.int64, "tiles", values=self._tiles)
        self.groups = RowGroups(offsets, order.address, tiles.address, rows=self.rows, adapters=self.adapters)
        self.f = torch.randn(self.adapters, self.rank, self.columns).to(torch.bfloat16)
        self.bank = FactorBank(small(device, self.f, "factor"), BF16, True, None)

    def _tiles(self, index: torch.Tensor) -> torch.Tensor:
        """Element 2 t + c: tile t is (adapter, first entry), and the last one of all is unused."""
        tile, of_first = index // 2, -(-self.starts[1] // 32)
        adapter = (tile >= of_first).long()
        first = torch.where(adapter == 1, self.starts[1] + (tile - of_first) * 32, tile * 32)
        unused = first >= self.rows
        return torch.where(index % 2 == 0, torch.where(unused, -1, adapter), torch.where(unused, 0, first))

    def adapter(self, entry: int) -> int:
        return int(entry >= self.starts[1])


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_multi_lora_down_of_many_rows(p):
    rank_tiles, threshold = -(-Tall.rank // 64), threshold_of(p)
    device = EndsOnly((0, -1 - rank_tiles))
    tall = Tall(device)
    x = Large(device, tall.rows, tall.columns, torch.bfloat16, "x")
    out = Large(device, tall.rows, tall.rank, torch.float32, "out", writable=True)
    scale = 32768 / (32768 - threshold)
    args = MultiLoraDown(
        x=x.address, x_dtype=BF16, groups=tall.groups, columns=tall.columns, rank=tall.rank, factors=tall.bank,
        alpha=0.75, dropout=Dropout(small(device, torch.tensor([SEED]), "seed"), threshold, scale), out=out.address,
    )  # fmt: skip
    device.run("multi_lora_down", args)
    seen = 0
    for first, got in out.written():
        (entry, rank), row = divmod(first, tall.rank), first // tall.rank ^ 1
        keep = _keep(row, row + 1, 0, tall.columns, threshold)
        values = x.part(row, 1, 0, tall.columns).double() * keep
        expected = 0.75 * scale * values @ tall.f[tall.adapter(entry), rank : rank + got.numel()].double().T
        assert_close(got, expected[0], torch.float32, "multi_lora_down")
        seen = max(seen, first + got.numel())
    assert seen == tall.rows * tall.rank, "the last block did not write the end"


def test_multi_lora_up_of_many_rows():
    device = EndsOnly((0, -1 - -(-Tall.columns // 128)))
    tall = Tall(device)
    u = Large(device, tall.rows, tall.rank, torch.float32, "u")
    y = Large(device, tall.rows, tall.columns, torch.bfloat16, "y")
    y.update()
    args = MultiLoraUp(
        u=u.address, groups=tall.groups, columns=tall.columns, rank=tall.rank, factors=tall.bank, alpha=0.75,
        dropout=Dropout(None, 0, 1.0), y=y.address, y_dtype=BF16,
    )  # fmt: skip
    device.run("multi_lora_up", args)
    ends = ((0, 32, slice(0, 128)), (tall.rows - 5, 5, slice(512, 520)))
    for (start, before, _), got, (first, count, columns) in zip(y.values, y.now(), ends, strict=True):
        expected = before.double().reshape(-1, tall.columns)
        rows = (torch.arange(first, first + count) ^ 1) - start // tall.columns
        product = u.part(first, count, 0, tall.rank).double() @ tall.f[tall.adapter(first)].double()
        expected[rows, columns] += 0.75 * product[:, columns]
        assert_close(got.reshape(expected.shape), expected, torch.bfloat16, "multi_lora_up")
        changed = torch.zeros(expected.shape, dtype=torch.bool)
        changed[rows, columns] = True
        assert not (got != before)[~changed.flatten()].any()


def test_multi_lora_grad_of_many_rows():
    """The last cluster alone, of two slabs: adapter 0 has too many rows to walk down."""
    device = EndsOnly((-1,))
    tall = Tall(device)
    u = Large(device, tall.rows, tall.rank, torch.float32, "u")
    x = Large(device, tall.rows, tall.columns, torch.bfloat16, "x")
    grad = Large(device, 2 * tall.rank, tall.columns, torch.float32, "grad", writable=True)
    args = MultiLoraGrad(
        u=u.address, x=x.address, x_dtype=BF16, groups=tall.groups, columns=tall.columns, rank=tall.rank, alpha=0.75,
        dropout=Dropout(None, 0, 1.0), grad=grad.address, grad_dtype=F32, rank_major=True,
        workspace=small(device, torch.zeros(4), "workspace"),  # which clusters do not touch
    )  # fmt: skip
    device.run("multi_lora_grad", args)
    assert device.clusters == [2]
    entries = torch.arange(tall.starts[1], tall.rows)
    left = u.part(int(entries[0]), tall.few, 256, 8).double()
    right = torch.cat([x.part(int(row), 1, 512, 8) for row in entries ^ 1]).double()
    got = torch.stack([values for _, values in grad.written()])
    assert_close(got, 0.75 * left.T @ right, torch.float32, "multi_lora_grad")


MANY = dict(adapters=2**18 + 3, rank=16, columns=1024)


@pytest.mark.parametrize("rank_major", [True, False])
@pytest.mark.parametrize("op", ["multi_lora_down", "multi_lora_up", "multi_lora_grad"])
def test_many_adapters(op, rank_major):
    """A bank past 2^32 elements, and three rows: of the first adapter, of the last, and of none."""
    adapters, rank, columns = MANY.values()
    device = EndsOnly((0, -1)) if op == "multi_lora_grad" else Device("sm_80")
    order = torch.tensor([2, 0, 1])
    groups = RowGroups(
        Large(
            device, adapters + 2, 1, torch.int64, "offsets",
            values=lambda a: (a > 0).long() + (a >= adapters) + (a > adapters),
        ).address,
        small(device, order, "order"),
        small(device, torch.tensor([[0, 0], [adapters - 1, 1], [adapters, 2]]), "tiles"),
        rows=3, adapters=adapters,
    )  # fmt: skip
    alphas = Large(device, adapters, 1, torch.float32, "alphas")
    shape = (adapters * rank, columns) if rank_major else (adapters * columns, rank)
    if op == "multi_lora_grad":
        bank = Large(device, *shape, torch.float32, "grad", writable=True, spans=_ends(adapters, rank * columns))
    else:
        bank = Large(device, *shape, torch.bfloat16, "factors", spans=_ends(adapters, rank * columns))
    f = [v.double().reshape((rank, columns) if rank_major else (columns, rank)) for _, v, _ in bank.values]
    f = f if rank_major else [factor.T for factor in f]
    scales = [values[at] for (_, values, _), at in zip(alphas.values, (0, -1), strict=True)]
    x, u, no_dropout = random(3, columns), random(3, rank), Dropout(None, 0, 1.0)
    size = dict(groups=groups, columns=columns, rank=rank, alphas=alphas.address, dropout=no_dropout)
    if op == "multi_lora_down":
        out = Large(device, 3, rank, torch.float32, "out", writable=True)
        args = MultiLoraDown(
            x=small(device, x, "x"), x_dtype=F32, factors=FactorBank(bank.address, BF16, rank_major, None),
            out=out.address, **size,
        )  # fmt: skip
        args.workspace = Large(device, 1, args.workspace_size(), torch.float32, "workspace", writable=True).address
        device.run(op, args)
        expected = torch.zeros(3, rank, dtype=torch.float64)
        for entry in range(2):
            expected[entry] = scales[entry] * f[entry] @ x[order[entry]].double()
        assert_close(out.now()[0].reshape(3, rank), expected, torch.float32, op)
    elif op == "multi_lora_up":
        y = Large(device, 3, columns, torch.float32, "y")
        y.update()
        args = MultiLoraUp(
            u=small(device, u, "u"), factors=FactorBank(bank.address, BF16, rank_major, None), y=y.address, y_dtype=F32,
            **size,
        )  # fmt: skip
        device.run(op, args)
        expected = y.values[0][1].reshape(3, columns).double()
        for entry in range(2):
            expected[order[entry]] += scales[entry] * u[entry].double() @ f[entry]
        assert_close(y.now()[0].reshape(3, columns), expected, torch.float32, op)
    else:
        args = MultiLoraGrad(
            u=small(device, u, "u"), x=small(device, x, "x"), x_dtype=F32, grad=bank.address, grad_dtype=F32,
            rank_major=rank_major, **size,
        )  # fmt: skip
        device.run(op, args)
        written = 0
        for first, got in bank.written():
            adapter, at = divmod(first, rank * columns)
            entry = int(adapter > 0)
            whole = scales[entry] * torch.outer(u[entry].double(), x[order[entry]].double())
            whole = (whole if rank_major else whole.T).flatten()
            assert_close(got, whole[at : at + got.numel()], torch.float32, op)
            written += got.numel()
        assert written == 2 * rank * 128, "each of the two blocks has 128 columns"


def _ends(count: int, size: int) -> list[tuple[int, int]]:
    """The first and the last of `count` pieces."""
    return [(0, size), ((count - 1) * size, size)]


# ---- norms, singular values, rank allocation -------------------------------------------------------------------------


@pytest.mark.parametrize("nf4", [False, True])
def test_squared_row_norms(nf4):
    rows, columns, device = 2**22 + 3, 1000, EndsOnly()
    out = Large(device, rows, 1, torch.float64, "out", writable=True)
    if nf4:  # of elements in blocks of 64, that rows do not end with
        packed = Large(device, rows, columns // 2, torch.uint8, "weight")
        n = rows * columns
        absmax = Large(device, -(-n // 64 // 8), 8, torch.float32, "absmax")
        args = SquaredRowNorms(packed.address, absmax.address, F32, 64, rows, columns, out.address)
    else:
        w = Large(device, rows, columns, torch.bfloat16, "weight")
        args = SquaredRowNorms(w.address, None, BF16, 64, rows, columns, out.address)
    device.run("squared_row_norms", args)
    seen = 0
    for row, got in out.written():
        if nf4:
            skip = row * columns % 64
            begin, count = row * columns - skip, got.numel() * columns + skip
            codes, scales = packed.flat(begin // 2, -(-count // 2)), absmax.flat(begin // 64, -(-count // 64))
            values = reference.dequantize_nf4(codes, scales, 64, (count,), torch.float32)[skip:].reshape(-1, columns)
        else:
            values = w.part(row, got.numel(), 0, columns)
        torch.testing.assert_close(got, values.double().square().sum(1), rtol=1e-12, atol=0)
        seen = max(seen, row + got.numel())
    assert seen == rows, "the last block did not write the end"


def test_dora_norm():
    rows, rank, device = 2**24 + 3, 132, EndsOnly()
    w2 = Large(device, rows, 1, torch.float64, "w2", values=lambda i: 1e5 + torch.rand(len(i)))
    P, B = Large(device, rank, rows, torch.float32, "P"), Large(device, rows, rank, torch.bfloat16, "B")
    G = torch.randn(rank, rank, dtype=torch.float64)
    G = G @ G.T
    norm = Large(device, rows, 1, torch.float32, "norm", writable=True)
    args = DoraNorm(
        w2=w2.address, P=P.address, G=small(device, G, "G"), B=B.address, B_dtype=BF16, rows=rows, rank=rank,
        scaling=0.75, norm=norm.address,
    )  # fmt: skip
    device.run("dora_norm", args)
    seen = 0
    for row, got in norm.written():
        b, p = B.part(row, got.numel(), 0, rank).double(), P.part(0, rank, row, got.numel()).double()
        w = w2.part(row, got.numel(), 0, 1)[:, 0]
        expected = w + 1.5 * (b * p.T).sum(1) + 0.5625 * (b @ G * b).sum(1)
        torch.testing.assert_close(got.double(), expected.sqrt(), rtol=1e-7, atol=0)
        seen = max(seen, row + got.numel())
    assert seen == rows, "the last block did not write the end"


def test_jacobi_svd():
    batch, n, device = 2**29 + 3, 8, EndsOnly()
    vectors = Large(device, batch, n * n, torch.float64, "vectors")
    vectors.update()
    values = Large(device, batch, n, torch.float64, "values", writable=True)
    sweeps = Large(device, batch, 1, torch.int32, "sweeps", writable=True)
    device.run("jacobi_svd", JacobiSvd(vectors.address, values.address, sweeps.address, batch, n))
    assert [first for first, _ in sweeps.written()] == [0, batch - 1]
    for (first, got), (_, before, _), at in zip(values.written(), vectors.values, (0, -1), strict=True):
        assert first == (batch - 1) * n * (at == -1)
        expected = torch.linalg.svdvals(before.reshape(-1, n, n)[at])
        torch.testing.assert_close(got.sort(descending=True).values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank_major", [True, False])
def test_orthogonality_grad(rank_major):
    """The factor and its gradient; a block of `orthogonality` itself walks down all columns."""
    rank, columns, device = 12, 2**28 + 40, EndsOnly()
    shape = (rank, columns) if rank_major else (columns, rank)
    data = Large(device, *shape, torch.bfloat16, "factor")
    grad = Large(device, *shape, torch.bfloat16, "grad", writable=True)
    D, norm, upstream = torch.randn(rank, rank), torch.tensor([0.5]), torch.tensor([-1.5])
    factor = OrthogonalFactor(data.address, BF16, rank_major, rank, columns, 0, grad.address)
    args = OrthogonalityGrad(
        factors=(OrthogonalFactor * 1)(factor), factor_count=1, squared=False,
        upstream=small(device, upstream, "upstream"), deviations=small(device, D, "D"),
        norms=small(device, norm, "norms"),
    )  # fmt: skip
    device.run("orthogonality_grad", args)
    seen = 0
    for first, got in grad.written():
        if rank_major:
            j, column = divmod(first, columns)
            expected = D[j].double() @ data.part(0, rank, column, got.numel()).double()
        else:
            x = data.part(first // rank, got.numel() // rank, 0, rank).double()
            expected = (x @ D.double().T).flatten()
        assert_close(got, -1.5 * 2 / 0.5 * expected, torch.bfloat16, "orthogonality_grad")
        seen = max(seen, first + got.numel())
    assert seen == rank * columns, "the last block did not write the end"


class ScoredLayers(Device):
    """Of the first layer rows 0 and last of A, all of the second, which has 3 triplets."""

    def __init__(self, rank: int):
        super().__init__("sm_80")
        self.rank = rank

    def options(self, name: str) -> dict:
        return {"blocks": (-1,) if "triplet_scores" in name else (0, self.rank - 1, *range(-3 - 8, 0))}


def test_update_importance():
    """A's rows, and the averages of what comes after them; B has no rows, as a block has an eighth of them."""
    sizes = dict(rank=2**21 + 5, columns=1032), dict(rank=3, columns=40)
    rank, columns, out = sizes[0]["rank"], sizes[0]["columns"], 20
    device = ScoredLayers(rank)
    tall, ragged = TripletLayer(dtype=BF16, rank=rank), TripletLayer(dtype=F32, rank=3, out=out, first=rank)
    setattr(tall, "in", columns), setattr(ragged, "in", 40)
    ragged.state = tall.state_size()
    A, grad = (Large(device, rank, columns, torch.bfloat16, name) for name in ("A", "grad_A"))
    tall.A, tall.grad_A = A.address, grad.address
    parts = {name: (random(count), random(count)) for name, count in ragged.sizes().items()}
    for name, (p, g) in parts.items():
        setattr(ragged, name, small(device, p, name))
        setattr(ragged, f"grad_{name}", small(device, g, f"grad_{name}"))
    rows = [(0, columns), ((rank - 1) * columns, columns), (ragged.state, ragged.state_size())]
    state = [
        Large(device, 1, 1, torch.float32, name, values=lambda i: torch.rand(len(i)), spans=rows)
        for name in ("sensitivity", "uncertainty")
    ]
    for each in state:
        each.update()
    triplets = rank + 3
    scores = Large(device, triplets, 1, torch.float32, "scores", writable=True)
    workspace = Large(device, 8, triplets, torch.float32, "workspace", writable=True)
    args = ImportanceUpdate(
        layers=(TripletLayer * 2)(tall, ragged), layer_count=2, triplets=triplets, beta1=0.85, beta2=0.7,
        sensitivity=state[0].address, uncertainty=state[1].address, scores=scores.address, workspace=workspace.address,
    )  # fmt: skip
    device.run("update_importance", args)

    def updated(span: int, at: int, p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Checks the averages of these elements, and returns their scores."""
        old = [each.values[span][1][at : at + p.numel()] for each in state]
        expected = reference.update_importance(p.float(), g.float(), *old, 0.85, 0.7)
        for each, values in zip(state, expected, strict=True):
            assert each.now()[span][at : at + p.numel()].equal(values)
        return (expected[0] * expected[1]).double()

    means = [updated(i, 0, A.part(row, 1, 0, columns)[0], grad.part(row, 1, 0, columns)[0]).mean()
             for i, row in enumerate((0, rank - 1))]  # fmt: skip
    elements, at = [], 0
    for name, (p, g) in parts.items():
        elements.append(updated(2, at, p, g).reshape({"A": (3, 40), "E": (3, 1), "B": (out, 3)}[name]))
        at += -(-p.numel() // 16) * 16
    expected = [means[:1], [means[1], *reference.triplet_scores(*elements)]]
    assert [first for first, _ in scores.written()] == [0, rank - 1]
    for (_, got), values in zip(scores.written(), expected, strict=True):
        assert_close(got, torch.stack(list(values)), torch.float32, "scores")
