# SPDX-License-Identifier: Apache-2.0
"""AdapterBank: every adapter as HF PEFT applies it, mixed in a batch; slots, eviction, swapping, compiled graphs."""

import json

import pytest
import torch
import torch._dynamo.testing
from conftest import assert_close
from safetensors.torch import load_file, save_file
from samples import BF16, F32
from test_adapt import mlp, snapshot, tiny_llama, unchanged
from torch import nn

import peftkern
from peftkern import AdapterBank, LoraConfig, NF4Linear
from peftkern.adapter_bank import BankLinear
from peftkern.adapter_io import CONFIG_NAME, PREFIX, WEIGHTS_NAME

CONFIGS = {
    "all": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "patterns": {
        "r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_dropout": 0.25, "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3}, "alpha_pattern": {"v_proj": 5},
    },
    "few": {"r": 8, "target_modules": r".*layers\.0.*(q|k)_proj"},
}  # fmt: skip

TOKENS = torch.randint(48, (4, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def save(model: nn.Module, folder, config: dict, seed: int = 0, scale: float = 0.3) -> None:
    """An adapter of random values for a copy of model."""
    torch.manual_seed(seed)
    peftkern.adapt(model, LoraConfig(**config))
    with torch.no_grad():
        for p in peftkern.trainable_parameters(model):
            p.normal_(std=scale)
    peftkern.save_adapter(model, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of tiny_llama by name."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        save(tiny_llama(), root / name, config, seed)
    return {name: root / name for name in CONFIGS}


def bank_of(folders, **options) -> AdapterBank:
    bank = AdapterBank(tiny_llama().eval(), **{"capacity": 3, "max_rank": 8, **options})
    for name, folder in folders.items():
        bank.add(name, folder)
    return bank


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def alone(folder, tokens=TOKENS):
    """What the model gives with one adapter, through load_adapter."""
    return logits(peftkern.load_adapter(tiny_llama(), folder).eval(), tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_hf_peft(peft, folders, name):
    bank = bank_of(folders)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), folders[name]).eval()
    with bank.select(name):
        assert_close(logits(bank.model), logits(theirs), F32, slack=2.0)


def test_a_mixed_batch_equals_hf_pefts_mixed_batch(peft, folders):
    bank = bank_of(folders)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), folders["all"], adapter_name="all").eval()
    for name in ("patterns", "few"):
        theirs.load_adapter(folders[name], adapter_name=name)
    names = ["few", "__base__", "all", "patterns"]
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS, adapter_names=names).logits
    with bank.select([None if n == "__base__" else n for n in names]):
        assert_close(logits(bank.model), expected, F32, slack=2.0)


def test_every_item_is_as_if_alone(folders):
    bank = bank_of(folders)
    base = logits(tiny_llama().eval())
    with bank.select(["few", None, "all", "patterns"]):
        got = logits(bank.model)
        with bank.select(None):
            assert torch.equal(logits(bank.model), base)
        assert torch.equal(logits(bank.model), got), "the selection that was there comes back"
    assert torch.equal(logits(bank.model), base)
    expected = [alone(folders["few"])[0], base[1], alone(folders["all"])[2], alone(folders["patterns"])[3]]
    assert_close(got, torch.stack(expected), F32)


def test_nf4_layers_and_adapters_in_bf16(tmp_path):
    torch.manual_seed(0)
    base = mlp().to(BF16)
    for i, module in enumerate(list(base)):
        if isinstance(module, nn.Linear):
            base[i] = NF4Linear.from_linear(module, block_size=32, double_quant=True)
    state = {k: v.clone() for k, v in base.state_dict().items()}
    save(mlp(), tmp_path / "a", {"r": 3, "target_modules": "all-linear"})
    bank = AdapterBank(base, capacity=1, max_rank=4, dtype=BF16)
    bank.add("a", tmp_path / "a")
    x = torch.randn(5, 16, dtype=BF16)
    plain = base(x)
    with bank.select("a"):
        got = base(x)
    now = base.state_dict()
    assert now.keys() == state.keys() and all(torch.equal(now[k], v) for k, v in state.items())
    assert sum(isinstance(m, BankLinear) for m in base.modules()) == 3
    assert bank.close() is base and torch.equal(base(x), plain) and isinstance(base[0], NF4Linear)
    assert_close(got, peftkern.load_adapter(base, tmp_path / "a")(x), BF16)


