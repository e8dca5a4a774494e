# SPDX-License-Identifier: Apache-2.0
"""LoRALinear, QLoRALinear and NF4Linear: values, gradients, merging, state dicts, and what torch does with modules."""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from conftest import assert_close
from samples import BF16, F16, F32
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import LoRALinear, NF4Config, NF4Linear, NF4Weight, QLoRALinear, reference


@dataclass(frozen=True)
class Case:
    """One layer and its input; base: the dtype of a dense weight, or how it is quantized; r: None for NF4Linear."""

    base: torch.dtype | NF4Config = F32
    x: torch.dtype = F32
    adapter: torch.dtype = F32
    rows: tuple[int, ...] = (6,)
    fan_in: int = 64
    fan_out: int = 40
    r: int | None = 4
    dropout: float = 0.0
    bias: bool = True
    rslora: bool = False

    def __str__(self) -> str:
        base = f"nf4-{self.base.block_size}-{self.base.double_quant}" if isinstance(self.base, NF4Config) else self.base
        dtypes = "-".join(str(d).removeprefix("torch.") for d in (base, self.x, self.adapter))
        size = "x".join(map(str, (*self.rows, self.fan_in, self.fan_out)))
        return f"{dtypes}-{size}-r{self.r}-p{self.dropout}-bias{self.bias:d}"

    def make(self) -> LoRALinear | NF4Linear:
        quantized = isinstance(self.base, NF4Config)
        if self.r is None:
            return NF4Linear(
                self.fan_in, self.fan_out, self.bias, self.base.block_size, self.base.double_quant, dtype=self.x
            )
        cls, options = (QLoRALinear, {"quantize": self.base}) if quantized else (LoRALinear, {})
        return cls(
            self.fan_in, self.fan_out, r=self.r, lora_alpha=7, lora_dropout=self.dropout, bias=self.bias,
            use_rslora=self.rslora, init_lora_weights=False, dtype=self.x if quantized else self.base,
            adapter_dtype=self.adapter, **options,
        )  # fmt: skip

    def input(self) -> torch.Tensor:
        return torch.randn(*self.rows, self.fan_in, dtype=self.x).requires_grad_()


NF4, NF4_DQ, NF4_32 = NF4Config(64), NF4Config(64, double_quant=True), NF4Config(32)

CASES = [
    Case(),
    Case(rows=(2, 3, 2), dropout=0.3, rslora=True),
    Case(rows=(), bias=False),
    Case(rows=(0, 3)),
    Case(fan_in=33, fan_out=17, r=3, dropout=0.5),
    Case(BF16, BF16, rows=(2, 5), dropout=0.1),
    Case(BF16, BF16, BF16),
    Case(F16, F16, dropout=0.1),
    Case(BF16, F32),
    Case(F32, BF16, BF16),
    Case(NF4, dropout=0.2),
    Case(NF4_DQ, BF16, rows=(3, 4), dropout=0.1),
    Case(NF4_DQ, BF16, BF16, bias=False),
    Case(NF4_32, F16, fan_in=33, fan_out=15),
    Case(NF4Config(32, True), fan_in=35, fan_out=15, r=5, dropout=0.4),
    Case(NF4, r=None),
    Case(NF4_DQ, BF16, rows=(2, 3), r=None),
    Case(NF4Config(32, True), fan_in=33, fan_out=15, rows=(), r=None),
    Case(NF4Config(128), F16, bias=False, r=None),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)

MODULES = {
    "lora": Case(dropout=0.2),
    "lora-bf16": Case(BF16, BF16, dropout=0.2),
    "qlora": Case(NF4_DQ, dropout=0.2),
    "qlora-bf16": Case(NF4, BF16, dropout=0.2),
    "qlora-odd": Case(NF4_32, fan_in=33, fan_out=15, r=3),
    "nf4": Case(NF4, r=None),
    "nf4-dq-odd": Case(NF4Config(32, True), fan_in=33, fan_out=15, r=None),
}
every_module = pytest.mark.parametrize("case", MODULES.values(), ids=MODULES)
ADAPTED = {name: case for name, case in MODULES.items() if case.r}
merging_modules = pytest.mark.parametrize("case", ADAPTED.values(), ids=ADAPTED)


