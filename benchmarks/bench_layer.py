# SPDX-License-Identifier: Apache-2.0
"""A LoRA layer, forward and backward, against HF PEFT's on the same weights and against the frozen layer alone."""

import pytest
import torch

import peftkern

SHAPES = [(512, 576, 1536), (512, 2048, 2048), (1024, 4096, 4096)]  # M, in, out


def peft_layer(linear: torch.nn.Linear, p: float, autocast_adapter_dtype: bool = True):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=p, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=autocast_adapter_dtype)
    return model.base_model.model[0].train()


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_layer(compare, shape, dtype, p):
    rows, fan_in, fan_out = shape
    linear = torch.nn.Linear(fan_in, fan_out, bias=False).to(dtype).requires_grad_(False)
    theirs = peft_layer(torch.nn.Linear(fan_in, fan_out, bias=False).to(dtype), p)
    theirs.base_layer.weight.data = linear.weight.data
    ours = peftkern.LoRALinear.from_linear(linear, r=16, lora_alpha=32, lora_dropout=p).train()
    ours.lora_A.data.copy_(theirs.lora_A.default.weight)
    ours.lora_B.data.copy_(theirs.lora_B.default.weight)
    x, grad = torch.randn(rows, fan_in).to(dtype).requires_grad_(), torch.randn(rows, fan_out).to(dtype)

    def step(layer):
        x.grad = None
        layer.zero_grad()
        y = layer(x)
        y.backward(grad)
        return y

    if p == 0.0:  # with dropout the two draw different masks
        a, b = step(ours), step(theirs)
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(a, b, atol=tolerance * b.abs().max().item(), rtol=0)
    providers = {"peftkern": lambda: step(ours), "HF PEFT": lambda: step(theirs), "frozen layer": lambda: step(linear)}
    if dtype == torch.bfloat16:  # PEFT's other mode: adapters in bf16 too, on both sides
        low = peft_layer(torch.nn.Linear(fan_in, fan_out, bias=False).to(dtype), p, autocast_adapter_dtype=False)
        providers["HF PEFT, bf16 adapters"] = lambda: step(low)
    name = str(dtype).removeprefix("torch.")
    compare(f"LoRA layer fwd+bwd {rows}x{fan_in}x{fan_out} {name} r=16 p={p}", providers, rounds=(7, 60))
