# SPDX-License-Identifier: Apache-2.0
"""Writes docs/ptxas.md: what ptxas makes of every CUDA kernel. Needs nvcc, no GPU.

python tools/ptxas_report.py            # make the table
python tools/ptxas_report.py --check    # compare it with a new one
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from ptxsim import cudart  # noqa: E402

TABLE = ROOT / "docs" / "ptxas.md"
ARCHS = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Usage:
    file: str
    kernel: str
    arch: int
    registers: int
    shared: int  # bytes, static
    stack: int
    spills: int  # bytes stored and loaded


def compile_file(path: Path) -> str:
    """What ptxas -v says of a file on all architectures. Cached by the contents of csrc."""
    key = f"{nvcc_version()} {ARCHS} {cudart.NVCC_FLAGS}"
    result = cudart.build([sys.executable, __file__, "--ptxas"], [path], ".txt", options=(key,))
    return result.read_text()


def run_ptxas(path: str, output: str) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = [cudart.nvcc(), *cudart.NVCC_FLAGS, *targets, "-Xptxas", "-v", "-c", path, "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    Path(output).write_text(done.stderr)


def nvcc_version() -> str:
    text = subprocess.run([cudart.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def usages() -> list[Usage]:
    with ThreadPoolExecutor(2) as pool:
        logs = dict(zip(cudart.cuda_files(), pool.map(compile_file, cudart.cuda_files()), strict=True))
    names = demangle({name for log in logs.values() for name in re.findall(r"entry function '(\w+)'", log)})
    pattern = re.compile(
        r"entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)\w*'.*?(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
        r"(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = []
    for path, log in logs.items():
        for m in pattern.finditer(log):
            shared = re.search(r"(\d+) bytes smem", m["rest"])
            spills = int(m["stores"]) + int(m["loads"])
            numbers = int(m["arch"]), int(m["registers"]), int(shared[1]) if shared else 0, int(m["stack"]), spills
            found.append(Usage(path.name, names[m["name"]], *numbers))
    return sorted(found, key=lambda u: (u.file, u.kernel, u.arch))


def demangle(names: set[str]) -> dict[str, str]:
    """'low_rank_up_kernel<float>' for each mangled name."""
    order = sorted(names)
    done = subprocess.run(["c++filt"], input="\n".join(order), capture_output=True, text=True, check=True)
    short = [re.sub(r"^void |peftkern::|\(.*", "", line) for line in done.stdout.splitlines()]
    return dict(zip(order, short, strict=True))


def table(found: list[Usage]) -> str:
    lines = [
        "# Registers and shared memory of the CUDA kernels",
        "",
        f"Made by `python tools/ptxas_report.py` with nvcc {nvcc_version()} and the flags of setup.py;",
        "`tests/test_ptxas.py` compares it and fails on any spill. The figures are the compiler's, not a GPU's.",
        "",
        "Registers a thread; most blocks have 256 threads (`__launch_bounds__`). A multiprocessor has 65,536",
        "registers: 128 a thread allow 2 such blocks, 255 allow one. Stack frame and spills are 0 bytes unless a cell",
        "says otherwise. Shared memory is static, in bytes; `nf4_forward_kernel` takes 70,144 to 97,664 at its launch,",
        "`nf4_gradient_kernel` 70,912 to 98,240.",
        "",
        "| kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " | shared memory |",
        "|---|" + "---|" * (len(ARCHS) + 1),
    ]
    rows: dict[str, dict[int, Usage]] = {}
    for usage in found:
        rows.setdefault(usage.kernel, {})[usage.arch] = usage
    for kernel, by_arch in rows.items():
        cells = [_cell(by_arch.get(arch)) for arch in ARCHS]
        shared = sorted({usage.shared for usage in by_arch.values()})
        lines.append(f"| `{kernel}` | {' | '.join(cells)} | {' or '.join(f'{s:,}' for s in shared)} |")
    return "\n".join(lines) + "\n"


def _cell(usage: Usage | None) -> str:
    if usage is None:
        return "-"
    text = str(usage.registers)
    if usage.stack:
        text += f", stack {usage.stack}"
    if usage.spills:
        text += f", spills {usage.spills}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare docs/ptxas.md and write nothing")
    parser.add_argument("--ptxas", action="store_true", help=argparse.SUPPRESS)  # `SOURCE -o TARGET`, of compile_file
    parser.add_argument("source", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("-o", dest="output", help=argparse.SUPPRESS)
    arguments, _ = parser.parse_known_args()
    if arguments.ptxas:
        run_ptxas(arguments.source, arguments.output)
        return
    text = table(usages())
    if not arguments.check:
        TABLE.write_text(text)
    elif TABLE.read_text() != text:
        raise SystemExit(f"{TABLE} is not what ptxas says now: run python tools/ptxas_report.py")


if __name__ == "__main__":
    main()
