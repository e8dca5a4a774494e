# SPDX-License-Identifier: Apache-2.0
"""Thread-block clusters in the PTX simulator (tests/ptxsim/core/cluster.cpp); rules and twins as in test_ptxsim.py."""

import numpy as np
import pytest
from ptxsim import KernelFault, Module, PtxError, buffer, missing_tool
from ptxsim_kernels import FLOAT, INT, compiled, integers, marked_lines, random, reported_lines

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))

FILE = "cluster.cu"
SCHEDULES = [{}, {"schedule": "random", "seed": 1}, {"schedule": "chaos", "seed": 2}]
CLUSTERS = 2  # of every grid


def sum_of_blocks(module, size, **options):
    x, y = random(CLUSTERS, size, 64), buffer((CLUSTERS, size, 64), FLOAT, name="y")
    result = module.kernel("sum_of_blocks").launch(CLUSTERS * size, 64, [buffer(x), y], cluster=size, **options)
    return result, np.allclose(y.array, x.sum(1, keepdims=True), atol=1e-5)


def pass_on(module, size, **options):
    x, y = integers(0, 99, CLUSTERS * size * 64).reshape(CLUSTERS, size, 64), buffer((CLUSTERS, size, 64), INT)
    result = module.kernel("pass_on").launch(CLUSTERS * size, 64, [buffer(x), y, 5], cluster=size, **options)
    return result, (y.array == np.roll(x, 5, axis=1)).all()


def wide(module, size, **options):
    x, y, counts = random(CLUSTERS, size, 128), buffer((CLUSTERS, size, 32, 4), FLOAT), buffer(CLUSTERS, INT)
    result = module.kernel("wide").launch(CLUSTERS * size, 32, [buffer(x), y, counts], cluster=size, **options)
    expected = x[:, ::-1].reshape(y.shape)[..., [2, 3, 0, 1]]
    return result, (y.array == expected).all() and (counts.array == 32 * size).all()


def early_end(module, size, **options):
    y = buffer((CLUSTERS, size, 32), INT)
    result = module.kernel("early_end").launch(CLUSTERS * size, 32, [y], cluster=size, **options)
    return result, (y.array[:, 1:] == np.arange(1, size)[:, None]).all()


def through_global(module, size, **options):
    x, y, z = random(CLUSTERS, size, 32), buffer((CLUSTERS, size, 32), FLOAT), buffer((CLUSTERS, size, 32), FLOAT)
    result = module.kernel("through_global").launch(CLUSTERS * size, 32, [buffer(x), y, z], cluster=size, **options)
    return result, (z.array == np.roll(x, -1, axis=1)).all()


def last_cluster_sum(module, size, **options):
    clusters, x = 5, random(5, size, 32)
    partial, counter, y = buffer(x.shape, FLOAT), buffer(np.zeros(1, INT)), buffer((size, 32), FLOAT)
    arguments = [buffer(x), partial, counter, y, clusters]
    result = module.kernel("last_cluster_sum").launch(clusters * size, 32, arguments, cluster=size, **options)
    return result, np.allclose(y.array, x.sum(0), atol=1e-5)


RULES = [sum_of_blocks, pass_on, wide, early_end, through_global, last_cluster_sum]


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("rule", RULES)
def test_rule_is_kept(rule, size, arch):
    for options in SCHEDULES:
        result, right = rule(compiled(FILE, arch), size, **options)
        result.check()
        assert right, f"wrong values with {options}"


@pytest.mark.parametrize("rule", RULES)
def test_no_false_reports(rule):
    for seed in range(20):
        result, right = rule(compiled(FILE, "sm_90"), 3, schedule=("random", "chaos")[seed % 2], seed=seed)
        result.check()
        assert right, f"wrong values with seed {seed}"


BUGS = [
    (sum_of_blocks, "BUG_NO_BARRIER", "race"),
    (sum_of_blocks, "BUG_NO_BARRIER", "uninitialised_read"),
    (sum_of_blocks, "BUG_BLOCK_BARRIER", "race"),
    (sum_of_blocks, "BUG_RELAXED_ARRIVE", "race"),
    (sum_of_blocks, "BUG_UNWRITTEN", "uninitialised_read"),
    (sum_of_blocks, "BUG_ARRIVES_TWICE", "cluster_barrier"),
    (sum_of_blocks, "BUG_WAITS_FIRST", "cluster_barrier"),
    (sum_of_blocks, "BUG_HALF_A_WARP", "deadlock"),
    (sum_of_blocks, "BUG_ONE_WARP_WAITS_ELSEWHERE", "deadlock"),
    (sum_of_blocks, "BUG_RANK_TOO_HIGH", "out_of_bounds"),
    (sum_of_blocks, "BUG_PAST_THE_END", "out_of_bounds"),
    (sum_of_blocks, "BUG_MAPPED_TWICE", "out_of_bounds"),
    (sum_of_blocks, "BUG_PLAIN_LOAD", "out_of_bounds"),
    (sum_of_blocks, "BUG_NO_LAST_BARRIER", "remote_lifetime"),
    (sum_of_blocks, "BUG_LAST_RELAXED", "remote_lifetime"),
    (pass_on, "BUG_MAY_NOT_HAVE_STARTED", "remote_lifetime"),
    (pass_on, "BUG_NO_SECOND_BARRIER", "race"),
    (through_global, "BUG_NOT_PUBLISHED", "race"),
    (last_cluster_sum, "BUG_NO_FENCE", "race"),
]


