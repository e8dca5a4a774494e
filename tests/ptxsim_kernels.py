# SPDX-License-Identifier: Apache-2.0
"""The simulator's own kernels (tests/ptxsim/kernels), compiled once, and numbers for them."""

import functools
import re
from pathlib import Path

import numpy as np
from ptxsim import Module

KERNELS = Path(__file__).parent / "ptxsim" / "kernels"
ARCHS = ["sm_80", "sm_90", "sm_100"]
INT, FLOAT = np.int32, np.float32


@functools.cache
def compiled(file: str, arch: str = "sm_80", defines: tuple = ()) -> Module:
    return Module.from_cuda(KERNELS / file, arch, defines)


def marked_lines(file, mark):
    lines = (KERNELS / file).read_text().splitlines()
    pattern = re.compile(rf"<- .*\b{mark}\b")
    return {number for number, line in enumerate(lines, 1) if pattern.search(line)}


def reported_lines(result, kind, file):
    sides = [line for report in result.reports if report.kind == kind for line in (report.line, report.other_line)]
    return {place.line for line in sides if line for place in line.chain() if place.file == file}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(FLOAT)


def integers(low, high, n, seed=0):
    return np.random.default_rng(seed).integers(low, high, n, dtype=np.int64).astype(INT)


def bfloat(x):
    """fp32 -> the codes of bf16, to nearest even."""
    code = np.ascontiguousarray(x, FLOAT).view(np.uint32).astype(np.uint64)
    return ((code + 0x7FFF + ((code >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat(code):
    return (code.astype(np.uint32) << 16).view(FLOAT)


# Rules. Each launches one kernel and returns (result, whether the values are right).
# `module` is compiled for the architecture and with the macros of the test; options go to launch().
