# SPDX-License-Identifier: Apache-2.0
"""The cases of csrc/multi_low_rank.h: rows sorted by adapter, and low-rank products over gathered rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from .ops import (
    BF16,
    F16,
    F32,
    FactorBank,
    MultiLoraDown,
    MultiLoraGrad,
    MultiLoraPlan,
    MultiLoraUp,
    RowGroups,
    max_row_tiles,
)
from .problem import DTYPES, TORCH_DTYPE, Problem, assert_bits, assert_sums, drop, dropout_argument, random


def _index(rows: int, adapters: int, kind: str) -> torch.Tensor:
    """random: -1 and what is out of range included; one, none: all rows alike; sorted; all: no row without one; few:
    five adapters alone."""
    index = torch.randint(0 if kind in ("all", "few") else -1, 5 if kind == "few" else adapters, (rows,))
    if kind == "random":
        index[torch.rand(rows) < 0.05], index[torch.rand(rows) < 0.05] = adapters, -(2**50)
    elif kind == "one":
        index[:] = adapters - 1
    elif kind == "none":
        index[:] = -1
    return index.sort().values if kind == "sorted" else index


def _plan(index: torch.Tensor, adapters: int) -> dict[str, torch.Tensor]:
    """offsets, order, tiles and cursor as MultiLoraPlan defines them."""
    rows = len(index)
    group = torch.where((index < 0) | (index >= adapters), adapters, index)
    offsets = torch.cat([torch.zeros(1).long(), torch.bincount(group, minlength=adapters + 1).cumsum(0)])
    tiles = torch.tensor([[-1, 0]]).repeat(max_row_tiles(rows, adapters), 1)
    used = [(g, e) for g in range(adapters + 1) for e in range(int(offsets[g]), int(offsets[g + 1]), 32)]
    tiles[: len(used)] = torch.tensor(used).reshape(-1, 2)
    return {"offsets": offsets, "order": group.sort(stable=True).indices, "tiles": tiles, "cursor": offsets[1:]}


def _multi_lora_plan(rows, adapters, indices=None, kind="random") -> Problem:
    problem, indices = Problem(), rows if indices is None else indices
    index = _index(indices, adapters, kind)
    expected = _plan(index.repeat_interleave(rows // indices if indices else 1), adapters)
    problem.args = MultiLoraPlan(
        index=problem.place("index", index), indices=indices, rows=rows, adapters=adapters,
        **{name: problem.reserve(name, values.numel(), torch.int64) for name, values in expected.items()},
    )  # fmt: skip

    def check() -> None:
        for name, values in expected.items():
            assert_bits(problem.result(name, torch.int64, *values.shape), values, f"multi_lora_plan {name}")

    problem.check = check
    return problem


class _Bank:
    """What the three other ops share: the groups, ranks and alphas, in the problem's memory and here."""

    def __init__(self, problem: Problem, rows: int, adapters: int, rank: int, kind: str, own: bool):
        index = _index(rows, adapters, kind)
        self.plan, self.adapters = _plan(index, adapters), adapters
        placed = {name: problem.place(name, self.plan[name]) for name in ("offsets", "order", "tiles")}
        self.groups = RowGroups(**placed, rows=rows, adapters=adapters)
        self.ranks, self.alphas = torch.full((adapters,), rank), torch.full((adapters,), 0.75)
        self.pointers = {"ranks": None, "alphas": None}
        if own:
            # two of them out of range: the nearest counts
            ranks = torch.randint(-1, rank + 2, (adapters,)).int()
            self.ranks, self.alphas = ranks.clamp(0, rank).long(), torch.rand(adapters) + 0.5
            self.pointers = {"ranks": problem.place("ranks", ranks), "alphas": problem.place("alphas", self.alphas)}

    def of(self, a: int) -> tuple[torch.Tensor, slice, int]:
        """The rows of an adapter, its entries, its rank."""
        first, last = self.plan["offsets"][a : a + 2].tolist()
        return self.plan["order"][first:last], slice(first, last), int(self.ranks[a])

    def factors(self, problem: Problem, columns: int, rank: int, dtype: int, rank_major: bool, misaligned: int):
        """The argument, with NaN past each adapter's rank, and F [adapters, rank, columns] in float64."""
        shape = (rank, columns) if rank_major else (columns, rank)
        values = random(self.adapters, *shape, dtype=dtype)
        f = values if rank_major else values.transpose(1, 2)
        for a, r in enumerate(self.ranks.tolist()):
            f[a, r:] = float("nan")
        address = problem.place("factor", values, misaligned) if values.numel() else None
        return FactorBank(address, dtype, rank_major, self.pointers["ranks"]), f.double()


