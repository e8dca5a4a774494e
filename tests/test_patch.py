# SPDX-License-Identifier: Apache-2.0
"""HF PEFT models, patched and not: the same results, and everything else as it was."""

import contextlib
import copy
import math

import pytest
import torch
from samples import BF16, F32
from test_adapt import TOKENS, tiny_llama
from torch import nn

import peftkern
from peftkern import NF4Linear

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft.tuners.adalora.layer import SVDLinear  # noqa: E402
from peft.tuners.lora import Linear as LoraLinear  # noqa: E402

LORA = {"r": 4, "lora_alpha": 6}
TARGETS = {"target_modules": "all-linear"}


def lora(**options):
    return peft.LoraConfig(**{**LORA, **TARGETS, **options})


def adalora(**options):
    return peft.AdaLoraConfig(**{"init_r": 5, "target_r": 3, "total_step": 100, "lora_alpha": 6, **TARGETS, **options})


CONFIGS = {
    "lora": lambda: lora(),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "dora with dropout": lambda: lora(use_dora=True, lora_dropout=0.2),  # PEFT's own masks: also equal
    "trained biases": lambda: lora(bias="all"),
    "ranks and alphas": lambda: lora(rank_pattern={"q_proj": 1, "up_proj": 9}, alpha_pattern={"k_proj": 30}),
    "adalora": lambda: adalora(),
}


