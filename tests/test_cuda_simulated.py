# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels and their launchers, run on the CPU: every launch goes to the simulator in tests/ptxsim, which
reports what a GPU would leave unsaid. Nothing here needs a GPU or torch's CUDA; nvcc is needed.

A `__global__` function in csrc/cuda that no case of ptxsim/ops_cases.py reaches fails this file.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from contextlib import nullcontext

import pytest
import torch
from conftest import assert_close
from multi_samples import MULTI_SAMPLES
from ptxsim import cudart
from ptxsim.cudart import Device, HostMemory, Recorder, autotune_on, capture, faulty_launchers, package_on
from ptxsim.ops import (
    BF16,
    F16,
    F32,
    OPS,
    STREAM,
    ColumnSums,
    DequantizeNf4,
    JacobiSvd,
    Nf4Forward,
    Nf4Matrix,
    QuantizeAbsmax,
    QuantizeNf4,
)
from ptxsim.ops_cases import (
    CASES,
    SCHEDULED,
    SEED,
    TORCH_DTYPE,
    Problem,
    case,
    drop,
    dropout_argument,
    threshold_of,
)
from ptxsim_kernels import compiled
from samples import NF4_SAMPLES, SAMPLES
from test_rank_allocation import as_parameters, make_layers, new_state, replace_gradients
from torch import nn

import peftkern
from peftkern import reference
from peftkern.ops import jacobi_svd, mask_ranks, multi_lora, orthogonality_penalty, rank_mask, update_importance
from peftkern.ops.dora_norm import dora_norm
from peftkern.ops.rank_allocation import TripletTable

pytestmark = pytest.mark.slow

ARCHS = {
    "sm_80": dict(seed=0, schedule="default"),
    "sm_90": dict(seed=1, schedule="random"),
    "sm_100": dict(seed=2, schedule="chaos"),
}
"""Each architecture with a schedule of its own: results may depend on neither."""


@pytest.fixture(autouse=True, scope="module")
def simulator():
    cudart.require()


# ---- the kernels, from raw pointers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case):
    """No report, all outputs written, inputs intact, the values of reference.py; the same bits on all architectures."""
    outputs = {arch: case.run(Device(arch, **how), check=arch == "sm_80") for arch, how in ARCHS.items()}
    assert outputs["sm_80"] == outputs["sm_90"] == outputs["sm_100"]


@pytest.mark.parametrize("case", SCHEDULED, ids=str)
def test_schedules(case):
    """20 random orders of the warps: no report, and the bits of the default order."""
    expected = case.run(Device("sm_80"))
    for seed in range(1, 21):
        schedule = "chaos" if seed % 4 == 0 else "random"
        assert case.run(Device("sm_80", seed=seed, schedule=schedule), check=False) == expected


def test_every_kernel_is_run():
    """Decided by the launchers themselves: which of the kernels in the PTX do the cases above reach?"""
    for arch in ("sm_80", "sm_90"):  # where clusters leave less to be added by second kernels
        _every_kernel_is_run(arch)


def _every_kernel_is_run(arch: str) -> None:
    recorder = Recorder(arch=arch)
    for each in CASES:
        each.run_on_recorder(recorder)
    reached = {name for name, *_ in recorder.launched}
    for file, module in cudart.modules(arch).items():
        assert module.demangled, f"{file}: holds no kernel, or its templates are instantiated nowhere"
        missing = [signature for name, signature in module.demangled.items() if name not in reached]
        assert not missing, f"{file}: no case of tests/ptxsim/ops_cases.py runs {missing}"


def test_every_line_is_run():
    """Of each kernel: a line of source that became PTX, but that no case executes in any instantiation, is untested."""
    ran = {}
    for each, arch in itertools.product(CASES, ("sm_80", "sm_90")):  # without clusters, and with them
        device = Device(arch)
        each.run(device, check=False)
        for result in device.results:
            ran[result.kernel] = ran.get(result.kernel, False) | (result.raw["warps"] > 0)
    with_code, executed = set(), set()
    for kernel, mask in ran.items():
        for line, run in zip(kernel.program.lines, mask, strict=True):
            positions = {(position.file, position.line) for position in line.chain()} if line else set()
            with_code |= positions
            executed |= positions if run else set()
    missed = []
    for file, number in sorted(with_code - executed):
        path = cudart.CUDA_SOURCES / file  # or a header of CUDA's
        text = path.read_text().splitlines()[number - 1].strip() if number and path.exists() else "}"
        missed += [f"{file}:{number}: {text}"] if text != "}" else []
    assert not missed