def test_all_items_of_a_batch_and_multiples(folders):
    """One name for any batch; a list for beams; a layer that sees the batch flattened."""
    bank = bank_of(folders)
    with bank.select("all"):
        for n in (1, 3):
            assert_close(logits(bank.model, TOKENS[:n]), alone(folders["all"], TOKENS[:n]), F32)
    with bank.select(["all", "few"]):
        got = logits(bank.model)
        expected = torch.cat([alone(folders["all"])[:2], alone(folders["few"])[2:]])
        assert_close(got, expected, F32)
        layer = bank.model.model.layers[0].self_attn.q_proj
        x = torch.randn(2, 5, 32)
        assert torch.equal(layer(x).flatten(0, 1), layer(x.flatten(0, 1)))
        with pytest.raises(RuntimeError, match=r"x: expected a batch of 2 or a multiple, .* got \[3, 7, 32\]"):
            logits(bank.model, TOKENS[:3])


def test_generation_with_adapters_of_their_own(folders):
    bank = bank_of(folders)
    bank.model.generation_config.pad_token_id = 0
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with bank.select(["all", None, "few", "patterns"]):
        got = bank.model.generate(TOKENS, **settings)
    for row, name in ((0, "all"), (2, "few"), (3, "patterns")):
        model = peftkern.load_adapter(tiny_llama(), folders[name]).eval()
        model.generation_config.pad_token_id = 0
        assert torch.equal(got[row : row + 1], model.generate(TOKENS[row : row + 1], **settings)), name


def test_a_mix_is_the_sum_of_its_parts(folders):
    """The update of every layer: w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2."""
    bank = bank_of(folders, max_rank=12)
    with bank.select([{"all": 0.25, "few": 0.75}, "patterns", None, {"few": 1.0}]):
        got = logits(bank.model)
        assert bank.counters.loads == 3 and bank.resident == ["patterns"]
    model = peftkern.load_adapter(tiny_llama(), folders["all"]).eval()
    deltas = {n: 0.25 * m.delta_weight() for n, m in model.named_modules() if isinstance(m, peftkern.LoRALinear)}
    few = peftkern.load_adapter(tiny_llama(), folders["few"])
    for n, m in few.named_modules():
        if isinstance(m, peftkern.LoRALinear):
            deltas[n] = deltas[n] + 0.75 * m.delta_weight()
    mixed = tiny_llama().eval()
    with torch.no_grad():
        for n, delta in deltas.items():
            mixed.get_submodule(n).weight += delta
    assert_close(got[0], logits(mixed)[0], F32, slack=3.0)
    assert_close(got[3], alone(folders["few"])[3], F32)
    small = bank_of(folders)
    with pytest.raises(ValueError, match=r"mix of all, few: .*q_proj: expected ranks that add up to at most 8, .* 12"):
        small.slots([{"all": 0.5, "few": 0.5}])


# ---- slots -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A bank with room for two of four adapters of a small network, and what each gives."""
    x, results = torch.randn(3, 16), {}
    for seed, name in enumerate("abcd"):
        save(model := mlp_of(7), tmp_path / name, {"r": seed + 1, "target_modules": "all-linear"}, seed)
        results[name] = model(x).detach()
    bank = AdapterBank(mlp_of(7), capacity=2, max_rank=4)
    for name in "abcd":
        bank.add(name, tmp_path / name)
    return bank, x, results


def mlp_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp()


def test_the_least_recently_used_goes(small):
    bank, x, results = small
    for name, resident in (("a", "a"), ("b", "ab"), ("a", "ba"), ("c", "ac"), ("c", "ac"), ("d", "cd"), ("b", "db")):
        with bank.select(name):
            assert_close(bank.model(x), results[name], F32)
        assert bank.resident == list(resident)
    assert vars(bank.counters) == {"hits": 2, "loads": 5, "evictions": 3}


