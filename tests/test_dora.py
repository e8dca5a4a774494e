# SPDX-License-Identifier: Apache-2.0
"""LoRALinear with use_dora: the formula of the paper in float64, HF PEFT's dropout, merging, files, what is refused."""

import copy
import pickle

import pytest
import torch
from peft_models import llama
from samples import BF16, F16, F32
from torch import nn
from torch.nn import functional as F

import peftkern
from peftkern import LoraConfig, LoRALinear, NF4Config, QLoRALinear

BASES = {"dense": None, "nf4": "nf4", "nf4-double": NF4Config(32, double_quant=True)}
bases = pytest.mark.parametrize("quantize", BASES.values(), ids=BASES)


def layer_of(quantize=None, dtype: torch.dtype = F32, **options) -> LoRALinear:
    """Trained a little: no part is at its start."""
    torch.manual_seed(2)
    linear = nn.Linear(64, 48).to(dtype)
    layer = LoRALinear.from_linear(linear, r=4, lora_alpha=6, quantize=quantize, use_dora=True, **options)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.2)
        layer.lora_magnitude_vector.mul_(1 + 0.3 * torch.randn(48))
    return layer


def double(layer: LoRALinear) -> dict[str, torch.Tensor]:
    """Float64 leaves."""
    parts = {n: p.detach().double().requires_grad_() for n, p in layer.adapter_parameters().items()}
    return parts | {"W": layer.dense_weight().double(), "bias": layer.bias.detach().double()}


def formula(layer: LoRALinear, p: dict[str, torch.Tensor], x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """With dropped = x equation 5 of the paper; otherwise what HF PEFT documents for dropout."""
    adapted = p["W"] + layer.scaling * p["lora_B"] @ p["lora_A"]
    scale = p["lora_magnitude_vector"] / adapted.detach().norm(dim=1)
    return (x - dropped) @ p["W"].T + scale * (dropped @ adapted.T) + p["bias"]


@bases
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(F32, 1e-5), (BF16, 2e-2), (F16, 2.5e-3)], ids=["fp32", "bf16", "fp16"]
)
def test_equals_the_formula(quantize, dtype, tolerance):
    layer = layer_of(quantize, dtype)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    p, x64 = double(layer), x.detach().double().requires_grad_()
    expected = formula(layer, p, x64, x64)
    expected.backward(g.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    wanted = {"x": (x.grad, x64.grad)} | {n: (q.grad, p[n].grad) for n, q in layer.adapter_parameters().items()}
    assert wanted.keys() == {"x", "lora_A", "lora_B", "lora_magnitude_vector"}
    for name, (got, exact) in wanted.items():
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=3 * tolerance * exact.abs().max().item(), msg=name)


@bases
def test_dropout_as_peft_documents_it(quantize):
    layer = layer_of(quantize, lora_dropout=0.4)
    x = torch.randn(6, 64, requires_grad=True)
    torch.manual_seed(9)
    y = layer(x)
    y.square().sum().backward()
    torch.manual_seed(9)
    mask = F.dropout(torch.ones(6, 64), 0.4).double()
    assert 0.2 < (mask == 0).double().mean() < 0.6
    p, x64 = double(layer), x.detach().double().requires_grad_()
    expected = formula(layer, p, x64, mask * x64)
    expected.square().sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    for name, q in layer.adapter_parameters().items():
        torch.testing.assert_close(q.grad.double(), p[name].grad, rtol=1e-4, atol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(x).double(), formula(layer, p, x64, x64), rtol=1e-5, atol=1e-5)


