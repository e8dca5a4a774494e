# SPDX-License-Identifier: Apache-2.0
"""Every op under torch.library.opcheck, every function under torch.compile(fullgraph=True), forward and backward."""

import pytest
import torch
from samples import NF4_SAMPLES, SAMPLES, Sample
from torch.library import opcheck

import peftkern
from peftkern import NF4Config, NF4Weight
from peftkern.ops.library import ops

OPCHECK = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


def raw_arguments(call) -> tuple:
    """The arguments of torch.ops.peftkern.adapted_linear; inputs detached, as gradients are the Function's affair."""
    q = call.weight if isinstance(call.weight, NF4Weight) else None
    base = (q.packed, q.absmax, q.nested_absmax, q.offset, q.block_size) if q else (call.weight, None, None, None, 64)
    terms = {k: t.detach() for k, t in call.trainable.items()}
    named = [terms.get(k) for k in ("A", "B", "lam", "out_scale", "bias")]
    out_features = (q or call.weight).shape[0]
    return (
        call.x.detach(), *base, out_features, *named, call.scaling, call.dropout_p,
        call.seed, True, True,
    )  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck_adapted_linear(sample):
    call = sample.make()
    arguments = raw_arguments(call)
    opcheck(ops.adapted_linear.default, arguments, test_utils=OPCHECK)
    x, *base, _, A, B, lam, out_scale, bias, scaling, p, seed, _, _ = arguments
    y, h, z = ops.adapted_linear(*arguments)
    needs = 1 | (2 | 4 if A is not None else 0) | (8 if lam is not None else 0)
    needs |= (16 if out_scale is not None else 0) | (32 if bias is not None else 0)
    backward = (
        torch.randn_like(y), x, *base, x.shape[-1], h, z, A, B, lam, out_scale, scaling, p, seed,
    )  # fmt: skip
    for bits in (needs, 1, 0):
        opcheck(ops.adapted_linear_backward.default, (*backward, bits), test_utils=OPCHECK)


@pytest.mark.parametrize("sample", NF4_SAMPLES[::3], ids=str)
def test_opcheck_nf4(sample):
    w = sample.make()
    opcheck(ops.quantize_nf4.default, (w, sample.block_size), test_utils=OPCHECK)
    packed, absmax = ops.quantize_nf4(w, sample.block_size)
    rest = (sample.block_size, list(w.shape), torch.bfloat16)
    opcheck(ops.dequantize_nf4.default, (packed, absmax, None, None, *rest), test_utils=OPCHECK)
    opcheck(ops.dequantize_nf4.default, (packed, *ops.quantize_absmax(absmax), *rest), test_utils=OPCHECK)
    opcheck(ops.quantize_absmax.default, (absmax,), test_utils=OPCHECK)
    opcheck(ops.dequantize_absmax.default, ops.quantize_absmax(absmax), test_utils=OPCHECK)


COMPILED = [
    Sample((4, 6), 32, 24, 4, dropout=0.2, lam=True, out_scale=True, bias=True),
    Sample((4, 6), 32, 24, 4, torch.bfloat16, NF4Config(32, True), dropout=0.2, bias=True),
    Sample((5,), 33, 24, None, bias=True),
]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sample", COMPILED, ids=str)
def test_compiled_equals_eager(sample, backend):
    torch._dynamo.reset()
    call = sample.make()

    def f(x, weight, seed, **terms):
        return peftkern.adapted_linear(x, weight, scaling=0.7, dropout_p=sample.dropout, seed=seed, **terms) * 2

    def run(function):
        fresh = call.copy()
        y = function(fresh.x, fresh.weight, fresh.seed, **fresh.trainable)
        y.sum().backward()
        grads = [t.grad for t in fresh.inputs().values()]
        assert all(g is not None for g in grads)
        return [y.detach(), *grads]

    for eager, compiled in zip(run(f), run(torch.compile(f, fullgraph=True, backend=backend)), strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compiled_draws_a_new_mask_each_call():
    torch._dynamo.reset()
    x, w = torch.randn(16, 32), torch.zeros(8, 32)
    A, B = torch.randn(4, 32), torch.randn(8, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        return peftkern.lora_linear(x, w, A, B, dropout_p=0.5)

    assert not torch.equal(f(x), f(x))


def test_compiled_with_dynamic_rows():
    torch._dynamo.reset()
    call = COMPILED[0].make()
    f = torch.compile(
        lambda x: peftkern.adapted_linear(x, call.weight, call.trainable["A"], call.trainable["B"]),
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for rows in (3, 4, 9):
        x = torch.randn(rows, 32)
        expected = peftkern.adapted_linear(x, call.weight, call.trainable["A"], call.trainable["B"])
        torch.testing.assert_close(f(x), expected)


def test_compiled_quantize_and_dequantize():
    torch._dynamo.reset()
    w = torch.randn(8, 64)
    q = peftkern.quantize_nf4(w, 64, double_quant=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(w):
        return peftkern.dequantize_nf4(peftkern.quantize_nf4(w, 64, double_quant=True))

    assert torch.equal(f(w), peftkern.dequantize_nf4(q))