def test_pinned_and_selected_adapters_stay(small):
    bank, x, results = small
    bank.pin("a")
    for name in "bcd":
        with bank.select(name):
            assert_close(bank.model(x), results[name], F32)
    assert bank.resident == ["a", "d"]
    with pytest.raises(RuntimeError, match="expected at most 2 adapters at a time, .* got 3"), bank.select(["b", "c"]):
        pass
    with bank.select("b"), pytest.raises(RuntimeError, match="got 3"), bank.select("c"):
        pass
    bank.pin("b")
    with pytest.raises(RuntimeError, match="c: expected at most 2 pinned adapters"):
        bank.pin("c")
    bank.unpin("a")
    with bank.select("c"):
        assert_close(bank.model(x), results["c"], F32)
    assert bank.resident == ["b", "c"]


def test_replace_swaps_what_is_in_memory(small, tmp_path):
    bank, x, results = small
    with bank.select("a"):
        bank.replace("a", tmp_path / "c")
        assert_close(bank.model(x), results["c"], F32)
    with bank.select({"a": 1.0}):
        assert_close(bank.model(x), results["c"], F32)
    bank.replace("a", tmp_path / "b")
    with bank.select({"a": 1.0}):
        assert_close(bank.model(x), results["b"], F32)
    bank.replace("d", tmp_path / "a")
    with bank.select("d"):
        assert_close(bank.model(x), results["a"], F32)
    (tmp_path / "d" / WEIGHTS_NAME).write_bytes(b"no")
    with pytest.raises(ValueError, match="a: .*expected a whole safetensors file"):
        bank.replace("a", tmp_path / "d")
    with bank.select("a"):
        assert_close(bank.model(x), results["b"], F32)


def test_remove(small):
    bank, x, results = small
    base = bank.model(x)
    with bank.select({"a": 1.0, "b": 0.0}), pytest.raises(RuntimeError, match="a: expected an adapter that is not"):
        bank.remove("a")
    bank.pin("a")
    bank.remove("a")
    assert bank.names == ["b", "c", "d"] and bank.resident == []
    with pytest.raises(KeyError, match=r"a: expected the name of an adapter of the bank \(b, c, d\)"), bank.select("a"):
        pass
    with bank.select(["b", "c", None]):
        assert_close(bank.model(x), torch.stack([results["b"][0], results["c"][1], base[2]]), F32)


def test_a_tensor_of_slots_is_read_each_time(small):
    """As a captured CUDA graph needs it."""
    bank, x, results = small
    for name in "ab":
        bank.pin(name)
    slots = bank.slots(["a", None, "b"])
    with bank.select(slots):
        first = bank.model(x)
        slots.copy_(bank.slots(["b", "b", "a"]))
        second = bank.model(x)
    assert_close(first, torch.stack([results["a"][0], bank.model(x)[1], results["b"][2]]), F32)
    assert_close(second, torch.stack([results["b"][0], results["b"][1], results["a"][2]]), F32)
    with torch.inference_mode(), bank.select(["a", "a", "b"]):
        assert_close(bank.model(x)[:2], results["a"][:2], F32)


def test_the_bank_moves_with_the_model(small):
    bank, x, results = small
    with bank.select("c"):
        bank.model.to(BF16)
        assert bank.model(x.to(BF16)).dtype == BF16
        assert_close(bank.model(x.to(BF16)), results["c"], BF16)


def test_gradients_flow_to_the_input_and_nowhere_else(small):
    bank, x, _ = small
    x = x.clone().requires_grad_()
    with bank.select(["a", None, "b"]):
        bank.model(x).sum().backward()
    assert x.grad is not None and not [p for p in bank.model.parameters() if p.grad is not None and p.dim() == 2]


def test_a_compiled_model_keeps_its_graph(small):
    """Other adapters, loading, evicting, swapping, adding: no recompilation, and the right results."""
    bank, x, results = small
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(bank.model, backend=counter, fullgraph=True)
    for names in (["a", "b", None], ["c", None, "d"], ["b", "b", "a"]):
        with bank.select(names), torch.no_grad():
            got = compiled(x)
            for i, name in enumerate(names):
                if name:
                    assert_close(got[i], results[name][i], F32)
    bank.remove("d")
    bank.add("e", bank._stored["c"].folder)
    with bank.select(["e", "e", "a"]), torch.no_grad():
        assert_close(compiled(x)[:2], results["c"][:2], F32)
    assert counter.frame_count == 1