def test_dropout_draws_the_mask_of_peft():
    """The same generator in the same order: a training run with HF PEFT is repeated step by step."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    config = {"r": 3, "target_modules": ["0", "2"], "use_dora": True, "lora_dropout": 0.3}
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(**config))
    peftkern.adapt(ours, peft.LoraConfig(**config))
    modules = dict(theirs.named_modules())
    for name in ("0", "2"):
        other = modules[f"base_model.model.{name}"]
        ours[int(name)].lora_A.data.copy_(other.lora_A.default.weight)
        torch.testing.assert_close(ours[int(name)].lora_magnitude_vector, other.lora_magnitude_vector.default.weight)
    x = torch.randn(32, 16)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        losses.append([])
        for _ in range(8):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < 0.8 * losses[0][0]


@bases
def test_starts_as_the_base_layer(quantize):
    torch.manual_seed(2)
    linear = nn.Linear(64, 48)
    plain = LoRALinear.from_linear(copy.deepcopy(linear), r=4, quantize=quantize)
    layer = LoRALinear.from_linear(linear, r=4, quantize=quantize, use_dora=True)
    x = torch.randn(9, 64)  # up to 8, dense, there is a way that takes no out_scale
    assert torch.equal(layer(x), plain(x)), "magnitude and norm are the same numbers, so the scale is 1"
    qlora = QLoRALinear(64, 48, use_dora=True)
    norm = qlora.dense_weight().norm(dim=1)
    torch.testing.assert_close(qlora.lora_magnitude_vector.detach(), norm, rtol=1e-5, atol=0)
    layer.lora_magnitude_vector.data.zero_()
    layer.reset_adapter()
    assert torch.equal(layer(x), plain(x))


@bases
def test_merge_and_unmerge(quantize):
    layer = layer_of(quantize).eval()
    x, weight = torch.randn(5, 64), layer.dense_weight().clone()
    before = layer(x)
    p = double(layer)
    adapted = p["W"] + layer.scaling * p["lora_B"] @ p["lora_A"]
    exact = (p["lora_magnitude_vector"] / adapted.norm(dim=1))[:, None] * adapted
    merged = weight + layer.delta_weight()
    torch.testing.assert_close(merged.double(), exact, rtol=1e-5, atol=1e-6)
    layer.merge(safe=True)
    if quantize is None:
        torch.testing.assert_close(layer.weight.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    else:
        config = layer.nf4_config
        again = peftkern.quantize_nf4(merged, config.block_size, config.double_quant)
        assert torch.equal(layer.dense_weight(), peftkern.dequantize_nf4(again, F32))
    with pytest.raises(RuntimeError, match="delta_weight: expected an unmerged DoRA layer"):
        layer.delta_weight()
    layer.unmerge()
    assert torch.equal(layer(x), before)


def test_changes_of_the_weight_are_seen():
    """The norms of the frozen rows are kept between calls."""
    layer = layer_of()
    x = torch.randn(3, 64)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    p = double(layer)
    torch.testing.assert_close(layer(x).double(), formula(layer, p, x.double(), x.double()), rtol=1e-5, atol=1e-5)
    layer.half().float()
    p = double(layer)
    torch.testing.assert_close(layer(x).double(), formula(layer, p, x.double(), x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    layer = layer_of()
    x = torch.randn(3, 64)
    y = layer(x)
    other = copied(layer)
    assert torch.equal(other(x), y)
    with torch.no_grad():
        other.weight.mul_(2)
        other.lora_magnitude_vector.mul_(3)
    assert torch.equal(layer(x), y) and not torch.allclose(other(x), y)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles(dropout):
    torch._dynamo.reset()
    layer = layer_of("nf4", lora_dropout=dropout)
    x = torch.randn(5, 64)

    def run(call):
        torch.manual_seed(3)
        layer.zero_grad()
        y = call(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in layer.adapter_parameters().values())]

    for a, b in zip(run(layer), run(torch.compile(layer, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(b, a)


def test_state_dict_and_explain():
    layer, other = layer_of(), LoRALinear(64, 48, r=4, lora_alpha=6, use_dora=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))
    assert "use_dora=True" in repr(layer) and "use_dora" not in repr(LoRALinear(8, 8))
    assert "DoRA" in peftkern.explain(layer) and "DoRA" not in peftkern.explain(LoRALinear(8, 8))
    with pytest.raises(RuntimeError, match="lora_magnitude_vector"):
        other.load_state_dict(LoRALinear(64, 48, r=4).state_dict())


# ---- whole models, files ---------------------------------------------------------------------------------------------


def test_quantized_model_and_its_files(tmp_path):
    model = peftkern.adapt(llama(), LoraConfig(r=2, use_dora=True), quantize="nf4").eval()
    with torch.no_grad():
        for p in peftkern.trainable_parameters(model):
            p.add_(0.1 * torch.randn_like(p))
    peftkern.save_adapter(model, tmp_path)
    again = peftkern.adapt(llama(), LoraConfig(r=2, use_dora=True), quantize="nf4").eval()
    peftkern.load_adapter(again, tmp_path)
    x = torch.tensor([[3, 4, 5]])
    assert torch.equal(again(x).logits, model(x).logits)


def test_a_file_of_the_other_kind_is_refused(tmp_path):
    plain, dora = (peftkern.adapt(llama(), LoraConfig(r=2, use_dora=d)) for d in (False, True))
    peftkern.save_adapter(plain, tmp_path / "plain")
    peftkern.save_adapter(dora, tmp_path / "dora")
    with pytest.raises(ValueError, match=r"adapter_config.json: expected use_dora=True, as model.* has it, got False"):
        peftkern.load_adapter(dora, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"adapter_config.json: expected use_dora=False, as model.* has it, got True"):
        peftkern.load_adapter(plain, tmp_path / "dora")


def test_what_wants_plain_lora_refuses(tmp_path):
    model = peftkern.adapt(llama(), LoraConfig(r=2, use_dora=True))
    folder = peftkern.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"expected a layer that adds s B A to its weight"):
        peftkern.compress(model, rank=1)
    with pytest.raises(ValueError, match="adapter_model.safetensors: use_dora: expected False"):
        peftkern.compress(folder, rank=1, output=tmp_path / "small")
    bank = peftkern.AdapterBank(llama(), capacity=2, max_rank=4)
    with pytest.raises(ValueError, match="dora: use_dora: expected False"):
        bank.add("dora", folder)


def test_layers_put_in_by_hand_agree(tmp_path):
    model = nn.Sequential(LoRALinear(8, 8, use_dora=True), LoRALinear(8, 8, use_dora=True))
    peftkern.save_adapter(model, tmp_path)
    assert peftkern.load_adapter(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), tmp_path)[1].use_dora
    model[1] = LoRALinear(8, 8)
    with pytest.raises(RuntimeError, match="1: expected use_dora=True, one value for all layers of an adapter"):
        peftkern.save_adapter(model, tmp_path)
