# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: what the package launches while a stream is captured runs in the replays alone, on what the tensors hold
then, with the bits of an eager call. The runtime of the tests models the capture (tests/ptxsim/cudart.cpp)."""

from __future__ import annotations

import ctypes

import pytest
import torch
from ptxsim import cudart
from ptxsim.cudart import CudaError, Device, capture, faulty_launchers, host_library, package_on
from ptxsim.ops import OPS, STREAM
from ptxsim.ops_cases import CASES
from ptxsim.report import KernelFault
from test_cuda_overlap import WithoutWait

import peftkern

pytestmark = pytest.mark.slow

UNSUPPORTED, INVALIDATED, IMPLICIT, ILLEGAL_STATE = 900, 901, 906, 401  # of cudaError_t


@pytest.fixture(autouse=True, scope="module")
def simulator():
    cudart.require()


# ---- the launchers, from raw pointers --------------------------------------------------------------------------------


class Captured(Device):
    """Every launch is captured first; its arguments are overwritten before the replay."""

    def run(self, op: str, args: ctypes.Structure) -> list:
        self.results, own = [], type(args).from_buffer_copy(args)
        with self.active():
            with capture(self) as graph:
                assert getattr(host_library(), f"ptxsim_{op}")(ctypes.byref(own)) == 0
            assert not self.launched
            ctypes.memset(ctypes.byref(own), 0xFF, ctypes.sizeof(own))
            graph.replay()
        return self.results


@pytest.mark.parametrize("op", OPS)
def test_every_launcher_can_be_captured(op):
    for case in [case for case in CASES if case.op == op][::7]:
        assert case.run(Captured("sm_90")) == case.run(Device("sm_90"), check=False), case


# ---- through torch ---------------------------------------------------------------------------------------------------


def assert_replays(call, inputs: list[torch.Tensor], constants: list[torch.Tensor], kind=Device) -> Device:
    """call(), captured and replayed twice, each time on new values in `inputs`, against eager calls on them."""
    device, tensors = kind("sm_90", host_memory=True), inputs + constants
    with package_on(device, tensors):
        with capture(device) as graph:
            outputs = call()
        assert not device.launched, "nothing runs while a graph is captured"
        for seed in (1, 2):
            fill(inputs, seed)
            graph.replay()
            got = [output.clone() for output in outputs]
            eager = Device("sm_90", host_memory=True)
            eager.host_memory.tensors = tensors
            with eager.active():
                expected = call()
            for number, (a, b) in enumerate(zip(got, expected, strict=True)):
                assert torch.equal(a, b), f"output {number} of replay {seed}"
            assert all(output.isfinite().all() and output.count_nonzero() for output in got)
    return device


def fill(inputs: list[torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in inputs:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
            else:
                value.copy_(torch.randint(3, value.shape, generator=generator))


def layer(rows: int, fan_in: int = 320, fan_out: int = 136, r: int = 8):
    """x, A, B and g of a LoRA layer, all to change, and its weight."""
    x, g = torch.randn(rows, fan_in).bfloat16(), torch.randn(rows, fan_out).bfloat16()
    A, B = torch.randn(r, fan_in), torch.randn(fan_out, r)
    return x, A, B, g, peftkern.quantize_nf4(torch.randn(fan_out, fan_in))


@pytest.mark.parametrize("rows", [1, 40])
def test_forward(rows):
    """In a replay, too, nf4_forward may run beside low_rank_down; the first node of a graph overlaps with nothing."""
    x, A, B, _, q = layer(rows)
    device = assert_replays(lambda: [peftkern.lora_linear(x, q, A, B, scaling=0.5)], [x, A, B], [q.packed, q.absmax])
    overlap = [name in device.overlapping for name, *_ in device.launched]
    per_replay = len(overlap) // 2
    assert overlap == overlap[:per_replay] * 2 and not overlap[0] and sum(overlap[:per_replay]) == 1


def test_forward_and_backward():
    x, A, B, g, q = layer(40)
    seed = torch.tensor(7)
    for leaf in (x, A, B):
        leaf.requires_grad_()

    def step():
        y = peftkern.adapted_linear(x, q, A, B, scaling=0.5, dropout_p=0.2, seed=seed)
        return [y.detach(), *torch.autograd.grad(y, [x, A, B], g)]

    assert_replays(step, [x, A, B, g, seed], [q.packed, q.absmax])


@pytest.mark.parametrize("rows", [1, 40])
def test_many_adapters(rows):
    x, _, _, _, q = layer(rows)
    A, B, index = torch.randn(3, 8, 320), torch.randn(3, 136, 8), torch.zeros(rows, dtype=torch.int64)
    assert_replays(
        lambda: [peftkern.multi_lora_linear(x, q, A, B, index, scaling=0.5)], [x, A, B, index], [q.packed, q.absmax]
    )


@pytest.mark.parametrize("rows", [1, 40])
def test_many_adapters_forward_and_backward(rows):
    """The plan is made inside of the graph, too: which rows a gradient sums changes with the index."""
    x, _, _, g, q = layer(rows)
    A, B, index, seed = torch.randn(3, 8, 320), torch.randn(3, 136, 8), torch.zeros(rows).long(), torch.tensor(7)
    leaves = [x, A, B]
    for leaf in leaves:
        leaf.requires_grad_()

    def step():
        y = peftkern.multi_lora_linear(x, q, A, B, index, scaling=0.5, dropout_p=0.2, seed=seed)
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    assert_replays(step, [*leaves, g, index, seed], [q.packed, q.absmax])


@pytest.mark.parametrize("rows", [1, 40])
def test_a_wait_that_is_missing_is_noticed_in_a_replay(rows):
    x, A, B, _, q = layer(rows)
    with pytest.raises(KernelFault, match=r"nf4_forward_kernel[\s\S]*(before|no)_grid_wait"):
        assert_replays(
            lambda: [peftkern.lora_linear(x, q, A, B, scaling=0.5)], [x, A, B], [q.packed, q.absmax], WithoutWait
        )


# ---- the model of the capture itself ---------------------------------------------------------------------------------


class Counting(Device):
    """Counts launches of any kernel, without parameters."""

    def kernel(self, name: str):
        return cudart.Module.from_ptx(".version 8.0\n.target sm_80\n.address_size 64\n.entry k() { ret; }").kernel("k")


def test_a_call_that_waits_ends_the_capture():
    device, stream = Counting("sm_80"), ctypes.c_void_p(STREAM)
    with device.active():
        assert faulty_launchers().wait_for_itself(stream) == 0
        with pytest.raises(CudaError, match=str(INVALIDATED)), capture(device):
            assert faulty_launchers().launch_nothing(stream) == 0
            assert faulty_launchers().wait_for_itself(stream) == UNSUPPORTED
            host_library().cudart_clear_error()
            assert faulty_launchers().launch_nothing(stream) == INVALIDATED
        host_library().cudart_clear_error()
        assert faulty_launchers().launch_nothing(stream) == 0
    assert len(device.launched) == 2


def test_the_default_stream_ends_the_capture():
    device = Counting("sm_80")
    with device.active():
        with pytest.raises(CudaError, match=str(INVALIDATED)), capture(device):
            assert faulty_launchers().launch_nothing(None) == IMPLICIT
        host_library().cudart_clear_error()
    assert not device.launched


def test_a_graph_keeps_the_order_of_its_stream():
    memory, stream = ctypes.create_string_buffer(4), ctypes.c_void_p(STREAM)
    device, library = Counting("sm_80"), host_library()
    with device.active():
        with capture(device) as graph:
            for value in (1, 2):
                assert library.cudaMemsetAsync(memory, value, ctypes.c_size_t(4), stream) == 0
        assert memory.raw == bytes(4)
        graph.replay()
    assert memory.raw == bytes([2] * 4)


def test_one_capture_at_a_time():
    device, stream = Counting("sm_80"), ctypes.c_void_p(STREAM)
    with device.active():
        with capture(device) as graph:
            with pytest.raises(CudaError, match=str(ILLEGAL_STATE)), capture(device):
                pass
            host_library().cudart_clear_error()
            assert faulty_launchers().launch_nothing(stream) == 0
        graph.replay()
        graph.replay()
    assert len(device.launched) == 2