def test_every_launcher_has_cases():
    declared = set(re.findall(r"cudaError_t launch_(\w+)\(", (cudart.CUDA_SOURCES / "kernels.h").read_text()))
    assert declared == set(OPS) == {each.op for each in CASES}


def test_flags_are_those_of_the_build():
    """A kernel compiled otherwise than by setup.py would be another kernel."""
    setup = (cudart.ROOT / "setup.py").read_text()
    assert all(f'"{flag}"' in setup for flag in cudart.NVCC_FLAGS)


# ---- the kernels, where a special value is the question --------------------------------------------------------------


def test_dropped_nan_vanishes_and_kept_nan_stays():
    rows, columns, rank, p = 40, 72, 8, 0.3
    keep = reference.dropout_mask(rows, columns, threshold_of(p), SEED)
    x = torch.where(keep, torch.randn(rows, columns), torch.tensor(float("nan")))
    x[~keep & (torch.rand(x.shape) < 0.5)] = float("inf")
    x_kept = x.clone()
    x_kept[0, keep[0].nonzero()[0]] = float("nan")
    f, u = torch.randn(rank, columns), torch.randn(rows, rank)
    for values in (x, x_kept):
        for op in ("low_rank_down", "low_rank_grad"):
            problem = case(op, rows=rows, columns=columns, rank=rank, p=p).make()
            fresh = Problem()
            args = problem.args
            args.x, args.dropout = fresh.place("x", values), dropout_argument(fresh, p)
            output = "out" if op == "low_rank_down" else "grad"
            if op == "low_rank_down":
                args.factor.data = fresh.place("factor", f)
                args.out, expected = fresh.reserve("out", rows * rank), 0.75 * drop(values, p) @ f.T.double()
            else:
                args.u = fresh.place("u", u)
                args.grad, expected = fresh.reserve("grad", rank * columns), 1.5 * u.T.double() @ drop(values, p)
            fresh.args = args
            fresh.run(Device("sm_80"), op)
            got = fresh.result(output, torch.float32, *expected.shape)
            assert got.isnan().equal(expected.isnan())
            assert_close(got[~got.isnan()], expected[~got.isnan()], torch.float32, op)


def test_the_mask_itself():
    """u = F = 1, rank 1, y = 0: the result of low_rank_up is the mask times its scale."""
    rows, columns, p = 40, 77, 0.3
    problem = Problem()
    problem.args = case("low_rank_up", rows=rows, columns=columns, rank=1, p=p).make().args
    args, ones = problem.args, torch.ones(max(rows, columns))
    args.alpha, args.dropout = 1.0, dropout_argument(problem, p)
    args.out_scale = args.bias = args.z = None
    args.u, args.factor.data = problem.place("u", ones[:rows]), problem.place("factor", ones[:columns])
    args.y = problem.place("y", torch.zeros(rows, columns))
    problem.run(Device("sm_100"), "low_rank_up")
    keep = reference.dropout_mask(rows, columns, threshold_of(p), SEED)
    scale = torch.tensor(32768 / (32768 - threshold_of(p)), dtype=torch.float32)
    assert problem.result("y", torch.float32, rows, columns).equal(keep * scale)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_narrowing_rounds_to_nearest_even(dtype):
    """Ties and special values reach y through the bias."""
    ties = torch.randint(-(2**31), 2**31, (4000,)).bitwise_or(0x8000).bitwise_and(~0x7FFF).to(torch.int32)
    special = [0x7F800000, -0x800000, 0x7FC00000, 0x7F7FFFFF, 1, -0x80000000, 0x477FF000, 0x33000000, 0x33000001]
    values = torch.cat([ties, torch.tensor(special, dtype=torch.int32)]).view(torch.float32)
    problem, n = Problem(), len(values)
    problem.args = case("low_rank_up", rows=1, columns=n, rank=0, y=dtype, out_scale=False, z=False).make().args
    problem.args.bias = problem.place("bias", values)
    problem.args.y = problem.place("y", torch.zeros(n, dtype=TORCH_DTYPE[dtype]))
    problem.run(Device("sm_80"), "low_rank_up")
    got, expected = problem.result("y", TORCH_DTYPE[dtype]), (values + 0.0).to(TORCH_DTYPE[dtype])
    assert got.isnan().equal(expected.isnan())
    assert got[~got.isnan()].view(torch.int16).equal(expected[~got.isnan()].view(torch.int16))