@pytest.mark.parametrize(("rule", "bug", "kind"), BUGS, ids=[f"{r.__name__}-{bug}-{kind}" for r, bug, kind in BUGS])
def test_bug_is_caught(rule, bug, kind):
    marked = marked_lines(FILE, bug)
    for options in SCHEDULES:
        result, _ = rule(compiled(FILE, "sm_90", (bug,)), 2, **options)
        with pytest.raises(KernelFault, match=kind) as fault:
            result.check()
        reported = reported_lines(result, kind, FILE)
        assert marked <= reported if kind == "race" else marked & reported, str(fault.value)  # both sides of a race


def test_a_report_names_the_rank():
    result, _ = sum_of_blocks(compiled(FILE, "sm_90", ("BUG_PAST_THE_END",)), 3)
    (report,) = result.reports
    assert (report.buffer, report.offset) == ("shared memory of rank 2", 256) and report.thread == (63, 0, 0)


@pytest.mark.parametrize("stride", [1, 4])
def test_remote_bytes_are_no_global_ones(stride):
    size = 4
    stats = sum_of_blocks(compiled(FILE, "sm_90", (f"STRIDE={stride}",)), size)[0].check().stats
    once = CLUSTERS * size * 64 * 4  # a value for each thread
    assert stats["remote_bytes"] == (size - 1) * once and stats["shared_bytes"] == 2 * once
    assert stats["global_bytes"] == stats["distinct_bytes"] == 2 * once and stats["sectors"] == 2 * once // 32
    warps = CLUSTERS * size * 2
    assert stats["ideal_waves"] == (1 + size) * warps and stats["waves"] == stride * stats["ideal_waves"]
    assert stats["cluster_wait"] == 2 * warps


def test_distinct_bytes_within_a_cluster():
    stats = through_global(compiled(FILE, "sm_90"), 4)[0].check().stats
    n = CLUSTERS * 4 * 32
    assert stats["global_bytes"] == 4 * n * 4 and stats["distinct_bytes"] == 4 * n * 3


def test_chosen_blocks_bring_their_cluster():
    size, x, y = 4, random(16, 64), buffer((16, 64), FLOAT)
    kernel = compiled(FILE, "sm_90").kernel("sum_of_blocks")
    kernel.launch(16, 64, [buffer(x), y], cluster=size, blocks=(0, 1, -1)).check()
    ran = y.initialised().reshape(16, -1).all(1)
    assert ran.tolist() == [True] * 4 + [False] * 8 + [True] * 4
    assert np.allclose(y.array[ran], x.reshape(4, 4, 64)[[0, 3]].sum(1).repeat(4, 0), atol=1e-5)


@pytest.mark.parametrize("bug", ["", "BUG_ONE_BLOCK_WAITS"])
def test_a_cluster_overlaps_with_the_launch_before(bug):
    x, filled, y = random(32), buffer(32, FLOAT), buffer((4, 32), FLOAT)
    first = compiled("grid_dependency.cu", "sm_90").kernel("fill").launch(1, 32, [filled, buffer(x)]).check()
    kernel = compiled(FILE, "sm_90", (bug,) if bug else ()).kernel("after_fill")
    result = kernel.launch(4, 32, [filled, y], cluster=2, overlaps=first)
    assert {report.kind for report in result.reports} == ({"before_grid_wait", "no_grid_wait"} if bug else set())
    assert (y.array == x).all()
    if bug:
        assert marked_lines(FILE, bug) <= reported_lines(result, "before_grid_wait", FILE)


def test_an_order_of_blocks_for_every_seed():
    """Without a barrier the schedule decides the values."""
    module = compiled(FILE, "sm_90", ("BUG_NO_BARRIER", "BUG_NO_LAST_BARRIER"))

    def unread(seed):
        return str(sum_of_blocks(module, 8, schedule="random", seed=seed)[0].reports)

    assert unread(1) == unread(1) and len({unread(seed) for seed in range(8)}) > 1


def test_launches_that_a_device_would_refuse():
    for arch, blocks, size in [("sm_90", 7, 3), ("sm_90", 16, 16), ("sm_90", 4, 0), ("sm_80", 4, 2)]:
        kernel = compiled("memory.cu", arch).kernel("twice")
        with pytest.raises(PtxError, match=f"invalid clusters of {size} blocks"):
            kernel.launch(blocks, 32, [buffer(random(8)), buffer(8, FLOAT), 8], cluster=size)


@pytest.mark.parametrize(
    "instruction",
    [
        "mov.u32 %r1, %cluster_ctarank",
        "mapa.shared::cluster.u32 %r1, %r2, 0",
        "ld.shared::cluster.u32 %r1, [%r2]",
        "barrier.cluster.arrive.aligned",
        "barrier.cluster.wait",
    ],
)
def test_older_architectures_have_no_clusters(instruction):
    def module(arch):
        head = f".version 8.0\n.target {arch}\n.address_size 64\n.visible .entry k()"
        return Module.from_ptx(f"{head}{{\n.reg .b32 %r<9>;\n{instruction};\nret;\n}}")

    module("sm_90a").kernel("k")
    with pytest.raises(PtxError, match="clusters need sm_90, this is sm_80"):
        module("sm_80").kernel("k")
