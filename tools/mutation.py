# SPDX-License-Identifier: Apache-2.0
"""Breaks the CUDA kernels one place at a time and counts what the simulated tests notice. Needs nvcc, no GPU.

    python tools/mutation.py                 # all mutants; writes the score to docs/simulated.md
    python tools/mutation.py --only absmax   # of csrc/cuda/absmax.cu, and writes nothing; --only may be repeated

Two kinds of mutants. A barrier, fence, wait or commit of the PTX (sm_90) that some case executes is left out: one
mutant for each kernel instantiation it is in; and a barrier of a cluster in the source becomes one of the block. A
comparison of the source that decides something at run time is moved by one, up and down, unless that leaves the PTX as
it was: then it is the host's, or makes no other program. A mutant counts as noticed if a case fails, by a report of the
simulator or by its values. Every survivor has to be explained in EXPLAINED; one that is not makes this program fail.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from ptxsim import Module, PtxError, cudart  # noqa: E402
from ptxsim.ops_cases import CASES, SCHEDULED, Case  # noqa: E402
from ptxsim.ops_report import replace_section  # noqa: E402

ARCH = "sm_90"  # which has clusters
SYNCHRONIZING = ("bar", "warpsync", "fence", "cp_commit", "cp_wait", "cp_wait_all")
MAX_STEPS = 10**7  # a mutant that never ends is noticed too

GUARDED = "one more step, over nothing: every access in it is guarded by itself, and its terms are zero"
MULTIPLES = "both sides are multiples of 4 or more, so none is one below the other"
SLOW_PATH = "the last whole chunk takes the path for partial ones, which gives the same bits"
NO_ROWS = "a warp without rows, which multiplies zeros and stores nothing"
NO_RANK = "ranks past the adapter's are zeros, and so are their sums"
EQUAL = "the two are equal there"
REPEATED = "one more round, which finds its work done"

EXPLAINED: dict[tuple[str, str], str] = {
    ("aligned && valid >= kChunk)", "to `>`"): SLOW_PATH,
    ("aligned && valid >= kQuad)", "to `>`"): SLOW_PATH,
    ("codes_aligned && left >= kQuad)", "to `>`"): SLOW_PATH,
    ("if (packed_aligned && valid >= kChunk)", "to `>= -1 +`"): "7 codes fill 4 bytes as well as 8 do",
    ("aligned && valid >= kQuad)", "to `>= -1 +`"): "rows that are aligned are whole quads, so 3 values never are left",
    ("byte < 4 && 2 * byte < valid; ++byte)", "to `<=`"): "a fifth byte that exists, and is shifted out of the word",
    ("return at <= 0.5f ? fmaf(0.9f, at", "to `<`"): EQUAL,
    ("return code < 127 ? -magnitude", "to `<=`"): "-0 for 0, whose products and sums are the same",
    ("first < args.n; first += gridDim.x * kPartValues)", "to `<=`"): GUARDED,
    ("absmax < kMinAbsmax ? kMinAbsmax : absmax", "to `<=`"): EQUAL,
    ("row0 + slab < layer.out ? row0 + slab", "to `<=`"): EQUAL,
    ("left < kImportanceThreads ? left", "to `<=`"): EQUAL,
    ("f.rank - k0 < kGramColumns ? f.rank - k0", "to `<=`"): EQUAL,
    ("return row < rows ? row", "to `< -1 +`"): EQUAL,
    ("index < args.adapters ? index : args.adapters", "to `<=`"): EQUAL,
    ("if (i > 0) load_chunk(", "to `>=`"): "loads once more what is in registers",
    ("if (valid <= 0) break;", "to `<`"): "a chunk without elements: nothing is loaded or stored",
    ("first < last_row; first += kGroupRows", "to `<=`"): GUARDED,
    ("rank - 4 * member < args.rank; rank += kLowRankDepth", "to `<=`"): GUARDED,
    ("k < static_cast<int>(args.weight.out); k += kGradientDepth", "to `<=`"): GUARDED,
    ("k < static_cast<int>(args.weight.out); k += kGradientDepth", "to `< -1 +`"): MULTIPLES,
    ("Columns >= in) packed_row_ = kOutside", "to `>= -1 +`"): MULTIPLES,
    ("Columns >= in) absmax_row_ = kOutside", "to `>= -1 +`"): MULTIPLES,
    ("q_column_ < left_ + kGradientDepth", "to `< -1 +`"): MULTIPLES,
    (
        "device_dispatch(layer.dtype",
        "left out",
    ): "only the last step reads what other threads wrote, and none comes after",
    (
        "cluster_sync();  // all have read",
        "left out",
    ): "at the end of a block that is a cluster of its own it orders nothing",
    ("copy_async_wait<0>();", "left out"): "nothing is read after it: it waits so that no copy outlives its block",
    ("first_rank < rank; first_rank += kUpRanks", "to `<=`"): GUARDED,
    ("column0 < f.columns; column0 += kGramColumns", "to `<=`"): GUARDED,
    ("c < kGramColumns; c += 4", "to `< -1 +`"): MULTIPLES,
    ("rank0 < f.rank; rank0 += kGradRanks", "to `<=`"): GUARDED,
    ("k0 < f.rank; k0 += kGramColumns", "to `<=`"): GUARDED,
    ("first < args.triplets; first += kSelectThreads", "to `<=`"): GUARDED,
    ("i < layer.in; i += kImportanceThreads", "to `<=`"): GUARDED,
    ("first < args.rows; first += kPlanThreads", "to `<=`"): GUARDED,
    ("first < groups; first += kPlanThreads", "to `<=`"): GUARDED,
    ("column < args.columns; column += 32 * kChunk", "to `<=`"): GUARDED,
    ("stage < part.last; stage += kStageColumns", "to `<=`"): GUARDED,
    ("if (stage + kStageColumns < part.last)", "to `<=`"): GUARDED,
    ("first < kGroups; first += warps.turns()", "to `< -1 +`"): MULTIPLES,
    ("none() const { return warp_first >= rows", "to `>`"): NO_ROWS,
    ("is_none(warps.row() >= count)", "to `>`"): NO_ROWS,
    ("is_inside[i] = warps.lane_row()", "to `<=`"): "one row more is read, that of number 0, and its sums are dropped",
    ("if (first_rank < rank) {", "to `<=`"): NO_RANK,
    ("r < rank ? scale * total : 0.0f", "to `<=`"): NO_RANK,
    ("at < rank ? scale * total : 0.0f", "to `<=`"): NO_RANK,
    ("last = first_rank < rank ? args.groups.offsets", "to `<=`"): NO_RANK,
    ("i < count * Tile::kRanks; i += kDownThreads", "to `<=`"): GUARDED,
    ("fetched_ = threadIdx.x < kGradRows", "to `<=`"): "one more thread fetches what put() drops",
    ("column0 < layer.rank; column0 += kImportanceThreads", "to `<=`"): "one more step, in which no thread has a row",
    ("if (first < last) load(first);", "to `<=`"): GUARDED,
    ("if (stage + kGradRows < last) load(", "to `<=`"): GUARDED,
    ("if (kRows > kRowTile && (first", "to `>"): "of a tile of kRowTile entries the place is a multiple of it",
    ("return {rows > 64", "to `>=`"): "the other way to share the tile makes it, too",
    ("if (valid <= 0) return;", "to `<`"): "a thread without columns: its accesses are guarded again",
    ("distance < lanes; distance *= 2", "to `< -1 +`"): "lanes is a power of two, at least 4: lanes / 2 < lanes - 1",
    ("distance < kPlanThreads; distance *= 2", "to `<=`"): "no thread has another so far before it",
    ("distance < kPlanThreads; distance *= 2", "to `< -1 +`"): MULTIPLES,
    ("if (threadIdx.x >= kThreads) return;", "to `>`"): "one more thread loads, inside of F, what store() drops",
    ("if (threadIdx.x < 32) {", "to `<=`"): "thread 32 stores the values that thread 0 stores, to the same places",
    ("if (threadIdx.x > 0) return;", "to `> 1 +`"): "thread 1 stores the value that thread 0 stores, to the same place",
    ("round < n + n % 2 - 1; ++round", "to `<=`"): REPEATED,
    ("shift >= 0; shift -= 8", "to `>= -1 +`"): REPEATED + ": PTX shifts by 2^32 - 8 to 0, the bin that has it all",
    ("square <= kJacobiZero ? 0.0", "to `<`"): "a norm of exactly 2^-200 is as good as 0, and no sample has one",
    ("two_halves_(block_size_log2 < 6)", "to `<=`"): "one block for both halves, whose absmax is read twice",
    (
        "kRows < kRowStep && threadIdx.x >= kRows",
        "to `<",
    ): "powers of two; where they are equal, no thread is past them",
    ("i < bytes; i += kForwardThreads * kLine", "to `<"): "a prefetch is a hint, and no access",
    ("up_to >= rank && up_to - sum < rank", "to `>= -1 +`"): "a lane too many, none of whose bins has the rank",
    ("up_to >= rank && up_to - sum < rank", "to `<=`"): "a lane too many, none of whose bins has the rank",
    ("pruned <= 0 || args.budget <= 0", "to `<`"): "the same mask, the long way",
    ("if (threadIdx.x < kBins) histogram", "to `<=`"): "a bin too many, in what nothing has been written to",
    ("const bool tie = i < args.triplets", "to `<=`"): "the key past the end is 0, which no score has",
    ("const bool tie = i < args.triplets", "to `< -1 +`"): "of equal scores the first stay, so never the last of all",
    ("args.indices > 0 ? args.rows / args.indices", "to `>=`"): "without an index there is no row that asks for it",
    ("layer.in > 0 ? sum", "to `>=`"): "the mean of a factor without elements, which the reference calls NaN and we 0",
    (
        "layer.out > 0 ? of_B",
        "to `>=`",
    ): "the mean of a factor without elements, which the reference calls NaN and we 0",
}
"""(part of the source line, part of the change) -> why the kernel is as right as before."""


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    source: str  # the line
    change: str  # what was done to it
    kernel: str = ""  # of a dropped instruction

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.change}: {self.source}" + (f" [{self.kernel}]" if self.kernel else "")


class MutantDevice(cudart.Device):
    def __init__(self, kernels: dict | None = None, dropped: tuple[str, int] | None = None):
        super().__init__(ARCH)
        self.kernels, self.dropped = kernels or {}, dropped

    def kernel(self, name: str):
        return self.kernels[name] if name in self.kernels else super().kernel(name)

    def options(self, name: str) -> dict:
        drop = self.dropped[1] if self.dropped and self.dropped[0] == name else None
        return {"drop": drop, "max_steps": MAX_STEPS}


def noticed(cases: list[Case], make_device) -> bool:
    for case in cases:
        try:
            case.run(make_device())
        except Exception:
            return True
    return False


def cases_by_kernel() -> dict[str, list[Case]]:
    """For each mangled kernel name the cases that run it, the quick general ones first."""
    shuffled = random.Random(0).sample(CASES, len(CASES))
    reached: dict[str, list[Case]] = {}
    for case in [*SCHEDULED, *shuffled]:
        recorder = cudart.Recorder(arch=ARCH)
        case.run_on_recorder(recorder)
        for name in {name for name, *_ in recorder.launched}:
            reached.setdefault(name, []).append(case)
    return reached


# ---- instructions left out -------------------------------------------------------------------------------------------


def dropped_instructions(file: str, reached: dict[str, list[Case]]):
    """(mutant, was it noticed) for every executed synchronizing instruction of a file."""
    for mangled in cudart.modules(ARCH)[file].demangled:
        kernel, cases = cudart.find_kernel(ARCH, mangled), reached[mangled]
        candidates = [i for i, op in enumerate(kernel.program.opcodes) if op in SYNCHRONIZING]
        executed = set()
        for case in cases if candidates else ():
            device = cudart.Device(ARCH)
            case.run(device, check=False)
            for result in device.results:
                if result.kernel.mangled == mangled:
                    executed |= {i for i in candidates if result.raw["warps"][i]}
        for index in sorted(executed):
            *_, where = kernel.program.lines[index].chain()  # the call in the kernel, not the instruction in a header
            path = cudart.CUDA_SOURCES / where.file
            source = path.read_text().splitlines()[where.line - 1].strip()
            mutant = Mutant(where.file, where.line, source, "left out", short(kernel.signature))
            yield mutant, noticed(cases, lambda index=index, name=mangled: MutantDevice(dropped=(name, index)))


def short(signature: str) -> str:
    return re.sub(r"^void |peftkern::|\(.*", "", signature)


# ---- comparisons moved by one ----------------------------------------------------------------------------------------

COMPARISON = re.compile(r" (<=|>=|<|>) ")
MOVES = {"<": (" <= ", " < -1 + "), "<=": (" <= 1 + ", " < "), ">": (" >= ", " > 1 + "), ">=": (" >= -1 + ", " > ")}


def comparisons(path: Path) -> list[tuple[Mutant, str]]:
    """Mutants of a file with their source text: of device code, and not of unrolled loops, whose bounds are constants.

    The host side, static functions and all from `launch_<op>` on, decides no memory access.
    """
    lines, found, host = path.read_text().splitlines(), [], False
    for i, line in enumerate(lines):
        if re.search(r"launch_\w+\(const ", line) and path.suffix == ".cu":
            break
        host = line != "}" if host else bool(re.match(r"static (?!__device__|constexpr)", line))
        if host:
            continue
        code = line.split("//")[0]
        skipped = re.match(r"\s*(#|template|static_assert|constexpr|static constexpr)", code)
        if skipped or "__launch_bounds__" in code:
            continue
        for m in COMPARISON.finditer(code):
            loop = re.match(r"\s*for \(", code) and m.start() < code.index(";", code.index(";") + 1)
            if loop and i and lines[i - 1].strip() == "#pragma unroll":
                continue
            for move in MOVES[m[1]]:
                text = "\n".join([*lines[:i], line[: m.start()] + move + line[m.end() :], *lines[i + 1 :]]) + "\n"
                found.append((Mutant(path.name, i + 1, line.strip(), f"`{m[1]}` to `{move.strip()}`"), text))
    return found


def cluster_barriers(path: Path) -> list[tuple[Mutant, str]]:
    """Mutants of a file with their source text."""
    lines = path.read_text().splitlines()
    found = [i for i, line in enumerate(lines) if "cluster_sync();" in line]
    return [
        (
            Mutant(path.name, i + 1, lines[i].strip(), "left out"),
            "\n".join([*lines[:i], lines[i].replace("cluster_sync", "__syncthreads"), *lines[i + 1 :]]) + "\n",
        )
        for i in found
    ]


def users(path: Path) -> list[str]:
    """The .cu files whose kernels a source file is part of."""
    return [file.name for file in cudart.cuda_files() if path in cudart.with_headers(file)]


def rebuilt(mutant: Mutant, text: str, files: list[str], reached: dict[str, list[Case]]) -> bool | None:
    """Was it noticed? None if it does not compile, or is no other program for the device."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(cudart.CUDA_SOURCES.parent, copy, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
        (copy / "cuda" / mutant.file).write_text(text)
        same = True
        for file in files:
            try:
                module = Module.from_cuda(copy / "cuda" / file, ARCH)
            except PtxError:
                return None
            if instructions(module) == instructions(cudart.modules(ARCH)[file]):
                continue
            same = False
            kernels = {name: module.kernel(name) for name in module.demangled}
            cases = {str(case): case for name in kernels for case in reached[name]}
            if noticed(list(cases.values()), lambda kernels=kernels: MutantDevice(kernels)):
                return True
    return None if same else False


