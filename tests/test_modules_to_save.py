# SPDX-License-Identifier: Apache-2.0
"""Modules that train as a whole next to the adapters. The comparison with HF PEFT is in test_adapt_peft.py."""

import pytest
import torch
from peft_models import TOKENS, classifier, files_of, llama, loss_of, tied_llama
from samples import BF16, F32
from torch import nn

import peftkern
from peftkern import AdaLoraConfig, LoraConfig, LoRALinear, NF4Linear
from peftkern.adapter_io import PREFIX


def trains(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}


def test_which_modules():
    config = {"r": 2, "target_modules": "all-linear"}
    model = peftkern.adapt(llama(), LoraConfig(**config, modules_to_save=["lm_head", "layers.0.mlp"]))
    names = {f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert trains(model) == names | {"lm_head.weight"}
    assert sum(isinstance(m, LoRALinear) for m in model.modules()) == 11
    # an ending, not a whole name, as in HF PEFT
    assert trains(peftkern.adapt(llama(), LoraConfig(**config, modules_to_save=["head"]))) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("task", "heads"), [("SEQ_CLS", ["classifier", "score"]), ("QUESTION_ANS", ["qa_outputs"]), ("CAUSAL_LM", [])]
)
def test_the_head_of_a_task(task, heads, tmp_path):
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("body", "classifier", "score", "qa_outputs")})
    peftkern.adapt(model, LoraConfig(r=2, target_modules=["body"], task_type=task))
    assert trains(model) == {f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")}
    tensors, config = files_of(peftkern.save_adapter(model, tmp_path))
    assert {n for n in tensors if "lora_" not in n} == {PREFIX + n for n in trains(model)}
    assert (config["modules_to_save"] or []) == heads


def test_round_trip_with_buffers_and_another_dtype(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1", "2"])
    model = peftkern.adapt(base(), config)
    optimizer = torch.optim.SGD(peftkern.trainable_parameters(model), lr=0.1)
    for _ in range(3):
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
    peftkern.save_adapter(model.eval(), tmp_path)
    x = torch.randn(5, 8)
    fresh = peftkern.load_adapter(base(), tmp_path).eval()
    assert torch.equal(fresh(x), model(x)) and fresh[1].num_batches_tracked == 3
    assert trains(fresh) == trains(model) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    again = peftkern.load_adapter(peftkern.adapt(base(), config), tmp_path).eval()
    assert torch.equal(again(x), model(x))
    half = peftkern.load_adapter(base().to(BF16), tmp_path)
    assert half[2].weight.dtype == BF16 and half[0].lora_A.dtype == F32
    assert torch.equal(half[2].weight, model[2].weight.to(BF16))
    for call in (peftkern.merge, peftkern.unmerge):
        call(model)
    merged = peftkern.merge(model, unload=True)
    torch.testing.assert_close(merged(x), fresh(x), rtol=1e-5, atol=1e-5)


def test_a_tied_module_becomes_a_copy():
    model = tied_llama()
    embedding = model.model.embed_tokens.weight
    values = embedding.detach().clone()
    with pytest.warns(UserWarning, match="lm_head: it trains as a whole, and shares a weight with model.embed_tokens"):
        peftkern.adapt(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert trains(model) == {"lm_head.weight"} and model.lm_head.weight is not embedding
    optimizer = torch.optim.SGD(peftkern.trainable_parameters(model), lr=1.0)
    loss_of(model)[1].backward()
    optimizer.step()
    assert torch.equal(embedding, values) and not torch.equal(model.lm_head.weight, values)
    with pytest.warns(UserWarning, match="no longer tied"):
        peftkern.merge(model, unload=True)
    assert model.config.tie_word_embeddings is False


def test_ensure_weight_tying_trains_the_one_weight():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True)
    model = peftkern.adapt(tied_llama(), config)
    assert trains(model) == {"model.embed_tokens.weight"}, "the first of its two names"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_adalora(tmp_path):
    peft = pytest.importorskip("peft")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "total_step": 9, "init_r": 3}
    theirs = peft.get_peft_model(llama(), peft.AdaLoraConfig(**config))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = peftkern.load_adapter(llama(), tmp_path / "theirs").eval()
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
    stored, _ = files_of(peftkern.save_adapter(ours, tmp_path / "ours"))
    kept, _ = files_of(tmp_path / "theirs")
    assert stored.keys() == kept.keys() and all(torch.equal(t, kept[n]) for n, t in stored.items())
    assert trains(peftkern.adapt(llama(), AdaLoraConfig(**config))) == {"lm_head.weight"}


def test_classifier_trains_with_quantized_layers(tmp_path):
    config = LoraConfig(r=4, task_type="SEQ_CLS")
    model = peftkern.adapt(classifier(), config, quantize="nf4").train()
    optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = loss_of(model)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    peftkern.save_adapter(model.eval(), tmp_path)
    again = peftkern.load_adapter(peftkern.adapt(classifier(), config, quantize="nf4"), tmp_path).eval()
    assert torch.equal(loss_of(again)[0], loss_of(model)[0])


def test_what_is_refused(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    with pytest.raises(ValueError, match=r"modules_to_save: expected names of modules, \['head'\] matches none"):
        peftkern.adapt(model(), LoraConfig(r=2, modules_to_save=["head"]))
    quantized = nn.Sequential(nn.Linear(8, 8), NF4Linear(8, 8))
    with pytest.raises(
        ValueError, match=r"modules_to_save: expected modules of floats to train, 1.weight is torch.uint8"
    ):
        peftkern.adapt(quantized, LoraConfig(r=2, modules_to_save=["1"]))
    assert type(quantized[0]) is nn.Linear
    named = nn.ModuleDict({"a_head": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="modules_to_save: expected modules without adapters to be named, 'a_head'"):
        peftkern.adapt(named, LoraConfig(r=2, target_modules=["a_head", "b"], modules_to_save=["head"]))
    peftkern.save_adapter(peftkern.adapt(model(), LoraConfig(r=2, target_modules=["0"])), tmp_path)
    other = peftkern.adapt(model(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    with pytest.raises(ValueError, match=r"modules_to_save: expected \['1'\], which train in the model, got \[\]"):
        peftkern.load_adapter(other, tmp_path)
