# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch: in a decode step nf4_forward may run beside low_rank_down, whose u it needs last. The
simulator checks what it touches before it waits (tests/ptxsim/README.md)."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from ptxsim import cudart
from ptxsim.cudart import Device, package_on
from ptxsim.report import KernelFault

import peftkern

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def simulator():
    cudart.require()


class WithoutWait(Device):
    """nf4_forward without its griddepcontrol.wait."""

    def options(self, name: str) -> dict:
        opcodes = list(self.kernel(name).program.opcodes)
        return {"drop": opcodes.index("grid_wait")} if "grid_wait" in opcodes else {}


def lora(device: Device, rows: int, fan_in: int = 320, r: int = 8, **options):
    """y of a LoRA layer on NF4, and the reference's."""
    torch.manual_seed(0)
    x, q = torch.randn(rows, fan_in).bfloat16(), peftkern.quantize_nf4(torch.randn(140, fan_in))
    A, B = torch.randn(r, fan_in), torch.randn(140, r)
    tensors = [x, q.packed, q.absmax, A, B, *(v for v in options.values() if isinstance(v, torch.Tensor))]
    with package_on(device, tensors):
        y = peftkern.lora_linear(x, q, A, B, scaling=0.5, **options)
    weight = peftkern.dequantize_nf4(q, torch.bfloat16).double()
    expected = x.double() @ weight.T + 0.5 * (x.double() @ A.double().T) @ B.double().T
    return y, expected + options.get("bias", 0.0)


@pytest.mark.parametrize(("rows", "fan_in"), [(1, 320), (12, 320), (40, 320), (1, 1024), (12, 1024)])
def test_forward_overlaps_with_down(rows, fan_in):
    """On sm_90, with the bits of one launch after the other on sm_80; where blocks share sums, in clusters."""
    device, bias = Device("sm_90", host_memory=True), torch.randn(140)
    y, expected = lora(device, rows, fan_in, bias=bias)
    assert (max(device.clusters) > 1) == (fan_in == 1024)
    assert_close(y, expected, torch.bfloat16, "y")
    assert ["nf4_forward_kernel" in name for name in device.overlapping] == [True]
    plain = Device("sm_80", host_memory=True)
    assert lora(plain, rows, fan_in, bias=bias)[0].equal(y) and not plain.overlapping


@pytest.mark.parametrize("rows", [1, 40])
def test_a_wait_that_is_missing_is_noticed(rows):
    with pytest.raises(KernelFault, match=r"nf4_forward_kernel[\s\S]*(before|no)_grid_wait"):
        lora(WithoutWait("sm_90", host_memory=True), rows)


def test_what_was_written_just_before_is_waited_for():
    """Without a low-rank part the launch before may be the one that made x."""
    x, q = torch.randn(3, 64).bfloat16(), peftkern.quantize_nf4(torch.randn(48, 64))
    device = Device("sm_90", host_memory=True)
    with package_on(device, [x, q.packed, q.absmax]):
        y = peftkern.nf4_linear(x, q)
    expected = x.double() @ peftkern.dequantize_nf4(q, torch.bfloat16).double().T
    assert_close(y, expected, torch.bfloat16, "y")
    assert device.launched and not device.overlapping