def test_quantize_a_block_below_the_smallest_divisor():
    w = torch.full((64,), 1e-42)
    w[3] = -2e-42
    problem = Problem()
    problem.args = QuantizeNf4(
        problem.place("w", w), F32, 64, 64, problem.reserve("packed", 32, torch.uint8), problem.reserve("absmax", 1)
    )
    problem.run(Device("sm_80"), "quantize_nf4")
    packed, absmax = reference.quantize_nf4(w, 64)
    assert problem.result("packed", torch.uint8).equal(packed) and problem.result("absmax").equal(absmax)


# ---- the launchers ---------------------------------------------------------------------------------------------------


def forward(block_size=64, columns=64, **options) -> Nf4Forward:
    matrix = Nf4Matrix(out=8, block_size=block_size)
    setattr(matrix, "in", columns)
    return Nf4Forward(**dict(x_dtype=BF16, rows=2, weight=matrix, splits=1) | options)


@pytest.mark.parametrize(
    "args",
    [
        QuantizeNf4(block_size=48, n=64),
        DequantizeNf4(block_size=48, n=64),
        QuantizeAbsmax(n=64),  # without a workspace
        JacobiSvd(batch=1, n=1025),
        OPS["low_rank_grad"](x_dtype=F32, rows=8, columns=8, rank=8, sums=8),
        ColumnSums(rows=512, columns=8, sums=8),
        forward(block_size=48),
        forward(columns=96),
        forward(x_dtype=F32),
        forward(y_dtype=F16),
        forward(splits=0),
        forward(x=8),
    ],
)
def test_bad_sizes_are_refused(args):
    op = next(op for op, struct in OPS.items() if isinstance(args, struct))
    recorder = Recorder()
    with recorder.active():
        assert getattr(cudart.host_library(), f"ptxsim_{op}")(ctypes.byref(args)) == 1  # cudaErrorInvalidValue
    assert not recorder.launched


@pytest.mark.parametrize("each", SCHEDULED, ids=str)
def test_a_failing_launch_is_reported(each):
    """The launcher returns the error of any of its kernels, and leaves none behind."""
    launches = Recorder()
    assert each.run_on_recorder(launches) == 0
    for i in range(len(launches.launched)):
        assert each.run_on_recorder(Recorder(fails=i)) == cudart.LAUNCH_FAILURE


