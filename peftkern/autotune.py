# SPDX-License-Identifier: Apache-2.0
"""Choosing how a product is made by timing the ways on the user's own machine."""

from __future__ import annotations

import atexit
import json
import os
import platform
import warnings
from pathlib import Path

from .files import write_whole
from .ops.library import ops

_path: Path | None = None  # where the timings are kept


def autotune(setting: bool | str | os.PathLike[str]) -> None:
    """Times the ways to make a product with a weight, and takes the fastest from then on.

    There are several ways to make ``x W^T`` and ``q W`` with their low-rank part (`csrc/products.h`): fused kernels,
    the library on a dequantized weight, and more. By default a rule picks one. True: when a product first meets a
    device and a bucket of shapes (rows and rank up to the next power of two, the weight's shape, dtypes, bias,
    dropout), all ways that can make it run a few times from cold caches, and the fastest by the median is taken from
    then on. False: by the rule again; what was timed is kept. A path: as True, with what is in that JSON file; all
    timings are written there when the interpreter ends or autotune is called again. An entry counts only for the same
    version of peftkern, CPU, number of threads or GPU and driver.

    Weights have the same bits in every way, but sums are rounded in another order, so results may differ in the last
    bits from those of the rule; a file of timings makes them repeatable from run to run. Nothing is timed while a CUDA
    graph is captured: warm up before. `explain` shows what was chosen and the figures.

    Raises TypeError or ValueError for a setting or a file of another kind.

    >>> autotune(True)
    >>> autotune(False)
    """
    global _path
    if not isinstance(setting, (bool, str, os.PathLike)):
        raise TypeError(f"setting: expected True, False or a path, got {type(setting).__name__}")
    _save()
    if isinstance(setting, bool):
        _path = None
        ops.set_autotune(setting)
        return
    path = Path(setting).absolute()  # the working directory may be another one when it is written
    lines = _read(path)
    _path = path
    ops.add_timed_products(lines)
    ops.set_autotune(True)


def timed_products() -> dict[str, dict[str, float]]:
    """What was timed: product -> {way: seconds}, the fastest first."""
    found = {}
    for line in ops.timed_products():
        product, *fields = line.split("\t")
        found[product] = dict(zip(fields[::2], map(float, fields[1::2]), strict=True))
    return found


def _machine() -> str:
    """What an entry of a file is for, besides the device that each names itself."""
    from . import __version__

    try:
        cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")).split(":")[
            1
        ]
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"peftkern {__version__} on {cpu.strip()}"


def _read_file(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        for products in content.values():
            for timings in products.values():
                assert timings and all(isinstance(seconds, float) and seconds > 0 for seconds in timings.values())
    except (ValueError, AttributeError, AssertionError) as error:
        raise ValueError(f"setting: expected a file that autotune has written, got {path}: {error!r}") from error
    return content


def _read(path: Path) -> list[str]:
    """The lines of a file that are for this machine, as the extension takes them."""
    products = _read_file(path).get(_machine(), {})
    return ["\t".join([name, *(f"{way}\t{s!r}" for way, s in timings.items())]) for name, timings in products.items()]


@atexit.register
def _save() -> None:
    """Adds what was timed to the file; what other processes have written meanwhile stays."""
    if _path is None:
        return
    try:
        content = _read_file(_path)
        content.setdefault(_machine(), {}).update(timed_products())
        _path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1) + "\n"
        write_whole({_path: lambda temporary: temporary.write_text(text)})
    except (OSError, ValueError) as error:
        warnings.warn(f"autotune: the timings were not saved: {error}", stacklevel=2)