def randomize(model: nn.Module) -> nn.Module:
    """Adapters that do something: PEFT starts B and E at zero, and the magnitude at the norm."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_E" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
            elif "magnitude" in name:
                p.mul_(torch.rand(p.shape, generator=g) + 0.5)
    return model


def build(config, dtype: torch.dtype = F32, base=tiny_llama, **options) -> nn.Module:
    model = base(dtype)
    torch.manual_seed(3)
    return randomize(peft.get_peft_model(model, config, **options)).train()


def run(model: nn.Module, autocast: bool = False, **inputs) -> dict[str, torch.Tensor]:
    """Logits and every gradient."""
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = model(input_ids=TOKENS, labels=TOKENS, **inputs)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {
        n.removeprefix("_orig_mod."): p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None
    }


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def gradients(result: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.double().flatten() for name, t in sorted(result.items()) if name != "logits"])


def assert_equal_results(got: dict, expected: dict, tolerance: float = 1e-6) -> None:
    assert got.keys() == expected.keys()
    assert all(got[k].dtype == expected[k].dtype for k in got)
    assert relative(got["logits"], expected["logits"]) <= tolerance
    assert relative(gradients(got), gradients(expected)) <= tolerance


def assert_equal_in_bf16(got: dict, expected: dict, exact: dict, once: bool, slack: float = 1.25) -> None:
    """once: PEFT rounds the sum once, as we do: then one ulp of the output's scale between the two. Elsewhere it also
    rounds x A^T, what B makes of it, and the scaling of that, and is itself further off: then float64 is the
    measure, 1.6 ulp after all layers of the model (test_patch_bf16.py asks one of each alone)."""
    assert got["logits"].dtype == expected["logits"].dtype
    ulp = bf16_ulp(expected["logits"])
    if once:
        assert (got["logits"] - expected["logits"]).abs().max() <= ulp
    ours, theirs = ((r["logits"].double() - exact["logits"]) / ulp for r in (got, expected))
    assert ours.abs().max() <= max(1.6, theirs.abs().max())
    assert ours.square().mean().sqrt() <= 1.1 * theirs.square().mean().sqrt()
    ours, theirs = ((gradients(r) - gradients(exact)).norm() for r in (got, expected))
    assert ours <= slack * theirs


def bf16_ulp(scale: torch.Tensor) -> float:
    return 2.0 ** (math.floor(math.log2(scale.abs().max().item())) - 7)


def patched_layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m).__module__ == "peftkern.patch"]


def fused_calls(model: nn.Module, monkeypatch) -> list[nn.Module]:
    """Fills with the layers whose own forward PEFT runs: empty if all is fused."""
    slow: list[nn.Module] = []
    for cls in (LoraLinear, SVDLinear):
        original = cls.forward

        def spy(self, *args, _original=original, **kwargs):
            slow.append(self)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "forward", spy)
    return slow


# ---- the same results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_equals_peft(name, monkeypatch):
    model = build(CONFIGS[name]())
    expected = run(model)
    exact = gradients(run(copy.deepcopy(model).double()))
    peftkern.patch(model)
    slow = fused_calls(model, monkeypatch)
    got = run(model)
    assert not slow
    assert_equal_results(got, expected)
    # and of two results that differ in their last bits, ours is no worse
    ours, theirs = relative(gradients(got), exact), relative(gradients(expected), exact)
    assert ours <= max(2 * theirs, 1e-6)


@pytest.mark.parametrize("adapter_dtype", ["fp32 adapters", "bf16 adapters"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_equals_peft(name, adapter_dtype, monkeypatch):
    model = build(CONFIGS[name](), BF16, autocast_adapter_dtype=adapter_dtype == "fp32 adapters")
    expected = run(model)
    exact = run(copy.deepcopy(model).double())
    peftkern.patch(model)
    slow = fused_calls(model, monkeypatch)
    got = run(model)
    assert not slow
    assert got["logits"].dtype == BF16
    assert_equal_in_bf16(got, expected, exact, once=adapter_dtype == "fp32 adapters", slack=1.6)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_equals_peft(name, dtype, monkeypatch):
    model = build(CONFIGS[name](), dtype)
    expected, exact = run(model, autocast=True), run(copy.deepcopy(model).double())
    peftkern.patch(model)
    slow = fused_calls(model, monkeypatch)
    got = run(model, autocast=True)
    assert not slow
    assert_equal_in_bf16(got, expected, exact, once=False)


@pytest.mark.parametrize("config", [lora, adalora])
def test_dropout(config):
    """Our mask is another, so: the same mean, the same mask again from the same seed, none in eval mode."""
    linear = nn.Linear(64, 48, bias=False)
    model = peft.get_peft_model(nn.Sequential(linear), config(target_modules=["0"], lora_dropout=0.5))
    x = torch.randn(3, 64)
    randomize(model).eval()
    expected = model(x)
    peftkern.patch(model)
    torch.testing.assert_close(model(x), expected)
    model.train()
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first) and not torch.equal(first, expected)
    mean = torch.stack([model(x).detach() for _ in range(2000)]).mean(0)
    assert relative(mean, expected) < 0.05


@pytest.mark.parametrize("with_dropout", [False, True])
def test_several_active_adapters(with_dropout, monkeypatch):
    model = build(lora())
    model.add_adapter("two", lora(r=3, lora_alpha=20, use_rslora=True, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("three", lora(r=2, target_modules=["up_proj"], lora_dropout=0.5 if with_dropout else 0.0))
    randomize(model)
    model.base_model.set_adapter(["default", "two", "three"])
    model.requires_grad_(False)
    model.set_requires_grad(["default", "two", "three"])
    expected = run(model)
    peftkern.patch(model)
    slow = fused_calls(model, monkeypatch)
    got = run(model)
    if with_dropout:  # PEFT draws a mask for each adapter, so those layers are left to it, masks and all
        assert len(slow) == 2 and "several active adapters with dropout" in peftkern.explain(model)
    else:
        assert not slow
    assert_equal_results(got, expected)
    model.eval()
    with torch.no_grad():
        first, again = model(TOKENS).logits, model(TOKENS).logits
        model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.two.weight").mul_(3.0)
        changed = model(TOKENS).logits
    assert torch.equal(first, again) and not torch.equal(first, changed), "joined factors are kept, until one changes"


def gpt2(dtype: torch.dtype = F32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype)


@pytest.mark.parametrize(
    "config", [lora, adalora, lambda **kw: lora(use_dora=True, **kw)], ids=["lora", "adalora", "dora"]
)
def test_conv1d(config, monkeypatch):
    targets = ["c_attn", "c_proj", "c_fc"]
    model = build(config(target_modules=targets, fan_in_fan_out=True), base=gpt2)
    expected = run(model)
    peftkern.patch(model)
    slow = fused_calls(model, monkeypatch)
    assert_equal_results(run(model), expected)
    assert not slow and "Conv1D base" in peftkern.explain(model)


def nf4_llama(dtype: torch.dtype = F32) -> nn.Module:
    model = tiny_llama(dtype)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, NF4Linear.from_linear(child, block_size=32, double_quant=True))
    return model


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [lora, adalora])
def test_nf4linear_base(config, dtype, monkeypatch):
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    model = build(config(target_modules=targets), dtype, base=nf4_llama)
    expected = run(model)
    peftkern.patch(model)
    slow = fused_calls(model, monkeypatch)
    got = run(model)
    assert not slow and "NF4 base" in peftkern.explain(model)
    if dtype == F32:
        assert_equal_results(got, expected)
    else:
        assert (got["logits"] - expected["logits"]).abs().max() <= bf16_ulp(expected["logits"])


def test_merging_into_an_nf4linear():
    """PEFT's own merge adds to the packed bytes and fails; unmerging is exact."""
    model = build(lora(), base=nf4_llama).eval()
    peftkern.patch(model)
    logits = model(TOKENS).logits
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.merge_adapter()
    merged = model(TOKENS).logits
    assert not torch.equal(merged, logits) and relative(merged, logits) < 0.2, "requantized"
    assert "merged into the base weight" in peftkern.explain(model)
    model.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(TOKENS).logits, logits)
    plain = model.merge_and_unload()
    assert torch.equal(plain(TOKENS).logits, merged)
    assert type(plain.model.layers[0].self_attn.q_proj) is NF4Linear