FAULTS = {
    "no_blocks": (9, "invalid configuration"),
    "too_many_threads": (9, "invalid configuration"),
    "grid_y_too_large": (9, "invalid configuration"),
    "shared_memory_without_attribute": (1, "invalid value"),
    "shared_memory_with_attribute": (0, ""),
    "attribute_too_large": (1, "invalid value"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_runtime_refuses(fault):
    recorder = Recorder()
    with recorder.active():
        assert getattr(faulty_launchers(), fault)() == FAULTS[fault][0]
    assert len(recorder.launched) == (FAULTS[fault][0] == 0)


@pytest.mark.parametrize(
    ("arch", "blocks", "x", "y", "error"),
    [
        ("sm_90", 6, 3, 1, 0),
        ("sm_90", 8, 8, 1, 0),
        ("sm_80", 6, 3, 1, 912),
        ("sm_80", 6, 1, 1, 912),
        ("sm_90", 7, 3, 1, 912),
        ("sm_90", 16, 16, 1, 912),
        ("sm_90", 6, 0, 1, 912),
        ("sm_90", 6, 3, 2, 912),
    ],
)
def test_clusters_the_runtime_refuses(arch, blocks, x, y, error):
    """cudaErrorInvalidClusterSize"""
    recorder = Recorder(arch=arch)
    with recorder.active():
        assert faulty_launchers().cluster_launch(blocks, x, y, None) == error
    assert len(recorder.launched) == (error == 0)


def test_a_launcher_of_clusters():
    class Meeting(Device):
        def kernel(self, name):
            return compiled("cluster.cu", "sm_90").kernel("meet")

    device = Meeting("sm_90")
    with device.active():
        assert faulty_launchers().cluster_launch(6, 3, 1, ctypes.c_void_p(STREAM)) == 0
    assert device.clusters == [3] and device.results[0].stats["cluster_wait"] == 6


def test_an_error_nobody_asked_for_shows_up():
    with pytest.raises(AssertionError, match="left CUDA error 9 behind"), Recorder().active():
        assert faulty_launchers().forgotten_error() == 0


# ---- through torch ---------------------------------------------------------------------------------------------------


def backward(call):
    y = call.run()
    gradient = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    y.backward(gradient)
    return y, gradient


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_adapted_linear_on_simulated_kernels(sample):
    """csrc/cuda/adapted_linear.cpp and nf4.cpp over the simulated launchers: reference values, and those of the CPU."""
    call = sample.make()
    weight = call.weight
    parts = [weight] if isinstance(weight, torch.Tensor) else [weight.packed, weight.absmax]
    device = Device("sm_80", host_memory=True)
    with package_on(device, [call.x, call.seed, *parts, *call.trainable.values()]):
        y, gradient = backward(call)
    assert device.launched or not y.numel() or (sample.r is None and isinstance(weight, torch.Tensor))
    fused = isinstance(weight, peftkern.NF4Weight) and sample.x != torch.float32 and sample.fan_in % 64 == 0
    assert any("nf4_forward_kernel" in name for name, *_ in device.launched) == bool(fused and y.numel())
    fused &= sample.fan_out % 8 == 0
    assert any("nf4_gradient_kernel" in name for name, *_ in device.launched) == bool(fused and y.numel())
    on_cpu = sample.make()
    expected_y, leaves = sample.make().reference()
    cpu_y, _ = backward(on_cpu)
    expected_y.backward(gradient.double())
    assert_close(y, expected_y, y.dtype, "y")
    assert_close(y, cpu_y, y.dtype, "y, against the CPU kernels")
    for name, tensor in call.inputs().items():
        dtype = y.dtype if tensor.dtype == torch.float32 else tensor.dtype  # du = q B has q in the dtype of y
        worst = max(dtype, y.dtype, key=lambda d: torch.finfo(d).eps)
        assert_close(tensor.grad, leaves[name].grad, worst, f"d{name}")
        assert_close(tensor.grad, on_cpu.inputs()[name].grad, worst, f"d{name}, against the CPU kernels")


def test_autotune_times_on_the_stream_but_not_in_a_graph():
    """The ways run several times between events when a product is new, and once while a graph is captured."""
    x = torch.randn(5, 64).bfloat16()
    q = peftkern.quantize_nf4(torch.randn(48, 64))
    launches = {}
    for when in ("captured", "timed", "remembered"):
        device = Device("sm_80", host_memory=True)
        with autotune_on(), package_on(device, [x, q.packed, q.absmax]):
            if when == "captured":
                with capture(device) as graph:
                    y = peftkern.nf4_linear(x, q)
                assert not device.launched
                graph.replay()
            else:
                y = peftkern.nf4_linear(x, q)
        launches[when] = len(device.launched)
        assert_close(y, x.double() @ peftkern.dequantize_nf4(q, torch.bfloat16).double().T, torch.bfloat16, when)
    assert launches["captured"] == launches["remembered"] == 1 and launches["timed"] >= 9


@pytest.mark.parametrize(("arch", "most"), [("sm_80", 1536), ("sm_90", 1024), ("sm_100", 256)])
def test_explain_says_what_is_launched(arch, most):
    """The fused kernels up to so many rows, the library beyond; not of fp32, nor where a row is no whole chunks."""
    layer = peftkern.QLoRALinear(64, 48, r=4, bias=False, dtype=torch.bfloat16)
    odd, full = peftkern.NF4Linear(64, 42, dtype=torch.bfloat16), peftkern.NF4Linear(64, 48, dtype=torch.float32)
    device = Recorder(arch=arch)
    device.host_memory = HostMemory()
    with package_on(device, list(layer.parameters())):
        fused = f"bfloat16 activations: forward and gradient nf4_fused up to {most} rows, then library_accumulate;"
        assert fused in peftkern.explain(layer)
        forward = f"bfloat16 activations: forward nf4_fused up to {most} rows, then library, gradient library"
        assert forward in peftkern.explain(odd)
        assert "float32 activations: forward and gradient library" in peftkern.explain(full)
        assert not device.launched, "nothing runs to explain a layer"
        for rows in (1, most, most + 1):
            device.launched.clear()
            layer(torch.zeros(rows, 64).bfloat16().requires_grad_()).sum().backward()
            for kernel in ("nf4_forward_kernel", "nf4_gradient_kernel"):
                assert any(kernel in name for name, *_ in device.launched) == (rows <= most), (kernel, rows)


@pytest.mark.parametrize("sample", MULTI_SAMPLES, ids=str)
def test_multi_lora_linear_on_simulated_kernels(sample):
    """csrc/cuda/multi_lora.cpp over the simulated launchers: reference values."""
    call = sample.make()
    device = Device("sm_80", host_memory=True)
    with package_on(device, call.tensors()):
        y, gradient = backward(call)
    assert any("multi_lora_plan" in name for name, *_ in device.launched)
    expected, leaves = call.reference()
    expected.backward(gradient.double())
    assert_close(y, expected, y.dtype, "y")
    for name, tensor in call.inputs().items():
        dtype = y.dtype if tensor.dtype == torch.float32 else tensor.dtype
        worst = max(dtype, y.dtype, key=lambda d: torch.finfo(d).eps)
        assert_close(tensor.grad, leaves[name].grad, worst, f"d{name}")


def test_a_plan_is_the_same_on_both_devices():
    index = torch.randint(-1, 7, (300,))
    x = torch.empty(300, 4)
    expected = multi_lora.make_plan(index, x, 7)
    with package_on(Device("sm_80", host_memory=True), [index]):
        got = multi_lora.make_plan(index, x, 7)
    assert torch.equal(got, expected)


def test_bad_indices_and_ranks_do_no_harm():
    """What the CPU refuses counts as no adapter, or as the nearest rank: a check would have to wait for the device."""
    call = MULTI_SAMPLES[8].make()
    plain = call.copy()
    call.index, call.ranks = call.index.clone(), torch.full_like(call.ranks, 1000)
    call.index[:2] = torch.tensor([call.ranks.numel(), -9])
    plain.index, plain.ranks = call.index.clone(), torch.full_like(call.ranks, call.trainable["A"].shape[1])
    plain.index[:2] = -1
    with package_on(Device("sm_80", host_memory=True), call.tensors()):
        y = call.run()
    assert_close(y, plain.run(), torch.float32)


@pytest.mark.parametrize("sample", NF4_SAMPLES, ids=str)
def test_nf4_on_simulated_kernels(sample):
    """Bit for bit the CPU's: codes, absmax, double quantization, and the weights that come back."""
    w = sample.make()
    expected = peftkern.quantize_nf4(w, sample.block_size, sample.double_quant)
    with package_on(Device("sm_80", host_memory=True), [w]):
        got = peftkern.quantize_nf4(w, sample.block_size, sample.double_quant)
        values = peftkern.dequantize_nf4(got)
    for part in ("packed", "absmax", "nested_absmax", "offset"):
        a, b = getattr(got, part), getattr(expected, part)
        assert (a is None and b is None) or (a.equal(b) and a.shape == b.shape), part
    assert values.equal(peftkern.dequantize_nf4(expected))


@pytest.mark.parametrize("double_quant", [None, False, True])
@pytest.mark.parametrize(
    ("dtype", "A_dtype", "columns"),
    [
        (torch.bfloat16, torch.float32, 96),
        (torch.float32, torch.bfloat16, 128),
        (torch.bfloat16, torch.float32, 128),
        (torch.bfloat16, torch.bfloat16, 128),
        (torch.float16, torch.float32, 128),
    ],
    ids=str,
)
def test_dora_norm_on_simulated_kernels(dtype, A_dtype, columns, double_quant):
    """Dense and NF4: the norms of the whole matrix. Over NF4 of a 16-bit layer A Wᵀ is of the two rounded to its dtype,
    from the codes, and all else is exact."""
    W, A, B = torch.randn(40, columns).to(dtype), torch.randn(5, columns).to(A_dtype), torch.randn(40, 5).to(dtype)
    weight = W if double_quant is None else peftkern.quantize_nf4(W, 64, double_quant)
    device = Device("sm_80", host_memory=True)
    stored = [W] if double_quant is None else [weight.packed, weight.absmax, weight.nested_absmax, weight.offset]
    with package_on(device, [A, B, *(t for t in stored if t is not None)]):
        norm = dora_norm(weight, A, B, 0.7)
    fused = double_quant is not None and dtype != torch.float32 and columns % 64 == 0

    def launched(kernel: str) -> bool:
        return any(kernel in name for name, *_ in device.launched)

    assert launched("dora_norm_kernel") and launched("nf4_forward_kernel") == fused
    assert launched("dequantize_nf4_kernel") == (double_quant is not None and not fused)
    dense = W if double_quant is None else peftkern.dequantize_nf4(weight, torch.float32)
    a, b, w = A.double(), 0.7 * B.double(), dense.double()
    P = (dense.to(dtype).double() @ A.to(dtype).double().T) if fused else w @ a.T
    expected = (w.square().sum(1) + 2 * (b * P).sum(1) + (b @ a).square().sum(1)).sqrt()
    torch.testing.assert_close(norm.double(), expected, rtol=2e-6, atol=0)
    exact, size = (w + b @ a).norm(dim=1), w.norm(dim=1) + (b.abs() @ a.abs()).norm(dim=1)
    eps = torch.finfo(dtype).eps / 2 if fused else columns * 2**-25
    assert ((norm.double().square() - exact.square()).abs() <= eps * size.square()).all()


@pytest.mark.parametrize("n", [1, 7, 24])
def test_jacobi_svd_on_simulated_kernels(n):
    """The singular values of the CPU, each relatively accurate, though the columns are graded down to 1e-12."""
    matrices = torch.randn(2, n, n, dtype=torch.float64) * torch.logspace(0, -12, n, dtype=torch.float64)
    U, S = jacobi_svd(matrices)
    with package_on(Device("sm_80", host_memory=True), [matrices]):
        got_U, got_S = jacobi_svd(matrices)
    assert ((got_S - S).abs() / S).max() < 1e-13
    signs = (got_U * U).sum(-2, keepdim=True).sign()
    assert (got_U * signs - U).abs().max() < 1e-10


@pytest.mark.parametrize("tabled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rank_allocation_on_simulated_kernels(dtype, tabled):
    """Two updates and a mask: averages and masks of the CPU bit for bit, scores within their sums' rounding."""
    layers, results, scale = as_parameters(make_layers(dtype)), [], torch.tensor([64.0])
    table = TripletTable(*layers) if tabled else None
    for simulated in (False, True):
        device = Device("sm_80", host_memory=True)
        _, sensitivity, uncertainty = new_state(layers)
        E = [nn.Parameter(e.detach().clone()) for e in layers[1]]
        for e in E:
            e.grad = torch.zeros_like(e)
        for step in range(2):
            replace_gradients(layers, step)
            if not tabled:
                layers[0][3].grad = layers[1][1].grad = layers[2][0].grad = None
            grads = [t.grad for group in layers for t in group if t.grad is not None]
            tensors = [t for group in layers for t in group] + [*grads, sensitivity, uncertainty, scale]
            with package_on(device, tensors) if simulated else nullcontext():
                scores = update_importance(*layers, sensitivity, uncertainty, 0.85, 0.7, scale, table and table())
        same_scores = results[0][2] if simulated else scores
        with package_on(device, [same_scores]) if simulated else nullcontext():
            masks = [rank_mask(same_scores, 70, exact) for exact in (False, True)]
        with package_on(device, [*E, masks[0]]) if simulated else nullcontext(), torch.no_grad():
            mask_ranks(E, masks[0], TripletTable(layers[0], E, layers[2])() if tabled else None)
        results.append((sensitivity, uncertainty, scores, *masks, *E))
        assert bool(device.launched) == simulated
    (*expected_state, expected_scores), (*state, scores) = (r[:3] for r in results)
    assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))
    assert_close(scores, expected_scores, torch.float32, "scores")
    assert all(torch.equal(a, b) for a, b in zip(results[1][3:], results[0][3:], strict=True))
    assert int(results[1][3].sum()) == 70


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_orthogonality_on_simulated_kernels(dtype, squared):
    results = []
    for simulated in (False, True):
        A, _, B = make_layers(dtype, grads=False)
        device = Device("sm_80", host_memory=True)
        with package_on(device, [*A, *B]) if simulated else nullcontext():
            value = orthogonality_penalty(A, B, squared)
            (value * 0.1).backward()
        results.append((value.detach().reshape(1), *(t.grad for t in (*A, *B))))
        assert bool(device.launched) == simulated
    assert_close(results[1][0], results[0][0], torch.float32, "value")
    for i, (got, expected) in enumerate(zip(results[1][1:], results[0][1:], strict=True)):
        assert_close(got, expected, dtype, f"gradient of factor {i}")


@pytest.mark.parametrize("layer_class", [peftkern.LoRALinear, peftkern.QLoRALinear])
def test_a_layer_trains_on_simulated_kernels(layer_class):
    """Two steps of SGD: the layer on the simulated GPU and its copy on the CPU stay together, dropout included."""
    layers = []
    for simulated in (False, True):
        torch.manual_seed(3)
        layer = layer_class(96, 72, r=8, lora_dropout=0.1, init_lora_weights="gaussian")
        x, target = torch.randn(20, 96), torch.randn(20, 72)
        device = Device("sm_80", host_memory=True)
        for _ in range(2):
            tensors = [x, target, *layer.parameters(), *layer.buffers()]
            if simulated:
                with package_on(device, tensors):
                    step(layer, x, target)
            else:
                step(layer, x, target)
        layers.append(dict(layer.named_parameters()))
        assert bool(device.launched) == simulated
    for name, parameter in layers[0].items():
        assert_close(layers[1][name], parameter, torch.float32, name, slack=2.0)


def step(layer, x, target):
    layer.zero_grad()
    (layer(x) - target).square().mean().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def test_real_memory_that_is_too_small_is_noticed():
    g, sums = torch.randn(6, 40), torch.empty(40)
    device = Device("sm_80", host_memory=True)
    device.host_memory.tensors = [g, sums]
    args = dict(g=g.data_ptr(), dtype=F32, rows=6, columns=40, sums=sums.data_ptr())
    device.run("column_sums", ColumnSums(**args))
    assert_close(sums, g.double().sum(0), torch.float32)
    with pytest.raises(AssertionError, match=r"ColumnSums.g: 1120 bytes in memory that holds 960"):
        device.run("column_sums", ColumnSums(**args | {"rows": 7}))
    device.host_memory.tensors = []  # the heap block of sums has 160 bytes, rounded up
    with pytest.raises(AssertionError, match=r"ColumnSums.sums: 320 bytes in memory that holds \d\d\d$"):
        device.run("column_sums", ColumnSums(**args | {"rows": 3, "columns": 80}))


def test_a_launch_error_becomes_an_exception():
    """As on a GPU: CudaBackend::check of csrc/cuda/backend.h names the op."""
    recorder = Recorder(fails=0)
    recorder.host_memory = cudart.HostMemory()
    w = torch.randn(64)
    with package_on(recorder, [w]), pytest.raises(RuntimeError, match="quantize_nf4: CUDA error: unspecified launch"):
        peftkern.quantize_nf4(w)
