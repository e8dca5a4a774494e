# SPDX-License-Identifier: Apache-2.0
"""The argument structs of csrc/low_rank.h, csrc/multi_low_rank.h and csrc/nf4.h in ctypes, and the memory each names.

`cudart.py` compiles static_asserts from this file, so a struct that changes there does not build here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from ctypes import c_bool, c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from typing import Any

F32, BF16, F16 = range(3)
"""DType of csrc/dtypes.h."""

READ, WRITE, UPDATE = "read", "write", "update"

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
        *parents, field = self.path.split(".")
        for parent in parents:
            args = getattr(args, parent)
        setattr(args, field, address)


def _get(args: Any, path: str) -> Any:
    for field in path.split("."):
        args = getattr(args, field)
    return args


def size_of(dtype: int) -> int:
    return 4 if dtype == F32 else 2


class Dropout(ctypes.Structure):
    _fields_ = [("seed", c_void_p), ("threshold", c_uint32), ("scale", c_float)]


class Factor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int32), ("rank_major", c_bool)]


class LowRankDown(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p), ("x_dtype", c_int32), ("rows", c_int64), ("columns", c_int64), ("rank", c_int64),
        ("factor", Factor), ("alpha", c_float), ("dropout", Dropout), ("out", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        yield Operand("x", self.rows * self.columns * size_of(self.x_dtype), READ)
        yield Operand("factor.data", self.columns * self.rank * size_of(self.factor.dtype), READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("out", self.rows * self.rank * 4, WRITE)


class LowRankUp(ctypes.Structure):
    _fields_ = [
        ("u", c_void_p), ("rows", c_int64), ("columns", c_int64), ("rank", c_int64), ("factor", Factor),
        ("alpha", c_float), ("dropout", Dropout), ("out_scale", c_void_p), ("bias", c_void_p), ("z", c_void_p),
        ("y", c_void_p), ("y_dtype", c_int32),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        matrix = self.rows * self.columns * size_of(self.y_dtype)
        yield Operand("u", self.rows * self.rank * 4, READ)
        yield Operand("factor.data", self.columns * self.rank * size_of(self.factor.dtype), READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("out_scale", self.columns * 4, READ)
        yield Operand("bias", self.columns * 4, READ)
        yield Operand("z", matrix, WRITE)
        yield Operand("y", matrix, UPDATE)


class LowRankGrad(ctypes.Structure):
    _fields_ = [
        ("u", c_void_p), ("x", c_void_p), ("x_dtype", c_int32), ("rows", c_int64), ("columns", c_int64),
        ("rank", c_int64), ("alpha", c_float), ("dropout", Dropout), ("grad", c_void_p), ("grad_dtype", c_int32),
        ("rank_major", c_bool),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        yield Operand("u", self.rows * self.rank * 4, READ)
        yield Operand("x", self.rows * self.columns * size_of(self.x_dtype), READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("grad", self.columns * self.rank * size_of(self.grad_dtype), WRITE)


class ColumnSums(ctypes.Structure):
    _fields_ = [
        ("g", c_void_p), ("z", c_void_p), ("g_dtype", c_int32), ("rows", c_int64), ("columns", c_int64),
        ("out", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        matrix = self.rows * self.columns * size_of(self.g_dtype)
        yield Operand("g", matrix, READ)
        yield Operand("z", matrix, READ)
        yield Operand("out", self.columns * 4, WRITE)


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


class QuantizeAbsmax(ctypes.Structure):
    _fields_ = [
        ("absmax", c_void_p), ("n", c_int64), ("codes", c_void_p), ("nested_absmax", c_void_p), ("offset", c_void_p),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
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
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        rows, adapters = self.groups.rows, self.groups.adapters
        yield from self.groups.operands()
        yield Operand("x", rows * self.columns * size_of(self.x_dtype), READ)
        yield Operand("factors.data", adapters * self.columns * self.rank * size_of(self.factors.dtype), READ)
        yield Operand("factors.ranks", 4 * adapters, READ)
        yield Operand("alphas", 4 * adapters, READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("out", rows * self.rank * 4, WRITE)


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
        ("grad", c_void_p), ("grad_dtype", c_int32), ("rank_major", c_bool),
    ]  # fmt: skip

    def operands(self) -> Iterator[Operand]:
        rows, adapters = self.groups.rows, self.groups.adapters
        yield from self.groups.operands()
        yield Operand("u", rows * self.rank * 4, READ)
        yield Operand("x", rows * self.columns * size_of(self.x_dtype), READ)
        yield Operand("ranks", 4 * adapters, READ)
        yield Operand("alphas", 4 * adapters, READ)
        yield Operand("dropout.seed", 8, READ)
        yield Operand("grad", adapters * self.columns * self.rank * size_of(self.grad_dtype), WRITE)


OPS: dict[str, type[ctypes.Structure]] = {
    "low_rank_down": LowRankDown,
    "low_rank_up": LowRankUp,
    "low_rank_grad": LowRankGrad,
    "column_sums": ColumnSums,
    "quantize_nf4": QuantizeNf4,
    "dequantize_nf4": DequantizeNf4,
    "quantize_absmax": QuantizeAbsmax,
    "dequantize_absmax": DequantizeAbsmax,
    "multi_lora_plan": MultiLoraPlan,
    "multi_lora_down": MultiLoraDown,
    "multi_lora_up": MultiLoraUp,
    "multi_lora_grad": MultiLoraGrad,
}
"""launch_<op> of csrc/cuda/kernels.h and the struct it takes."""


def wrappers() -> str:
    """C++ that gives every launcher a C name, and checks every field above against the headers."""
    lines = ['#include "kernels.h"', "using namespace peftkern;"]
    for struct in (Dropout, Factor, RowGroups, FactorBank, *OPS.values()):
        name = struct.__name__
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(struct)});")
        for field, *_ in struct._fields_:
            lines.append(f"static_assert(offsetof({name}, {field}) == {getattr(struct, field).offset});")
    for op, struct in OPS.items():
        call = f"launch_{op}(*args, reinterpret_cast<cudaStream_t>({STREAM}))"
        lines.append(f'extern "C" int ptxsim_{op}(const {struct.__name__}* args) {{ return {call}; }}')
    return "\n".join(lines) + "\n"