# ---- errors ----------------------------------------------------------------------------------------------------------


def damaged(folder, change) -> None:
    tensors, config = load_file(folder / WEIGHTS_NAME), json.loads((folder / CONFIG_NAME).read_text())
    change(tensors, config)
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config))


KEY = f"{PREFIX}0.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(KEY), r"bad: .*: 0.lora_A: expected shape \[2, 16\], got None"),
        (lambda t, c: t.update({KEY: torch.zeros(3, 16)}), r"0.lora_A: expected shape \[2, 16\], got \[3, 16\]"),
        (lambda t, c: c.update(r=3), r"expected shape \[3, "),
        (lambda t, c: c.update(r=5), "bad: .*: expected r <= 4, max_rank of the bank, got 5"),
        (lambda t, c: c.update(bias="all"), "bad: .*bias: expected \"none\", got 'all'"),
        (lambda t, c: c.update(peft_type="IA3"), "bad: .*peft_type: expected LORA or ADALORA, got 'IA3'"),
        (lambda t, c: t.update({f"{PREFIX}9.lora_A.weight": torch.zeros(2, 2)}), "9: expected a layer of the bank"),
        (lambda t, c: t.update({f"{PREFIX}0.weight": torch.zeros(2)}), "expected lora_A and lora_B of linear layers"),
        (lambda t, c: t.clear(), "bad: .*expected lora_A and lora_B of some layers, got none"),
    ],
)
def test_files_that_do_not_fit_are_named(change, message, tmp_path):
    save(mlp(), tmp_path / "bad", {"r": 2, "target_modules": "all-linear"})
    damaged(tmp_path / "bad", change)
    bank = AdapterBank(mlp(), capacity=2, max_rank=4)
    with pytest.raises(ValueError, match=message):
        bank.add("bad", tmp_path / "bad")
    assert bank.names == []


def test_values_are_checked_when_they_are_loaded(small):
    bank, x, results = small
    damaged(bank._stored["c"].folder, lambda t, c: t[KEY].fill_(float("nan")))
    with bank.select(["a", "b", None]):
        pass
    with pytest.raises(ValueError, match=r"c: .*0.lora_A.weight: expected finite values"), bank.select("c"):
        pass
    assert bank.resident == ["a", "b"] and bank.counters.evictions == 0, "nothing is dropped for what cannot be read"
    with bank.select("b"):
        assert_close(bank.model(x), results["b"], F32)


def test_bad_arguments_are_named(small, tmp_path):
    bank, _, _ = small
    with pytest.raises(FileNotFoundError, match=r"none: .*adapter_config.json"):
        bank.add("none", tmp_path / "none")
    with pytest.raises(ValueError, match="a: expected a new name"):
        bank.add("a", tmp_path / "a")
    for bad, message in (
        ([], "choices: expected one for each item"), ({}, "choices: expected names, None or"),
        ([3], "choices: expected names, None or"), ({"a": float("nan")}, "choices: a: expected a finite weight"),
        (torch.zeros(2, 2), "choices: expected a tensor of slots"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message), bank.select(bad):
            pass
    for options, message in (
        ({"capacity": 0}, "capacity: expected an int >= 1, got 0"), ({"max_rank": 0.5}, "max_rank: expected an int"),
        ({"dtype": torch.int8}, "dtype: expected float32"), ({"target_modules": ["x"]}, "target_modules: .* none"),
    ):  # fmt: skip
        model = mlp()
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            AdapterBank(model, **options)
        assert unchanged(model, before)
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        AdapterBank(bank.model)
    with pytest.raises(ValueError, match="model: expected one without adapters"):
        AdapterBank(peftkern.adapt(mlp(), LoraConfig(r=2)))


def test_close_gives_the_model_back():
    model = mlp()
    before = snapshot(model)
    assert AdapterBank(model).close() is model
    assert unchanged(model, before)
