# SPDX-License-Identifier: Apache-2.0
"""Adapters on embeddings, and on heads that are tied to them: one weight in memory, and what merging does to the tie.
The comparison with HF PEFT is in test_adapt_peft.py."""

import copy
import pickle
import warnings

import pytest
import torch
from peft_models import TOKENS, gemma, gpt2, llama, tied_llama
from samples import BF16, F32
from torch import nn

import peftkern
from peftkern import LoraConfig
from peftkern.modules import LoRAEmbedding

TIED = "its weight is also"


def embedding_of(dtype: torch.dtype = F32, **options) -> LoRAEmbedding:
    torch.manual_seed(5)
    layer = LoRAEmbedding.from_embedding(nn.Embedding(40, 24, padding_idx=3).to(dtype), r=4, lora_alpha=6, **options)
    with torch.no_grad():
        layer.lora_embedding_A.normal_()
    return layer


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_equals_looking_up_the_adapted_table(dtype, dora):
    layer = embedding_of(dtype, use_dora=dora)
    x = torch.tensor([[1, 3, 7], [7, 39, 0]])
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 3, 24)
    y.float().square().sum().backward()

    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_embedding_A, layer.lora_embedding_B))
    table = layer.weight.double() + layer.scaling * (B @ A).T
    parts = [A, B]
    if dora:
        magnitude = layer.lora_magnitude_vector.detach().double().requires_grad_()
        table = table * magnitude / table.detach().norm(dim=0)
        parts.append(magnitude)
    expected = table[x]
    expected.square().sum().backward()
    A.grad[:, 3] = 0  # padding_idx: its row gets no gradient, as in nn.Embedding
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == BF16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    for got, exact in zip(layer.adapter_parameters().values(), parts, strict=True):
        scale = exact.grad.abs().max().item()
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=0, atol=tolerance["rtol"] * scale)

    original = layer.weight
    layer.merge()
    torch.testing.assert_close(layer.weight.double(), table.detach(), **tolerance)
    torch.testing.assert_close(layer(x), y, **tolerance)
    layer.unmerge()
    assert layer.weight is original and torch.equal(layer(x), y)


def test_starts_as_the_embedding_and_is_one_to_readers():
    plain = nn.Embedding(40, 24)
    layer = LoRAEmbedding.from_embedding(plain, r=2)
    x = torch.arange(40)
    assert torch.equal(layer(x), plain(x)) and layer.weight is plain.weight
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (40, 24, None)
    assert layer.lora_embedding_A.shape == (2, 40) and layer.lora_embedding_B.shape == (24, 2)
    assert layer.lora_embedding_B.std().item() == pytest.approx(1, rel=0.3)
    assert list(layer.state_dict()) == ["weight", "lora_embedding_A", "lora_embedding_B"]
    random = LoRAEmbedding(40, 24, init_lora_weights=False, dtype=BF16)
    assert random.lora_embedding_A.any() and random.weight.dtype == BF16 and random.lora_embedding_A.dtype == F32


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    layer = embedding_of()
    x = torch.tensor([1, 2])
    other = copied(layer)
    assert torch.equal(other(x), layer(x)) and other.weight is not layer.weight
    assert type(other.plain()) is nn.Embedding and other.plain().padding_idx == 3


def test_scaled_embeddings_keep_their_class():
    model = gemma()
    kind = type(model.model.embed_tokens)
    assert kind is not nn.Embedding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peftkern.adapt(model, LoraConfig(r=2, target_modules=["embed_tokens"])).half().float()
        layer = model.model.embed_tokens
        with torch.no_grad():
            layer.lora_embedding_A.normal_()
        x = torch.tensor([4, 5])
        before = layer(x)
        peftkern.merge(model, unload=True)
    plain = model.model.embed_tokens
    assert type(plain) is kind and plain.embed_scale == layer.embed_scale
    torch.testing.assert_close(plain(x), before)


def test_embeddings_that_do_more_are_refused():
    class Shifted(nn.Embedding):
        def forward(self, x):
            return super().forward(x + 1)

    hooked = nn.Embedding(8, 4)
    hooked.register_forward_hook(lambda module, args, output: output * 0)
    for embedding, message in (
        (Shifted(8, 4), "got Shifted, which has a forward of its own"),
        (nn.Embedding(8, 4, max_norm=1.0), "expected max_norm=None and sparse=False"),
        (nn.Embedding(8, 4, sparse=True), "expected max_norm=None and sparse=False"),
        (hooked, "expected a plain nn.Embedding, got one with forward hooks"),
        (nn.Linear(8, 4), "expected an nn.Embedding, got Linear"),
    ):
        with pytest.raises(TypeError, match=f"embedding: .*{message}"):
            LoRAEmbedding.from_embedding(embedding)
    with pytest.raises(TypeError, match="expected from_embedding"):
        LoRAEmbedding.from_linear(nn.Linear(8, 4))
    with pytest.raises(ValueError, match="r: expected an int >= 1"):
        LoRAEmbedding(8, 4, r=0)


def test_quantizing_leaves_embeddings_dense():
    model = peftkern.adapt(llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]), quantize="nf4")
    assert model.model.embed_tokens.weight.dtype == F32
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8


