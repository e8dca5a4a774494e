# SPDX-License-Identifier: Apache-2.0
"""Tiny transformers models of several architectures, and one question: is an adapted model HF PEFT's, in outputs,
gradients, merged weights and files, both directions?"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkern
from peftkern.adapter_io import CONFIG_NAME, PREFIX, WEIGHTS_NAME

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(1, 48, (2, 7), generator=torch.Generator().manual_seed(1))


def _tiny(model: str, config: str, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, config)(vocab_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)
    return getattr(transformers, model)(config)


def gpt2(**options) -> nn.Module:
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return _tiny(
        "GPT2LMHeadModel", "GPT2Config", n_positions=32, n_embd=32, n_layer=2, n_head=4, **no_dropout, **options
    )


def llama(**options) -> nn.Module:
    return _tiny("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, attention_bias=True, **SIZES, **options)


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def phi3() -> nn.Module:
    return _tiny("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2, **SIZES)


def gemma() -> nn.Module:
    """Scales its embeddings, which are tied to the head."""
    return _tiny("Gemma3ForCausalLM", "Gemma3TextConfig", num_key_value_heads=2, head_dim=8, **SIZES)


def classifier() -> nn.Module:
    return _tiny("LlamaForSequenceClassification", "LlamaConfig", num_labels=3, num_key_value_heads=2, **SIZES)


def loss_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    labels = torch.tensor([0, 2]) if hasattr(model, "score") else TOKENS
    output = model(TOKENS, labels=labels)
    return output.logits, output.loss


def plain_name(name: str) -> str:
    """HF PEFT's name of a parameter in a model, as ours."""
    name = name.removeprefix(PREFIX)
    for part in (".default", ".modules_to_save", ".base_layer"):
        name = name.replace(part, "")
    return name.removesuffix(".weight") if ".lora_" in name else name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model)[1].backward()
    return {plain_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}


def trained_by_peft(make: Callable[[], nn.Module], config: dict) -> nn.Module:
    """make()'s model with HF PEFT's adapter, of which everything that trains has moved."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(**copy.deepcopy(config)))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def files_of(folder: Path) -> tuple[dict[str, Tensor], dict]:
    return load_file(folder / WEIGHTS_NAME), json.loads((folder / CONFIG_NAME).read_text())


def check_against_peft(make: Callable[[], nn.Module], config: dict, folder: Path) -> nn.Module:
    """Loads what PEFT has trained and saved; returns our model, unloaded."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both say so where weights are tied
        theirs = trained_by_peft(make, config)
        theirs.save_pretrained(folder / "theirs")
        ours = peftkern.load_adapter(make(), folder / "theirs").train()
        expected = loss_of(theirs.train())[0]
        torch.testing.assert_close(loss_of(ours)[0], expected, rtol=1e-5, atol=2e-6)
        got, wanted = gradients(ours), gradients(theirs)
        if config.get("ensure_weight_tying") and "lm_head.lora_A" in wanted:
            # PEFT's head has parameters of its own in the memory of the embedding's; ours has none, and adds up
            wanted["model.embed_tokens.lora_embedding_B"] += wanted.pop("lm_head.lora_A").T
            wanted["model.embed_tokens.lora_embedding_A"] += wanted.pop("lm_head.lora_B").T
        assert got.keys() == wanted.keys()
        for name, g in wanted.items():
            torch.testing.assert_close(got[name], g, rtol=0, atol=1e-5 * g.abs().max().item(), msg=name)

        peftkern.save_adapter(ours, folder / "ours")
        (stored, settings), (kept, kept_settings) = files_of(folder / "ours"), files_of(folder / "theirs")
        assert stored.keys() == kept.keys()
        assert all(t.dtype == kept[n].dtype and torch.equal(t, kept[n]) for n, t in stored.items()), "bit for bit"
        unordered = {n: sorted(v) if isinstance(v, list) else v for n, v in settings.items() if n != "task_type"}
        assert unordered == {
            n: sorted(v) if isinstance(v, list) else v for n, v in kept_settings.items() if n in unordered
        }
        again = peft.PeftModel.from_pretrained(make(), folder / "ours").eval()
        torch.testing.assert_close(loss_of(again)[0], expected, rtol=1e-5, atol=2e-6)

        names = set(ours.state_dict())
        peftkern.merge(ours.eval())
        torch.testing.assert_close(loss_of(ours)[0], expected, rtol=1e-4, atol=1e-5)
        peftkern.unmerge(ours)
        torch.testing.assert_close(loss_of(ours)[0], expected, rtol=1e-5, atol=2e-6)
        assert set(ours.state_dict()) == names
        peftkern.merge(ours, unload=True)
        torch.testing.assert_close(loss_of(ours)[0], expected, rtol=1e-4, atol=1e-5)
    plain = dict(make().named_modules())
    assert [(n, type(m)) for n, m in ours.named_modules()] == [(n, type(m)) for n, m in plain.items()]
    return ours