def instructions(module: Module) -> list[str]:
    """The PTX of a module without what says where it came from: debug information, and a hash of the path in names."""
    lines = [line for line in module.text.splitlines() if not re.match(r"\s*(\.loc|\.file|\.b8|//)", line)]
    return [re.sub(r"_INTERNAL_[0-9a-f]+", "", line) for line in lines]


# ---- the run ---------------------------------------------------------------------------------------------------------


def explanation(mutant: Mutant) -> str | None:
    for (part, change), reason in EXPLAINED.items():
        if part in mutant.source and change in mutant.change:
            return reason
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="files whose name contains this")
    parser.add_argument("--kind", choices=("all", "dropped", "moved"), default="all")
    only, kind = (arguments := parser.parse_args()).only, arguments.kind

    def chosen(file: str) -> bool:
        return not only or any(part in file for part in only)

    cudart.host_library()
    cudart.modules(ARCH)  # here, as two threads ask for it later
    start, reached = time.time(), cases_by_kernel()
    outcome: dict[str, list[tuple[Mutant, bool]]] = {"left out": [], "moved by one": []}
    if kind != "moved":
        for file in cudart.modules(ARCH):
            if chosen(file):
                for mutant, caught in dropped_instructions(file, reached):
                    outcome["left out"].append((mutant, caught))
                    show(mutant, caught)
    jobs = []
    for path in sorted([*cudart.CUDA_SOURCES.glob("*.cu"), *cudart.CUDA_SOURCES.glob("*.cuh")]):
        if chosen(path.name):
            barriers = cluster_barriers(path) if kind != "moved" else []
            moved = comparisons(path) if kind != "dropped" else []
            jobs += [(mutant, text, users(path), reached) for mutant, text in [*barriers, *moved]]
    # Two at a time: while one runs in nvcc, the other simulates. Nobody will ask for their PTX again.
    with ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory() as cache:
        os.environ["PTXSIM_CACHE"] = cache
        for (mutant, *_), caught in zip(jobs, pool.map(lambda job: rebuilt(*job), jobs), strict=True):
            if caught is not None:
                outcome["left out" if mutant.change == "left out" else "moved by one"].append((mutant, caught))
                show(mutant, caught)

    survivors = [mutant for group in outcome.values() for mutant, caught in group if not caught]
    unexplained = [mutant for mutant in survivors if explanation(mutant) is None]
    text = report(outcome)
    print(text, f"{time.time() - start:.0f} s", sep="\n")
    if not only and kind == "all":
        replace_section("mutation", text)
    if unexplained:
        raise SystemExit("survivors without an explanation:\n  " + "\n  ".join(map(str, unexplained)))


def show(mutant: Mutant, caught: bool) -> None:
    print("noticed " if caught else "SURVIVED", mutant, flush=True)


def report(outcome: dict[str, list[tuple[Mutant, bool]]]) -> str:
    lines = ["| mutants | number | noticed | survived, all explained below |", "|---|---|---|---|"]
    for name, group in outcome.items():
        caught = sum(found for _, found in group)
        lines.append(f"| {name} | {len(group)} | {caught} | {len(group) - caught} |")
    lines += ["", "| survivor | change | why |", "|---|---|---|"]
    seen = {}
    for group in outcome.values():
        for mutant, caught in group:
            if not caught:
                key = (mutant.file, mutant.line, mutant.change)
                seen[key] = (mutant, explanation(mutant) or "not explained yet")
    for mutant, reason in seen.values():
        source = mutant.source.replace("|", "\\|")
        change = mutant.change.replace("|", "\\|")
        lines.append(f"| `{mutant.file}`: `{source}` | {change} | {reason} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
