# SPDX-License-Identifier: Apache-2.0
"""What a run shows: a row for each case and provider, as a table and as JSON."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import peftkern

from ..files import write_whole
from .cases import Case
from .measure import Ceilings, Timing
from .providers import OURS, Work

PACKAGES = ("peftkern", "torch", "peft", "bitsandbytes", "transformers", "torchao", "unsloth")


@dataclass(frozen=True)
class Result:
    """A case that has run."""

    case: Case
    timings: dict[str, Timing]
    left_out: dict[str, str]
    flops: float
    nbytes: float
    fraction: float  # of the ceiling that binds
    ceiling: str  # "memory" or "compute"

    @classmethod
    def of(cls, case: Case, work: Work, timings: dict[str, Timing], ceilings: Ceilings) -> Result:
        fraction, ceiling = ceilings.fraction(timings[OURS].p50, work.nbytes, work.flops, case.dtype)
        return cls(case, timings, work.left_out, work.flops, work.nbytes, fraction, ceiling)

    def ratio(self, provider: str) -> float:
        """The provider's median time over ours: above 1 we are faster."""
        return self.timings[provider].p50 / self.timings[OURS].p50


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def environment(ceilings: Ceilings, device: str = "cpu") -> dict[str, Any]:
    """When, where and with what: as it stands at the head of the JSON and of every page."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "isa": peftkern.cpu_isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "ceilings": asdict(ceilings),
    }


def table(results: Iterable[Result]) -> str:
    """Markdown, a row for each provider of each case; times in milliseconds."""
    head = ("case", "provider", "p20", "p50", "p80", "ratio", "GB/s", "GFLOP/s", "of the ceiling")
    rows = [head]
    for result in results:
        for provider, t in result.timings.items():
            ours = provider == OURS
            rows.append(
                (
                    result.case.name if ours else "", provider,
                    *(f"{1e3 * value:.3f}" for value in (t.p20, t.p50, t.p80)),
                    "" if ours else f"{result.ratio(provider):.2f}x", f"{result.nbytes / t.p50 / 1e9:.1f}",
                    f"{result.flops / t.p50 / 1e9:.0f}" if result.flops else "",
                    f"{result.fraction:.0%} {result.ceiling}" if ours else "",
                )
            )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = f"|{'|'.join('-' * (w + 1) + (':' if i > 1 else '-') for i, w in enumerate(widths))}|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


SWEPT = {"M": "rows", "r": "r", "threads": "threads", "layers": "layers"}  # the field of Case that a sweep changes


LINEAR_FROM = {"r": 64}  # below, the time of a layer hardly depends on it


def growth(results: Iterable[Result], copy_speedup: Callable[[int], float]) -> str:
    """A line for each sweep. Of a size: our time over that at the size before, and how far times are from the straight
    line through the first and the last. Of threads: the speed over that with fewer, and for what memory binds, the same
    of a copy: copy_speedup(threads), over one thread."""
    series: dict[tuple[str, Case], list[tuple[int, float, str]]] = {}
    for result in results:
        if field := SWEPT.get(result.case.sweep):
            rest = replace(result.case, **{field: 0})
            point = getattr(result.case, field), result.timings[OURS].p50, result.ceiling
            series.setdefault((result.case.sweep, rest), []).append(point)
    lines = []
    for (sweep, rest), points in series.items():
        points.sort()
        steps = list(pairwise(points))
        if sweep == "threads":
            said = [f"{a} -> {b}: {ta / tb:.2f}x as fast" for (a, ta, _), (b, tb, _) in steps]
            if steps and points[-1][2] == "memory":
                first, last = points[0][0], points[-1][0]
                said.append(f"a copy {copy_speedup(last) / copy_speedup(first):.2f}x")
        else:
            said = [f"{a} -> {b}: {tb / ta:.2f} for {b / a:g}" for (a, ta, _), (b, tb, _) in steps]
            straight = [(size, t) for size, t, _ in points if size >= LINEAR_FROM.get(sweep, 0)]
            if len(straight) > 2:
                start = f" from {straight[0][0]} on" if sweep in LINEAR_FROM else ""
                said.append(f"off a straight line{start} by {100 * off_a_line(straight):.1f}%")
        lines.append(f"growth with {sweep}, {rest.name}: {', '.join(said)}")
    return "\n".join(lines)


def off_a_line(points: Sequence[tuple[int, float]]) -> float:
    """The largest distance of (size, time) from the straight line through the first and the last, over that line."""
    (x0, t0), (x1, t1) = points[0], points[-1]
    return max(abs(t / (t0 + (t1 - t0) * (x - x0) / (x1 - x0)) - 1) for x, t in points)


def left_out(results: Iterable[Result]) -> str:
    """The providers that could not take part, with the reason, each once."""
    reasons = {
        (provider, reason): result.case.name for result in results for provider, reason in result.left_out.items()
    }
    return "\n".join(f"left out: {provider}, {reason} (e.g. {case})" for (provider, reason), case in reasons.items())


def write_json(path: Path, env: dict[str, Any], results: Iterable[Result]) -> None:
    """Everything, in seconds, bytes and FLOPs."""
    content = {
        **env,
        "results": [
            {**asdict(r), "name": r.case.name, "ratios": {p: r.ratio(p) for p in r.timings if p != OURS}}
            for r in results
        ],
    }
    write_whole({path: lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n")})
