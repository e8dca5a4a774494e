# SPDX-License-Identifier: Apache-2.0
"""The arguments of `peftkern bench`, and the run. Exit codes: 0 done, 2 bad input, 130 interrupted."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .cases import SUITES, Case, select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every argument of the command to a parser."""
    parser.add_argument(
        "--suite", action="append", choices=SUITES, help="which cases; may be given several times (default: quick)"
    )
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="cases whose name or 'model layer' matches, e.g. 'nf4*M=1 *'"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="to spend on each case (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--isas", action="store_true", help="also time each of the other instruction sets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all readings there")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write PNG files and bench.html there")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and stop")


def main(args: argparse.Namespace) -> int:
    """Runs the command with parsed arguments; returns the exit code."""
    cases = select(args.suite or ["quick"], args.only)
    if not cases:
        return _refuse(f"--only: expected a pattern that matches a case, got {args.only!r}; --list prints them")
    if args.seconds <= 0:
        return _refuse(f"--seconds: expected a number > 0, got {args.seconds}")
    if args.threads is not None and args.threads < 1:
        return _refuse(f"--threads: expected a number >= 1, got {args.threads}")
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return _run(cases, args)
    except KeyboardInterrupt:
        print("interrupted; nothing was written")
        return 130


def _refuse(message: str) -> int:
    import sys

    print(f"error: {message}", file=sys.stderr)
    return 2


def _run(cases: list[Case], args: argparse.Namespace) -> int:
    from . import plots, report
    from .measure import ceilings

    dtypes = tuple(dict.fromkeys(case.dtype for case in cases))
    limits = ceilings(dtypes)
    of_threads = cache(lambda threads: on_threads(threads, lambda: ceilings(dtypes)))
    env = report.environment(limits)
    peaks = ", ".join(f"{dtype} {peak / 1e9:.0f} GFLOP/s" for dtype, peak in limits.flops_per_second.items())
    print(f"{env['date']}, {env['cpu']}, {env['threads']} threads, {env['isa']}, torch {torch.__version__}")
    print(f"ceilings: copy {limits.bytes_per_second / 1e9:.1f} GB/s, {peaks}")
    print("ratio: the provider's median time over ours, above 1 we are faster; times in ms\n")
    results = []
    for case in cases:
        case_limits = of_threads(case.threads) if case.threads else limits
        results.append(run_case(case, case_limits, args.seconds, args.isas))
        print(report.table(results[-1:]), flush=True)

    def copy_speedup(threads: int) -> float:
        return of_threads(threads).bytes_per_second / of_threads(1).bytes_per_second

    for text in (report.growth(results, copy_speedup), report.left_out(results)):
        if text:
            print(text)
    if args.json:
        report.write_json(args.json, env, results)
    if args.plot:
        for path in plots.write(args.plot, env, limits, results, report.table(results)):
            print(f"wrote {path}")
    return 0


def on_threads(threads: int, call: Callable[[], Any]) -> Any:
    """call() on so many threads of torch; 0: on as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def run_case(case: Case, limits, seconds: float, isas: bool = False):
    """Builds the work, checks every provider's result, then times them. On the number of threads of the case."""
    from .measure import measure
    from .method_providers import BUILD
    from .providers import with_every_isa
    from .report import Result

    def run() -> Result:
        work = BUILD[case.op](case)
        if isas:
            with_every_isa(work)
        return Result.of(case, work, measure(work.calls, seconds, device=case.device), limits)

    try:
        return on_threads(case.threads, run)
    finally:
        gc.collect()
