# SPDX-License-Identifier: Apache-2.0
"""Property-based tests: hypothesis chooses the shapes, dtypes, block sizes and options, and shrinks what fails."""

import torch
from conftest import assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import Sample

import peftkern
from peftkern import NF4Config, reference
from peftkern.ops.library import ops
from peftkern.ops.nf4 import BLOCK_SIZES

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ISAS = st.sampled_from(ops.cpu_isas())
ordinary = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@ordinary
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    dtype=DTYPES,
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
    exponent=st.integers(-30, 30),
    isa=ISAS,
)
def test_nf4_is_its_definition(shape, dtype, block_size, double_quant, exponent, isa):
    peftkern.set_cpu_isa(isa)
    w = (torch.randn(shape) * 2.0**exponent).clamp(-6e4, 6e4).to(dtype)
    q = peftkern.quantize_nf4(w, block_size, double_quant)
    packed, absmax = reference.quantize_nf4(w, block_size)
    assert torch.equal(q.packed.reshape(-1), packed)
    if double_quant:
        absmax = reference.dequantize_absmax(*reference.quantize_absmax(absmax))
    assert torch.equal(q.float_absmax(), absmax)
    expected = reference.dequantize_nf4(packed, absmax, block_size, tuple(shape), dtype)
    assert torch.equal(peftkern.dequantize_nf4(q), expected)


@st.composite
def layer_samples(draw):
    r = draw(st.one_of(st.none(), st.integers(0, 40)))
    weight = draw(st.one_of(DTYPES, st.builds(NF4Config, st.sampled_from(BLOCK_SIZES[:3]), st.booleans())))
    return Sample(
        rows=tuple(draw(st.lists(st.integers(0, 12), min_size=0, max_size=2))),
        fan_in=draw(st.one_of(st.integers(1, 300), st.sampled_from([32, 64, 128, 256]))),
        fan_out=draw(st.integers(1, 300)),
        r=r,
        x=draw(DTYPES),
        weight=weight,
        adapter=draw(DTYPES),
        dropout=draw(st.sampled_from([0.0, 0.05, 0.5, 0.9])),
        lam=r is not None and draw(st.booleans()),
        out_scale=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@ordinary
@given(sample=layer_samples(), isa=ISAS)
def test_adapted_linear_is_the_formula(sample, isa):
    peftkern.set_cpu_isa(isa)
    call = sample.make()
    y = call.run()
    grad = torch.randn(y.shape).to(y.dtype)
    y.backward(grad)
    expected, leaves = call.reference()
    expected.backward(grad.double())
    # dropout at 0.9 multiplies the kept terms by 10, and with them what rounding the small ones costs
    slack = 2.0 / (1.0 - sample.dropout)
    assert_close(y, expected, sample.x, "y", slack)
    for name, t in call.inputs().items():
        coarser = max(sample.x, t.dtype, key=lambda d: torch.finfo(d).eps)
        assert_close(t.grad, leaves[name].grad, coarser, f"d{name}", 2 * slack)
