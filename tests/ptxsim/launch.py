# SPDX-License-Identifier: Apache-2.0
"""A kernel and its launch: parameter layout, packing of arguments, and the call of the machine."""

from __future__ import annotations

import ctypes
import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from .build import core
from .decode import Decoder
from .memory import Buffer, Pointer
from .ptx import PtxError, align_up, parse_variable
from .report import Result

MAX_SHARED_BYTES = 232448  # of a block on sm_90 and sm_100; smaller cards are the launcher's business
MAX_THREADS = 1024
MAX_CLUSTER = 8  # more is not portable
SCHEDULES = ("default", "random", "chaos")


@dataclass(frozen=True)
class Parameter:
    name: str
    size: int
    align: int
    offset: int
    type: str  # of the C++ signature, where it is known


class Kernel:
    """`parameters` says what a launch takes; launch() runs it."""

    def __init__(self, module, mangled: str):
        self.module, self.mangled, self.signature = module, mangled, module.demangled[mangled]
        head, body = module.ptx.entries[mangled]
        declared = [parse_variable(text) for text in re.findall(r"\.param[^,)]*", head[head.find("(") :])]
        types = _parameter_types(self.signature)
        if len(types) != len(declared):
            types = [""] * len(declared)
        self.parameters, end = [], 0
        for variable, type_name in zip(declared, types, strict=True):
            variable.address = align_up(end, variable.align)
            end = variable.address + variable.size
            self.parameters.append(Parameter(variable.name, variable.size, variable.align, variable.address, type_name))
        self.parameter_bytes = end
        bound = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
        self.max_threads = int(np.prod([int(extent or 1) for extent in bound.groups()])) if bound else MAX_THREADS
        self.program = Decoder(module.ptx, body, declared).program()

    def __repr__(self):
        return f"<Kernel {self.signature}>"

    def launch(
        self,
        grid,
        block,
        args,
        smem: int = 0,
        seed: int = 0,
        schedule: str = "default",
        buffers=(),
        *,
        races: bool = True,
        global_races: bool = True,
        mma_mode: int = 0,
        max_steps: int = 10**9,
        drop: int | None = None,
        blocks: tuple[int, ...] = (),
        overlaps: Result | None = None,
        cluster: int = 1,
    ) -> Result:
        """Runs the kernel to its end, or to its 200th report.

        args: one for each parameter: a Buffer, buffer + bytes, None (null), a number, or raw bytes (a struct by value).
        buffers: what else the kernel can reach, through addresses inside raw bytes.
        schedule: "default" runs warps in order; "random" interleaves them by `seed`; "chaos" splits warps as well.
        drop: an instruction to leave out, for mutation tests.
        blocks: the blocks to run of a grid that is too large to run all, with the rest of their clusters; negative ones
            count from its end.
        overlaps: the launch before, if this one may start while that one runs (programmatic dependent launch).
        cluster: so many blocks, neighbours along x, run together and see each other's shared memory (sm_90).
        """
        grid, block = _extents(grid), _extents(block)
        threads = int(np.prod(block))
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if min(*grid, *block) < 1 or threads > MAX_THREADS:
            raise PtxError(f"{self.signature}: invalid grid {grid} or block {block}")
        if threads > self.max_threads:
            raise PtxError(f"{self.signature}: block of {threads} threads, its launch bound is {self.max_threads}")
        if cluster != 1 and (self.module.ptx.target < 90 or not 1 <= cluster <= MAX_CLUSTER or grid[0] % cluster):
            raise PtxError(f"{self.signature}: invalid clusters of {cluster} blocks in a grid {grid}")
        shared_bytes = max([v.address for v in self.program.dynamic_shared] + [self.program.static_shared]) + smem
        if shared_bytes > MAX_SHARED_BYTES:
            raise PtxError(f"{self.signature}: {shared_bytes} bytes of shared memory, a block has {MAX_SHARED_BYTES}")

        reachable = [self.module.data]
        for item in [*buffers, *args]:
            owner = item.buffer if isinstance(item, Pointer) else item
            if isinstance(owner, Buffer) and not any(owner is known for known in reachable):
                reachable.append(owner)

        config = core().LaunchConfig()
        config.grid, config.block, config.cluster = grid, block, cluster
        config.shared_bytes, config.local_bytes = shared_bytes, self.program.local_bytes
        config.dynamic_shared_bytes = smem
        config.param_bytes, config.slots = self.parameter_bytes, self.program.slots
        config.shared_races, config.global_races = races, races and global_races
        config.mma_mode, config.max_steps = mma_mode, max_steps
        config.only_blocks = sorted({block % int(np.prod(grid)) for block in blocks})
        config.seed = zlib.crc32(f"{seed}".encode())  # neighbouring seeds become unrelated
        if schedule != "default":
            config.shuffle_warps, config.quantum, config.chaos = True, 64, schedule == "chaos"

        instructions = self.program.instructions
        if drop is not None:
            instructions = instructions.copy()
            instructions["op"][drop] = core().OPS["nop"]
        constants = dict(self.program.numbers) | {s: v.address for s, v in self.program.symbols.items()}
        stats, reports, footprints, steps = core().run(
            instructions,
            config,
            list(constants.values()),
            list(constants),
            [(b.address, b.bytes, b.state, not b.writable, b.races) for b in reachable],
            overlaps.footprints if overlaps else [],
            np.frombuffer(self._pack(args) + b"\0", np.uint8).copy(),
        )
        return Result(self, stats, reports, reachable, footprints, steps, grid, block)

    def _pack(self, args) -> bytes:
        if len(args) != len(self.parameters):
            raise PtxError(f"{self.signature}: {len(self.parameters)} parameters, got {len(args)} arguments")
        packed = bytearray(self.parameter_bytes)
        for parameter, value in zip(self.parameters, args, strict=True):
            raw = _argument_bytes(parameter, value)
            if len(raw) != parameter.size:
                raise PtxError(
                    f"{self.signature}: parameter {parameter.name} ({parameter.type}) has {parameter.size} bytes, "
                    f"got {len(raw)}"
                )
            packed[parameter.offset : parameter.offset + parameter.size] = raw
        return bytes(packed)


def _argument_bytes(parameter: Parameter, value) -> bytes:
    if isinstance(value, (Buffer, Pointer)):
        return struct.pack("<Q", value.address)
    if value is None:
        return bytes(8)
    if isinstance(value, (bytes, bytearray, ctypes.Structure)):
        return bytes(value)
    if isinstance(value, np.generic):
        return value.tobytes()
    if parameter.type in ("float", "double"):
        return struct.pack("<f" if parameter.type == "float" else "<d", value)
    if isinstance(value, int):
        return (value % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")
    raise PtxError(f"cannot pass {value!r} for {parameter.name} ({parameter.type}): give its bytes")


def _extents(value) -> tuple[int, int, int]:
    extents = tuple(int(extent) for extent in np.atleast_1d(value))
    return (*extents, 1, 1)[:3]


def _parameter_types(signature: str) -> list[str]:
    """Of `void kernel<float, 4>(float const*, std::pair<int, int>)`: ["float const*", "std::pair<int, int>"]"""
    if not signature.endswith(")"):
        return []
    depth, types, current = 0, [], ""
    for character in reversed(signature[:-1]):
        depth += {")": 1, ">": 1, "(": -1, "<": -1}.get(character, 0)
        if depth < 0 or (character == "," and not depth):
            types.append(current.strip())
            current = ""
            if depth < 0:
                break
        else:
            current = character + current
    return [] if types == [""] else types[::-1]
