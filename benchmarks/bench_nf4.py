# SPDX-License-Identifier: Apache-2.0
"""NF4 quantize, dequantize and linear against bitsandbytes and against memory bandwidth."""

import pytest
import torch

import peftkern
from peftkern import reference

N = 4096


@pytest.fixture(scope="module")
def weight():
    return torch.randn(N, N, generator=torch.Generator().manual_seed(0))


def test_dequantize(compare, weight):
    """Cold: the call rotates over enough copies that neither the codes nor the output are in cache."""
    copies = 16
    q = [peftkern.quantize_nf4(weight, 64) for _ in range(copies)]
    expected = reference.dequantize_nf4(q[0].packed, q[0].absmax, 64, (N, N), torch.bfloat16)
    assert torch.equal(peftkern.dequantize_nf4(q[0], torch.bfloat16), expected)
    source = torch.empty(copies, N * N, dtype=torch.uint8)
    turn = iter(range(10**9))

    def ours():
        return peftkern.dequantize_nf4(q[next(turn) % copies], torch.bfloat16)

    def copy_of_the_same_bytes():  # read + write as many bytes as dequantize does
        half = (N * N // 2 + N * N * 2) // 2
        torch.empty(half, dtype=torch.uint8).copy_(source.view(-1)[(next(turn) % copies) * N * N :][:half])

    providers = {"peftkern": ours, "copy of as many bytes": copy_of_the_same_bytes}
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        bnb = None
    if bnb:
        theirs, state = bnb.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4")
        ours_again = peftkern.dequantize_nf4(peftkern.quantize_nf4(weight.bfloat16(), 64))
        assert torch.equal(bnb.dequantize_4bit(theirs, state), ours_again)
        providers["bitsandbytes"] = lambda: bnb.dequantize_4bit(theirs, state)
    compare("dequantize 4096x4096 to bf16", providers)


def test_quantize(compare, weight):
    packed, absmax = reference.quantize_nf4(weight, 64)
    q = peftkern.quantize_nf4(weight, 64)
    assert torch.equal(q.packed.reshape(-1), packed) and torch.equal(q.absmax, absmax)
    providers = {"peftkern": lambda: peftkern.quantize_nf4(weight, 64)}
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        bnb = None
    if bnb:
        theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        assert torch.equal(theirs.reshape(-1), packed) and torch.equal(state.absmax, absmax)
        providers["bitsandbytes"] = lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    compare("quantize 4096x4096 fp32", providers, seconds=6.0)


@pytest.mark.parametrize("rows", [1, 16, 512])
def test_nf4_linear(compare, weight, rows):
    w = weight.bfloat16() / 64
    q = peftkern.quantize_nf4(w, 64)
    x = torch.randn(rows, N).bfloat16().requires_grad_(rows > 16)  # training where there are many rows
    dense = peftkern.dequantize_nf4(q)
    torch.testing.assert_close(peftkern.nf4_linear(x, q), torch.nn.functional.linear(x, dense))
    providers = {
        "peftkern": lambda: peftkern.nf4_linear(x, q),
        "dense F.linear": lambda: torch.nn.functional.linear(x, w),
    }
    try:
        import bitsandbytes as bnb
    except ImportError:
        bnb = None
    if bnb:
        layer = bnb.nn.Linear4bit(N, N, bias=False, quant_type="nf4", compress_statistics=False)
        layer.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=False)
        layer = layer.to("cpu")
        layer.train(rows > 16)
        torch.testing.assert_close(layer(x).float(), peftkern.nf4_linear(x, q).float(), atol=0.05, rtol=0.05)
        providers["bitsandbytes"] = lambda: layer(x)
    compare(f"NF4 linear forward, M={rows}, 4096x4096, bf16", providers)
