# SPDX-License-Identifier: Apache-2.0
"""The PTX simulator itself: each rule of the machine with a kernel that keeps it and twins that break it.

A twin is the kernel compiled with a BUG_ macro. The lines that its report must name carry the macro in a comment.
"""

import re
import struct

import numpy as np
import pytest
from ptxsim import Buffer, KernelFault, Module, PtxError, buffer, build, missing_tool
from ptxsim import module as module_file
from ptxsim_kernels import (
    ARCHS,
    FLOAT,
    INT,
    compiled,
    from_bfloat,
    integers,
    marked_lines,
    random,
    reported_lines,
)

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))


RULES = {}


def rule(file):
    def add(run):
        RULES[run.__name__] = (file, run)
        return run

    return add


@rule("memory.cu")
def twice(module, **options):
    x, y = random(1000), buffer(1000, FLOAT, name="y")
    result = module.kernel("twice").launch(8, 128, [buffer(x, name="x"), y, 1000], **options)
    return result, (y.array == 2 * x).all() and not result.unwritten(y)


@rule("memory.cu")
def twice_by_four(module, **options):
    x, y = random(1000), buffer(1000, FLOAT, name="y")
    result = module.kernel("twice_by_four").launch(2, 128, [buffer(x, name="x"), y, 1000], **options)
    return result, (y.array == 2 * x).all()


@rule("memory.cu")
def look_up(module, **options):
    codes, y = integers(0, 16, 300).astype(np.uint8), buffer(300, FLOAT, name="y")
    result = module.kernel("look_up").launch(3, 128, [buffer(codes), y, 300], **options)
    return result, (y.array == codes.astype(FLOAT) ** 2).all()


@rule("memory.cu")
def local_array(module, **options):
    index, y = np.append(np.arange(32) % 8, 3).astype(INT), buffer(32, INT, name="y")
    result = module.kernel("local_array").launch(1, 32, [buffer(index), y], **options)
    return result, (y.array == (index[:32] ^ 3) ** 2).all()


@rule("memory.cu")
def histogram(module, **options):
    x, bins = integers(0, 40, 1000), buffer(np.zeros(40, INT), name="bins")
    result = module.kernel("histogram").launch(8, 128, [buffer(x), bins, 1000], **options)
    return result, (bins.array == np.bincount(x, minlength=40)).all()


@rule("memory.cu")
def shared_histogram(module, **options):
    x, bins = integers(0, 32, 1000), buffer(32, INT, name="bins")
    result = module.kernel("shared_histogram").launch(1, 128, [buffer(x), bins, 1000], **options)
    return result, (bins.array == np.bincount(x, minlength=32)).all()


@rule("memory.cu")
def last_block_sum(module, **options):
    x, partial, total = random(9), buffer(9, FLOAT, name="partial"), buffer(1, FLOAT, name="total")
    result = module.kernel("last_block_sum").launch(9, 32, [buffer(x), partial, total], **options)
    return result, abs(total.array[0] - 2 * x.sum()) < 1e-5


@rule("memory.cu")
def coordinates(module, **options):
    y = buffer((2 * 3 * 4, 4 * 3 * 2), INT, name="y")
    result = module.kernel("coordinates").launch((2, 3, 4), (4, 3, 2), [y], **options)
    return result, (y.array == 1000 * np.arange(24)[:, None] + np.arange(24)).all()


@rule("sync.cu")
def warp_exchange(module, **options):
    x, y = np.arange(64, dtype=INT), buffer(64, INT, name="y")
    result = module.kernel("warp_exchange").launch(1, 64, [buffer(x), y], **options)
    return result, (y.array == x ^ 1).all()


@rule("sync.cu")
def block_sum(module, **options):
    x, total = random(256), buffer(1, FLOAT, name="total")
    result = module.kernel("block_sum").launch(1, 256, [buffer(x), total], **options)
    return result, abs(total.array[0] - x.sum()) < 1e-4


