# SPDX-License-Identifier: Apache-2.0
"""Devices, instruction sets, and the one tolerance table."""

import pytest
import torch

import peftkern
from peftkern.ops.library import ops

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and ops.cuda_archs() else [])
ISAS = ops.cpu_isas()

# Largest error relative to the largest magnitude of the reference: a few roundings of the output dtype, over sums whose
# length these tests keep below about 1000. fp32 sums in fp32; 16-bit results are rounded at most three times.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@pytest.fixture(autouse=True)
def same_start():
    """A fixed seed, and afterwards no choice that a test has forced."""
    torch.manual_seed(0)
    yield
    peftkern.set_cpu_isa("")
    peftkern.autotune(False)
    ops.forget_timed_products()
    ops.set_product("forward", "")
    ops.set_product("gradient", "")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once for each instruction set of this machine."""
    peftkern.set_cpu_isa(request.param)
    return request.param


@pytest.fixture
def threads():
    """A function that sets the number of threads; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str = "", slack: float = 1.0):
    """got against an fp64 reference, by the table above; says where the largest error is."""
    assert tuple(got.shape) == tuple(expected.shape), f"{what}: shape {tuple(got.shape)} != {tuple(expected.shape)}"
    if not got.numel():
        return
    error = (got.detach().double().cpu() - expected.detach().double().cpu()).abs()
    scale = expected.detach().double().abs().max().item() or 1.0
    worst = error.max().item() / scale
    limit = TOLERANCE[dtype] * slack
    where = torch.unravel_index(error.argmax(), error.shape)
    assert worst <= limit, (
        f"{what}: error {worst:.2e} > {limit:.1e} of the largest value, at {tuple(int(i) for i in where)}: "
        f"got {got[where].item():.6g}, expected {expected[where].item():.6g}"
    )
