# SPDX-License-Identifier: Apache-2.0
"""HF PEFT models as they are against the same models patched: a training step of SmolLM2-135M, AdaLoRA's rank
allocation, and a batch of 8 rows over 8 adapters. There the base model alone is a provider too: PEFT's time over its
time is the most that faster adapters can gain."""

import copy

import pytest
import torch
from train_step import BATCH, LENGTH, Trainee, to_bitsandbytes

import peftkern

peft = pytest.importorskip("peft")

CONFIGS = {
    "lora": lambda **kw: peft.LoraConfig(r=16, lora_alpha=32, **kw),
    "qlora": lambda **kw: peft.LoraConfig(r=16, lora_alpha=32, **kw),
    "dora": lambda **kw: peft.LoraConfig(r=16, lora_alpha=32, use_dora=True, **kw),
    "adalora": lambda **kw: peft.AdaLoraConfig(init_r=12, target_r=8, lora_alpha=32, total_step=1000, **kw),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_patched_step(compare, smollm2, batches, method):
    base = copy.deepcopy(smollm2)
    if method == "qlora":
        to_bitsandbytes(base)
        base.is_loaded_in_4bit = True
    config = CONFIGS[method](lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config)
    ours = peftkern.patch(copy.deepcopy(theirs))
    ours, theirs = Trainee(ours, batches), Trainee(theirs, batches)
    assert ours.step() == pytest.approx(theirs.step(), abs=2e-2), "the first loss, before dropout has changed a weight"
    compare(
        f"SmolLM2-135M {method} step, {BATCH}x{LENGTH}, bf16, p=0.05, patched",
        {"peftkern": ours.step, "HF PEFT": theirs.step},
        seconds=25.0, rounds=(3, 9),
    )  # fmt: skip


def test_rank_allocation(compare, smollm2):
    """update_and_allocate with an allocation a step, on gradients that are there already."""
    config = peft.AdaLoraConfig(
        init_r=12, target_r=8, tinit=1, tfinal=10, deltaT=1, total_step=1000, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(smollm2), config)
    ours = peftkern.patch(copy.deepcopy(theirs))
    steps = {}
    for model in (ours, theirs):
        torch.manual_seed(0)
        steps[model] = iter(range(2, 990))
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p)

    def step(model):
        model.base_model.update_and_allocate(next(steps[model]))

    step(ours), step(theirs)
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    compare(
        "SmolLM2-135M update_and_allocate, r = 12, patched",
        {"peftkern": lambda: step(ours), "HF PEFT": lambda: step(theirs)},
        seconds=10.0, rounds=(5, 60),
    )  # fmt: skip


@pytest.mark.parametrize("length", [1, 64, 256])
def test_mixed_batch(compare, smollm2, batches, length):
    base = copy.deepcopy(smollm2)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    names = [f"adapter{i}" for i in range(8)]
    alone = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    theirs.eval()
    ours = peftkern.patch(copy.deepcopy(theirs))
    ids = batches.reshape(-1)[: 8 * length].reshape(8, length)

    def call(model, **kwargs):
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False, **kwargs).logits

    # In float32: in bfloat16 both are some 4% of the largest logit from that, after 30 layers of random adapters.
    exact = copy.deepcopy(theirs).float()
    expected = call(exact, adapter_names=names)
    got = call(peftkern.patch(exact), adapter_names=names)
    torch.testing.assert_close(got, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    del exact
    ours.set_adapter(names[0])
    compare(
        f"SmolLM2-135M, 8 rows x {length} tokens over 8 adapters, bf16, patched",
        {
            "peftkern": lambda: call(ours, adapter_names=names),
            "HF PEFT": lambda: call(theirs, adapter_names=names),
            "peftkern, one adapter for all rows": lambda: call(ours),
            "base model alone": lambda: call(alone),
        },
        seconds=10.0, rounds=(5, 40),
    )  # fmt: skip