@rule("sync.cu")
def shuffle_half(module, **options):
    x, y = integers(0, 99, 32), buffer(32, INT, name="y")
    result = module.kernel("shuffle_half").launch(1, 32, [buffer(x), y], **options)
    return result, (y.array == np.append(x[np.arange(16) ^ 8], [-1] * 16)).all()


@rule("sync.cu")
def one_barrier(module, **options):
    y = buffer(64, INT, name="y")
    result = module.kernel("one_barrier").launch(1, 64, [y], **options)
    return result, (y.array == np.arange(64) ^ 1).all()


@rule("sync.cu")
def early_exit(module, **options):
    y = buffer(128, INT, name="y")
    result = module.kernel("early_exit").launch(1, 128, [y, 100], **options)
    return result, (y.array[:100] == 99 - np.arange(100)).all()


@rule("sync.cu")
def produce_consume(module, **options):
    x, y = integers(0, 99, 64), buffer(64, INT, name="y")
    result = module.kernel("produce_consume").launch(1, 128, [buffer(x), y], **options)
    return result, (y.array == x[::-1]).all()


@rule("sync.cu")
def voting_barriers(module, **options):
    x, y = integers(-9, 9, 64), buffer(64, INT, name="y")
    result = module.kernel("voting_barriers").launch(1, 64, [buffer(x), y], **options)
    return result, (y.array == (x > 0).sum() + 1000 * (x > 5).any() + 10000).all()


@rule("sync.cu")
def spin_lock(module, **options):
    counter = buffer(np.zeros(1, INT), name="counter")
    result = module.kernel("spin_lock").launch(2, 64, [counter], max_steps=10**7, **options)
    return result, counter.array[0] == 128


@rule("sync.cu")
def collectives(module, **options):
    x, y = integers(0, 9, 32), buffer((32, 6), np.uint32, name="y")
    result = module.kernel("collectives").launch(1, 32, [buffer(x), y], **options)
    lane = np.arange(32)
    expected = [
        np.full(32, sum(int(v & 1) << i for i, v in enumerate(x))),
        np.full(32, int((x == 7).any())),
        [sum(1 << j for j in lane if x[j] == x[i]) for i in lane],
        np.full(32, x.sum()),
        [x[i - 3] if i % 16 >= 3 else x[i] for i in lane],
        np.full(32, x.max()),
    ]
    return result, (y.array == np.array(expected).T).all()


