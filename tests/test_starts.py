# SPDX-License-Identifier: Apache-2.0
"""Starts that decompose the weight, or draw orthogonal factors; what HF PEFT has and we do not is refused by name."""

import pytest
import torch
from peft_models import llama
from samples import BF16, F32
from torch import nn

import peftkern
from peftkern import LoraConfig, LoRALinear, NF4Config, NF4Linear, QLoRALinear

DECOMPOSITIONS = pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])


@DECOMPOSITIONS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_layer_starts_with_its_old_output(start, dtype):
    linear = nn.Linear(64, 48).to(dtype)
    weight, x = linear.weight, torch.randn(5, 64).to(dtype)
    before, values = linear(x), weight.detach().clone()
    layer = LoRALinear.from_linear(linear, r=6, lora_alpha=3, init_lora_weights=start)
    assert torch.equal(weight, values), "the original is left as it was"
    whole = layer.dense_weight() + layer.delta_weight()
    torch.testing.assert_close(
        whole, values.float(), rtol=1e-2 if dtype == BF16 else 1e-5, atol=1e-3 if dtype == BF16 else 1e-6
    )
    torch.testing.assert_close(
        layer(x), before, rtol=2e-2 if dtype == BF16 else 1e-4, atol=2e-2 if dtype == BF16 else 1e-5
    )
    assert layer.delta_weight().norm() > 0.2 * values.float().norm()
    if start.startswith("pissa"):
        S = torch.linalg.svdvals(values.float())
        torch.testing.assert_close(torch.linalg.svdvals(layer.delta_weight())[:6], S[:6], rtol=2e-2, atol=0)
        left = torch.linalg.svdvals(layer.dense_weight())
        torch.testing.assert_close(left[:6], S[6:12], rtol=5e-2, atol=0)
        assert torch.allclose(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0), rtol=1e-4)
    else:
        Q, R = torch.linalg.qr(values.float())
        torch.testing.assert_close(layer.lora_B.detach(), Q[:, :6], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.lora_A.detach(), R[:6], rtol=1e-5, atol=1e-6)


@DECOMPOSITIONS
def test_what_is_left_is_quantized(start):
    """Its largest values are gone, so its NF4 is nearer: PiSSA, section 4."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight += 2 * torch.outer(torch.randn(48), torch.randn(64))
    weight = linear.weight.detach().clone()
    layer = LoRALinear.from_linear(linear, r=4, lora_alpha=4, init_lora_weights=start, quantize=NF4Config(32))
    assert layer.nf4_config == NF4Config(32)
    error = (layer.dense_weight() + layer.delta_weight() - weight).norm()
    plain = (NF4Linear.from_linear(linear, 32).dequantize() - weight).norm()
    assert error < (0.3 if start != "olora" else 1.0) * plain
    double = QLoRALinear.from_linear(linear, r=4, init_lora_weights=start)
    assert double.nf4_config == NF4Config(64, double_quant=True)


def test_orthogonal():
    layer = LoRALinear(64, 48, r=8, init_lora_weights="orthogonal")
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    assert A.std().item() == pytest.approx(0.1 * 0.5**0.5, rel=0.2) == pytest.approx(B.std().item(), rel=0.2)
    assert (B @ A).abs().max() < 1e-6, "so the layer starts as the plain one"
    with pytest.raises(ValueError, match='r: expected an even rank for init_lora_weights="orthogonal", got 3'):
        LoRALinear(64, 48, r=3, init_lora_weights="orthogonal")


def test_what_changes_the_base_model_is_not_for_a_bank_or_compress(tmp_path):
    """Such an adapter is one of a changed base model, which whoever loads it has to make."""
    model = peftkern.adapt(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    folder = peftkern.save_adapter(model, tmp_path / "a")
    message = "init_lora_weights: expected a start that leaves the weights as they are, got 'pissa'"
    with pytest.raises(ValueError, match=message):
        peftkern.AdapterBank(llama()).add("a", folder)
    with pytest.raises(ValueError, match=message):
        peftkern.compress(folder, rank=1, output=tmp_path / "b")
    with pytest.raises(ValueError, match=message):
        peftkern.compress(model, rank=1)


def test_what_cannot_be_decomposed():
    for start in ("pissa", "olora"):
        with pytest.raises(ValueError, match="init_lora_weights: expected a dense weight to decompose"):
            LoRALinear.from_linear(NF4Linear(64, 48), init_lora_weights=start)
        with pytest.raises(ValueError, match=r"r: expected at most 8, the rank of the weight, for .* got 9"):
            LoRALinear(8, 64, r=9, init_lora_weights=start)
    with pytest.raises(ValueError, match="lora_alpha: expected one above 0 for 'pissa'"):
        LoRALinear(8, 64, r=2, lora_alpha=-1, init_lora_weights="pissa")


@pytest.mark.parametrize("start", ["eva", "corda", "loftq", "mica", "lora_ga", "pissa_niter_", "Pissa", "none"])
def test_other_starts_are_refused_by_name(start):
    with pytest.raises(ValueError, match=f"init_lora_weights: expected one of .*got '{start}'"):
        LoraConfig(init_lora_weights=start)


@pytest.mark.parametrize("start", ["eva", "mica"])
def test_of_peft_too(start):
    peft = pytest.importorskip("peft")
    options = {"eva_config": peft.EvaConfig()} if start == "eva" else {}
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=start, **options)
    model = llama()
    with pytest.raises(ValueError, match=f"init_lora_weights.*'{start}'|config.{start}_config"):
        peftkern.adapt(model, config)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
