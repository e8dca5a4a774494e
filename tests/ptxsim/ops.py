# SPDX-License-Identifier: Apache-2.0
"""The argument structs of csrc/*.h in ctypes, and what memory each one names.

`cudart.py` compiles static_asserts from this file, so a struct that changes there does not build here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_double, c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from typing import Any

F32, BF16, F16 = range(3)
"""DType of csrc/dtypes.h."""

READ, WRITE, UPDATE = "read", "write", "update"
WORKSPACE = "workspace"  # what is in it at the end, and how much, is the launcher's affair

STREAM = 0x57
"""The stream that the launchers are given, and have to use."""


@dataclass(frozen=True)
class Operand:
    """One pointer of a struct, as a path to its field, and the memory that a kernel may touch through it."""

    path: str
    nbytes: int
    access: str  # READ; WRITE: uninitialised before, written completely after; UPDATE: read and written
    within: str = ""  # the pointer to the start of the allocation that this one points into, if it is another

    def address(self, args: ctypes.Structure) -> int:
        return _get(args, self.path) or 0

    def start(self, args: ctypes.Structure) -> int:
        """Of the allocation."""
        return _get(args, self.within or self.path)

    def set_address(self, args: ctypes.Structure, address: int) -> None:
        parent, _, field = self.path.rpartition(".")
        setattr(_get(args, parent) if parent else args, field, address)


def _get(args: Any, path: str) -> Any:
    """path: names of fields, and indices of arrays: "layers.3.A"."""
    for field in path.split("."):
        args = args[int(field)] if field.isdecimal() else getattr(args, field)
    return args


def size_of(dtype: int) -> int:
    return 4 if dtype == F32 else 2


class Dropout(ctypes.Structure):
    _fields_ = [("seed", c_void_p), ("threshold", c_uint32), ("scale", c_float)]


class Factor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int32), ("rank_major", c_bool)]


def part_count(tiles: int, terms: int) -> int:
    """Of csrc/cuda/parts.cuh: up to 8 parts of at least 256 terms, or a multiple of 8 of at least 1,024."""
    most = max(1, min(8, terms // 256), terms // 1024 // 8 * 8)
    parts = max(1, min(256 // tiles if tiles else 1, most))
    return parts // 8 * 8 if parts > 8 else parts


class LowRankDown(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("x_dtype", c_int32), ("rows", c_int64), ("columns", c_int64), ("rank", c_int64),
        ("factor", Factor), ("alpha", c_float), ("dropout", Dropout), ("out", c_void_p), ("workspace", c_void_p),
    ]  # fmt: skip

    def workspace_size(self) -> int:
        """low_rank_down_workspace: 128 rows and up to 64 ranks a block."""
        ranks = 16 if self.rank <= 16 else 32 if self.rank <= 32 else 64
        parts = part_count(-(-self.rank // ranks) * -(-self.rows // 128), self.columns)
        return parts * self.rows * self.rank if parts > 1 else 0

    def operands(self) -> Iterator[Operand]:
        yield Operand("x", self.rows * self.columns * size_of(self.x_dtype), READ)
        yield Operand("factor.data", self.columns * self.rank * size_of(self.factor.dtype), READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("out", self.rows * self.rank * 4, WRITE)
        yield Operand("workspace", self.workspace_size() * 4, WORKSPACE)


class LowRankUp(ctypes.Structure):
    _fields_ = [
        ("u", c_void_p), ("rows", c_int64), ("columns", c_int64), ("rank", c_int64), ("factor", Factor),
        ("alpha", c_float), ("dropout", Dropout), ("out_scale", c_void_p), ("bias", c_void_p), ("z", c_void_p),
        ("y", c_void_p), ("y_dtype", c_int32), ("accumulate", c_bool),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        matrix = self.rows * self.columns * size_of(self.y_dtype)
        yield Operand("u", self.rows * self.rank * 4, READ)
        yield Operand("factor.data", self.columns * self.rank * size_of(self.factor.dtype), READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("out_scale", self.columns * 4, READ)
        yield Operand("bias", self.columns * 4, READ)
        yield Operand("z", matrix, WRITE)
        yield Operand("y", matrix, UPDATE if self.accumulate else WRITE)


class LowRankGrad(ctypes.Structure):
    _fields_ = [
        ("u", c_void_p), ("x", c_void_p), ("x_dtype", c_int32), ("rows", c_int64), ("columns", c_int64),
        ("rank", c_int64), ("alpha", c_float), ("dropout", Dropout), ("grad", c_void_p), ("grad_dtype", c_int32),
        ("rank_major", c_bool), ("workspace", c_void_p), ("sums", c_void_p),
    ]  # fmt: skip

    def workspace_size(self) -> int:
        """low_rank_grad_workspace: 128 columns and up to 32 ranks a block."""
        ranks = 16 if self.rank <= 16 else 32
        slabs = part_count(-(-self.rank // ranks) * -(-self.columns // 128), self.rows)
        return slabs * (self.rank + bool(self.sums)) * self.columns if slabs > 1 else 0

    def operands(self) -> Iterator[Operand]:
        yield Operand("u", self.rows * self.rank * 4, READ)
        yield Operand("x", self.rows * self.columns * size_of(self.x_dtype), READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("grad", self.columns * self.rank * size_of(self.grad_dtype), WRITE)
        yield Operand("sums", self.columns * 4, WRITE)
        yield Operand("workspace", self.workspace_size() * 4, WORKSPACE)


class ColumnSums(ctypes.Structure):
    _fields_ = [
        ("g", c_void_p), ("dtype", c_int32), ("rows", c_int64), ("columns", c_int64), ("z", c_void_p),
        ("scale", c_void_p), ("q", c_void_p), ("sums", c_void_p), ("dots", c_void_p), ("workspace", c_void_p),
    ]  # fmt: skip

    def workspace_size(self) -> int:
        """column_sums_workspace: 32 columns a block."""
        slabs = part_count(-(-self.columns // 32), self.rows)
        return slabs * (bool(self.sums) + bool(self.dots)) * self.columns if slabs > 1 else 0

    def operands(self) -> Iterator[Operand]:
        matrix = self.rows * self.columns * size_of(self.dtype)
        yield Operand("g", matrix, READ)
        yield Operand("z", matrix, READ)
        yield Operand("scale", self.columns * 4, READ)
        yield Operand("q", matrix, WRITE)
        yield Operand("sums", self.columns * 4, WRITE)
        yield Operand("dots", self.columns * 4, WRITE)
        yield Operand("workspace", self.workspace_size() * 4, WORKSPACE)


class QuantizeNf4(ctypes.Structure):
    _fields_ = [
        ("w", c_void_p), ("w_dtype", c_int32), ("n", c_int64), ("block_size", c_int64), ("packed", c_void_p),
        ("absmax", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        yield Operand("w", self.n * size_of(self.w_dtype), READ)
        yield Operand("packed", -(-self.n // 2), WRITE)
        yield Operand("absmax", -(-self.n // self.block_size) * 4, WRITE)


class DequantizeNf4(ctypes.Structure):
    _fields_ = [
        ("packed", c_void_p), ("absmax", c_void_p), ("n", c_int64), ("block_size", c_int64), ("out", c_void_p),
        ("out_dtype", c_int32),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        yield Operand("packed", -(-self.n // 2), READ)
        yield Operand("absmax", -(-self.n // self.block_size) * 4, READ)
        yield Operand("out", self.n * size_of(self.out_dtype), WRITE)


class Nf4Matrix(ctypes.Structure):
    _fields_ = [
        ("packed", c_void_p), ("absmax", c_void_p), ("codes", c_void_p), ("nested_absmax", c_void_p),
        ("offset", c_void_p), ("out", c_int64), ("in", c_int64), ("block_size", c_int64),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        n = self.out * getattr(self, "in")
        blocks = -(-n // self.block_size)
        yield Operand("weight.packed", n // 2, READ)
        yield Operand("weight.absmax", blocks * 4, READ)
        yield Operand("weight.codes", blocks, READ)
        yield Operand("weight.nested_absmax", -(-blocks // 256) * 4, READ)
        yield Operand("weight.offset", 4, READ)


class Nf4Forward(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("x_dtype", c_int32), ("rows", c_int64), ("weight", Nf4Matrix), ("u", c_void_p),
        ("rank", c_int64), ("factor", Factor), ("alpha", c_float), ("out_scale", c_void_p), ("bias", c_void_p),
        ("z", c_void_p), ("y", c_void_p), ("y_dtype", c_int32), ("splits", c_int64), ("workspace", c_void_p),
        ("overlap", c_bool),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        out = self.weight.out
        yield from self.weight.operands()
        yield Operand("x", self.rows * getattr(self.weight, "in") * size_of(self.x_dtype), READ)
        yield Operand("u", self.rows * self.rank * 4, READ)
        yield Operand("factor.data", out * self.rank * size_of(self.factor.dtype), READ)
        yield Operand("out_scale", out * 4, READ)
        yield Operand("bias", out * 4, READ)
        yield Operand("workspace", self.workspace_size() * 4, WORKSPACE)
        yield Operand("z", self.rows * out * size_of(self.x_dtype), WRITE)
        yield Operand("y", self.rows * out * size_of(self.y_dtype), WRITE)

    def workspace_size(self) -> int:
        """nf4_forward_workspace: whole tiles, and of one of 8 rows pairs of rows."""
        tile_rows = next((n for n in (8, 16, 32, 64) if self.rows <= n), 128)
        tiles = -(-self.rows // tile_rows) * -(-self.weight.out // 128)
        members = -(-self.rows // 2) if tile_rows == 8 else 4
        return self.splits * tiles * tile_rows * members * 32 if self.splits > 1 else 0


class Nf4Gradient(ctypes.Structure):
    _fields_ = [
        ("q", c_void_p), ("q_dtype", c_int32), ("rows", c_int64), ("weight", Nf4Matrix), ("dh", c_void_p),
        ("rank", c_int64), ("factor", Factor), ("dropout", Dropout), ("dx", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        columns = getattr(self.weight, "in")
        yield Operand("q", self.rows * self.weight.out * 2, READ)
        yield from self.weight.operands()
        yield Operand("dh", self.rows * self.rank * 4, READ)
        yield Operand("factor.data", self.rank * columns * size_of(self.factor.dtype), READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("dx", self.rows * columns * 2, WRITE)


class QuantizeAbsmax(ctypes.Structure):
    _fields_ = [
        ("absmax", c_void_p), ("n", c_int64), ("codes", c_void_p), ("nested_absmax", c_void_p), ("offset", c_void_p),
        ("workspace", c_void_p),
    ]  # fmt: skip

    def workspace_size(self) -> int:
        """quantize_absmax_workspace: a double for each 4,096 values."""
        return min(-(-self.n // 4096), 64)

    def operands(self) -> Iterator[Operand]:
        yield Operand("workspace", self.workspace_size() * 8, WORKSPACE)
        yield Operand("absmax", self.n * 4, READ)
        yield Operand("codes", self.n, WRITE)
        yield Operand("nested_absmax", -(-self.n // 256) * 4, WRITE)
        yield Operand("offset", 4, WRITE)


class DequantizeAbsmax(ctypes.Structure):
    _fields_ = [
        ("codes", c_void_p), ("nested_absmax", c_void_p), ("offset", c_void_p), ("n", c_int64), ("absmax", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        yield Operand("codes", self.n, READ)
        yield Operand("nested_absmax", -(-self.n // 256) * 4, READ)
        yield Operand("offset", 4, READ)
        yield Operand("absmax", self.n * 4, WRITE)


class RowGroups(ctypes.Structure):
    _fields_ = [
        ("offsets", c_void_p), ("order", c_void_p), ("tiles", c_void_p), ("rows", c_int64), ("adapters", c_int64),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        yield Operand("groups.offsets", 8 * (self.adapters + 2), READ)
        yield Operand("groups.order", 8 * self.rows, READ, within="groups.offsets")
        tiles = max_row_tiles(self.rows, self.adapters)
        yield Operand("groups.tiles", 16 * tiles, READ, within="groups.offsets")


def max_row_tiles(rows: int, adapters: int) -> int:
    return rows // 32 + adapters + 1


class MultiLoraPlan(ctypes.Structure):
    _fields_ = [
        ("index", c_void_p), ("indices", c_int64), ("rows", c_int64), ("adapters", c_int64), ("offsets", c_void_p),
        ("order", c_void_p), ("tiles", c_void_p), ("cursor", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        yield Operand("index", 8 * self.indices, READ)
        yield Operand("offsets", 8 * (self.adapters + 2), WRITE)
        yield Operand("order", 8 * self.rows, WRITE, within="offsets")
        yield Operand("tiles", 16 * max_row_tiles(self.rows, self.adapters), WRITE, within="offsets")
        yield Operand("cursor", 8 * (self.adapters + 1), WRITE, within="offsets")


class FactorBank(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int32), ("rank_major", c_bool), ("ranks", c_void_p)]


class MultiLoraDown(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("x_dtype", c_int32), ("groups", RowGroups), ("columns", c_int64), ("rank", c_int64),
        ("factors", FactorBank), ("alphas", c_void_p), ("alpha", c_float), ("dropout", Dropout), ("out", c_void_p),
        ("workspace", c_void_p),
    ]  # fmt: skip

    def workspace_size(self) -> int:
        """multi_lora_down_workspace: as low_rank_down's, with so many blocks that have work at most."""
        rows = self.groups.rows
        ranks = 16 if self.rank <= 16 else 32 if self.rank <= 32 else 64
        tiles = -(-self.rank // ranks) * min(rows // 128 + self.groups.adapters + 1, rows)
        parts = part_count(tiles, self.columns)
        return parts * rows * self.rank if parts > 1 else 0

    def operands(self) -> Iterator[Operand]:
        rows, adapters = self.groups.rows, self.groups.adapters
        yield from self.groups.operands()
        yield Operand("x", rows * self.columns * size_of(self.x_dtype), READ)
        yield Operand("factors.data", adapters * self.columns * self.rank * size_of(self.factors.dtype), READ)
        yield Operand("factors.ranks", 4 * adapters, READ)
        yield Operand("alphas", 4 * adapters, READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("out", rows * self.rank * 4, WRITE)
        yield Operand("workspace", self.workspace_size() * 4, WORKSPACE)


class MultiLoraUp(ctypes.Structure):
    _fields_ = [
        ("u", c_void_p), ("groups", RowGroups), ("columns", c_int64), ("rank", c_int64), ("factors", FactorBank),
        ("alphas", c_void_p), ("alpha", c_float), ("dropout", Dropout), ("y", c_void_p), ("y_dtype", c_int32),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        rows, adapters = self.groups.rows, self.groups.adapters
        yield from self.groups.operands()
        yield Operand("u", rows * self.rank * 4, READ)
        yield Operand("factors.data", adapters * self.columns * self.rank * size_of(self.factors.dtype), READ)
        yield Operand("factors.ranks", 4 * adapters, READ)
        yield Operand("alphas", 4 * adapters, READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("y", rows * self.columns * size_of(self.y_dtype), UPDATE)


class MultiLoraGrad(ctypes.Structure):
    _fields_ = [
        ("u", c_void_p), ("x", c_void_p), ("x_dtype", c_int32), ("groups", RowGroups), ("columns", c_int64),
        ("rank", c_int64), ("ranks", c_void_p), ("alphas", c_void_p), ("alpha", c_float), ("dropout", Dropout),
        ("grad", c_void_p), ("grad_dtype", c_int32), ("rank_major", c_bool), ("workspace", c_void_p),
    ]  # fmt: skip

    def workspace_size(self) -> int:
        """multi_lora_grad_workspace: as low_rank_grad's, where one adapter has all rows."""
        ranks, adapters = 16 if self.rank <= 16 else 32, self.groups.adapters
        slabs = part_count(-(-self.rank // ranks) * -(-self.columns // 128) * adapters, self.groups.rows)
        return slabs * adapters * self.rank * self.columns if slabs > 1 else 0

    def operands(self) -> Iterator[Operand]:
        rows, adapters = self.groups.rows, self.groups.adapters
        yield from (operand for operand in self.groups.operands() if operand.path != "groups.tiles")
        yield Operand("u", rows * self.rank * 4, READ)
        yield Operand("x", rows * self.columns * size_of(self.x_dtype), READ)
        yield Operand("ranks", 4 * adapters, READ)
        yield Operand("alphas", 4 * adapters, READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("grad", adapters * self.columns * self.rank * size_of(self.grad_dtype), WRITE)
        yield Operand("workspace", self.workspace_size() * 4, WORKSPACE)


class SquaredRowNorms(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p), ("absmax", c_void_p), ("dtype", c_int32), ("block_size", c_int64), ("rows", c_int64),
        ("columns", c_int64), ("out", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        n = self.rows * self.columns
        yield Operand("weight", -(-n // 2) if self.absmax else n * size_of(self.dtype), READ)
        yield Operand("absmax", -(-n // self.block_size) * 4, READ)
        yield Operand("out", self.rows * 8, WRITE)


class DoraNorm(ctypes.Structure):
    _fields_ = [
        ("w2", c_void_p), ("P", c_void_p), ("G", c_void_p), ("B", c_void_p), ("B_dtype", c_int32), ("rows", c_int64),
        ("rank", c_int64), ("scaling", c_double), ("norm", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        yield Operand("w2", self.rows * 8, READ)
        yield Operand("P", self.rank * self.rows * 4, READ)
        yield Operand("G", self.rank * self.rank * 8, READ)
        yield Operand("B", self.rows * self.rank * size_of(self.B_dtype), READ)
        yield Operand("norm", self.rows * 4, WRITE)


class JacobiSvd(ctypes.Structure):
    _fields_ = [("vectors", c_void_p), ("values", c_void_p), ("sweeps", c_void_p), ("batch", c_int64), ("n", c_int64)]

    def operands(self) -> Iterator[Operand]:
        yield Operand("vectors", self.batch * self.n * self.n * 8, UPDATE)
        yield Operand("values", self.batch * self.n * 8, WRITE)
        yield Operand("sweeps", self.batch * 4, WRITE)


class TripletLayer(ctypes.Structure):
    _fields_ = [
        ("A", c_void_p), ("E", c_void_p), ("B", c_void_p), ("grad_A", c_void_p), ("grad_E", c_void_p),
        ("grad_B", c_void_p), ("dtype", c_int32), ("in", c_int64), ("out", c_int64), ("rank", c_int64),
        ("first", c_int64), ("state", c_int64),
    ]  # fmt: skip

    def sizes(self) -> dict[str, int]:
        """Elements of A, E and B."""
        return {"A": self.rank * getattr(self, "in"), "E": self.rank, "B": self.out * self.rank}

    def state_size(self) -> int:
        return sum(-(-n // 16) * 16 for n in self.sizes().values())


class ImportanceUpdate(ctypes.Structure):
    SCORE_PARTS = 8  # kScoreParts of csrc/cuda/kernels.h
    _fields_ = [
        ("layers", POINTER(TripletLayer)), ("layer_count", c_int64), ("triplets", c_int64), ("beta1", c_double),
        ("beta2", c_double), ("grad_scale", c_void_p), ("sensitivity", c_void_p), ("uncertainty", c_void_p),
        ("scores", c_void_p), ("workspace", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        state = 0
        for i in range(self.layer_count):
            layer = self.layers[i]
            state += layer.state_size()
            for name, n in layer.sizes().items():
                yield Operand(f"layers.{i}.{name}", n * size_of(layer.dtype), READ)
                yield Operand(f"layers.{i}.grad_{name}", n * size_of(layer.dtype), READ)
        yield Operand("grad_scale", 4, READ)
        yield Operand("sensitivity", state * 4, UPDATE)
        yield Operand("uncertainty", state * 4, UPDATE)
        yield Operand("scores", self.triplets * 4, WRITE)
        yield Operand("workspace", self.SCORE_PARTS * self.triplets * 4, WORKSPACE)


class RankMask(ctypes.Structure):
    _fields_ = [
        ("scores", c_void_p), ("triplets", c_int64), ("budget", c_int64), ("exact", c_bool), ("keep", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        yield Operand("scores", self.triplets * 4, READ)
        yield Operand("keep", self.triplets, WRITE)


class MaskRanks(ctypes.Structure):
    _fields_ = [("layers", POINTER(TripletLayer)), ("layer_count", c_int64), ("keep", c_void_p)]

    def operands(self) -> Iterator[Operand]:
        triplets = 0
        for i in range(self.layer_count):
            triplets += self.layers[i].rank
            yield Operand(f"layers.{i}.E", self.layers[i].rank * size_of(self.layers[i].dtype), UPDATE)
        yield Operand("keep", triplets, READ)


class OrthogonalFactor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("dtype", c_int32), ("rank_major", c_bool), ("rank", c_int64), ("columns", c_int64),
        ("deviation", c_int64), ("grad", c_void_p),
    ]  # fmt: skip

    @property
    def nbytes(self) -> int:
        return self.rank * self.columns * size_of(self.dtype)


class Orthogonality(ctypes.Structure):
    _fields_ = [
        ("factors", POINTER(OrthogonalFactor)), ("factor_count", c_int64), ("squared", c_bool),
        ("deviations", c_void_p), ("norms", c_void_p), ("value", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        for i in range(self.factor_count):
            yield Operand(f"factors.{i}.data", self.factors[i].nbytes, READ)
        deviations = sum(self.factors[i].rank ** 2 for i in range(self.factor_count))
        yield Operand("deviations", deviations * 4, WRITE)
        yield Operand("norms", self.factor_count * 4, WRITE)
        yield Operand("value", 4, WRITE)


class OrthogonalityGrad(ctypes.Structure):
    _fields_ = [
        ("factors", POINTER(OrthogonalFactor)), ("factor_count", c_int64), ("squared", c_bool),
        ("upstream", c_void_p), ("deviations", c_void_p), ("norms", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        for i in range(self.factor_count):
            yield Operand(f"factors.{i}.data", self.factors[i].nbytes, READ)
            yield Operand(f"factors.{i}.grad", self.factors[i].nbytes, WRITE)
        yield Operand("upstream", 4, READ)
        yield Operand("deviations", sum(self.factors[i].rank ** 2 for i in range(self.factor_count)) * 4, READ)
        yield Operand("norms", self.factor_count * 4, READ)


OPS: dict[str, type[ctypes.Structure]] = {
    "low_rank_down": LowRankDown,
    "low_rank_up": LowRankUp,
    "low_rank_grad": LowRankGrad,
    "column_sums": ColumnSums,
    "quantize_nf4": QuantizeNf4,
    "dequantize_nf4": DequantizeNf4,
    "nf4_forward": Nf4Forward,
    "nf4_gradient": Nf4Gradient,
    "quantize_absmax": QuantizeAbsmax,
    "dequantize_absmax": DequantizeAbsmax,
    "multi_lora_plan": MultiLoraPlan,
    "multi_lora_down": MultiLoraDown,
    "multi_lora_up": MultiLoraUp,
    "multi_lora_grad": MultiLoraGrad,
    "squared_row_norms": SquaredRowNorms,
    "dora_norm": DoraNorm,
    "jacobi_svd": JacobiSvd,
    "update_importance": ImportanceUpdate,
    "rank_mask": RankMask,
    "mask_ranks": MaskRanks,
    "orthogonality": Orthogonality,
    "orthogonality_grad": OrthogonalityGrad,
}
"""launch_<op> of csrc/cuda/kernels.h and the struct it takes."""


def wrappers() -> str:
    """C++ that gives every launcher a C name, and checks every field above against the headers."""
    lines = ['#include "kernels.h"', "using namespace peftkern;"]
    lines.append(f"static_assert(kScoreParts == {ImportanceUpdate.SCORE_PARTS});")
    for struct in (Dropout, Factor, Nf4Matrix, RowGroups, FactorBank, TripletLayer, OrthogonalFactor, *OPS.values()):
        name = struct.__name__
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});")
        for field, *_ in struct._fields_:
            lines.append(f"static_assert(offsetof({name}, {field}) == {getattr(struct, field).offset});")
    for op, struct in OPS.items():
        call = f"launch_{op}(*args, reinterpret_cast<cudaStream_t>({STREAM}))"
        lines.append(f'extern "C" int ptxsim_{op}(const {struct.__name__}* args) {{ return {call}; }}')
    return "\n".join(lines) + "\n"
