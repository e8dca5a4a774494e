# SPDX-License-Identifier: Apache-2.0
"""compare(): how each of these files times its providers, as `peftkern bench` does: the result is checked first, then
all run in turn in one process, and medians are compared. These are shared machines, so the ratio is the figure."""

from __future__ import annotations

import time

import pytest
import torch
import train_step

import peftkern
from peftkern.bench.measure import measure
from peftkern.bench.report import cpu_name
from peftkern.finetune.model import find_model, load_base

ROWS: list[tuple[str, str, float, float, float]] = []  # case, peer, peftkern ms, peer ms, ratio


def medians(providers: dict, seconds: float, rounds: tuple[int, int]) -> dict[str, float]:
    """Median seconds of a call of each."""
    calls = {name: lambda turn, call=call: call() for name, call in providers.items()}
    return {name: t.p50 for name, t in measure(calls, seconds, rounds).items()}


@pytest.fixture(scope="module")
def batches():
    """[steps, 4, 256] tokens for SmolLM2-135M."""
    return train_step.token_batches(train_step.BATCH, train_step.LENGTH)


@pytest.fixture(scope="module")
def smollm2():
    """The frozen model in bf16. To be copied, not changed."""
    return load_base(find_model(None), "bf16", torch.device("cpu"))


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
    terminalreporter.write_line(
        f"{cpu_name()}, {torch.get_num_threads()} threads, isa {peftkern.cpu_isa()}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    terminalreporter.write_line("ratio = peer's time / peftkern's, medians of alternating runs in one process\n")
    width = max(len(row[0]) for row in ROWS)
    terminalreporter.write_line(f"| {'case':{width}} | {'peer':22} | peftkern ms | peer ms | ratio |")
    terminalreporter.write_line(f"|{'-' * (width + 2)}|{'-' * 24}|------------:|--------:|------:|")
    for case, peer, ours, theirs, ratio in ROWS:
        terminalreporter.write_line(f"| {case:{width}} | {peer:22} | {ours:11.2f} | {theirs:7.2f} | {ratio:4.2f}x |")
