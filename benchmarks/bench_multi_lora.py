# SPDX-License-Identifier: Apache-2.0
"""A batch of 8 items with an adapter each, against one adapter for all of them, against a bank of 100, and against HF
PEFT's `adapter_names`, a loop over the adapters: 8 rows (decode) and 8 x 128 rows (prefill), no gradients."""

import itertools

import pytest
import torch

import peftkern
from peftkern.bench.measure import copies

ADAPTERS, RANK = 8, 16


def peft_layer(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float):
    """PEFT's layer with the bank's adapters, named "0" to "7"."""
    peft = pytest.importorskip("peft")
    linear = torch.nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    config = peft.LoraConfig(r=RANK, lora_alpha=scaling * RANK, target_modules=["0"])
    # in float32, as PEFT keeps them on a bf16 base
    model = peft.get_peft_model(torch.nn.Sequential(linear), config, adapter_name="0")
    for i in range(1, ADAPTERS):
        model.add_adapter(str(i), config)
    layer = model.base_model.model[0].eval()
    with torch.no_grad():
        for i in range(ADAPTERS):
            layer.lora_A[str(i)].weight.copy_(A[i])
            layer.lora_B[str(i)].weight.copy_(B[i])
    return layer


@pytest.mark.parametrize("tokens", [1, 128], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [576, 2048, 4096])
def test_multi_lora(compare, n, dtype, tokens):
    g = torch.Generator().manual_seed(0)
    # As in a model, whose layers take their turns: weights and factors come from memory.
    layers = copies(n * n * dtype.itemsize + ADAPTERS * 2 * RANK * n * 4)
    x = torch.randn(8, tokens, n, generator=g).to(dtype)
    weights = [(torch.randn(n, n, generator=g) / n**0.5).to(dtype) for _ in range(layers)]
    many_A = [torch.randn(100, RANK, n, generator=g) / n**0.5 for _ in range(layers)]
    many_B = [torch.randn(100, n, RANK, generator=g) / 4 for _ in range(layers)]
    A, B = ([factor[:ADAPTERS].clone() for factor in many] for many in (many_A, many_B))
    each, first, spread = torch.arange(8), torch.zeros(8, dtype=torch.long), torch.arange(8) * 12 + 3
    names = [str(i) for i in range(8)]
    theirs = [peft_layer(*layer, 2.0) for layer in zip(weights, A, B, strict=True)]

    def in_turn(call):
        turn = itertools.cycle(range(layers))
        return lambda: call(next(turn))

    def ours(i, A, B, index):
        return peftkern.multi_lora_linear(x, weights[i], A[i], B[i], index, scaling=2.0)

    with torch.no_grad():
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
        y, expected = ours(0, A, B, each), theirs[0](x, adapter_names=names)
        torch.testing.assert_close(y, expected, atol=tolerance * expected.abs().max().item(), rtol=0)
        for i in range(8):  # bit for bit what one adapter for all gives, where the same way makes the base product
            alone = peftkern.lora_linear(x, weights[0], A[0][i], B[0][i], 2.0)[i]
            torch.testing.assert_close(y[i], alone, atol=tolerance * 10, rtol=0)
        calls = {
            "peftkern": lambda i: ours(i, A, B, each),
            "one adapter for all": lambda i: ours(i, A, B, first),
            "lora_linear": lambda i: peftkern.lora_linear(x, weights[i], A[i][0], B[i][0], 2.0),
            "bank of 100": lambda i: ours(i, many_A, many_B, spread),
            "F.linear": lambda i: torch.nn.functional.linear(x, weights[i]),
            "HF PEFT's loop": lambda i: theirs[i](x, adapter_names=names),
        }
        name = f"{'decode 8 rows' if tokens == 1 else 'prefill 8x128 rows'}, {n}x{n} {str(dtype)[6:]} r=16, 8 adapters"
        compare(name, {who: in_turn(call) for who, call in calls.items()}, seconds=2.0, rounds=(15, 200))