def _multi_lora_down(
    rows, columns, rank, adapters, x=F32, factor=F32, rank_major=True, p=0.0, kind="random", own=True, misaligned=0
) -> Problem:
    problem = Problem()
    bank, values = _Bank(problem, rows, adapters, rank, kind, own), random(rows, columns, dtype=x)
    argument, f = bank.factors(problem, columns, rank, factor, rank_major, misaligned)
    problem.args = MultiLoraDown(
        x=problem.place("x", values, misaligned), x_dtype=x, groups=bank.groups, columns=columns, rank=rank,
        factors=argument, alphas=bank.pointers["alphas"], alpha=0.75, dropout=dropout_argument(problem, p),
        out=problem.reserve("out", rows * rank),
    )  # fmt: skip
    problem.reserve_workspace()

    def check() -> None:
        dropped = drop(values, p)
        expected, magnitude = torch.zeros(2, rows, rank, dtype=torch.float64)
        for a in range(adapters):
            own_rows, entries, r = bank.of(a)
            expected[entries, :r] = bank.alphas[a] * dropped[own_rows] @ f[a, :r].T
            magnitude[entries, :r] = bank.alphas[a] * dropped[own_rows].abs() @ f[a, :r].abs().T
        assert_sums(problem.result("out", torch.float32, rows, rank), expected, magnitude, "multi_lora_down")

    problem.check = check
    return problem


def _multi_lora_up(
    rows, columns, rank, adapters, y=F32, factor=F32, rank_major=True, p=0.0, kind="random", own=True, misaligned=0
) -> Problem:
    problem = Problem()
    bank, before = _Bank(problem, rows, adapters, rank, kind, own), random(rows, columns, dtype=y)
    u = random(rows, rank)
    for a in range(adapters):
        _, entries, r = bank.of(a)
        u[entries, r:] = float("nan")
    argument, f = bank.factors(problem, columns, rank, factor, rank_major, misaligned)
    problem.args = MultiLoraUp(
        u=problem.place("u", u, misaligned), groups=bank.groups, columns=columns, rank=rank, factors=argument,
        alphas=bank.pointers["alphas"], alpha=0.75, dropout=dropout_argument(problem, p),
        y=problem.place("y", before, misaligned), y_dtype=y,
    )  # fmt: skip

    def check() -> None:
        added, magnitude = torch.zeros(2, rows, columns, dtype=torch.float64)
        for a in range(adapters):
            own_rows, entries, r = bank.of(a)
            added[own_rows] = bank.alphas[a] * u[entries, :r].double() @ f[a, :r]
            magnitude[own_rows] = bank.alphas[a] * u[entries, :r].double().abs() @ f[a, :r].abs()
        expected = before.double() + drop(added, p)
        got = problem.result("y", TORCH_DTYPE[y], rows, columns)
        assert_sums(got, expected, before.double().abs() + drop(magnitude, p), "multi_lora_up")
        untouched = bank.plan["order"][bank.plan["offsets"][adapters] :]
        assert_bits(got[untouched], before[untouched], "multi_lora_up, rows without adapter")

    problem.check = check
    return problem