def bnb_llama(dtype: torch.dtype = F32, double_quant: bool = True) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama(dtype, head_dim=16)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name not in ("lm_head", "down_proj"):
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=child.bias is not None,
                                        quant_type="nf4", compute_dtype=dtype)  # fmt: skip
                new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", blocksize=32,
                                               compress_statistics=double_quant)  # fmt: skip
                new.bias = child.bias
                setattr(parent, name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def exact_twin(model: nn.Module) -> nn.Module:
    """A float64 model with the dequantized weights."""
    import bitsandbytes as bnb

    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if type(child) is bnb.nn.Linear4bit:
                dense = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                weight = bnb.functional.dequantize_4bit(child.weight.data, child.weight.quant_state)
                dense.weight = nn.Parameter(weight, requires_grad=False)
                dense.bias = child.bias
                setattr(parent, name, dense)
    return twin.double()


@pytest.mark.parametrize(
    "dtype, autocast", [(F32, False), (BF16, False), (BF16, True)], ids=["fp32", "bf16", "autocast"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_bitsandbytes_base(name, dtype, autocast, monkeypatch):
    config = CONFIGS[name]()
    model = build(config, dtype, base=bnb_llama)
    state = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    expected, exact = run(model, autocast), run(exact_twin(model)) if dtype == BF16 else None
    peftkern.patch(model)
    slow = fused_calls(model, monkeypatch)
    for cls in {type(m)._peftkern_class for m in model.modules() if type(m).__name__.endswith("4bit") and
                hasattr(type(m), "_peftkern_class")}:  # fmt: skip
        monkeypatch.setattr(cls, "forward", lambda self, *a, **k: pytest.fail("PEFT's forward"))
    got = run(model, autocast)
    assert not slow and "bitsandbytes NF4 base" in peftkern.explain(model)
    if dtype == F32:
        assert_equal_results(got, expected)
    else:
        assert_equal_in_bf16(got, expected, exact, once=False)
    after = {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    assert after.keys() == state.keys() and all(torch.equal(t, after[n]) for n, t in state.items())


def test_bitsandbytes_in_another_dtype_than_it_computes_in():
    """float32 activations, bfloat16 products: that is bitsandbytes' to round."""
    model = build(lora(), base=bnb_llama)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = BF16, True  # else the first call sets it to float32
    plain = run(model)
    expected = run(model)
    assert all(torch.equal(plain[k], expected[k]) for k in plain), "PEFT's own run is repeatable"
    peftkern.patch(model)
    for name, module in model.named_modules():
        if "down_proj" in name and hasattr(module, "lora_A"):  # dense, and fused
            peftkern.unpatch(module)
    got = run(model)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_bitsandbytes_with_a_code_book_of_its_own():
    model = build(lora(), base=bnb_llama)
    state = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.quant_state
    peftkern.patch(model)
    run(model)  # the plan is made with the usual book
    other = copy.deepcopy(state)
    other.code = state.code * 1.001
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.quant_state = other
    assert "has a code book of its own" in peftkern.explain(model)
    expected = run(peftkern.unpatch(copy.deepcopy(model)))
    assert_equal_results(run(model), expected)


# ---- mixed batches --------------------------------------------------------------------------------------------------


def several(dtype: torch.dtype = F32, base=tiny_llama, **options) -> nn.Module:
    """Adapters of several ranks, one with other layers."""
    model = build(lora(**options), dtype, base=base)
    model.add_adapter("two", lora(r=7, lora_alpha=20, use_rslora=True, target_modules=["q_proj", "up_proj"], **options))
    model.add_adapter("three", lora(r=1, **options))
    model.requires_grad_(False)
    model.set_requires_grad(["default", "two", "three"])
    return randomize(model)


MIXED = ["three", "__base__", "default", "two", "default"]
MANY = torch.randint(48, (5, 7), generator=torch.Generator().manual_seed(2))


def run_mixed(model: nn.Module, names: list[str] = MIXED) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=MANY, labels=MANY, adapter_names=names)
    if torch.is_grad_enabled():
        out.loss.backward()
    return {"logits": out.logits.detach()} | {
        n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("base", [tiny_llama, bnb_llama, nf4_llama])
def test_mixed_batches(base, monkeypatch):
    model = several(base=base).eval()
    if base is bnb_llama:  # in eval mode it would repack its weights
        for module in model.modules():
            module.training = type(module).__name__ == "Linear4bit" and not hasattr(module, "lora_A")
    with torch.set_grad_enabled(base is not bnb_llama):  # there PEFT's loop changes a view in place, and fails
        expected = run_mixed(model)
        peftkern.patch(model)
        cls = type(model.base_model.model.model.layers[0].mlp.up_proj)._peftkern_class
        monkeypatch.setattr(cls, "_mixed_batch_forward", lambda *a, **k: pytest.fail("PEFT's loop"))
        got = run_mixed(model)
    if base is bnb_llama:
        assert relative(got["logits"], expected["logits"]) <= 1e-6
        assert sum("lora_A.three" in n for n in run_mixed(model)) == 14
    else:
        assert sum("lora_A.three" in n for n in expected) == 14 and sum("lora_A.two" in n for n in expected) == 4
        assert_equal_results(got, expected)
    with torch.no_grad():
        for names in (MIXED, MIXED[::-1], ["two"] * 5, ["default", "two"] + ["__base__"] * 3):
            logits = model(MANY, adapter_names=names).logits
            for i, name in enumerate(names):
                model.set_adapter(name if name != "__base__" else "default")
                with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
                    alone = model(MANY[i : i + 1]).logits
                assert relative(logits[i : i + 1], alone) < 2e-6
        model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.two.weight").mul_(3.0)
        assert relative(model(MANY, adapter_names=["two"] * 5).logits[0], logits[1]) > 1e-3, "stacked anew"


def test_mixed_batches_in_bf16():
    model = several(BF16).eval()
    expected, exact = run_mixed(model), run_mixed(copy.deepcopy(model).double())
    assert_equal_in_bf16(run_mixed(peftkern.patch(model)), expected, exact, once=True)


def test_mixed_batches_in_training():
    """PEFT refuses them; here each item's gradient goes to its adapter."""
    model = several(lora_dropout=0.3)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        run_mixed(model)
    peftkern.patch(model)
    torch.manual_seed(1)
    first = run_mixed(model)
    assert model.training and model.base_model.training
    torch.manual_seed(1)
    second, third = run_mixed(model), run_mixed(model)
    assert all(torch.equal(first[n], second[n]) for n in first) and not torch.equal(first["logits"], third["logits"])
    only = run_mixed(model, ["default"] * 5)
    assert all("lora_A.two" not in n and "lora_A.three" not in n for n in only)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_equal_results(run_mixed(model), run_mixed(peftkern.unpatch(copy.deepcopy(model)).eval()))
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="adapter_names: expected gradient checkpointing off"):
        run_mixed(model)


def test_mixed_batches_keep_pefts_errors():
    model = peftkern.patch(several())
    with pytest.raises(ValueError, match="non-existing adapter"):
        run_mixed(model, ["nobody"] * 5)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        run_mixed(model, ["default"])
    dora = peftkern.patch(build(lora(use_dora=True)))
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        run_mixed(dora, ["default"] * 5)


# ---- what is not fused ----------------------------------------------------------------------------------------------


def test_explain():
    model = build(lora(target_modules=["q_proj", "embed_tokens"], lora_dropout=0.1))
    text = peftkern.explain(model)
    assert "2 lora.Linear: HF PEFT's own forward: not patched; peftkern.patch(model) does it (e.g. base_model" in text
    assert "1 lora.Embedding: HF PEFT's own forward: this kind of layer is not fused" in text
    assert "13 plain nn.Linear" in text, "without those inside PEFT's layers"
    peftkern.patch(model)
    assert "2 lora.Linear, patched: one fused call, LoRA on a dense base, dropout 0.1 (e.g." in peftkern.explain(model)
    model.eval()
    assert "LoRA on a dense base (e.g." in peftkern.explain(model)
    with model.disable_adapter():
        assert "adapters are disabled" in peftkern.explain(model)


NOT_FUSED = {
    "lora_bias": (lambda: lora(lora_bias=True), "lora_bias"),
    "aLoRA": (lambda: lora(alora_invocation_tokens=[1, 2]), "the LoRA variant ALora"),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_other_variants_run_pefts_forward(name):
    config, reason = NOT_FUSED[name]
    model = build(config())
    expected = run(model)
    peftkern.patch(model)
    assert f"patched: HF PEFT's own forward: {reason}" in peftkern.explain(model)
    got = run(model)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_a_base_that_trains():
    model = build(lora())
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_()
    expected = run(model)
    peftkern.patch(model)
    assert_equal_results(run(model), expected)
    assert "the base weight trains" in peftkern.explain(model)


def test_a_mixture_of_dtypes_stays_an_error():
    model = peftkern.patch(build(lora(), BF16))
    with pytest.raises(RuntimeError, match="dtype"):
        model.base_model.model.model.layers[0].mlp.up_proj(torch.randn(2, 32))


def test_input_casting_turned_off():
    from peft.helpers import disable_input_dtype_casting

    model = peftkern.patch(build(lora(), BF16))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 32, dtype=BF16))


def test_transforms_of_torch_func():
    layer = peftkern.patch(build(lora())).base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 3, 32)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
