# SPDX-License-Identifier: Apache-2.0
"""Patched layers in bfloat16, each against float64: within one unit in the last place of the output's scale, in the
result and in every gradient. HF PEFT is no measure for that where it rounds x A^T, what B makes of it, and the scaling
of that to bfloat16 on their own (16-bit adapters, autocast, bitsandbytes): it is further from float64 than we are."""

import copy

import pytest
import torch
from samples import BF16, F32
from test_adapt import tiny_llama
from torch import nn

import peftkern

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from test_patch import CONFIGS, MIXED, bf16_ulp, bnb_llama, build, exact_twin, nf4_llama, several  # noqa: E402

UNMASKED = [name for name in CONFIGS if "dropout" not in name]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if type(m).__module__ == "peftkern.patch" and hasattr(m, "lora_A")}


def results(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, autocast=False, **kwargs) -> dict[str, torch.Tensor]:
    """y, and the gradients of x and of all that trains."""
    x = x.clone().requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = layer(x, **kwargs)
    grads = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype), allow_unused=True)
    return {"y": y.detach(), **{n: g for n, g in zip(["x", *trained], grads, strict=True) if g is not None}}


def assert_within_an_ulp(model: nn.Module, exact: nn.Module, autocast: bool = False, **kwargs) -> None:
    """Or as near as PEFT is: autocast rounds a float32 weight before the product, DoRA rounds a sum more."""
    plain = copy.deepcopy(model)
    layers = layers_of(peftkern.patch(model))
    assert len(layers) == 14
    g = torch.Generator().manual_seed(4)
    for name, layer in layers.items():
        base = layer.base_layer
        # in bfloat16 to the bit, so that nothing is lost on the way in
        x = torch.randn(5, 7, base.in_features, generator=g).bfloat16()
        dy = torch.randn(5, 7, base.out_features, generator=g).bfloat16()
        dtype = base.weight.dtype if base.weight.is_floating_point() else BF16
        got = results(layer, x.to(dtype), dy, autocast, **kwargs)
        theirs = results(plain.get_submodule(name), x.to(dtype), dy, autocast, **kwargs)
        expected = results(exact.get_submodule(name), x.double(), dy.double(), **kwargs)
        assert got.keys() == theirs.keys() == expected.keys() and len(got) >= 4
        for what, value in got.items():
            ours, pefts = (
                (t.double() - expected[what]).abs().max().item() / bf16_ulp(expected[what])
                for t in (value, theirs[what])
            )
            assert ours <= max(1, 1.05 * pefts), f"{name}: {what}: {ours:.2f} ulps, HF PEFT {pefts:.2f}"


@pytest.mark.parametrize("adapters", ["fp32 adapters", "bf16 adapters"])
@pytest.mark.parametrize(
    "name, base",
    # PEFT's norm of a DoRA layer does not know NF4Linear
    [(n, b) for n in UNMASKED for b in (tiny_llama, nf4_llama, bnb_llama) if (n, b) != ("dora", nf4_llama)],
)
def test_layers(name, base, adapters):
    model = build(CONFIGS[name](), BF16, base=base, autocast_adapter_dtype=adapters == "fp32 adapters")
    exact = exact_of(model)
    assert_within_an_ulp(model, exact)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("name", UNMASKED)
def test_layers_under_autocast(name, dtype):
    model = build(CONFIGS[name](), dtype)
    exact = exact_of(model)
    assert_within_an_ulp(model, exact, autocast=True)


def test_layers_with_mixed_batches():
    model = several(BF16).eval()
    exact = exact_of(model)
    assert_within_an_ulp(model, exact, adapter_names=MIXED)


def exact_of(model: nn.Module) -> nn.Module:
    """In float64, with the weights that are multiplied by: dequantized to bfloat16."""
    twin = exact_twin(model) if "bitsandbytes" in str({type(m).__module__ for m in model.modules()}) else model
    twin = copy.deepcopy(twin)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if type(child) is peftkern.NF4Linear:
                dense = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                dense.weight = nn.Parameter(child.dequantize(BF16), requires_grad=False)
                dense.bias = child.bias
                setattr(parent, name, dense)
    return twin.double()