# ---- tied weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
def test_the_tied_weight_stays_one(targets):
    model = tied_llama()
    weight = model.model.embed_tokens.weight
    total = peftkern.memory_footprint(model)["total_bytes"]
    with pytest.warns(UserWarning, match=TIED) as caught:
        peftkern.adapt(model, LoraConfig(r=2, target_modules=[*targets, "q_proj"]))
    assert sum(TIED in str(w.message) for w in caught) == len(targets)
    assert model.model.embed_tokens.weight is weight and model.lm_head.weight is weight
    report = peftkern.memory_footprint(model)
    assert report["total_bytes"] == total + report["trainable_bytes"]
    model.tie_weights()  # as transformers does after loading and resizing
    assert model.model.embed_tokens.weight is model.lm_head.weight


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
def test_merging_unties_and_says_so(targets, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tied_llama().eval()
    with pytest.warns(UserWarning, match=TIED):
        peftkern.adapt(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    before = model(TOKENS).logits
    weight = model.lm_head.weight.clone()
    peftkern.merge(model)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    peftkern.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, weight)
    with pytest.warns(UserWarning, match="no longer tied after merging; config.tie_word_embeddings is now False"):
        peftkern.merge(model, unload=True)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(TOKENS).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_ensure_weight_tying_is_one_adapter_and_keeps_the_tie(target, tmp_path, recwarn):
    config = LoraConfig(r=2, target_modules=[target], ensure_weight_tying=True, init_lora_weights=False)
    model = peftkern.adapt(tied_llama(), config).eval()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"}
    before = model(TOKENS).logits
    peftkern.save_adapter(model, tmp_path)
    again = peftkern.load_adapter(tied_llama(), tmp_path).eval()
    assert torch.equal(again(TOKENS).logits, before)
    other = peftkern.adapt(tied_llama(), config).eval()
    peftkern.load_adapter(other, tmp_path)
    assert torch.equal(other(TOKENS).logits, before)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.embed_tokens.lora_embedding_A.zero_()
    assert not copied.lm_head.delta_weight().any() and model.lm_head.delta_weight().any()
    peftkern.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    peftkern.unmerge(model)
    assert torch.equal(model(TOKENS).logits, before)
    peftkern.merge(model, unload=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert not [w for w in recwarn if "tied" in str(w.message) or "untie" in str(w.message)]


def test_ensure_weight_tying_without_a_tie():
    with pytest.warns(UserWarning, match="ensure_weight_tying: the model has no linear layer tied to an embedding"):
        peftkern.adapt(llama(), LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    with pytest.raises(ValueError, match="ensure_weight_tying: expected False with use_dora"):
        LoraConfig(ensure_weight_tying=True, use_dora=True)
    with pytest.raises(ValueError, match="quantize: expected weights of one module each, that of lm_head"):
        config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
        peftkern.adapt(tied_llama(), config, quantize="nf4")


def test_quantizing_a_tied_weight_is_refused():
    model = tied_llama()
    trains = [(n, p.requires_grad, p.dtype) for n, p in model.named_parameters()]
    message = r"quantize: expected weights of one module each, that of lm_head is also model.embed_tokens.weight"
    with pytest.raises(ValueError, match=message):
        peftkern.adapt(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), quantize="nf4")
    assert trains == [(n, p.requires_grad, p.dtype) for n, p in model.named_parameters()]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    peftkern.adapt(llama(), LoraConfig(r=2, target_modules=["lm_head"]), quantize="nf4")  # untied: no reason not to


def test_a_base_weight_in_the_file_is_the_one_that_counts(tmp_path):
    """HF PEFT saves the frozen embedding with an adapter on it, and loads it: that of a resized vocabulary, say."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.base_layer.weight += 1
    theirs.save_pretrained(tmp_path)
    ours = peftkern.load_adapter(llama(), tmp_path).eval()
    torch.testing.assert_close(ours(TOKENS).logits, theirs.eval()(TOKENS).logits, rtol=1e-5, atol=1e-6)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(ours(TOKENS).logits, again(TOKENS).logits, rtol=1e-5, atol=1e-6)


def test_explain_and_trained_biases(tmp_path):
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], bias="all")
    model = peftkern.adapt(llama(), config)
    lines = peftkern.explain(model).splitlines()
    assert any("LoRAEmbedding: rows of a dense float32 weight looked up by torch; rank-2 rows" in x for x in lines)
    peftkern.save_adapter(model, tmp_path)
    fresh = peftkern.load_adapter(llama(), tmp_path)
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_what_is_for_linear_layers_refuses(tmp_path):
    model = peftkern.adapt(gpt2(), LoraConfig(r=2, target_modules=["wpe", "c_fc"], init_lora_weights=False))
    folder = peftkern.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"wpe: expected a layer that adds s B A to its weight, got a LoRAEmbedding"):
        peftkern.compress(model, rank=1)
    with pytest.raises(ValueError, match=r"lora_embedding_A: expected lora_A and lora_B of linear layers"):
        peftkern.compress(folder, rank=1, output=tmp_path / "small")
    with pytest.raises(ValueError, match="embedding|linear"):
        peftkern.AdapterBank(llama(), ["embed_tokens"])


def test_trains_and_compiles():
    torch._dynamo.reset()
    model = peftkern.adapt(llama(), LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model), lr=3e-2)
    losses = []
    for _ in range(20):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)
