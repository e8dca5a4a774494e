# SPDX-License-Identifier: Apache-2.0
"""Timing in turns, and the machine's ceilings measured in the same way.

The machines are shared, so the ratio of two medians of one run is the figure and a time is only its companion: all
providers of a case run in turn in one process, and the order turns round each time, so that drift hits all alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

Call = Callable[[int], object]
"""Does the work once; the argument is the turn, by which cold cases choose their buffers."""

SHORTEST = 1e-2
"""Seconds of a reading of the clock: a call is repeated until it takes so long. A provider starts with caches full of
the one before it, whose changed lines are written back meanwhile: 0.15 ms of a decode of 0.3, 0.4 of a product of 6,
which a model of many layers does not pay for each. Cold cases take another buffer for every call."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the quantiles of its readings."""

    p20: float
    p50: float
    p80: float
    readings: int


def measure(
    calls: Mapping[str, Call],
    seconds: float,
    rounds: tuple[int, int] = (5, 300),
    finish: Callable[[], object] = int,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Runs the calls in turn for about so many seconds, at least rounds[0] and at most rounds[1] times each.

    finish: waits until the work of a call is done, where that is not when it returns. device: "cuda" for the time
    between two events of its stream instead of the clock's.
    """

    def work(call: Call, turn: int, repeats: int) -> None:
        for i in range(repeats):
            call(turn * repeats + i)
        finish()

    def reading(call: Call, turn: int, repeats: int) -> float:
        if device == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work(call, turn, repeats)
            after.record()
            after.synchronize()
            return before.elapsed_time(after) / 1e3 / repeats
        start = time.perf_counter()
        work(call, turn, repeats)
        return (time.perf_counter() - start) / repeats

    for call in calls.values():  # the first call allocates, compiles and decides
        reading(call, 0, 1)
    repeats = {name: max(1, math.ceil(SHORTEST / reading(call, 1, 1))) for name, call in calls.items()}
    readings: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for i in range(rounds[1]):
        for name in list(calls) if i % 2 else reversed(calls):
            readings[name].append(reading(calls[name], i, repeats[name]))
        if i + 1 >= rounds[0] and time.perf_counter() - start > seconds:
            break
    return {name: _quantiles(values) for name, values in readings.items()}


def _quantiles(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], 1)
    p = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(p[1], p[4], p[7], len(values))


@cache
def last_level_cache(device: str = "cpu") -> int:
    """Bytes of the largest cache of the CPU, 32 MiB where the system does not tell, or of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = file.read_text().strip()[:-1], file.read_text().strip()[-1]
        sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}[unit])
    return max(sizes)


def copies(nbytes: int, device: str = "cpu", most: int = 4 << 30) -> int:
    """How many buffers of so many bytes to rotate over, so that each is out of the caches when its turn comes, also
    when nothing else runs between; their sum is kept below `most`."""
    wanted = math.ceil(2 * last_level_cache(device) / max(1, nbytes))
    return max(1, min(wanted, most // max(1, nbytes), 512))


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best: measured, not from a data sheet."""

    bytes_per_second: float
    flops_per_second: dict[str, float]  # by dtype

    def fraction(self, seconds: float, nbytes: float, flops: float, dtype: str) -> tuple[float, str]:
        """How near a call comes to the ceiling that binds it, and which that is: "memory" or "compute"."""
        memory = nbytes / self.bytes_per_second
        compute = flops / self.flops_per_second.get(dtype, math.inf)
        return max(memory, compute) / seconds, "memory" if memory >= compute else "compute"


def ceilings(dtypes: tuple[str, ...] = ("float32", "bfloat16"), seconds: float = 1.0, device: str = "cpu") -> Ceilings:
    """The copy bandwidth over buffers larger than the caches (bytes read plus bytes written), and for each dtype the
    best of the library's products of a few shapes."""
    size = 64 << 20
    n = copies(2 * size, device)
    buffers = torch.ones(2, n, size, dtype=torch.uint8, device=device)
    copy = measure({"copy": lambda i: buffers[0, i % n].copy_(buffers[1, i % n])}, seconds, device=device)["copy"]
    flops = {}
    shapes = ((512, 4096, 4096), (2048, 2048, 2048), (1024, 4096, 4096))
    if device == "cuda":
        shapes = ((4096, 4096, 4096), (8192, 8192, 8192))
    for dtype in dtypes:
        calls, work = {}, {}
        for m, k, n in shapes:
            a, w = (torch.randn(shape).to(device, getattr(torch, dtype)) for shape in ((m, k), (n, k)))
            calls[f"{m}x{k}x{n}"] = lambda i, a=a, w=w: torch.nn.functional.linear(a, w)
            work[f"{m}x{k}x{n}"] = 2 * m * k * n
        timings = measure(calls, seconds, device=device)
        flops[dtype] = max(work[name] / t.p20 for name, t in timings.items())
    return Ceilings(2 * size / copy.p20, flops)
