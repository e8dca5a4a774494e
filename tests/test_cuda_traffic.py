# SPDX-License-Identifier: Apache-2.0
"""The bytes that the CUDA kernels have to move, counted in the simulator: docs/simulated.md has the table and says what
"distinct" and "waves" are."""

from __future__ import annotations

import pytest
from ptxsim import cudart
from ptxsim.ops_report import DOCUMENT, OLDER, ROWS, count, line_of

pytestmark = pytest.mark.slow

# Outside of main loops, by nature of the histogram of rank_mask, or both: docs/simulated.md.
WAVES = {"low_rank_grad": 1.05, "multi_lora_plan": 1.03, "orthogonality": 1.03, "rank_mask": 1.7}


@pytest.fixture(autouse=True, scope="module")
def simulator():
    cudart.require()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.case.op} {row.title}")
def test_traffic(row):
    """At most 1.05 of the operands, each once. What two launches hand to each other comes on top: absmax, whose codes
    need the mean of all of it first; and parts of a sum, written and read, where there are no clusters."""
    (totals, operands), (older, _) = count(row.case), count(row.case, OLDER)
    again = operands["absmax"]["compulsory"] if row.case.op == "quantize_absmax" else 0
    assert totals["distinct"] <= 1.05 * totals["compulsory"] + again
    assert older["distinct"] <= 1.05 * totals["compulsory"] + again + 2 * totals["workspace"]
    if row.case.op != "mask_ranks":  # which writes nothing where a rank stays
        assert totals["distinct"] >= totals["compulsory"]
    assert totals["waves"] <= WAVES.get(row.case.op, 1.0) * totals["ideal_waves"]
    assert line_of(row, totals, operands, older) in DOCUMENT.read_text(), "run python -m ptxsim.ops_report"
