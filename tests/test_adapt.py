# SPDX-License-Identifier: Apache-2.0
"""adapt, merge and unmerge of whole models, next to HF PEFT on a small Llama."""

import copy

import pytest
import torch
from conftest import assert_close
from samples import BF16, F32
from torch import nn

import peftkern
from peftkern import LoraConfig, LoRALinear, NF4Config, NF4Linear


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def llama():
    return tiny_llama()


def tiny_llama(dtype: torch.dtype = F32, **options) -> nn.Module:
    """Two layers, random, with biases in the attention."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, max_position_embeddings=64, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)  # transformers starts them at zero
    return model


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Sequential(nn.Linear(24, 24), nn.ReLU()), nn.Linear(24, 4))


def snapshot(model: nn.Module) -> dict:
    """Everything that a failed call has to leave as it was."""
    return {
        "modules": [(n, id(m), type(m), m.training) for n, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()],
        "attributes": sorted(vars(model)),
    }


def unchanged(model: nn.Module, before: dict) -> bool:
    now = snapshot(model)
    same = all(
        a[:3] == b[:3] and torch.equal(a[3].nan_to_num(7.0), b[3].nan_to_num(7.0))
        for a, b in zip(now["parameters"], before["parameters"], strict=True)
    )
    return same and now["modules"] == before["modules"] and now["attributes"] == before["attributes"]


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B.normal_(std=0.1)


TOKENS = torch.randint(48, (2, 7), generator=torch.Generator().manual_seed(1))


# ---- which layers, as HF PEFT chooses -------------------------------------------------------------------------------

CHOICES = {
    "all-linear": {"target_modules": "all-linear"},
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "paths": {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
    "pattern": {"target_modules": r".*\.layers\.0\..*(q|v)_proj"},
    "whole names only": {"target_modules": ["q_proj", "ate_proj", "proj"]},
    "whole pattern only": {"target_modules": r".*\.(q|k)_pro|.*\.v_proj"},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "exclude names": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    "exclude pattern": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1.*"},
    "rank_pattern": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 5, "^model.layers.0.self_attn.v_proj": 2, "proj": 9},
        "alpha_pattern": {"k_proj": 1, r".*\.0\.mlp\.up_proj": 40, "layers.1.self_attn.o_proj": 7.5},
    },
    "rslora": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 9}},
    "alpha": {"target_modules": ["v_proj"], "lora_alpha": 3, "r": 6, "lora_dropout": 0.25},
}


@pytest.mark.parametrize("theirs", [False, True], ids=["our-config", "peft-config"])
@pytest.mark.parametrize("choice", CHOICES)
def test_same_choice_as_peft(peft, llama, choice, theirs):
    options = {"r": 4, "lora_alpha": 8} | CHOICES[choice]
    other = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(**copy.deepcopy(options)))
    config = peft.LoraConfig(**options) if theirs else LoraConfig(**options)
    peftkern.adapt(llama, config)
    expected = {
        name.removeprefix("base_model.model."): (m.r["default"], m.lora_alpha["default"], m.scaling["default"])
        for name, m in other.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    assert expected
    assert {name: (m.r, m.lora_alpha, m.scaling) for name, m in adapted(llama).items()} == expected
    assert all(m.lora_dropout == options.get("lora_dropout", 0.0) for m in adapted(llama).values())
    assert "lm_head" not in expected or choice == "head"
    trained = sum(p.numel() for p in peftkern.trainable_parameters(llama))
    assert trained == sum(p.numel() for p in other.parameters() if p.requires_grad)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_same_parameters_train_as_with_peft(peft, llama, bias):
    config = {"r": 2, "target_modules": ["q_proj", "down_proj"], "bias": bias}
    other = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(**config))
    peftkern.adapt(llama, LoraConfig(**config))

    def plain(name: str) -> str:
        for part in ("base_model.model.", "base_layer.", ".default.weight"):
            name = name.replace(part, "")
        return name

    ours = {name for name, p in llama.named_parameters() if p.requires_grad}
    assert ours == {plain(name) for name, p in other.named_parameters() if p.requires_grad}
    assert any("bias" in name for name in ours) == (bias != "none")


def copy_adapters(ours: nn.Module, theirs: nn.Module) -> None:
    """Random values into both."""
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for name, layer in adapted(ours).items():
            other = modules["base_model.model." + name]
            for mine, linear in ((layer.lora_A, other.lora_A.default), (layer.lora_B, other.lora_B.default)):
                assert mine.shape == linear.weight.shape and mine.dtype == linear.weight.dtype
                mine.normal_(std=0.1)
                linear.weight.copy_(mine)


@pytest.mark.parametrize("dtype, tolerance", [(F32, 1e-5), (BF16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_same_outputs_and_gradients_as_peft(peft, dtype, tolerance, rslora):
    ours = tiny_llama(dtype)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=rslora)
    theirs = peft.get_peft_model(copy.deepcopy(ours), copy.deepcopy(config))
    peftkern.adapt(ours, config)
    copy_adapters(ours, theirs)
    for model in (ours, theirs):
        model.train()
        model(TOKENS, labels=TOKENS).loss.backward()
    got, expected = ours(TOKENS).logits, theirs(TOKENS).logits
    assert got.dtype == expected.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    modules = dict(theirs.named_modules())
    for name, layer in adapted(ours).items():
        other = modules["base_model.model." + name]
        for mine, linear in ((layer.lora_A, other.lora_A.default), (layer.lora_B, other.lora_B.default)):
            scale = linear.weight.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, linear.weight.grad, rtol=0, atol=5 * tolerance * scale)


def test_gaussian_start_as_peft(peft, llama):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian")
    theirs = peft.get_peft_model(copy.deepcopy(llama), config)
    peftkern.adapt(llama, config)
    mine = torch.cat([m.lora_A.detach() for m in adapted(llama).values()])
    other = torch.cat([m.lora_A.default.weight for m in theirs.modules() if isinstance(m, peft.tuners.lora.Linear)])
    assert mine.shape == other.shape
    assert mine.std().item() == pytest.approx(other.std().item(), rel=0.2) == pytest.approx(0.25, rel=0.2)
    assert mine.abs().max() > 0.5, "not uniform"
    assert not any(m.lora_B.any() for m in adapted(llama).values())


# ---- what adapt does to the model -----------------------------------------------------------------------------------


def test_adapt_shares_the_weights_and_freezes_the_rest(llama):
    before = dict(llama.named_parameters())
    llama.model.layers[1].eval()
    logits = llama(TOKENS).logits
    assert peftkern.adapt(llama, LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], lora_dropout=0.5)) is llama
    after = dict(llama.named_parameters())
    assert before.keys() <= after.keys() and all(after[n] is p for n, p in before.items())
    assert {n for n, p in after.items() if p.requires_grad} == {n for n in after if "lora_" in n}
    assert [m.training for m in adapted(llama).values()] == [True, True, False, False]
    torch.testing.assert_close(llama(TOKENS).logits, logits)  # B starts at zero
    assert set(llama.state_dict()) == set(after)


@pytest.mark.parametrize("quantize", ["nf4", NF4Config(32, double_quant=True)], ids=str)
def test_adapt_quantizes(llama, quantize):
    config = NF4Config() if quantize == "nf4" else quantize
    expected = copy.deepcopy(llama)
    for name, module in list(expected.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            quantized = peftkern.quantize_nf4(module.weight, config.block_size, config.double_quant)
            module.weight.data = peftkern.dequantize_nf4(quantized)
    peftkern.adapt(llama, LoraConfig(r=2), quantize=quantize)
    assert len(adapted(llama)) == 14
    assert all(m.nf4_config == config and m.weight.dtype == torch.uint8 for m in adapted(llama).values())
    assert type(llama.lm_head) is nn.Linear
    torch.testing.assert_close(llama(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-5)
    llama(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in peftkern.trainable_parameters(llama))


def test_adapt_keeps_layers_that_are_nf4_already():
    model = nn.Sequential(NF4Linear(64, 64, block_size=32), nn.Linear(64, 4))
    peftkern.adapt(model, LoraConfig(), quantize=NF4Config(128))
    assert model[0].nf4_config == NF4Config(32) and model[1].nf4_config == NF4Config(128)


def test_shared_modules_stay_shared():
    linear = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear, nn.ReLU()), "c": nn.Linear(8, 8)})
    peftkern.adapt(model, LoraConfig(r=2))
    assert model["a"] is model["b"][0] and isinstance(model["a"], LoRALinear) and model["c"] is not model["a"]
    assert len(peftkern.trainable_parameters(model)) == 4


def test_tied_embeddings_survive_merging():
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    peftkern.adapt(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    randomize(model)
    logits = model(TOKENS).logits
    embedding = model.model.embed_tokens.weight.detach().clone()
    peftkern.merge(model)
    torch.testing.assert_close(model(TOKENS).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, embedding), "merging the head must not change the embedding"
    peftkern.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_attention_projections_that_are_never_called():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    with pytest.raises(
        ValueError,
        match=r"target_modules: expected linear layers and embeddings that are called.*'attention\.out_proj'",
    ):
        peftkern.adapt(model, LoraConfig(target_modules=["out_proj", "linear"]))
    peftkern.adapt(model, LoraConfig())
    assert list(adapted(model)) == ["linear"]


def test_checkpointing_of_a_whole_model(llama):
    peftkern.adapt(llama, LoraConfig(r=2, lora_dropout=0.5))
    randomize(llama)
    llama.train()

    def grads():
        llama.zero_grad()
        torch.manual_seed(4)
        llama(TOKENS, labels=TOKENS).loss.backward()
        return [p.grad.clone() for p in peftkern.trainable_parameters(llama)]

    plain = grads()
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(grads(), plain, strict=True))


def test_a_whole_model_compiles(llama):
    torch._dynamo.reset()
    peftkern.adapt(llama, LoraConfig(r=2, lora_dropout=0.3), quantize=NF4Config(32, True))
    randomize(llama)

    def run(model):
        llama.zero_grad()
        torch.manual_seed(4)
        loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in peftkern.trainable_parameters(llama)]

    for a, b in zip(run(llama), run(torch.compile(llama, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(b, a)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["query", "value"], "q_proj", r".*\.attention", ["0.weight"]], ids=str)
def test_targets_that_match_nothing(targets):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"target_modules: expected the names.*matches none; the model has 3: 0, 2\.0, 3"
    ):
        peftkern.adapt(model, LoraConfig(target_modules=targets))
    assert unchanged(model, before)
    with pytest.raises(ValueError, match="matches none"):
        peftkern.adapt(model, LoraConfig(exclude_modules=["0", "3"]))
    with pytest.raises(ValueError, match="the model has 0: none"):
        peftkern.adapt(nn.Sequential(nn.ReLU()), LoraConfig())


def test_targets_that_are_no_linear_layers(llama):
    before = snapshot(llama)
    for targets in (["self_attn", "q_proj"], r".*layers\.0.*"):
        with pytest.raises(ValueError, match=r"target_modules: expected linear layers and embeddings.*a Llama"):
            peftkern.adapt(llama, LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match=r"target_modules: expected linear layers that.*a Embedding"):
        peftkern.adapt(llama, peftkern.AdaLoraConfig(total_step=9, target_modules=["embed_tokens", "q_proj"]))
    assert unchanged(llama, before)
    peftkern.adapt(llama, LoraConfig(target_modules=["self_attn", "q_proj"], exclude_modules=["self_attn"]))
    assert len(adapted(llama)) == 2


def test_adapting_twice():
    model = peftkern.adapt(mlp(), LoraConfig(r=2))
    before = snapshot(model)
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        peftkern.adapt(model, LoraConfig(r=2))
    assert unchanged(model, before)


UNSUPPORTED = {
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [(0, 1)]},
    "target_parameters": {"target_parameters": ["mlp.gate_up_proj"]},
    "init_lora_weights": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_unsupported_options_of_peft_are_named(peft, llama, option):
    config = peft.LoraConfig(target_modules=["q_proj"], **UNSUPPORTED[option])
    before = snapshot(llama)
    with pytest.raises(ValueError, match=option):
        peftkern.adapt(llama, config)
    assert unchanged(llama, before)


def test_other_configs_are_refused(peft, llama):
    before = snapshot(llama)
    with pytest.raises(ValueError, match=r"config.peft_type: expected LORA or ADALORA, got 'IA3'"):
        peftkern.adapt(llama, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    for config in (None, "all-linear", LoraConfig):
        with pytest.raises(TypeError, match=r"config: expected a LoraConfig or an AdaLoraConfig, .*got"):
            peftkern.adapt(llama, config)
    assert unchanged(llama, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_model_alone(value):
    model = mlp()
    model[0].bias.requires_grad_(False)
    with torch.no_grad():
        model[3].weight[0, 0] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^3: .*expected finite weights, got 1 NaN or infinite of 96"):
        peftkern.adapt(model, LoraConfig(), quantize="nf4")
    assert unchanged(model, before)


# ---- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "nf4", NF4Config(32, True)], ids=str)
def test_merge_and_unmerge_a_model(llama, quantize):
    peftkern.adapt(llama, LoraConfig(r=4), quantize=quantize)
    randomize(llama)
    state = copy.deepcopy(llama.state_dict())
    objects = dict(llama.named_parameters())
    logits = llama(TOKENS).logits
    assert peftkern.merge(llama) is llama
    assert all(m.merged for m in adapted(llama).values())
    merged = llama(TOKENS).logits
    assert not torch.equal(merged, logits)
    if quantize is None:
        torch.testing.assert_close(merged, logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="model: expected all layers unmerged, 14 are not"):
        peftkern.merge(llama)
    assert peftkern.unmerge(llama) is llama
    assert all(p is objects[n] for n, p in llama.named_parameters())
    assert all(torch.equal(t, state[n]) for n, t in llama.state_dict().items())
    assert torch.equal(llama(TOKENS).logits, logits)
    with pytest.raises(RuntimeError, match="model: expected all layers merged, 14 are not"):
        peftkern.unmerge(llama)
    for call in (peftkern.merge, peftkern.unmerge):
        with pytest.raises(RuntimeError, match="model: expected one with adapters"):
            call(mlp())


def test_half_merged_models_are_refused():
    model = peftkern.adapt(mlp(), LoraConfig(r=2))
    model[2][0].merge()
    for call, state in ((peftkern.merge, "unmerged, 1"), (peftkern.unmerge, "merged, 2")):
        with pytest.raises(RuntimeError, match=f"model: expected all layers {state} are not"):
            call(model)
    assert [m.merged for m in adapted(model).values()] == [False, True, False]


@pytest.mark.parametrize("quantize", [None, "nf4", NF4Config(32, True)], ids=str)
def test_unload_gives_plain_layers(llama, quantize):
    plain = copy.deepcopy(llama)
    peftkern.adapt(llama, LoraConfig(r=4, bias="lora_only"), quantize=quantize)
    randomize(llama)
    llama.eval()
    merged = peftkern.merge(copy.deepcopy(llama))
    expected = merged(TOKENS).logits
    assert peftkern.merge(llama, unload=True) is llama
    assert not adapted(llama) and not hasattr(llama, "peftkern_config")
    kind = nn.Linear if quantize is None else NF4Linear
    linears = {n: m for n, m in llama.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert len(linears) == 14 and all(type(m) is kind and not m.training for m in linears.values())
    assert torch.equal(llama(TOKENS).logits, expected) or quantize is None
    torch.testing.assert_close(llama(TOKENS).logits, expected)
    assert [(n, type(m).__name__) for n, m in plain.named_modules()] == [
        (n, type(m).__name__.replace("NF4", "")) for n, m in llama.named_modules()
    ]
    if quantize is None:
        plain.load_state_dict(llama.state_dict(), strict=True)
        torch.testing.assert_close(plain.eval()(TOKENS).logits, expected)
    peftkern.adapt(llama, LoraConfig(r=2))  # and it can be adapted again
    assert len(adapted(llama)) == 14


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"], ids=str)
def test_a_merge_that_fails_is_undone(quantize, unload):
    model = peftkern.adapt(mlp(), LoraConfig(r=2), quantize=quantize)
    randomize(model)
    with torch.no_grad():
        model[3].lora_B[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^3: merge: expected finite merged weights"):
        peftkern.merge(model, safe=True, unload=unload)
    assert unchanged(model, before) and not any(m.merged for m in adapted(model).values())
    if quantize:  # an infinite weight cannot be quantized, safe or not
        with pytest.raises(ValueError, match=r"^3: .*expected finite weights"):
            peftkern.merge(model, unload=unload)
        assert unchanged(model, before) and not any(m.merged for m in adapted(model).values())


def test_merged_nf4_model_is_requantized(llama):
    peftkern.adapt(llama, LoraConfig(r=4), quantize=NF4Config(32))
    randomize(llama)
    layer = llama.model.layers[1].mlp.up_proj
    exact = peftkern.dequantize_nf4(layer.base_weight(), F32) + layer.delta_weight()
    peftkern.merge(llama, unload=True)
    plain = llama.model.layers[1].mlp.up_proj
    assert torch.equal(plain.dequantize(F32), peftkern.dequantize_nf4(peftkern.quantize_nf4(exact, 32), F32))
    assert_close(plain.dequantize(F32), exact, F32, slack=0.2 / 1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_transformer_encoder_uses_its_adapters_in_eval_mode(quantize):
    """torch's fast path would read the weights of its layers and never call them."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    peftkern.adapt(model, peftkern.LoraConfig(r=2, init_lora_weights=False), quantize=quantize)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x))


def test_hooks_and_replaced_forwards_are_not_lost_silently():
    hooked, replaced = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda module, args, output: output * 0)
    replaced[0].forward = lambda x: x * 0
    for model in (hooked, replaced):
        with pytest.raises(TypeError, match="0: linear: expected a plain nn.Linear, got one with forward hooks"):
            peftkern.adapt(model, peftkern.LoraConfig(r=2))
        assert type(model[0]) is nn.Linear


def test_a_peft_model_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="got one with HF PEFT's"):
        peftkern.adapt(model, peftkern.LoraConfig(r=2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "("), ("target_modules", 5), ("target_modules", [1]), ("exclude_modules", "("),
        ("exclude_modules", 3), ("rank_pattern", [1]), ("rank_pattern", {"(": 1}), ("alpha_pattern", {"(": 1.0}),
        ("alpha_pattern", "x"), ("use_rslora", "no"),
    ],
)  # fmt: skip
def test_bad_config_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected"):
        peftkern.LoraConfig(**{field: value})
