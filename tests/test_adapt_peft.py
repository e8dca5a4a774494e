# SPDX-License-Identifier: Apache-2.0
"""Every kind of target and option next to HF PEFT: outputs, gradients, merging, files in both directions."""

import sys

import pytest
import torch
from peft_models import (
    check_against_peft,
    classifier,
    files_of,
    gemma,
    gpt2,
    llama,
    phi3,
    plain_name,
    tied_llama,
    trained_by_peft,
)

import peftkern
from peftkern.adapt import adapted_layers
from peftkern.adapter_io import PREFIX

CASES = {
    # Conv1D
    "gpt2-all": (gpt2, {"target_modules": "all-linear"}),
    "gpt2-fused-qkv": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_alpha": 6}),
    "gpt2-embeddings": (gpt2, {"target_modules": ["wte", "wpe", "c_fc"]}),
    "gpt2-both-ends": (gpt2, {"target_modules": ["wte", "lm_head", "c_proj"]}),
    "gpt2-dora": (gpt2, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "gpt2-layers": (
        gpt2, {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["layers", "h"]}
    ),
    # fused projections
    "phi3-fused": (phi3, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "phi3-all": (phi3, {"target_modules": "all-linear", "rank_pattern": {"qkv_proj": 6}, "lora_alpha": 3}),
    # embeddings and heads
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "embedding-regex": (llama, {"target_modules": r".*embed_tokens|.*q_proj"}),
    "embedding-dora": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "embedding-tied": (tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-scaled": (gemma, {"target_modules": ["embed_tokens", "v_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "head-tied": (tied_llama, {"target_modules": ["lm_head", "q_proj"]}),
    "both-tied": (tied_llama, {"target_modules": ["lm_head", "embed_tokens"]}),
    # which layers
    "layers-list": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "layers-int": (llama, {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "layers-exact": (llama, {"target_modules": ["model.layers.0.mlp.up_proj", "v_proj"], "layers_to_transform": [1]}),
    # modules that train as a whole
    "whole-head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "whole-head-tied": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "whole-ends-tied": (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "whole-inside": (llama, {"target_modules": "all-linear", "modules_to_save": ["norm", "layers.1.mlp"]}),
    "classifier": (classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "classifier-all": (classifier, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    # what is tied stays so
    "keep-tied-embedding": (
        tied_llama, {"target_modules": ["model.embed_tokens", "q_proj"], "ensure_weight_tying": True}
    ),
    "keep-tied-whole": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True},
    ),
    # DoRA and starts
    "dora": (llama, {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "dora-bias": (llama, {"target_modules": ["q_proj"], "use_dora": True, "bias": "all"}),
    "pissa": (llama, {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}),
    "pissa-conv1d": (gpt2, {"target_modules": ["c_attn"], "init_lora_weights": "pissa"}),
    "pissa-dora": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_dora": True}),
    "olora": (llama, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_as_peft(case, tmp_path):
    make, config = CASES[case]
    check_against_peft(make, {"r": 4} | config, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_same_start_as_peft(case, recwarn):
    """The same parameters train, and the model starts with the same outputs."""
    peft = pytest.importorskip("peft")
    make, config = CASES[case]
    config = {"r": 4} | config
    ours = peftkern.adapt(make(), peft.LoraConfig(**config)).eval()
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**config)).eval()
    trained = {plain_name(n): p.shape for n, p in theirs.named_parameters() if p.requires_grad}
    if config.get("ensure_weight_tying"):  # PEFT's head has parameters of its own, in the memory of the embedding's
        trained = {n: shape for n, shape in trained.items() if not n.startswith("lm_head.lora_")}
    assert {n: p.shape for n, p in ours.named_parameters() if p.requires_grad} == trained
    x = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(ours(x).logits, make().eval()(x).logits, rtol=1e-4, atol=1e-5)
    if "_A" in "".join(trained) and config.get("init_lora_weights") in ("pissa", "olora"):
        mine, other = dict(ours.named_parameters()), {plain_name(n): p for n, p in theirs.named_parameters()}
        for name in (n.removesuffix("lora_A") for n in trained if n.endswith("lora_A")):
            torch.testing.assert_close(mine[name + "weight"], other[name + "weight"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                mine[name + "lora_B"] @ mine[name + "lora_A"], other[name + "lora_B"] @ other[name + "lora_A"],
                rtol=1e-4, atol=1e-5,
            )  # fmt: skip


def test_biases_of_the_copies_that_peft_makes(tmp_path):
    """With bias="all" PEFT writes those too; they are read over."""
    theirs = trained_by_peft(
        llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["k_proj"], "bias": "all"}
    )
    theirs.save_pretrained(tmp_path)
    ours = peftkern.load_adapter(llama(), tmp_path).eval()
    x = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(ours(x).logits, theirs.eval()(x).logits, rtol=1e-5, atol=1e-6)


def test_patterns_of_layers_in_the_config():
    with pytest.raises(ValueError, match="layers_to_transform: expected None, as target_modules is a string"):
        peftkern.LoraConfig(target_modules="all-linear", layers_to_transform=[1])
    with pytest.raises(ValueError, match="layers_to_transform: expected numbers for layers_pattern='h'"):
        peftkern.LoraConfig(target_modules=["a"], layers_pattern="h")
    with pytest.raises(ValueError, match="layers_to_transform: expected int or a list of them"):
        peftkern.LoraConfig(target_modules=["a"], layers_to_transform=["1"])
    with pytest.raises(ValueError, match=r"layers_pattern: expected a regular expression, got '\('"):
        peftkern.LoraConfig(target_modules=["a"], layers_to_transform=1, layers_pattern="(")
    with pytest.raises(ValueError, match="modules_to_save: expected a list of names, got 'head'"):
        peftkern.LoraConfig(modules_to_save="head")
    # of experts in a layer the number of the layer counts, as in HF PEFT
    config = peftkern.LoraConfig(target_modules=["up"], layers_to_transform=[1])
    names = ["m.layers.1.experts.0.up", "m.layers.0.experts.1.up", "up", "layers.1.up"]
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(target_modules=["up"], layers_to_transform=[1])
    from peft.tuners.tuners_utils import check_target_module_exists

    from peftkern.config import is_target

    assert [is_target(config, n) for n in names] == [bool(check_target_module_exists(theirs, n)) for n in names]
    assert [is_target(config, n) for n in names] == [True, False, True, False]


def test_patterns_that_match_nothing_are_said():
    model = llama()
    with pytest.warns(UserWarning, match=r"rank_pattern: \['q_prj'\] match no layer that gets an adapter"):
        config = peftkern.LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"q_prj": 4, "q_proj": 3})
        peftkern.adapt(model, config)
    assert {m.r for m in model.modules() if isinstance(m, peftkern.LoRALinear)} == {3}


TARGETS = {
    "default-llama": (llama, {}),
    "default-gpt2": (gpt2, {}),
    "default-gemma": (gemma, {}),
    "default-adalora": (llama, {"total_step": 10}),
    "default-without": (llama, {"exclude_modules": ["layers.1.self_attn.v_proj"]}),
    "default-layers": (llama, {"layers_to_transform": [1]}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "all-linear-upper": (gpt2, {"target_modules": "All-Linear"}),
    "all-linear-without": (llama, {"target_modules": "all-linear", "exclude_modules": r".*\.(up|down)_proj"}),
    "all-linear-classifier": (classifier, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "regex": (llama, {"target_modules": r".*\.1\..*\.(q|k)_proj"}),
    "regex-head": (llama, {"target_modules": r"lm_head|model\.layers\.0\.mlp\..*_proj"}),
    "endings": (llama, {"target_modules": ["self_attn.q_proj", "down_proj", "model.layers.0.mlp.up_proj"]}),
    "pattern": (gpt2, {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1], "layers_pattern": "h"}),
    "patterns": (
        llama, {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]}
    ),
    "no-numbers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
def test_same_layers_as_peft(case):
    peft = pytest.importorskip("peft")
    make, options = TARGETS[case]
    kind = peft.AdaLoraConfig if "total_step" in options else peft.LoraConfig
    theirs = peft.get_peft_model(make(), kind(**options))
    layers = peft.tuners.tuners_utils.BaseTunerLayer
    expected = [n.removeprefix(PREFIX) for n, m in theirs.named_modules() if isinstance(m, layers)]
    assert expected
    ours = peftkern.adapt(make(), kind(**options))
    assert [name for name, _ in adapted_layers(ours)] == expected


def test_default_targets_are_refused_where_there_are_none(monkeypatch):
    peft = pytest.importorskip("peft")
    config = peftkern.LoraConfig(target_modules=None)
    with pytest.raises(ValueError, match="HF PEFT's choice for the type of the model, and it has none for None"):
        peftkern.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(phi3(), peft.LoraConfig())
    with pytest.raises(ValueError, match="and it has none for 'phi3'"):
        peftkern.adapt(phi3(), config)
    monkeypatch.setitem(sys.modules, "peft.utils", None)
    with pytest.raises(ValueError, match="HF PEFT's choice for the type of the model, and peft is not installed"):
        peftkern.adapt(llama(), config)


# ---- vocabularies of another size than the model was read with

RESIZED = {
    "untied": (llama, {}),
    "tied": (tied_llama, {}),
    "conv1d": (gpt2, {"target_modules": ["c_attn"]}),
    "embedding-adapted": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "whole-head": (llama, {"modules_to_save": ["lm_head"]}),
    "whole-ends": (llama, {"modules_to_save": ["lm_head", "embed_tokens"]}),
}


def resized(make, folder, size=56):
    """make()'s model read from a folder, with more tokens, whose rows are not what resizing makes of them."""
    if not folder.exists():
        make().save_pretrained(folder)
    model = type(make()).from_pretrained(folder)
    model.resize_token_embeddings(size)
    return model


def with_new_tokens(model):
    with torch.no_grad():
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.weight[48:] = torch.randn(end.weight[48:].shape, generator=torch.Generator().manual_seed(5))
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", RESIZED)
def test_resized_vocabulary(case, tmp_path):
    """The files hold the embeddings, and the same names as HF PEFT's; either side reads the other's."""
    peft = pytest.importorskip("peft")
    make, options = RESIZED[case]
    config = peft.LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | options))
    x = torch.tensor([[5, 50, 7, 55]])
    theirs = peft.get_peft_model(with_new_tokens(resized(make, tmp_path / "base")), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    reloaded = peft.PeftModel.from_pretrained(resized(make, tmp_path / "base"), tmp_path / "theirs").eval()
    expected = reloaded(x).logits  # not theirs': with an adapter on one end HF PEFT does not save the other
    assert case == "embedding-adapted" or torch.allclose(expected, theirs(x).logits, atol=1e-5)
    ours = peftkern.load_adapter(resized(make, tmp_path / "base"), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(x).logits, expected, rtol=1e-5, atol=2e-6)

    peftkern.save_adapter(ours, tmp_path / "ours")
    stored, kept = files_of(tmp_path / "ours")[0], files_of(tmp_path / "theirs")[0]
    kept = {n: t for n, t in kept.items() if ".original_module." not in n and ".modules_to_save." not in n}
    assert stored.keys() == kept.keys() and all(torch.equal(t, kept[n]) for n, t in stored.items())
    assert any("embed" in n or "wte" in n for n in stored)
    again = peft.PeftModel.from_pretrained(resized(make, tmp_path / "base"), tmp_path / "ours").eval()
    torch.testing.assert_close(again(x).logits, expected, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match=r"expected shape \[(2, 48|48, 32)\], got \[(2, 56|56, 32)\]"):
        peftkern.load_adapter(make(), tmp_path / "ours")


def test_embeddings_are_saved_where_asked(tmp_path):
    peft = pytest.importorskip("peft")
    config = {"r": 2, "target_modules": ["q_proj"]}
    ours, theirs = (
        peftkern.adapt(llama(), peft.LoraConfig(**config)),
        peft.get_peft_model(llama(), peft.LoraConfig(**config)),
    )
    for save in (True, False, "auto"):
        peftkern.save_adapter(ours, tmp_path / "ours", save_embedding_layers=save)
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=save)
        names = files_of(tmp_path / "ours")[0].keys()
        assert names == files_of(tmp_path / "theirs")[0].keys()
        assert (PREFIX + "model.embed_tokens.weight" in names) == (save is True)
    with pytest.raises(ValueError, match="save_embedding_layers: expected True, False or \"auto\", got 'yes'"):
        peftkern.save_adapter(ours, tmp_path, save_embedding_layers="yes")
    plain = peftkern.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), peftkern.LoraConfig(r=2))
    with pytest.warns(UserWarning, match="save_embedding_layers: the model does not say which layers those are"):
        peftkern.save_adapter(plain, tmp_path, save_embedding_layers=True)
