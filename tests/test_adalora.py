# SPDX-License-Identifier: Apache-2.0
"""AdaLoRALinear and its config; pruning its triplets."""

import copy
import math

import pytest
import torch
from adalora_models import NAMES, adapted, batches, config, copy_from_peft, mlp, randomized, train, trained
from conftest import assert_close
from torch import nn

import peftkern
from peftkern import AdaLoRALinear, NF4Config, reference
from peftkern.ops.adapted_linear import draw_seed
from peftkern.rank_allocator import adalora_layers


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layer_matches_the_reference(device, isa, base, dropout):
    dtype = torch.bfloat16 if base == "bf16" else torch.float32
    linear = nn.Linear(64, 40, dtype=dtype, device=device)
    quantize = NF4Config(32) if base == "nf4" else None
    layer = AdaLoRALinear.from_linear(linear, r=5, lora_alpha=9, lora_dropout=dropout, quantize=quantize)
    randomized(layer)
    x = torch.randn(3, 7, 64, dtype=dtype, device=device, requires_grad=True)
    torch.manual_seed(5)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.manual_seed(5)
    seed = int(draw_seed(x.device)) if dropout else 0
    weight = layer.base_weight() if quantize is None else peftkern.dequantize_nf4(layer.base_weight(), dtype)
    exact = {name: p.detach().cpu().double().requires_grad_() for name, p in layer.adapter_parameters().items()}
    x64 = x.detach().cpu().double().requires_grad_()
    expected = reference.adapted_linear(
        x64, weight.cpu().double(), exact["lora_A"], exact["lora_B"], lam=exact["lora_E"].view(-1),
        bias=layer.bias.cpu().double(), scaling=9 / (5 + 1e-5), dropout_p=dropout, seed=seed,
    )  # fmt: skip
    expected.backward(grad.cpu().double())
    assert_close(y, expected, dtype, "y")
    assert_close(x.grad, x64.grad, dtype, "dx")
    for name, p in layer.adapter_parameters().items():
        assert p.grad.shape == p.shape
        assert_close(p.grad, exact[name].grad, dtype, name)


def test_start_is_the_base_layer():
    linear = nn.Linear(32, 24)
    layer = AdaLoRALinear.from_linear(linear, r=200).eval()
    x = torch.randn(5, 32)
    assert_close(layer(x), linear(x), torch.float32)  # our product may sum in another order than F.linear
    assert not layer.lora_E.any() and layer.weight is linear.weight and layer.bias is linear.bias
    for t in (layer.lora_A, layer.lora_B):
        assert t.std().item() == pytest.approx(0.02, rel=0.1) and abs(t.mean().item()) < 2e-3
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == list(NAMES)


