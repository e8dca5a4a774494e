# SPDX-License-Identifier: Apache-2.0
"""Small layers, where a call is all overhead: what ours costs above the bare F.linear, on one thread."""

import copy

import peft
import pytest
import torch

import peftkern


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_small_layer(compare, one_thread, backward):
    linear = torch.nn.Linear(64, 64).requires_grad_(False)
    ours = peftkern.LoRALinear.from_linear(linear, r=8)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(copy.deepcopy(linear)), config).base_model.model[0]
    weight, bias, A, B = linear.weight, linear.bias, ours.lora_A, ours.lora_B
    x = torch.randn(4, 64, requires_grad=backward)

    def bare(t):
        return torch.nn.functional.linear(t, weight, bias)

    def plain(t):
        return bare(t) + torch.nn.functional.linear(torch.nn.functional.linear(t, A), B) * ours.scaling

    layers = {"peftkern": ours, "F.linear": bare, "HF PEFT": theirs, "plain torch": plain}
    for layer in layers.values():
        torch.testing.assert_close(layer(x), linear(x))  # B is zero
    repeats = 50

    def many(layer):
        def call():
            for _ in range(repeats):
                y = layer(x)
                if backward:
                    y.sum().backward()

        def inference():
            with torch.no_grad():
                call()

        return call if backward else inference

    name = f"a LoRA layer, 4x64 on one thread, {'forward + backward' if backward else 'forward'}, {repeats} calls"
    times = compare(name, {who: many(layer) for who, layer in layers.items()}, seconds=3.0)
    for who, seconds in times.items():
        if who != "F.linear":
            print(f"{who}: {(seconds - times['F.linear']) / repeats * 1e6:.1f} us a call above F.linear")
