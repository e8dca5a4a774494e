# SPDX-License-Identifier: Apache-2.0
"""How everything here is timed: check the result, then run the providers in turn in one process, in alternating order,
and compare medians. These are shared machines, so the ratio is the figure; a time is only its companion."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import peftkern

ROWS: list[tuple[str, str, float, float, float]] = []  # case, peer, peftkern ms, peer ms, ratio


def medians(providers: dict[str, Callable[[], object]], seconds: float, rounds: tuple[int, int]) -> dict[str, float]:
    """Median seconds of a call of each; the order turns round each time, so that drift hits all alike."""
    for call in providers.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in providers}
    start = time.perf_counter()
    names = list(providers)
    for i in range(rounds[1]):
        for name in names if i % 2 else reversed(names):
            before = time.perf_counter()
            providers[name]()
            times[name].append(time.perf_counter() - before)
        if i + 1 >= rounds[0] and time.perf_counter() - start > seconds:
            break
    return {name: statistics.median(t) for name, t in times.items()}


@pytest.fixture
def compare(benchmark):
    """compare(case, {"peftkern": f, "peer": g, ...}): adds a row a peer, and hands our call to pytest-benchmark."""

    def run(case: str, providers: dict, seconds: float = 4.0, rounds: tuple[int, int] = (5, 200)) -> dict[str, float]:
        result = medians(providers, seconds, rounds)
        ours = result["peftkern"]
        for name, t in result.items():
            if name != "peftkern":
                ROWS.append((case, name, ours * 1e3, t * 1e3, t / ours))
                benchmark.extra_info[f"ratio to {name}"] = round(t / ours, 3)
        benchmark.group = case
        benchmark.pedantic(providers["peftkern"], rounds=3, iterations=1)
        return result

    return run


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("peftkern against its peers")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    terminalreporter.write_line(
        f"{cpu}, {torch.get_num_threads()} threads, isa {peftkern.cpu_isa()}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    terminalreporter.write_line("ratio = peer's time / peftkern's, medians of alternating runs in one process\n")
    width = max(len(row[0]) for row in ROWS)
    terminalreporter.write_line(f"| {'case':{width}} | {'peer':22} | peftkern ms | peer ms | ratio |")
    terminalreporter.write_line(f"|{'-' * (width + 2)}|{'-' * 24}|------------:|--------:|------:|")
    for case, peer, ours, theirs, ratio in ROWS:
        terminalreporter.write_line(f"| {case:{width}} | {peer:22} | {ours:11.2f} | {theirs:7.2f} | {ratio:4.2f}x |")