def _multi_lora_grad(
    rows, columns, rank, adapters, x=F32, grad=F32, rank_major=True, p=0.0, kind="random", own=True, misaligned=0
) -> Problem:
    problem = Problem()
    bank, values, u = (
        _Bank(problem, rows, adapters, rank, kind, own),
        random(rows, columns, dtype=x),
        random(rows, rank),
    )
    problem.args = MultiLoraGrad(
        u=problem.place("u", u, misaligned), x=problem.place("x", values, misaligned), x_dtype=x, groups=bank.groups,
        columns=columns, rank=rank, **bank.pointers, alpha=0.75, dropout=dropout_argument(problem, p),
        grad=problem.reserve("grad", adapters * rank * columns, TORCH_DTYPE[grad]), grad_dtype=grad,
        rank_major=rank_major,
    )  # fmt: skip
    problem.reserve_workspace()

    def check() -> None:
        dropped = drop(values, p)
        expected, magnitude = torch.zeros(2, adapters, rank, columns, dtype=torch.float64)
        for a in range(adapters):
            own_rows, entries, r = bank.of(a)
            left = u[entries, :r].double().T
            expected[a, :r] = bank.alphas[a] * left @ dropped[own_rows]
            magnitude[a, :r] = bank.alphas[a] * left.abs() @ dropped[own_rows].abs()
        shape = (adapters, rank, columns) if rank_major else (adapters, columns, rank)
        got = problem.result("grad", TORCH_DTYPE[grad], *shape)
        assert_sums(got if rank_major else got.transpose(1, 2), expected, magnitude, "multi_lora_grad")

    problem.check = check
    return problem


multi_builders = {
    "multi_lora_plan": _multi_lora_plan,
    "multi_lora_down": _multi_lora_down,
    "multi_lora_up": _multi_lora_up,
    "multi_lora_grad": _multi_lora_grad,
}


