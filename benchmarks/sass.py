# SPDX-License-Identifier: Apache-2.0
"""What ptxas made of the main loops of the tensor-core kernels: read from cubins, so counted and not timed.

    python benchmarks/sass.py                          # peftkern's own, compiled for --arch from csrc/cuda
    python benchmarks/sass.py FILE...                  # any cubin or library: our extension, bitsandbytes' library

For each kernel with tensor-core instructions (HMMA) and each architecture: the instructions of its main loop, which is
the loop with the most HMMA, how many there are for an HMMA, and the longest stretch without one, in which the tensor
cores have nothing to do from this warp. The stretch goes round the end of the loop. Where another loop around it has
no HMMA of its own, the work between them counts too, but how often is not in the code: its size is told beside.
Needs cuobjdump: of a CUDA toolkit, or of the package nvidia-cuda-cuobjdump.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = ("-O3", "-std=c++20", "--fmad=false")  # of setup.py, as far as they change the code


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel. around: instructions of the smallest loop around it, 0 for none; spills: loads and
    stores of local memory in the whole kernel."""

    kernel: str
    instructions: int
    hmma: int
    longest_gap: int
    around: int
    spills: int

    @property
    def per_hmma(self) -> float:
        return self.instructions / self.hmma


def find_tool(name: str) -> str:
    """Of CUDA, on PATH, or of a pip package."""
    places = [Path("/usr/local/cuda/bin") / name, *Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/**/bin/{name}")]
    found = shutil.which(name) or next((str(place) for place in places if place.exists()), None)
    if found is None:
        raise SystemExit(f"error: {name} not found: install a CUDA toolkit, or pip install nvidia-cuda-{name}")
    return found


def listing(path: Path, arch: str) -> str:
    """The SASS of a file for one architecture; empty if it holds none."""
    command = [find_tool("cuobjdump"), "-sass", "-arch", arch, str(path)]
    if path.suffix == ".cubin":
        command = [command[0], "-sass", str(path)]
    return subprocess.run(command, capture_output=True, text=True).stdout


def kernels(text: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Name and (address, instruction) of each."""
    name, code = "", []
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            if name:
                yield name, code
            name, code = match.group(1), []
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code.append((int(match.group(1), 16), match.group(2)))
    if name:
        yield name, code


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def main_loop(name: str, code: list[tuple[int, str]]) -> Loop | None:
    """None for a kernel without an HMMA in a loop."""
    best: list[str] = []
    loops: list[list[str]] = []
    for address, instruction in code:
        jump = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)|\bBRA\S*\s+0x([0-9a-f]+)", instruction)
        if not jump or int(jump.group(1) or jump.group(2), 16) > address:
            continue
        start = int(jump.group(1) or jump.group(2), 16)
        inside = [each for at, each in code if start <= at <= address]
        if "EXIT" in inside:  # no loop: code that was moved behind the end jumps back
            continue
        body = [opcode(each) for each in inside]
        loops.append(body)
        if (_hmma(body), -len(body)) > (_hmma(best), -len(best)):
            best = body
    if not _hmma(best):
        return None
    at = [i for i, op in enumerate(best) if op.startswith("HMMA")]
    gaps = [b - a - 1 for a, b in zip(at, [*at[1:], at[0] + len(best)], strict=True)]
    spills = sum(opcode(each).startswith(("LDL", "STL")) for _, each in code)
    around = min((len(body) for body in loops if _hmma(body) == len(at) and len(body) > len(best)), default=0)
    return Loop(name, len(best), len(at), max(gaps), around, spills)


def _hmma(ops: list[str]) -> int:
    return sum(op.startswith("HMMA") for op in ops)


def main_loops(text: str) -> list[Loop]:
    return [loop for name, code in kernels(text) if (loop := main_loop(name, code))]


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    return [re.sub(r"\(.*\)$", "", re.sub(r"^void ", "", name)) for name in done]


def with_headers(path: Path) -> str:
    """The text of a source and of all headers beside it that it includes, directly or not."""
    text = path.read_text()
    headers = (path.parent / name for name in re.findall(r'#include "(\w+\.cuh)"', text))
    return text + "".join(map(with_headers, headers))


def compiled(arch: str, folder: Path) -> list[Path]:
    """Cubins of csrc/cuda's kernels that use tensor cores."""
    sources = [p for p in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if "mma.sync" in with_headers(p)]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.cubin"
        command = [find_tool("nvcc"), "-cubin", f"-arch={arch}", *FLAGS, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)}\n{done.stderr}")
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--arch", action="append", help="may be given several times (default: sm_90)")
    parser.add_argument("--only", default="", metavar="REGEX", help="kernels whose name matches")
    args = parser.parse_args()
    print("| kernel | arch | main loop | HMMA | per HMMA | longest stretch without | in a loop of | spills |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    found = 0
    for arch in args.arch or ["sm_90"]:
        with tempfile.TemporaryDirectory() as folder:
            files = args.files or compiled(arch, Path(folder))
            loops = [loop for file in files for loop in main_loops(listing(file, arch))]
        for name, loop in zip(demangled([loop.kernel for loop in loops]), loops, strict=True):
            if re.search(args.only, name):
                found += 1
                counts = f"{loop.instructions} | {loop.hmma} | {loop.per_hmma:.2f} | {loop.longest_gap}"
                print(f"| `{name}` | {arch} | {counts} | {loop.around or '-'} | {loop.spills} |")
    if not found:
        print("no kernel with an HMMA in a loop", file=sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