def effective_weight(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight the definition asks for: NF4 dequantized to the dtype of the activations, a dense one cast to it."""
    weight = layer.base_weight()
    if not isinstance(weight, NF4Weight):
        return weight.detach().to(dtype)
    absmax = weight.absmax
    if weight.double_quant:
        absmax = reference.dequantize_absmax(weight.absmax, weight.nested_absmax, weight.offset)
    return reference.dequantize_nf4(weight.packed, absmax, weight.block_size, weight.shape, dtype)


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine
    )


def run(layer, x: torch.Tensor, call=None) -> list[torch.Tensor]:
    """Output and all gradients, the dropout mask fixed."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    y = (layer if call is None else call)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


@cases
def test_values_and_gradients(case, device):
    layer, x = case.make().to(device), case.input().detach().to(device).requires_grad_()
    torch.manual_seed(11)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert y.dtype == case.x and y.shape == (*case.rows, case.fan_out)

    trained = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    leaves = {name: t.detach().cpu().double().requires_grad_() for name, t in trained.items()}
    terms = {}
    if case.r:
        torch.manual_seed(11)
        seed = int(torch.randint(2**62, (), dtype=torch.int64, device=device)) if case.dropout else 0
        scaling = 7 / (case.r**0.5 if case.rslora else case.r)
        terms = {
            "A": leaves["lora_A"],
            "B": leaves["lora_B"],
            "scaling": scaling,
            "dropout_p": case.dropout,
            "seed": seed,
        }
    bias = leaves.get("bias", None if layer.bias is None else layer.bias.detach().cpu().double())
    expected = reference.adapted_linear(leaves["x"], effective_weight(layer.cpu(), case.x).double(), bias=bias, **terms)
    expected.backward(g.cpu().double())
    assert_close(y, expected, case.x, "y")
    assert set(trained) == {"x"} | ({"lora_A", "lora_B"} if case.r else {"bias"} if case.bias else set())
    for name, t in trained.items():
        assert t.grad.dtype == t.dtype
        assert_close(
            t.grad, leaves[name].grad, case.x if name == "x" else max_error(case.x, t.dtype), f"grad of {name}"
        )


def max_error(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype with the largest tolerance."""
    return next(d for d in (BF16, F16, F32) if d in dtypes)


@cases
def test_without_gradients_the_bits_are_the_same(case):
    layer, x = case.make().eval(), case.input()
    y = layer(x)
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(layer(x), y), "training mode"


@pytest.mark.parametrize("base", [F32, NF4_DQ], ids=["dense", "nf4"])
def test_dropout_follows_torchs_generator(base):
    case = Case(base, rows=(64,), dropout=0.5)
    layer, x = case.make(), case.input()
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train().lora_dropout = 0.0
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("base", [F32, BF16, NF4, NF4_DQ], ids=str)
def test_autocast_computes_in_bf16(base):
    case = Case(base, F32, rows=(8,), dropout=0.3)
    layer, x = case.make(), case.input()
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == BF16
    y.float().square().sum().backward()
    grads = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    assert [g.dtype for g in grads] == [F32, F32, F32]
    layer.zero_grad()
    low = x.detach().to(BF16).requires_grad_()
    torch.manual_seed(2)
    z = layer(low)
    z.float().square().sum().backward()
    assert torch.equal(y, z)
    for got, expected in zip(grads, [low.grad.float(), layer.lora_A.grad, layer.lora_B.grad], strict=True):
        assert torch.equal(got, expected)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert layer(x).dtype == F32


@pytest.mark.parametrize("linear_dtype", [F32, BF16], ids=str)
def test_from_linear_shares_the_layer(linear_dtype):
    linear = nn.Linear(16, 8, dtype=linear_dtype)
    weight, bias = linear.weight, linear.bias
    layer = LoRALinear.from_linear(linear, r=2, lora_alpha=3, lora_dropout=0.25)
    assert layer.weight is weight and layer.bias is bias and not weight.requires_grad and not bias.requires_grad
    assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.scaling) == (2, 3, 0.25, 1.5)
    assert layer.lora_A.shape == (2, 16) and layer.lora_B.shape == (8, 2)
    assert layer.lora_A.dtype == layer.lora_B.dtype == F32
    assert LoRALinear.from_linear(linear, adapter_dtype=BF16).lora_A.dtype == BF16
    x = torch.randn(3, 16, dtype=linear_dtype)
    assert_close(layer(x), linear(x), linear_dtype)  # B starts at zero

    quantized = NF4Linear.from_linear(linear, 32, double_quant=True)
    assert quantized.bias is bias
    again = LoRALinear.from_linear(quantized)
    assert again.weight.data_ptr() == quantized.weight.data_ptr()
    assert again.nf4_config == NF4Config(32, True) and again.quantized_dtype == linear_dtype


def test_from_linear_quantizes_as_asked():
    linear = nn.Linear(64, 8)
    assert LoRALinear.from_linear(linear).nf4_config is None
    assert LoRALinear.from_linear(linear, quantize="nf4").nf4_config == NF4Config()
    assert LoRALinear.from_linear(linear, quantize=NF4_32).nf4_config == NF4_32
    assert QLoRALinear.from_linear(linear).nf4_config == QLoRALinear(64, 8).nf4_config == NF4_DQ
    assert QLoRALinear.from_linear(linear, quantize="nf4").nf4_config == NF4Config()
    assert QLoRALinear(64, 8, quantize="nf4").nf4_config == NF4Config()
    assert QLoRALinear.from_linear(NF4Linear(64, 8, block_size=32)).nf4_config == NF4_32
    assert isinstance(QLoRALinear.from_linear(linear), QLoRALinear)
    packed, absmax = reference.quantize_nf4(linear.weight, 64)
    layer = LoRALinear.from_linear(linear, quantize="nf4")
    assert torch.equal(layer.weight.reshape(-1), packed) and torch.equal(layer.absmax.view(F32), absmax)


def test_initial_adapters():
    torch.manual_seed(0)
    kaiming, gaussian = LoRALinear(400, 8, r=50), LoRALinear(400, 8, r=50, init_lora_weights="gaussian")
    random = LoRALinear(400, 8, r=50, init_lora_weights=False)
    assert not kaiming.lora_B.any() and not gaussian.lora_B.any() and random.lora_B.all()
    assert kaiming.lora_A.abs().max() <= 400**-0.5 and kaiming.lora_A.std().item() == pytest.approx(
        (3 * 400) ** -0.5, rel=0.03
    )
    assert gaussian.lora_A.std().item() == pytest.approx(1 / 50, rel=0.03)
    assert LoRALinear(8, 8, r=4, lora_alpha=6).scaling == 1.5
    assert LoRALinear(8, 8, r=4, lora_alpha=6, use_rslora=True).scaling == 3.0


@every_module
def test_only_the_adapter_trains(case):
    layer = case.make()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    torch.optim.SGD(peftkern.trainable_parameters(layer), lr=1.0)
    run(layer, case.input())
    with torch.no_grad():
        for p in peftkern.trainable_parameters(layer):
            p -= p.grad
    changed = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert changed == ({"lora_A", "lora_B"} if case.r else {"bias"})


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize(
    "case, merged", [(c, False) for c in MODULES.values()] + [(c, True) for c in ADAPTED.values()], ids=str
)
def test_copies_compute_the_same(case, how, merged):
    layer = case.make().eval()
    if merged:
        layer.merge()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(layer) and not other.training and same_tensors(layer, other)
    x = case.input()
    assert torch.equal(layer(x), other(x))
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(layer.parameters(), other.parameters(), strict=True))
    if merged:
        assert other.merged
        other.unmerge()
        layer.unmerge()
        assert torch.equal(other(x), layer(x)) and torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("convert", [lambda m: m.to(BF16), lambda m: m.half(), lambda m: m.float().bfloat16()])
@pytest.mark.parametrize("case", [c for c in MODULES.values() if isinstance(c.base, NF4Config)], ids=str)
def test_converting_leaves_nf4_alone(case, convert):
    layer = case.make()
    names = [n for n, p in layer.named_parameters() if p.dtype == torch.uint8]
    before = {n: getattr(layer, n).detach().clone() for n in names}
    dense = peftkern.dequantize_nf4(layer.base_weight(), F32)
    convert(layer)
    assert {"weight", "absmax"} <= set(names)
    assert all(torch.equal(getattr(layer, n), before[n]) for n in names)
    assert torch.equal(peftkern.dequantize_nf4(layer.base_weight(), F32), dense)
    assert layer.bias.dtype in (BF16, F16)
    assert layer(case.input().to(layer.bias.dtype)).dtype == layer.bias.dtype


def test_modules_behave_as_modules():
    model = nn.Sequential(*(case.make() for case in MODULES.values()))
    assert all(not m.training for m in model.eval()) and all(m.training for m in model.train())
    seen = []
    model.apply(seen.append)
    assert len(seen) == len(MODULES) + 1
    for layer in model:
        assert f"in_features={layer.in_features}" in repr(layer)
    assert [isinstance(m, nn.Linear) for m in model] == [case.r is None for case in MODULES.values()]
    assert "r=4" in repr(model[0]) and all("block_size=64" in repr(model[k]) for k in (2, 3, 5))
    layer = model[0]
    layer.merge()
    assert "merged" in repr(layer)


def test_nf4_linear_is_a_linear():
    linear = nn.Linear(64, 24, dtype=BF16)
    layer = NF4Linear.from_linear(linear)
    weight = layer.weight.detach().clone()
    layer.reset_parameters()
    assert isinstance(layer, nn.Linear) and torch.equal(layer.weight, weight)
    assert layer.dequantize().dtype == BF16 and layer.dequantize(F32).dtype == F32
    assert torch.equal(layer.dequantize(), effective_weight(layer, BF16))
    assert layer.weight.dtype == torch.uint8 and layer.weight.shape == (24, 32) and not layer.weight.requires_grad
    assert layer.bias.requires_grad


@pytest.mark.parametrize("base", [F32, NF4_DQ], ids=["dense", "nf4"])
def test_activation_checkpointing_repeats_the_mask(base):
    layers = nn.Sequential(*(Case(base, fan_out=64, dropout=0.5).make() for _ in range(2)))
    x = torch.randn(16, 64)
    plain = run(layers, x)
    recomputed = run(layers, x, lambda t: checkpoint(layers, t, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize(
    "case, state",
    [(c, state) for c in MODULES.values() for state in ("train", "eval")] + [(c, "merged") for c in ADAPTED.values()],
    ids=str,
)
def test_compiled_equals_eager(case, state):
    torch._dynamo.reset()
    layer = case.make().train(state == "train")
    if state == "merged":
        layer.merge()
        layer.bias.requires_grad_()
    x = case.input()
    eager = run(layer, x)
    compiled = run(layer, x, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(b, a)


# ---- merging --------------------------------------------------------------------------------------------------------


@merging_modules
def test_merged_computes_the_same(case):
    layer, x = case.make().eval(), case.input().detach()
    with torch.no_grad():
        layer.lora_B.mul_(0.1)
    y = layer(x)
    original = effective_weight(layer, F32)
    delta = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double())
    assert layer.delta_weight().dtype == F32
    assert_close(layer.delta_weight(), delta, F32)
    layer.merge()
    assert layer.merged and layer.weight.requires_grad is False
    exact = original + layer.delta_weight()
    if isinstance(case.base, NF4Config):
        packed, absmax = reference.quantize_nf4(exact, case.base.block_size)
        assert torch.equal(layer.weight.reshape(-1), packed)
        if case.base.double_quant:
            codes, nested, offset = reference.quantize_absmax(absmax)
            assert torch.equal(layer.absmax, codes) and torch.equal(layer.nested_absmax.view(F32), nested)
            assert torch.equal(layer.absmax_offset.view(F32), offset.reshape(1))
        else:
            assert torch.equal(layer.absmax.view(F32), absmax)
        assert layer.nf4_config == case.base and layer.quantized_dtype == case.x
        half_step = (exact - effective_weight(layer, F32)).norm() / exact.norm()
        assert half_step < 0.12, "more than what NF4 rounds off"
    else:
        assert torch.equal(layer.weight, exact.to(case.base))
        assert_close(layer(x), y, case.x, slack=2)
    expected = x.float() @ effective_weight(layer, F32).T + layer.bias.float()
    assert_close(layer(x), expected, max_error(case.x, BF16 if case.base == BF16 else F32))
    layer.train()
    assert torch.equal(layer(x), layer(x)), "a merged layer has no dropout"


@merging_modules
def test_unmerge_restores_every_byte(case):
    layer = case.make()
    before = copy.deepcopy(layer.state_dict())
    objects = dict(layer.named_parameters())
    layer.merge()
    assert not torch.equal(layer.weight, before["weight"])
    assert set(dict(layer.named_parameters())) == set(objects)
    layer.unmerge()
    assert not layer.merged
    after = dict(layer.named_parameters())
    assert set(after) == set(objects) and all(after[n] is objects[n] for n in objects)
    assert all(torch.equal(before[n], t) for n, t in layer.state_dict().items())
    assert {n for n, p in after.items() if p.requires_grad} == {"lora_A", "lora_B"}


@merging_modules
def test_merging_twice_is_an_error(case):
    layer = case.make()
    with pytest.raises(RuntimeError, match="unmerge: not merged"):
        layer.unmerge()
    layer.merge()
    weight = layer.weight
    with pytest.raises(RuntimeError, match="merge: already merged"):
        layer.merge()
    assert layer.weight is weight and layer.merged


@merging_modules
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_safe_merge_refuses_infinity(case, value):
    layer = case.make()
    with torch.no_grad():
        layer.lora_B[1, 1] = value
    before, objects = copy.deepcopy(layer.state_dict()), dict(layer.named_parameters())
    with pytest.raises(ValueError, match="merge: expected finite merged weights, got NaN or infinity"):
        layer.merge(safe=True)
    assert not layer.merged
    after = dict(layer.named_parameters())
    assert after.keys() == objects.keys() and all(after[n] is objects[n] for n in objects)
    assert all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in before)
    if isinstance(case.base, NF4Config):
        with pytest.raises(ValueError, match="expected finite weights"):
            layer.merge()
        assert not layer.merged


def test_safe_merge_looks_at_the_rounded_weight():
    layer = LoRALinear(4, 4, r=1, lora_alpha=1, dtype=F16)
    with torch.no_grad():
        layer.lora_A.fill_(300.0)
        layer.lora_B.fill_(300.0)  # 90000 is finite in float32 and above the largest float16
    with pytest.raises(ValueError, match="merge: expected finite merged weights"):
        layer.merge(safe=True)
    layer.merge()
    assert torch.isinf(layer.weight).all()


@merging_modules
def test_state_dict_while_merged_is_the_unmerged_one(case):
    layer = case.make()
    before = copy.deepcopy(layer.state_dict())
    layer.merge()
    merged = layer.state_dict()
    assert merged.keys() == before.keys() and all(torch.equal(merged[n], before[n]) for n in before)
    assert not any(t.requires_grad for t in merged.values())
    with pytest.raises(RuntimeError, match="1: expected an unmerged layer to load into; unmerge"):
        nn.Sequential(nn.ReLU(), layer).load_state_dict({f"1.{n}": t for n, t in before.items()})
    with pytest.raises(RuntimeError, match="module: expected an unmerged layer"):
        layer.load_state_dict(before)
    layer.unmerge()
    layer.load_state_dict(before)


@merging_modules
def test_unmerge_after_a_conversion(case):
    """The weight that is kept aside follows the module, as if it had been converted unmerged."""
    layer = case.make()
    expected = copy.deepcopy(layer).half()
    layer.merge()
    layer.half().unmerge()
    assert same_tensors(layer, expected)


# ---- state dicts ----------------------------------------------------------------------------------------------------


@every_module
@pytest.mark.parametrize("through", ["memory", "safetensors", "assign"])
def test_state_dict_round_trip(case, through, tmp_path):
    layer = nn.Sequential(case.make(), case.make())
    torch.manual_seed(99)
    other = nn.Sequential(case.make(), case.make())
    state = layer.state_dict()
    if through != "memory":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(state, tmp_path / "m.safetensors")
        state = safetensors.load_file(tmp_path / "m.safetensors")
    assert all(type(t) is torch.Tensor for t in state.values())
    result = other.load_state_dict(state, strict=True, assign=through == "assign")
    assert not result.missing_keys and not result.unexpected_keys
    assert same_tensors(layer, other)
    trained = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in other.named_parameters() if p.requires_grad]
    for a, b in zip(layer, other, strict=True):
        x = case.input()
        assert torch.equal(a.eval()(x), b.eval()(x))


def test_damaged_state_dicts_are_refused():
    layer = NF4Linear(64, 8, double_quant=True)
    state = layer.state_dict()
    for name, changed, message in [
        ("absmax", state["absmax"][:4], "size mismatch for absmax"),
        ("weight", state["weight"][:4], "size mismatch for weight"),
        ("weight", torch.full((8, 64), float("nan")), "weight: w: expected finite weights, got 512 NaN"),
        ("weight", torch.ones(4, 64), r"weight: weight: expected shape \(8, 64\), got \(4, 64\)"),
        ("nested_absmax", None, "Missing key.*nested_absmax"),
    ]:
        damaged = {n: t for n, t in state.items() if n != name} | ({} if changed is None else {name: changed})
        before = copy.deepcopy(layer)
        with pytest.raises((RuntimeError, ValueError), match=message):
            layer.load_state_dict(damaged)
        assert same_tensors(layer, before)


def test_a_dense_checkpoint_is_quantized_on_loading():
    linear = nn.Linear(64, 24, dtype=BF16)
    for layer in (NF4Linear(64, 24, block_size=32, double_quant=True), NF4Linear(64, 24, dtype=BF16)):
        config = layer.nf4_config
        layer.load_state_dict(linear.state_dict())
        expected = NF4Linear.from_linear(linear, config.block_size, config.double_quant)
        assert layer.nf4_config == config and torch.equal(layer.dequantize(F32), expected.dequantize(F32))
        assert torch.equal(layer.bias.to(BF16), linear.bias)
    lora = QLoRALinear(64, 24, quantize=NF4_32)
    result = lora.load_state_dict(linear.state_dict(), strict=False)
    assert set(result.missing_keys) == {"lora_A", "lora_B"} and not result.unexpected_keys
    assert torch.equal(lora.weight, NF4Linear.from_linear(linear, 32).weight)


@pytest.mark.parametrize(
    "make", [lambda: LoRALinear(64, 32, device="meta"), lambda: QLoRALinear(64, 32, device="meta")]
)
def test_on_the_meta_device(make):
    """Shapes without memory, as sharded loading starts from; to_empty then gives it memory."""
    layer = make()
    assert layer(torch.randn(3, 64, device="meta")).shape == (3, 32)
    assert layer.to_empty(device="cpu").weight.device.type == "cpu"


def test_weights_in_one_flat_buffer_at_odd_offsets():
    """As sharded training lays parameters out: the float32 scales then start at any byte."""
    layer = NF4Linear(64, 32, double_quant=True)
    state = layer.state_dict()
    quantized = {name: t for name, t in state.items() if t.dtype == torch.uint8}
    flat, at = torch.zeros(1 + sum(t.numel() for t in quantized.values()), dtype=torch.uint8), 1
    for name, t in quantized.items():
        flat[at : at + t.numel()] = t.reshape(-1)
        state[name] = flat[at : at + t.numel()].view(t.shape)
        at += t.numel()
    other = NF4Linear(64, 32, double_quant=True)
    other.load_state_dict(state, assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))


def test_the_quantized_dtype_travels_with_the_state_dict(tmp_path):
    """In its metadata, so that no key is added; torch.save keeps that, a plain dict does not."""
    for layer in (NF4Linear.from_linear(nn.Linear(64, 32).bfloat16()), QLoRALinear(64, 32, r=2, dtype=torch.bfloat16)):
        fresh = NF4Linear(64, 32) if isinstance(layer, NF4Linear) else QLoRALinear(64, 32, r=2)
        assert fresh.quantized_dtype == torch.float32
        fresh.load_state_dict(dict(layer.state_dict()))
        assert fresh.quantized_dtype == torch.float32
        torch.save(nn.Sequential(layer).state_dict(), tmp_path / "state.pt")
        nn.Sequential(fresh).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert fresh.quantized_dtype == torch.bfloat16
        before, after = layer.base_weight(), fresh.base_weight()
        assert torch.equal(peftkern.dequantize_nf4(before), peftkern.dequantize_nf4(after))
