# SPDX-License-Identifier: Apache-2.0
"""The bytes that the CUDA kernels have to move, counted in the simulator: docs/simulated.md has the table and says what
"distinct" is."""

from __future__ import annotations

import pytest
from ptxsim import cudart
from ptxsim.ops_report import ARCH, OLDER, ROWS, count

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def simulator():
    cudart.require()


@pytest.mark.parametrize("arch", (ARCH, OLDER))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.case.op} {row.title}")
def test_distinct_bytes(row, arch):
    """At most 1.05 of the operands, each once. What two launches hand to each other comes on top: absmax, whose codes
    need the mean of all of it first; and parts of a sum, written and read, where there are no clusters."""
    totals, operands = count(row.case, arch)
    handed_over = 2 * totals["workspace"] if arch == OLDER else 0
    if row.case.op == "quantize_absmax":
        handed_over += operands["absmax"]["compulsory"]
    assert totals["distinct"] <= 1.05 * totals["compulsory"] + handed_over
    assert totals["workspace"] or handed_over or totals["distinct"] >= totals["compulsory"]
