# SPDX-License-Identifier: Apache-2.0
"""Adapters over transformers' Conv1D, whose weight is [in, out]: what is shared, quantized, merged, unloaded. The
comparison with HF PEFT is in test_adapt_peft.py."""

import copy

import pytest
import torch
from peft_models import TOKENS, gpt2, loss_of
from samples import BF16, F32
from torch import nn

import peftkern
from peftkern import AdaLoraConfig, AdaLoRALinear, LoraConfig, LoRALinear, NF4Config, NF4Linear

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


def conv(dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(1)
    layer = Conv1D(48, 64).to(dtype)
    nn.init.normal_(layer.bias)
    return layer


def as_linear(layer: nn.Module) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf)
    linear.weight, linear.bias = nn.Parameter(layer.weight.detach().T.contiguous()), copy.deepcopy(layer.bias)
    return linear


QUANTIZE = pytest.mark.parametrize("quantize", [None, "nf4", NF4Config(32, double_quant=True)], ids=str)


@QUANTIZE
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_equals_the_layer_over_the_transposed_linear(quantize, dtype):
    base = conv(dtype)
    layers = []
    for module in (base, as_linear(base)):
        torch.manual_seed(4)
        layers.append(LoRALinear.from_linear(module, r=4, quantize=quantize, init_lora_weights=False))
    x = torch.randn(3, 5, 64).to(dtype)
    results = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.float().square().sum().backward()
        layer.merge()
        results.append([y, leaf.grad, layer.lora_A.grad, layer.lora_B.grad, layer.dense_weight(), layer(x)])
    for a, b in zip(*results, strict=True):  # the library may add in another order over a transposed weight
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == BF16 else 1e-5, atol=2e-2 if dtype == BF16 else 1e-4)
    if quantize is not None:
        assert torch.equal(results[0][4], results[1][4]), "the same codes"


def test_the_weight_is_shared_and_never_copied():
    base = conv()
    weight, bias = base.weight, base.bias
    layer = LoRALinear.from_linear(base, r=2)
    assert layer.weight is weight and layer.bias is bias and not weight.requires_grad
    assert layer.base_weight().data_ptr() == weight.data_ptr() and layer.base_weight().shape == (48, 64)
    assert (layer.in_features, layer.out_features, layer.lora_A.shape[1]) == (64, 48, 64)
    layer.merge()
    assert layer.weight.shape == weight.shape and layer.weight.is_contiguous()
    layer.unmerge()
    assert layer.weight is weight


@QUANTIZE
def test_state_dicts_are_those_of_the_model(quantize):
    """A dense checkpoint of GPT-2 loads into the adapted model, quantized or not."""
    plain = gpt2()
    model = peftkern.adapt(gpt2(), LoraConfig(r=2), quantize=quantize)
    other = {n: t + 0.01 for n, t in plain.state_dict().items()}
    missing = model.load_state_dict(other, strict=False)
    assert not missing.unexpected_keys
    assert all("lora_" in name or "absmax" in name for name in missing.missing_keys)
    plain.load_state_dict(other)
    expected = plain if quantize is None else peftkern.adapt(copy.deepcopy(plain), LoraConfig(r=2), quantize=quantize)
    torch.testing.assert_close(loss_of(model)[0], loss_of(expected)[0], rtol=1e-5, atol=1e-5)


def test_unloading_gives_conv1d_back_and_nf4_where_it_was_quantized():
    plain = gpt2()
    names = [n for n, m in plain.named_modules() if type(m) is Conv1D]
    for quantize, kind in ((None, Conv1D), ("nf4", NF4Linear)):
        model = peftkern.adapt(gpt2(), LoraConfig(r=2, init_lora_weights=False), quantize=quantize).eval()
        before = loss_of(model)[0]
        peftkern.merge(model, unload=True)
        assert all(type(model.get_submodule(n)) is kind for n in names) and len(names) == 8
        if quantize is None:
            torch.testing.assert_close(loss_of(model)[0], before, rtol=1e-4, atol=1e-5)
        peftkern.adapt(model, LoraConfig(r=2))  # and again


def test_adalora(tmp_path):
    peft = pytest.importorskip("peft")
    config = {"target_modules": ["c_attn", "c_proj"], "init_r": 3, "target_r": 2, "total_step": 10}
    theirs = peft.get_peft_model(gpt2(), peft.AdaLoraConfig(**config))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    theirs.eval().save_pretrained(tmp_path)
    ours = peftkern.load_adapter(gpt2(), tmp_path).eval()
    assert sum(isinstance(m, AdaLoRALinear) for m in ours.modules()) == 6
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
    small = peftkern.to_lora(copy.deepcopy(ours))
    torch.testing.assert_close(small(TOKENS).logits, ours(TOKENS).logits, rtol=1e-4, atol=1e-5)
    peftkern.compress(ours, energy=1.0)
    torch.testing.assert_close(ours(TOKENS).logits, small(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert sum(type(m) is LoRALinear for m in ours.modules()) == 6
    peftkern.merge(ours, unload=True)
    assert [type(m) for m in ours.modules()] == [type(m) for m in gpt2().modules()]
    assert type(peftkern.adapt(gpt2(), AdaLoraConfig(**config)).transformer.h[0].attn.c_attn) is AdaLoRALinear


def test_gpt2_trains_and_compiles():
    torch._dynamo.reset()
    model = peftkern.adapt(gpt2(), LoraConfig(r=4, lora_dropout=0.1), quantize="nf4").train()
    optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = loss_of(model)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)


def test_hooks_and_banks_refuse():
    base = conv()
    base.register_forward_hook(lambda module, args, output: output * 0)
    with pytest.raises(TypeError, match="linear: expected a plain Conv1D, got one with forward hooks"):
        LoRALinear.from_linear(base)
    with pytest.raises(ValueError, match="linear: expected an nn.Linear, got Conv1D"):
        peftkern.AdapterBank(gpt2(), ["c_attn"])
