# SPDX-License-Identifier: Apache-2.0
"""Sums that blocks share: on sm_90 clusters add them up on the chip, elsewhere a second kernel does, with the same bits
(csrc/cuda/parts.cuh). tests/test_cuda_simulated.py compares the architectures in all cases, this how they get there."""

from __future__ import annotations

import pytest
from ptxsim import cudart
from ptxsim.cudart import Device
from ptxsim.ops import BF16
from ptxsim.ops_cases import case

pytestmark = pytest.mark.slow

CASES = {
    3: case("nf4_forward", rows=5, out=140, columns=768, rank=8, splits=3),
    4: case("low_rank_down", rows=20, columns=1024, rank=8, x=BF16, p=0.1),
    5: case("low_rank_grad", rows=1280, columns=72, rank=8, x=BF16, rank_major=False, sums=True),
    6: case("multi_lora_grad", rows=1536, columns=72, rank=8, adapters=2, x=BF16),
    8: case("multi_lora_down", rows=20, columns=2048, rank=8, adapters=3, x=BF16),
}


@pytest.fixture(autouse=True, scope="module")
def simulator():
    cudart.require()


def with_room(clusters: int) -> Device:
    """A GPU, or a share of one, that runs so many clusters at once. It has room for 8 blocks."""
    device = Device("sm_90")
    device.cluster_room = clusters
    return device


@pytest.mark.parametrize("parts", CASES)
def test_up_to_eight_parts_are_one_launch(parts):
    in_clusters, by_workspace, without_room = Device("sm_90"), Device("sm_80"), with_room(0)
    outputs = CASES[parts].run(in_clusters)
    assert in_clusters.clusters == [parts]
    assert outputs == CASES[parts].run(by_workspace) and by_workspace.clusters == [1, 1]
    assert outputs == CASES[parts].run(without_room) and without_room.clusters == [1, 1]


@pytest.mark.parametrize(("out", "clusters", "expected"), [(140, 1, [1, 1]), (140, 2, [4]), (300, 1, [4])])
def test_no_cluster_waits_where_blocks_would_not(out, clusters, expected):
    """Two clusters of four: as blocks alone they run at once. Three do not, either."""
    device = with_room(clusters)
    case("nf4_forward", rows=5, out=out, columns=1024, rank=8, splits=4).run(device)
    assert device.clusters == expected


def test_more_parts_are_clusters_and_a_second_launch():
    many = case("nf4_forward", rows=1, out=140, columns=1024, rank=8, splits=16)
    in_clusters, by_workspace = Device("sm_90"), Device("sm_80")
    assert many.run(in_clusters) == many.run(by_workspace)
    assert in_clusters.clusters == [8, 1] and by_workspace.clusters == [1, 1]


def test_parts_that_make_no_whole_clusters():
    uneven = case("nf4_forward", rows=1, out=140, columns=1024, rank=8, splits=12)
    device = Device("sm_90")
    assert uneven.run(device) == uneven.run(Device("sm_80"))
    assert device.clusters == [1, 1]


def test_a_launch_that_fails_leaves_no_error_behind():
    recorder = cudart.Recorder(fails=0, arch="sm_90")
    assert CASES[3].run_on_recorder(recorder) == cudart.LAUNCH_FAILURE  # active() asserts that nothing is pending
    assert len(recorder.launched) == 1