def multi_cases() -> Iterator[tuple[str, dict]]:
    for rows, adapters in ((1, 1), (0, 3), (40, 3), (256, 5), (300, 8), (70, 300), (1000, 2)):
        for kind in ("random", "sorted", "one", "none"):
            yield "multi_lora_plan", dict(rows=rows, adapters=adapters, kind=kind)
    yield "multi_lora_plan", dict(rows=600, adapters=7, indices=6)
    yield "multi_lora_plan", dict(rows=70, adapters=3, indices=1)
    yield "multi_lora_plan", dict(rows=300, adapters=256)  # with the rows of none, one group more than threads
    # ragged; whole tiles; one row; none; few rows of many adapters; all of one; none with an adapter
    shapes = ((67, 131, 3, "random"), (64, 128, 2, "sorted"), (1, 64, 2, "random"), (0, 64, 2, "random"),
              (9, 72, 20, "random"), (70, 40, 2, "one"), (40, 40, 3, "none"))  # fmt: skip
    ranks = (0, 1, 5, 8, 16, 40)
    for (i, rank), (j, (rows, columns, adapters, kind)) in itertools.product(enumerate(ranks), enumerate(shapes)):
        p, dtype, other = 0.3 * ((i + j) % 2), (i + j) % 3, (i + 2 * j) % 3
        size = dict(rows=rows, columns=columns, rank=rank, adapters=adapters, kind=kind, own=bool((i + j // 2) % 2))
        rank_major = bool((i // 2 + j) % 2)
        yield "multi_lora_down", dict(**size, x=dtype, factor=other, rank_major=rank_major, p=p)
        yield "multi_lora_up", dict(**size, y=dtype, factor=other, rank_major=rank_major, p=p)
        yield "multi_lora_grad", dict(**size, x=dtype, grad=other, rank_major=rank_major, p=p)
    # every pair of dtypes in both layouts and every width of a tile, where all accesses are vectors
    for a, b, rank_major in itertools.product(DTYPES, DTYPES, (False, True)):
        size = dict(rows=70, adapters=3, rank_major=rank_major, p=0.1)
        for rank in (16, 32):
            yield "multi_lora_down", dict(columns=256, rank=rank, **size, x=a, factor=b)
            yield "multi_lora_grad", dict(columns=136, rank=rank, **size, x=a, grad=b)
        yield "multi_lora_up", dict(columns=136, rank=16, **size, y=a, factor=b)
    for (i, dtype), rank in itertools.product(enumerate((F32, BF16)), (12, 24, 40)):
        # blocks that share the columns; so many tiles that they do not; adapters with several stages of rows
        yield "multi_lora_down", dict(rows=170, columns=600, rank=rank, adapters=3, x=dtype, p=0.2)
        for kind in ("one", "few", "random")[i:]:
            size = dict(rows=260, columns=600, rank=rank, adapters=250, kind=kind)
            yield "multi_lora_down", dict(**size, x=dtype, factor=BF16, rank_major=bool(i), p=0.2 * i)
        yield "multi_lora_grad", dict(rows=300, columns=40, rank=rank, adapters=2, x=dtype, kind="one", p=0.2)
    for rank in (12, 24, 40):
        yield "multi_lora_down", dict(rows=260, columns=600, rank=rank, adapters=250, kind="few", x=F16)
        yield "multi_lora_grad", dict(rows=300, columns=40, rank=rank, adapters=2, x=F16, kind="one", p=0.2)
    # slabs of the rows, some of them without any; more parts than a cluster has blocks
    for i, dtype in enumerate(DTYPES):
        for kind in ("one", "random", "few"):
            yield "multi_lora_grad", dict(rows=1000, columns=72, rank=5 + 20 * i, adapters=3, x=dtype, kind=kind, p=0.1)
        size = dict(rank=3, adapters=2, x=dtype, kind="random", own=False)
        yield "multi_lora_grad", dict(rows=1024 * 16, columns=8, **size)
        yield "multi_lora_down", dict(rows=5, columns=1024 * 16, **size)
    yield "multi_lora_grad", dict(rows=65, columns=64, rank=8, adapters=2, x=BF16, kind="one", own=False)
    for rows in (33, 65):  # a row more than half the warps, and a quarter of them, have
        yield "multi_lora_down", dict(rows=rows, columns=256, rank=12, adapters=2, x=BF16, kind="one", own=False)
    for op, dtype in (("multi_lora_down", "x"), ("multi_lora_up", "y"), ("multi_lora_grad", "x")):
        # pointers that are not 16-byte aligned, with sizes that are
        yield op, dict(rows=45, columns=80, rank=12, adapters=3, **{dtype: BF16}, p=0.2, misaligned=1)
        yield op, dict(rows=45, columns=80, rank=24, adapters=3, **{dtype: F32}, rank_major=False, misaligned=3)
        # narrow, single column, no columns
        yield op, dict(rows=100, columns=8, rank=20, adapters=2, **{dtype: F16}, rank_major=False, p=0.5)
        yield op, dict(rows=150, columns=1, rank=3, adapters=2, **{dtype: BF16}, p=0.05)
        yield op, dict(rows=5, columns=0, rank=8, adapters=2, **{dtype: BF16}, p=0.1)


def multi_scheduled() -> Iterator[tuple[str, dict]]:
    yield "multi_lora_plan", dict(rows=300, adapters=5)
    size = dict(rows=70, columns=136, adapters=3, p=0.1)
    for rank, columns in ((16, 136), (8, 300), (40, 136)):
        yield "multi_lora_down", dict(**size | {"columns": columns}, rank=rank, x=BF16)
    yield "multi_lora_up", dict(**size, rank=20, y=BF16, factor=F16, rank_major=False)
    for rank in (8, 20):
        yield "multi_lora_grad", dict(**size | {"rows": 200, "columns": 40}, rank=rank, x=BF16, kind="one")
