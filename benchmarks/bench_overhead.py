# SPDX-License-Identifier: Apache-2.0
"""Small layers, where a call is all overhead: what ours costs above the bare F.linear, on one thread."""

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
    x = torch.randn(4, 64, requires_grad=backward)
    torch.testing.assert_close(ours(x), linear(x))  # B is zero
    weight, bias = linear.weight, linear.bias
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

    name = f"LoRALinear 4x64 on one thread, {'forward + backward' if backward else 'forward'}, {repeats} calls"
    bare = many(lambda t: torch.nn.functional.linear(t, weight, bias))
    times = compare(name, {"peftkern": many(ours), "F.linear": bare}, seconds=3.0)
    overhead = (times["peftkern"] - times["F.linear"]) / repeats
    print(f"\n{name}: {overhead * 1e6:.1f} us a call above F.linear")