def gemm(module, stages, m=70, n=40, k=136, **options):
    a, b, c = random(m, k).astype(np.float16), random(n, k, seed=1).astype(np.float16), buffer((m, n), FLOAT, name="c")
    arguments = [buffer(a, name="a"), buffer(b, name="b"), c, m, n, k]
    result = module.kernel(f"gemm<{stages}>").launch((-(-n // 64), -(-m // 64)), 128, arguments, **options)
    return result, np.allclose(c.array, a.astype(float) @ b.astype(float).T, atol=1e-4)


@rule("gemm.cu")
def gemm_2(module, **options):
    return gemm(module, 2, **options)


@rule("gemm.cu")
def gemm_3(module, **options):
    return gemm(module, 3, **options)


@rule("arithmetic.cu")
def atomics(module, **options):
    f, h, b = buffer(np.zeros(1, FLOAT)), buffer(np.zeros(2, np.float16)), buffer(np.zeros(2, np.uint16))
    u, i = buffer(np.zeros(1, np.uint64)), buffer(np.zeros(4, INT))
    result = module.kernel("atomics").launch(2, 64, [f, h, b, u, i], **options)
    right = f.array[0] == 128 and h.array.tolist() == [128, 64] and from_bfloat(b.array).tolist() == [128, 32]
    return result, right and u.array[0] == 63 << 33 and i.array[:3].tolist() == [-63, 0, 128 % 10] and i.array[3] > 0


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("arch", ARCHS)
def test_rule_is_kept(name, arch):
    file, run = RULES[name]
    for options in ({}, {"schedule": "random", "seed": 1}, {"schedule": "chaos", "seed": 2}):
        result, right = run(compiled(file, arch), **options)
        result.check()
        assert right, f"wrong values with {options}"


@pytest.mark.parametrize("name", RULES)
def test_no_false_reports(name):
    file, run = RULES[name]
    for seed in range(20):
        result, right = run(compiled(file), schedule=("random", "chaos")[seed % 2], seed=seed)
        result.check()
        assert right, f"wrong values with seed {seed}"


BUGS = [
    ("twice", "BUG_ONE_PAST_THE_END", "out_of_bounds"),
    ("twice_by_four", "BUG_OFF_THE_16_BYTES", "misaligned"),
    ("look_up", "BUG_ONE_ENTRY_SHORT", "uninitialised_read"),
    ("look_up", "BUG_NO_BARRIER", "race"),
    ("local_array", "BUG_HALF_OF_THE_ARRAY", "uninitialised_read"),
    ("histogram", "BUG_NO_ATOMIC", "race"),
    ("shared_histogram", "BUG_NO_BARRIER_AFTER_CLEAR", "race"),
    ("shared_histogram", "BUG_PLAIN_SHARED_ADD", "race"),
    ("last_block_sum", "BUG_NO_FENCE", "race"),
    ("warp_exchange", "BUG_NO_SYNCWARP", "race"),
    ("block_sum", "BUG_NO_BARRIER", "race"),
    ("block_sum", "BUG_NO_BARRIER", "uninitialised_read"),
    ("block_sum", "BUG_DIVERGENT_SHUFFLE", "deadlock"),
    ("block_sum", "BUG_MASK_WITHOUT_SELF", "sync_mask"),
    ("shuffle_half", "BUG_LANE_OUTSIDE_THE_MASK", "inactive_lane"),
    ("one_barrier", "BUG_TWO_BARRIERS", "deadlock"),
    ("produce_consume", "BUG_WRONG_BARRIER", "deadlock"),
    ("gemm_2", "BUG_NO_WAIT", "cp_async_in_flight"),
    ("gemm_2", "BUG_WAIT_FOR_ONE_LESS", "cp_async_in_flight"),
    ("gemm_3", "BUG_WAIT_FOR_ONE_LESS", "cp_async_in_flight"),
    ("gemm_3", "BUG_NO_BARRIER", "race"),
    ("gemm_3", "BUG_LOAD_BEFORE_BARRIER", "race"),
]


@pytest.mark.parametrize(("name", "bug", "kind"), BUGS, ids=[f"{name}-{bug}-{kind}" for name, bug, kind in BUGS])
def test_bug_is_caught(name, bug, kind):
    file, run = RULES[name]
    result, _ = run(compiled(file, defines=(bug,)))
    with pytest.raises(KernelFault, match=kind) as fault:
        result.check()
    assert result.kernel.signature in str(fault.value)
    marked, reported = marked_lines(file, bug), reported_lines(result, kind, file)
    assert marked <= reported if kind == "race" else marked & reported, str(fault.value)  # both sides of a race
    for options in ({"schedule": "random", "seed": 1}, {"schedule": "chaos", "seed": 2}):
        result, _ = run(compiled(file, defines=(bug,)), **options)
        kinds = ("race", kind)  # what another schedule does not read too early is still a race
        assert any(marked & reported_lines(result, kind, file) for kind in kinds), options


def test_a_seed_repeats_a_run():
    """With a plain += the schedule decides the values, so equal values mean an equal schedule."""
    module = compiled("memory.cu", defines=("BUG_PLAIN_SHARED_ADD",))

    def bins(seed):
        output = buffer(32, INT)
        arguments = [buffer(integers(0, 32, 1000)), output, 1000]
        module.kernel("shared_histogram").launch(1, 128, arguments, schedule="chaos", seed=seed)
        return output.array.tolist()

    assert bins(1) == bins(1) and len({tuple(bins(seed)) for seed in range(8)}) > 1


def test_race_is_found_where_the_values_are_right():
    """No schedule needs to go wrong for a report."""
    result, right = last_block_sum(compiled("memory.cu", defines=("BUG_NO_FENCE",)))
    race = next(report for report in result.reports if report.kind == "race")
    assert right and race.buffer == "partial" and race.block == (8, 0, 0) and race.other_block == (0, 0, 0)
    assert (race.line.line, race.other_line.line) == tuple(sorted(marked_lines("memory.cu", "BUG_NO_FENCE"))[::-1])


def test_value_only_bug():
    """Swapped fragment registers break no rule."""
    result, right = gemm_2(compiled("gemm.cu", defines=("BUG_SWAPPED_FRAGMENTS",)))
    result.check()
    assert not right


def test_speed_only_bug_shows_in_the_counters():
    good, _ = gemm_2(compiled("gemm.cu"))
    slow, right = gemm_2(compiled("gemm.cu", defines=("BUG_NO_SWIZZLE",)))
    slow.check()
    assert right and good.stats["bank_conflicts"] == 0 < slow.stats["bank_conflicts"]
    count, line = slow.hot(1, "waves", over="ideal_waves")[0]
    assert count > 0 and "gemm.cu" in line


def test_every_dropped_wait_is_noticed():
    """Mutation: dropping any executed wait, commit or barrier of the GEMM gives a report or a wrong value."""
    module = compiled("gemm.cu")
    program, (result, _) = module.kernel("gemm<3>").program, gemm_3(module)
    sync = [
        i for i, op in enumerate(program.opcodes) if op in ("bar", "cp_wait", "cp_commit") and result.raw["warps"][i]
    ]
    assert len(sync) >= 4
    for index in sync:
        result, right = gemm_3(module, drop=index)
        noticed = not right or any(report.kind not in ("never_waited",) for report in result.reports)
        assert noticed, f"{program.texts[index]} at {program.lines[index]}"


# Reports that need another launch rather than another kernel


def test_restrict_promise_broken_by_the_caller():
    x = buffer(random(512), name="x")
    result = compiled("memory.cu").kernel("reversed").launch(2, 256, [x, x, 512])
    assert marked_lines("memory.cu", "in place") <= reported_lines(result, "nc_of_written", "memory.cu")
    apart = compiled("memory.cu").kernel("reversed").launch(2, 256, [buffer(512, FLOAT), x, 512])
    apart.check()


def test_uninitialised_and_unwritten_global_memory():
    x, y = buffer(100, FLOAT, name="x"), buffer(100, FLOAT, name="y")
    kernel = compiled("memory.cu").kernel("twice")
    with pytest.raises(KernelFault, match="uninitialised_read.*memory.cu.*x"):
        kernel.launch(1, 128, [x, y, 100]).check()
    y = buffer(100, FLOAT, name="y")
    result = kernel.launch(1, 64, [buffer(random(100)), y, 100])
    assert result.unwritten(y) == 36 * 4 and y.initialised().sum() == 64 * 4
    with pytest.raises(KernelFault, match=r"unwritten_output: 144 bytes of y, the first at \+256"):
        result.check(written=[y])


def test_read_only_buffer():
    y = buffer(np.zeros(100, FLOAT), name="y", writable=False)
    result = compiled("memory.cu").kernel("twice").launch(1, 128, [buffer(random(100)), y, 100])
    assert {report.kind for report in result.reports} == {"read_only_write"} and not y.array.any()


def test_same_value_races_are_a_kind_of_their_own():
    result = compiled("memory.cu").kernel("same_value").launch(2, 32, [buffer(1, INT, name="flag")])
    result.check()
    assert {report.kind for report in result.reports} == {"race_same_value"}
    with pytest.raises(KernelFault, match="race_same_value"):
        result.check(allow=())


def test_endless_loop():
    result = compiled("sync.cu").kernel("endless").launch(1, 32, [buffer(np.zeros(1, INT))], max_steps=10_000)
    assert [report.kind for report in result.reports] == ["step_limit"]
    assert reported_lines(result, "step_limit", "sync.cu") <= marked_lines("sync.cu", "step limit")


def test_device_assert():
    y = buffer(4, INT, name="y")
    result = compiled("sync.cu").kernel("asserts").launch(1, 4, [buffer(np.array([5, 50, 100, 7], INT)), y])
    (report,) = result.reports
    assert report.kind == "assertion" and report.lanes == 0b100 and report.thread == (2, 0, 0)
    assert reported_lines(result, "assertion", "sync.cu") == marked_lines("sync.cu", "assert")


def test_report_says_where():
    x, y = buffer(random(1000), name="x"), buffer(1000, FLOAT, name="y")
    kernel = compiled("memory.cu", defines=("BUG_ONE_PAST_THE_END",)).kernel("twice")
    result = kernel.launch(8, 128, [x, y, 1000])
    read, write = result.reports
    assert read.kind == write.kind == "out_of_bounds" and (read.buffer, write.buffer) == ("x", "y")
    assert read.block == (7, 0, 0) and read.thread == (104, 0, 0) and read.size == 4
    assert read.address == x.address + 4000 and read.offset == read.buffer_bytes == 4000
    assert re.search(r"block \(7, 0, 0\) thread \(104, 0, 0\) at memory.cu:\d+ .*x\+4000", str(read))
    unmapped = kernel.launch(1, 32, [x, None, 1000])
    assert unmapped.reports[0].buffer is None and "unmapped memory" in str(unmapped.reports[0])


# Arguments and buffers


def test_struct_by_value_and_dynamic_shared_memory():
    x, y = random(50), buffer(50, FLOAT, name="y")
    kernel = compiled("memory.cu").kernel("by_struct")
    assert [(p.size, p.align, p.offset) for p in kernel.parameters] == [(32, 8, 0), (1, 1, 32)]
    source = buffer(x, name="x")
    scale = struct.pack("<fxxxxqQQ", 3.0, 50, source.address, y.address)
    assert kernel.parameters[1].type == "signed char" and kernel.parameters[0].type == "Scale"
    kernel.launch(1, 64, [scale, -2], smem=200, buffers=[source, y]).check(written=[y])
    assert (y.array == x * 3 * -2).all()
    with pytest.raises(KernelFault, match="out_of_bounds.*shared memory"):
        kernel.launch(1, 64, [scale, -2], smem=160, buffers=[source, y]).check()
    with pytest.raises(KernelFault, match="out_of_bounds.*unmapped"):
        kernel.launch(1, 64, [scale, -2], smem=200, buffers=[y]).check()


def test_pointers_into_a_buffer_and_host_memory():
    kernel = compiled("memory.cu").kernel("twice")
    x, host = random(101), np.zeros(100, FLOAT)
    y = Buffer.at(host.ctypes.data, host.nbytes, "host", initialised=False)
    kernel.launch(1, 128, [buffer(x) + 4, y, 100]).check(written=[y])
    assert (host == 2 * x[1:]).all()
    with pytest.raises(KernelFault, match="out_of_bounds"):
        kernel.launch(1, 128, [buffer(x), y + 4, 100]).check()
    raw = buffer.empty(400, name="raw")
    kernel.launch(1, 128, [buffer(x), raw, 100]).check()
    assert (raw.numpy(FLOAT) == 2 * x[:100]).all()


def test_launches_that_a_device_would_refuse():
    twice, gemm_kernel = compiled("memory.cu").kernel("twice"), compiled("gemm.cu").kernel("gemm<2>")
    arguments = [buffer(random(8)), buffer(8, FLOAT), 8]
    for message, launch in {
        "invalid grid": lambda: twice.launch(0, 32, arguments),
        "or block": lambda: twice.launch(1, 2048, arguments),
        "launch bound is 128": lambda: gemm_kernel.launch(1, 256, [*arguments, 1, 1, 1]),
        "bytes of shared memory": lambda: twice.launch(1, 32, arguments, smem=10**6),
        "3 parameters, got 2": lambda: twice.launch(1, 32, arguments[:2]),
        "has 4 bytes, got 8": lambda: twice.launch(1, 32, [*arguments[:2], bytes(8)]),
    }.items():
        with pytest.raises(PtxError, match=message):
            launch()


def test_kernels_by_name():
    module = compiled("gemm.cu")
    assert len(module.kernels()) == 2 and module.kernel("gemm< 2 >") is module.kernel(
        "void gemm<2>(__half const*, __half const*, float*, int, int, int)"
    )
    with pytest.raises(PtxError, match=r"2 kernels named 'gemm'.*gemm<2>.*gemm<3>".replace(".*", r"[\s\S]*")):
        module.kernel("gemm")


# Counters


@pytest.mark.parametrize(("stride", "sectors", "waves"), [(1, 4, 1), (2, 8, 2), (3, 12, 1), (8, 32, 8), (32, 32, 32)])
def test_cost_of_a_stride(stride, sectors, waves):
    x, y = buffer(random(32 * stride)), buffer(32, FLOAT, name="y")
    result = compiled("memory.cu").kernel("strided").launch(1, 32, [x, y, stride], smem=128 * stride).check()
    stats = result.stats
    assert stats["sectors"] == sectors + 4 and stats["ideal_sectors"] == 8  # the read and the coalesced write
    assert stats["waves"] == 2 * waves and stats["ideal_waves"] == 2
    assert stats["bank_conflicts"] == 2 * (waves - 1)
    assert (stats["global_bytes_read"], stats["global_bytes_written"], stats["shared_bytes"]) == (128, 128, 256)
    assert all("memory.cu" in line for line in result.by_line())


@pytest.mark.parametrize(("bug", "moved"), [("", 2), ("BUG_SPREAD_OUT", 9), ("BUG_WORKSPACE", 3)])
def test_distinct_bytes(bug, moved):
    """`moved`, of n values: a sector counts once however often it is asked for, and whole."""
    n = 2048
    x, y = buffer(random(8 * n)), buffer(2 * n, FLOAT)
    kernel = compiled("memory.cu", defines=(bug,) if bug else ()).kernel("twice_through_y")
    stats = kernel.launch(8, 256, [x, y, n]).check().stats
    assert stats["distinct_bytes"] == 4 * n * moved and stats["global_bytes"] == 4 * n * 6
    assert kernel.launch(1, 1, [x + 4, y + 28, 1]).stats["distinct_bytes"] == 64 + 32 * (bug == "BUG_WORKSPACE")


OVERLAP_BUGS = {
    "BUG_READS_TOO_EARLY": {"before_grid_wait"},
    "BUG_WRITES_TOO_EARLY": {"before_grid_wait"},
    "BUG_HALF_WAITS": {"no_grid_wait"},
    "BUG_NEVER_WAITS": {"before_grid_wait", "no_grid_wait"},
}


@pytest.mark.parametrize("bug", ["", *OVERLAP_BUGS])
def test_launches_that_overlap(bug):
    """What the launch before writes is not read before the wait, what it touches not written; every thread waits."""
    file = "grid_dependency.cu"
    module = compiled(file, "sm_90", (bug,) if bug else ())
    x, scratch = random(32), random(32, seed=1)
    filled, y, memory = buffer(32, FLOAT), buffer(32, FLOAT, name="y"), buffer(scratch)
    first = module.kernel("fill").launch(1, 32, [filled, memory]).check()
    arguments = [buffer(x), filled, y, memory]
    module.kernel("add").launch(1, 32, arguments).check()  # one after the other, all of them are right
    result = module.kernel("add").launch(1, 32, arguments, overlaps=first)
    if not bug:
        result.check(written=[y])
        assert (y.array == x + scratch).all()
    assert {report.kind for report in result.reports} == OVERLAP_BUGS.get(bug, set())
    if "before_grid_wait" in OVERLAP_BUGS.get(bug, ()):
        assert marked_lines(file, bug) <= reported_lines(result, "before_grid_wait", file)


def test_counts_of_a_gemm():
    stats = gemm(compiled("gemm.cu"), 2, m=64, n=64, k=64)[0].check().stats
    assert stats["mma"] == 4 * (2 * 4) * 4  # warps, tiles of a warp, steps of 16
    assert stats["global_bytes_read"] == 2 * 64 * 64 * 2 and stats["global_bytes_written"] == 64 * 64 * 4
    assert stats["cp_async"] == 4 * 2 * 2 * 2 and stats["bar"] == 4 * 2
    assert stats["ideal_sectors"] == 512 + 512 and stats["sectors"] == 512 + 2 * 512  # C is stored by every other float
    assert sum(stats["classes"].values()) == stats["warp_instructions"] and stats["bank_conflicts"] == 0


# Arithmetic


def ptx_with(*instructions):
    body = "\n".join(f"{instruction};" for instruction in instructions)
    head = ".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry k(.param .u64 p)\n"
    return f"{head}{{\n.reg .b32 %r<9>;\n{body}\nret;\n}}"


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.fence.sync.aligned",
        "frobnicate.u32 %r1, %r2",
        "add.cc.u32 %r1, %r2, %r3",
        "add.sat.s32 %r1, %r2, %r3",
        "max.s32 %r1, %r2, %r3, %r4",
        "prmt.b32.f4e %r1, %r2, %r3, %r4",
        "cp.async.ca.shared::cluster.global [%r1], [%r2], 4",
        "mapa.u64 %r1, %r2, %r3",
        "cvt.rn.satfinite.e4m3x2.f32 %r1, %r2, %r3",
        "cvt.rz.bf16x2.f32 %r1, %r2, %r3",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4}",
        "cp.async.bulk.commit_group",
        "mov.u32 %r1, %nosuch",
        "bra nowhere",
        "setp.u32 %r1, %r2, %r3",
        "lop3.b32 %r1, %r2, %r3",
        "ld.global.u32 %r1",
    ],
)
def test_unknown_ptx_raises_at_decode(instruction):
    module = Module.from_ptx(ptx_with(instruction))
    with pytest.raises(PtxError):
        module.kernel("k")
    Module.from_ptx(ptx_with("mov.u32 %r1, 5", "add.u32 %r2, %r1, -3")).kernel("k").launch(1, 1, [0]).check()


