# SPDX-License-Identifier: Apache-2.0
"""The PTX simulator's speed: simulated thread-instructions per second of one core, all checks on. Target: 30 million.

python benchmarks/bench_ptxsim.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from ptxsim import Module, buffer, missing_tool  # noqa: E402

TARGET = 30e6
KERNELS = TESTS / "ptxsim" / "kernels"


def elementwise():
    """Mostly global loads, whose every byte is checked."""
    x = buffer(np.ones(1 << 19, np.float32))
    kernel = Module.from_cuda(KERNELS / "memory.cu").kernel("twice")
    return lambda: kernel.launch(2048, 256, [x, buffer(1 << 19, np.float32), 1 << 19])


def shared_histogram():
    """Shared atomics and barriers."""
    x = buffer((np.arange(100_000) * 7919 % 32).astype(np.int32))
    kernel = Module.from_cuda(KERNELS / "memory.cu").kernel("shared_histogram")
    return lambda: kernel.launch(1, 256, [x, buffer(32, np.int32), 100_000])


def functions():
    """Arithmetic."""
    n = 1 << 15
    x = buffer(np.linspace(-3, 3, n, dtype=np.float32))
    kernel = Module.from_cuda(KERNELS / "arithmetic.cu").kernel("functions")
    return lambda: kernel.launch(n // 256, 256, [x, buffer(n * 10, np.float32), n])


def gemm():
    """cp.async, ldmatrix and mma: an mma is one instruction of 4,096 multiplications."""
    a, b = (buffer(np.ones((256, 512), np.float16)) for _ in range(2))
    kernel = Module.from_cuda(KERNELS / "gemm.cu").kernel("gemm<3>")
    return lambda: kernel.launch((4, 4), 128, [a, b, buffer((256, 256), np.float32), 256, 256, 512])


CASES = [elementwise, shared_histogram, functions, gemm]


def measure(launch, rounds=5) -> tuple[int, float]:
    """(thread-instructions, CPU seconds of the best round): CPU time, because these machines are shared."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        result = launch()
        best = min(best, time.process_time() - start)
        result.check()
    return result.stats["thread_instructions"], best


@pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_simulator(benchmark, case):
    launch = case()
    instructions, seconds = measure(launch)
    benchmark.extra_info["million thread-instructions per second"] = round(instructions / seconds / 1e6, 1)
    benchmark.pedantic(launch, rounds=3, iterations=1)


def main():
    total_instructions = total_seconds = 0
    for case in CASES:
        instructions, seconds = measure(case())
        total_instructions, total_seconds = total_instructions + instructions, total_seconds + seconds
        speed = instructions / seconds / 1e6
        print(f"{case.__name__:18} {instructions / 1e6:6.1f} M in {seconds * 1e3:6.1f} ms  {speed:6.1f} M/s")
    speed = total_instructions / total_seconds
    print(f"{'all':18} {speed / 1e6:26.1f} M thread-instructions/s of one core (target {TARGET / 1e6:.0f})")


if __name__ == "__main__":
    main()
