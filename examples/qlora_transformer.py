# SPDX-License-Identifier: Apache-2.0
"""QLoRA on a transformers model in a loop of one's own: adapt, train, save, load into a fresh base, merge.

A tiny random Llama stands in for a real one, so that this runs in seconds; put `from_pretrained(...)` in its place.
Run: python examples/qlora_transformer.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).bfloat16()


config = peftkern.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05)  # target_modules="all-linear"
quantize = peftkern.NF4Config(block_size=64, double_quant=True)
model = peftkern.adapt(base_model(), config, quantize=quantize)
print(peftkern.explain(model))

tokens = torch.tensor(list((b"the quick brown fox jumps over the lazy dog. " * 20)[:512])).reshape(4, 128)
optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model), lr=5e-3)
losses = []
for _ in range(30):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    peftkern.save_adapter(model, folder)  # HF PEFT's format
    reloaded = peftkern.adapt(base_model(), config, quantize=quantize)
    peftkern.load_adapter(reloaded, folder)
    expected = model.eval()(input_ids=tokens).logits
    assert torch.equal(reloaded.eval()(input_ids=tokens).logits, expected)

    merged = peftkern.merge(reloaded)(input_ids=tokens).logits  # the NF4 weights are requantized: close, not equal
    restored = peftkern.unmerge(reloaded)(input_ids=tokens).logits
    assert torch.equal(restored, expected)
    print(f"reloaded and unmerged: equal; merged: largest difference {(merged - expected).abs().max():.3f}")
