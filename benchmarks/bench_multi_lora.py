# SPDX-License-Identifier: Apache-2.0
"""A batch of 8 items with an adapter each, against one adapter for all of them, against a bank of 100, and against HF
PEFT's `adapter_names`, a loop over the adapters: 8 rows (decode) and 8 x 128 rows (prefill), no gradients."""

import pytest
import torch

import peftkern

ADAPTERS, RANK = 8, 16


def peft_layer(linear: torch.nn.Linear, A: torch.Tensor, B: torch.Tensor, scaling: float):
    """PEFT's layer with the bank's adapters, named "0" to "7"."""
    peft = pytest.importorskip("peft")
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
    weight = (torch.randn(n, n, generator=g) / n**0.5).to(dtype)
    x = torch.randn(8, tokens, n, generator=g).to(dtype)
    many_A, many_B = torch.randn(100, RANK, n, generator=g) / n**0.5, torch.randn(100, n, RANK, generator=g) / 4
    A, B = many_A[:ADAPTERS].clone(), many_B[:ADAPTERS].clone()
    each, first, spread = torch.arange(8), torch.zeros(8, dtype=torch.long), torch.arange(8) * 12 + 3
    linear = torch.nn.Linear(n, n, bias=False).to(dtype).requires_grad_(False)
    linear.weight.data = weight
    theirs, names = peft_layer(linear, A, B, 2.0), [str(i) for i in range(8)]

    with torch.no_grad():
        ours = peftkern.multi_lora_linear(x, weight, A, B, each, scaling=2.0)
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
        expected = theirs(x, adapter_names=names)
        torch.testing.assert_close(ours, expected, atol=tolerance * expected.abs().max().item(), rtol=0)
        for i in range(8):  # bit for bit what one adapter for all gives, where the same way makes the base product
            alone = peftkern.lora_linear(x, weight, A[i], B[i], 2.0)[i]
            torch.testing.assert_close(ours[i], alone, atol=tolerance * 10, rtol=0)
        providers = {
            "peftkern": lambda: peftkern.multi_lora_linear(x, weight, A, B, each, scaling=2.0),
            "one adapter for all": lambda: peftkern.multi_lora_linear(x, weight, A, B, first, scaling=2.0),
            "lora_linear": lambda: peftkern.lora_linear(x, weight, A[0], B[0], 2.0),
            "bank of 100": lambda: peftkern.multi_lora_linear(x, weight, many_A, many_B, spread, scaling=2.0),
            "F.linear": lambda: torch.nn.functional.linear(x, weight),
            "HF PEFT's loop": lambda: theirs(x, adapter_names=names),
        }
        name = f"{'decode 8 rows' if tokens == 1 else 'prefill 8x128 rows'}, {n}x{n} {str(dtype)[6:]} r=16, 8 adapters"
        compare(name, providers, seconds=2.0, rounds=(15, 200))
