# SPDX-License-Identifier: Apache-2.0
"""What a launch found and what it counted, in the terms of the CUDA source."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .build import core
from .decode import SourceLine

# Two threads that store the same value, and a cp.async that nobody needed: no errors, but in `reports`.
ALLOWED = ("race_same_value", "never_waited")
# atomicAdd(__nv_bfloat162*) of CUDA's own headers starts its compare-and-swap loop with a plain load.
HEADERS_WITH_PLAIN_LOAD_BEFORE_CAS = ("cuda_bf16.hpp", "cuda_fp16.hpp")

CLASSES = {
    "memory": "ld st atom cp_async ldmatrix stmatrix",
    "control": "bra brx exit trap assertfail",
    "mma": "mma",
    "sync": "bar cluster_arrive cluster_wait warpsync cp_commit cp_wait cp_wait_all fence",
    "warp": "shfl vote match redux activemask",
    "special": "sqrt rsqrt rcp ex2 lg2 sin cos tanh",
    "move": "mov pack unpack cvta mapa",
    "convert": "cvt cvt2",
}
CLASS_OF = {op: name for name, ops in CLASSES.items() for op in ops.split()}  # others: "alu"
COUNTED_OPS = ["mma", "bar", "cluster_wait", "warpsync", "shfl", "ldmatrix", "stmatrix", "cp_async", "atom"]


class KernelFault(AssertionError):
    """Raised by Result.check()."""


@dataclass(frozen=True)
class Report:
    kind: str
    kernel: str
    line: SourceLine | None
    instruction: str
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    other_line: SourceLine | None  # the other side of a race
    other_instruction: str | None
    other_block: tuple[int, int, int] | None
    other_thread: tuple[int, int, int] | None
    buffer: str | None  # or "shared memory", "local memory"
    buffer_bytes: int | None
    address: int
    offset: int  # of the address in its buffer
    size: int  # bytes accessed
    lanes: int  # of the warp, for warp-wide errors
    count: int

    def __str__(self):
        text = f"{self.kind}: block {self.block} thread {self.thread} at {self.line or '?'} `{self.instruction}`"
        if self.buffer or self.kind in ("out_of_bounds", "misaligned"):
            where = f"{self.buffer}+{self.offset}" if self.buffer else "unmapped memory"
            text += f"; {self.size} bytes at {where} (address {self.address:#x}"
            text += f", {self.buffer_bytes} bytes long)" if self.buffer_bytes is not None else ")"
        if self.other_instruction:
            text += (
                f"; other side: block {self.other_block} thread {self.other_thread} at {self.other_line or '?'} "
                f"`{self.other_instruction}`"
            )
        if self.lanes:
            text += f"; lanes {self.lanes:#010x}"
        return text + (f" [{self.count} times]" if self.count > 1 else "")


class Result:
    """`reports`, `stats`, and in arrays `raw`: the counters of each PTX instruction; `footprints`: of each buffer the
    address of the first sector, and what was done to each (SECTOR_ of core/types.h)."""

    def __init__(self, kernel, stats: np.ndarray, reports: np.ndarray, buffers, footprints, steps, grid, block):
        self.kernel, self.raw, self.buffers, self.footprints = kernel, stats, buffers, footprints
        self.steps, self.grid, self.block = steps, grid, block
        self._kinds = list(core().REPORTS)
        self.reports = self._merged(
            report for record in reports if not self._is_suppressed(report := self._report(record))
        )

    # Reports

    def _report(self, record) -> Report:
        program, machine = self.kernel.program, core()
        instruction, other = int(record["instruction"]), int(record["other_instruction"])
        has_other, index, address = other >= 0, int(record["buffer"]), int(record["address"])
        spaces = {machine.BUFFER_SHARED: "shared memory", machine.BUFFER_LOCAL: "local memory"}
        buffer = self.buffers[index] if index >= 0 else None
        name = spaces.get(index, "parameters" if index == machine.BUFFER_PARAM else None)
        if buffer is not None:
            name = buffer.name or f"buffer {index}"
        elif index == machine.BUFFER_SHARED and (rank := address >> machine.RANK_SHIFT):
            name, address = f"shared memory of rank {rank - 1}", address & (1 << machine.RANK_SHIFT) - 1
        return Report(
            kind=self._kinds[record["kind"]],
            kernel=self.kernel.signature,
            line=program.lines[instruction],
            instruction=program.texts[instruction],
            block=_coordinates(int(record["block"]), self.grid),
            thread=_coordinates(int(record["thread"]), self.block),
            other_line=program.lines[other] if has_other else None,
            other_instruction=program.texts[other] if has_other else None,
            other_block=_coordinates(int(record["other_block"]), self.grid) if has_other else None,
            other_thread=_coordinates(int(record["other_thread"]), self.block) if has_other else None,
            buffer=name,
            buffer_bytes=buffer.nbytes if buffer is not None else None,
            address=address,
            offset=address - (buffer.address if buffer is not None else 0),
            size=int(record["size"]),
            lanes=int(record["lanes"]),
            count=int(record["count"]),
        )

    @staticmethod
    def _merged(reports) -> list[Report]:
        """One for each kind and place in the source; the compiler makes several instructions of an unrolled line."""
        found: dict[tuple, Report] = {}
        for report in reports:
            place = (report.kind, report.buffer, report.line or report.instruction, report.other_line)
            first = found.get(place)
            found[place] = dataclasses.replace(first, count=first.count + report.count) if first else report
        return list(found.values())

    @staticmethod
    def _is_suppressed(report: Report) -> bool:
        if report.kind != "race":
            return False
        sides = [(report.line, report.instruction), (report.other_line, report.other_instruction)]
        texts = " ".join(text for _, text in sides)
        in_header = all(
            line and any(place.file in HEADERS_WITH_PLAIN_LOAD_BEFORE_CAS for place in line.chain())
            for line, _ in sides
        )
        return in_header and "atom." in texts and "ld." in texts

    def check(self, allow=ALLOWED, written=()) -> Result:
        """Raises KernelFault with every report whose kind is not in `allow`, and for unwritten bytes of `written`."""
        problems = [str(report) for report in self.reports if report.kind not in allow]
        for buffer in written:
            if count := self.unwritten(buffer):
                first = int(np.flatnonzero(~buffer.initialised())[0])
                problems.append(
                    f"unwritten_output: {count} bytes of {buffer.name or 'a buffer'}, the first at +{first}"
                )
        if problems:
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise KernelFault(f"{self.kernel.signature}\n  " + "\n  ".join(problems[:20]) + more)
        return self

    @staticmethod
    def unwritten(buffer) -> int:
        """Bytes of an output that no thread wrote."""
        return int((~buffer.initialised()).sum())

    # Counters

    @property
    def stats(self) -> dict:
        """Totals. Bytes and sectors are of global memory, waves of shared memory, that of other
        blocks of the cluster included, whose bytes are `remote_bytes`. Of `distinct_bytes` a sector counts once if it
        was read before the launch wrote it, and once if it was written: what the memory behind an L2 moves that is
        empty before the launch and holds all that the launch touches."""
        raw, opcodes = self.raw, np.array(self.kernel.program.opcodes)
        total = {name: int(raw[name].sum()) for name in raw.dtype.names}
        classes = Counter()
        for op in set(opcodes[raw["warps"] > 0]):
            classes[CLASS_OF.get(str(op), "alu")] += int(raw["warps"][opcodes == op].sum())
        reaches_global = raw["sectors"] > 0
        writes = reaches_global & (opcodes == "st")
        machine, touched = core(), np.concatenate([np.zeros(0, np.uint8), *(s for _, s in self.footprints)])
        distinct = sum(np.count_nonzero(touched & bit) for bit in (machine.SECTOR_FETCHED, machine.SECTOR_WRITTEN))
        result = {
            "distinct_bytes": machine.SECTOR_BYTES * int(distinct),
            "thread_instructions": total["threads"],
            "warp_instructions": total["warps"],
            "classes": dict(classes),
            "global_requests": int(raw["requests"][reaches_global].sum()),
            "global_bytes": int(raw["bytes"][reaches_global].sum()),
            "global_bytes_written": int(raw["bytes"][writes].sum()),
            "global_bytes_read": int(raw["bytes"][reaches_global & ~writes].sum()),
            "sectors": total["sectors"],
            "ideal_sectors": total["ideal_sectors"],
            "shared_bytes": int(raw["bytes"][~reaches_global].sum()) - total["remote_bytes"],
            "remote_bytes": total["remote_bytes"],
            "waves": total["waves"],
            "ideal_waves": total["ideal_waves"],
            "bank_conflicts": total["waves"] - total["ideal_waves"],
            "steps": self.steps,
        }
        return result | {op: int(raw["warps"][opcodes == op].sum()) for op in COUNTED_OPS}

    def by_line(self, counter: str = "threads", over: str | None = None) -> Counter:
        """A counter of `raw`, less another one, summed for each source line."""
        values = self.raw[counter].astype(np.int64) - (self.raw[over].astype(np.int64) if over else 0)
        lines = Counter()
        for index in np.flatnonzero(values):
            lines[str(self.kernel.program.lines[index] or "?")] += int(values[index])
        return lines

    def hot(self, n: int = 10, counter: str = "threads", over: str | None = None) -> list[tuple[int, str]]:
        """The n source lines with most of it: hot(5, "waves", over="ideal_waves") finds the bank conflicts."""
        return [(count, line) for line, count in self.by_line(counter, over).most_common(n) if count > 0]


def _coordinates(index: int, extents) -> tuple[int, int, int]:
    x, y, _ = extents
    return (index % x, index // x % y, index // (x * y))