def test_cache_follows_headers_and_flags(tmp_path, monkeypatch):
    header, source = tmp_path / "factor.h", tmp_path / "kernel.cu"
    header.write_text("#define FACTOR 3\n")
    source.write_text('#include "factor.h"\n__global__ void scale(int* x) { x[threadIdx.x] *= FACTOR * SIGN; }\n')
    monkeypatch.setenv("PTXSIM_CACHE", str(tmp_path / "cache"))
    compilations = []
    compile_once = module_file._compile
    monkeypatch.setattr(module_file, "_compile", lambda *a: compilations.append(a) or compile_once(*a))

    def scaled(sign):
        x = buffer(np.arange(4, dtype=INT))
        Module.from_cuda(source, "sm_80", {"SIGN": sign}).kernel("scale").launch(1, 4, [x]).check()
        return x.array.tolist(), len(compilations)

    assert scaled(1) == ([0, 3, 6, 9], 1)
    assert scaled(1) == ([0, 3, 6, 9], 1)
    assert scaled(-1) == ([0, -3, -6, -9], 2)
    header.write_text("#define FACTOR 10\n")
    assert scaled(1) == ([0, 10, 20, 30], 3)
    header.touch()
    assert scaled(1) == ([0, 10, 20, 30], 3)


def test_compiler_errors_are_shown(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { nonsense; }\n")
    with pytest.raises(PtxError, match="nonsense"):
        Module.from_cuda(source)


def test_missing_tools_are_named(monkeypatch):
    with monkeypatch.context() as without_pybind11:
        without_pybind11.setattr(build.importlib.util, "find_spec", lambda name: None)
        assert "pip install pybind11" in missing_tool()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert "g++ not found" in missing_tool()
    monkeypatch.setattr(build, "DEFAULT_CUDA_HOME", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", "/nowhere/else")
    assert "set CUDA_HOME" in missing_tool()