def test_scaling_is_peft_s_rule():
    assert AdaLoRALinear(8, 8, r=12, lora_alpha=32).scaling == 32 / (12 + 1e-5)
    assert AdaLoRALinear(8, 8, r=12, lora_alpha=0).scaling == 12 / (12 + 1e-5)
    assert AdaLoRALinear(8, 8, r=12, lora_alpha=-1).scaling == 12 / (12 + 1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merge_and_unmerge(quantize):
    layer = randomized(AdaLoRALinear(64, 48, r=4, lora_alpha=4, quantize=quantize)).eval()
    x = torch.randn(6, 64)
    before = layer(x)
    original = {n: p.clone() for n, p in layer.named_parameters()}
    layer.merge(safe=True)
    assert layer.merged and ("uint8" in str(layer.weight.dtype)) == (quantize is not None)
    slack = 0.35 if quantize else 1e-5  # requantized
    assert (layer(x) - before).norm() / before.norm() < slack
    layer.unmerge()
    assert torch.equal(layer(x), before)
    assert all(torch.equal(p, original[n]) for n, p in layer.named_parameters())


def test_layer_has_the_output_of_peft_s(peft):
    model = mlp()
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.AdaLoraConfig(target_modules=["0", "2"], init_r=5, total_step=9, lora_alpha=7)
    )
    ours = peftkern.adapt(model, peft.AdaLoraConfig(target_modules=["0", "2"], init_r=5, total_step=9, lora_alpha=7))
    for module in theirs.modules():
        for p in getattr(module, "lora_E", {}).values():
            nn.init.normal_(p)
    copy_from_peft(ours, theirs)
    x = torch.randn(5, 24)
    assert_close(ours.eval()(x), theirs.eval()(x), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, r"r: expected an int >= 1, got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected 0 <= p < 1, got 1.0"),
        ({"lora_alpha": math.nan}, r"lora_alpha: expected a finite number, got nan"),
        ({"init_lora_weights": "gaussian"}, r"init_lora_weights: expected True or False, got 'gaussian'"),
        ({"quantize": "int4"}, r"quantize: expected None, \"nf4\" or an NF4Config"),
        ({"in_features": 0}, r"in_features: expected an int >= 1, got 0"),
    ],
)
def test_bad_arguments_of_the_layer(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaLoRALinear(**{"in_features": 8, "out_features": 8, **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_step": None}, r"total_step: expected an int >= 1, got None"),
        ({"init_r": 0}, r"init_r: expected an int >= 1, got 0"),
        ({"tinit": 22}, r"tinit: expected less than total_step - tfinal = 22, .*got 22"),
        ({"beta1": 1.0}, r"beta1: expected a number between 0 and 1, got 1.0"),
        ({"deltaT": 0}, r"deltaT: expected an int >= 1, got 0"),
        ({"orth_reg_weight": -1}, r"orth_reg_weight: expected a finite number >= 0, got -1"),
        ({"rank_pattern": {"0.lora_E": [True]}}, r"rank_pattern\['0.lora_E'\]: expected a list of 6 booleans"),
        ({"target_modules": []}, r"target_modules: expected names"),
        ({"bias": "some"}, r"bias: expected one of"),
    ],
)
def test_bad_fields_of_the_config(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_peft_options_that_change_the_result_are_refused(peft):
    with pytest.raises(ValueError, match=r"config.trainable_token_indices: expected its default"):
        peftkern.adapt(
            mlp(), peft.AdaLoraConfig(target_modules=["0"], total_step=9, trainable_token_indices=[0])
        )  # fmt: skip


# ---- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, NF4Config(32)])
def test_pruning_changes_no_bit_of_the_output(isa, quantize):
    model, optimizer, allocator = trained(quantize=quantize)
    x = torch.randn(70, 24)
    model.eval()
    before, few = model(x), model(x[:3])
    ranks = allocator.ranks()
    sizes = {name: p.numel() for name, p in model.named_parameters() if "lora" in name}
    assert peftkern.prune_ranks(model, optimizer) == ranks and min(ranks.values()) < 6
    assert torch.equal(model(x), before) and torch.equal(model(x[:3]), few)
    for name, p in model.named_parameters():
        if "lora" in name:
            layer = name.split(".")[0]
            assert p.numel() == sizes[name] // 6 * ranks[layer]
            assert all(s.shape == p.shape for s in optimizer.state[p].values() if s.dim())
    assert allocator.ranks() == ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_without_some_triplets_of_zero(isa, dtype):
    """A sum of many ranks, in the order that every instruction set takes it, without the terms that are zero."""
    layer = randomized(AdaLoRALinear(129, 67, r=40, adapter_dtype=dtype, dtype=dtype))
    layer.lora_E.data[torch.rand(40, generator=torch.Generator().manual_seed(2)) < 0.6] = 0
    x = torch.randn(37, 129).to(dtype).requires_grad_()
    pruned = copy.deepcopy(layer)
    kept = (layer.lora_E != 0).view(-1)
    peftkern.prune_ranks(pruned)
    results = []
    for m in (layer, pruned):
        (dx,) = torch.autograd.grad(m(x).square().sum(), x, retain_graph=False)
        m.zero_grad()
        y = m(x)
        y.square().sum().backward()
        results.append((y, dx, m.lora_A.grad, m.lora_B.grad, m.lora_E.grad))
    (y, dx, dA, dB, dE), small = results
    for whole, cut in zip((y, dx, dA[kept], dB[:, kept], dE[kept]), small, strict=True):
        assert torch.equal(whole, cut)


@pytest.mark.parametrize("prune", ["final", "always"])
def test_pruning_during_training(prune):
    model, optimizer, allocator = trained(30, prune=prune)
    assert {name: m.r for name, m in adalora_layers(model).items()} == allocator.ranks()
    assert sum(allocator.ranks().values()) == 6 and allocator.keep.all()
    if prune == "final":  # the very same training as with masks
        masked, _, same = trained(30, prune="never")
        assert same.ranks() == allocator.ranks()
        x = torch.randn(5, 24)
        assert torch.equal(model.eval()(x), masked.eval()(x))
        for name, layer in adalora_layers(model).items():
            kept = (masked.get_submodule(name).lora_E != 0).view(-1)
            assert torch.equal(layer.lora_A, masked.get_submodule(name).lora_A[kept])
    assert optimizer.state[model[0].lora_A]["exp_avg"].shape == model[0].lora_A.shape


def test_the_state_of_the_allocator_follows_a_pruning_by_hand():
    model, optimizer, allocator = trained(12)
    ranks = allocator.ranks()
    old = {name: s.clone() for name, s in zip(("s", "u"), (allocator.sensitivity, allocator.uncertainty), strict=True)}
    slices, kept = allocator._slices, [(m.lora_E != 0).view(-1) for m in allocator.layers.values()]
    peftkern.prune_ranks(model, optimizer)
    assert allocator.ranks() == ranks
    for i, (layer, keep) in enumerate(zip(allocator.layers.values(), kept, strict=True)):
        new = allocator.sensitivity[allocator._slices[i][0]].view(layer.r, -1)
        assert torch.equal(new, old["s"][slices[i][0]].view(6, -1)[keep])
        new = allocator.uncertainty[allocator._slices[i][2]].view(-1, layer.r)
        assert torch.equal(new, old["u"][slices[i][2]].view(-1, 6)[:, keep])
    train(model, optimizer, batches(18, seed=5))
    assert sum(allocator.ranks().values()) == 6


def test_pruning_refuses_what_it_cannot_do():
    fresh = adapted()
    with pytest.raises(RuntimeError, match=r"expected AdaLoRALinear layers of which some E is not 0"):
        peftkern.prune_ranks(fresh)
    model, _, _ = trained()
    factored = torch.optim.Adafactor(peftkern.trainable_parameters(model))
    nn.functional.mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    factored.step()
    for m in adalora_layers(model).values():
        m.lora_E.data[0] = 0
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"optimizer: expected a state whose tensors are shaped like their parameters"
    ):
        peftkern.prune_ranks(model, factored)
    model[0].merge()
    with pytest.raises(RuntimeError, match=r"0: expected an unmerged layer"):
        peftkern.prune_ranks(model)
    assert [p.shape for p in model.parameters()][: len(shapes)] == shapes


def test_compiled_layer():
    layer = randomized(AdaLoRALinear(32, 24, r=4)).eval()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 32)
    assert_close(compiled(x), layer(x), torch.float32)
