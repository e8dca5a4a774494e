# SPDX-License-Identifier: Apache-2.0
"""Router: embeddings, scores, the threshold, mixes, files; prompts of three kinds on a real model."""

import json

import pytest
import torch
from conftest import assert_close
from samples import F32
from test_adapter_bank import save
from torch import nn

from peftkern import AdapterBank, Router
from peftkern.router import PROTOTYPES_NAME, SETTINGS_NAME, transformers_encoder

WIDTH = 6


def encode(prompts):
    """Token i of the alphabet points along axis i % WIDTH, all of them also along a common direction."""
    longest = max(map(len, prompts))
    hidden = torch.full((len(prompts), longest, WIDTH), float("nan"))
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        for j, letter in enumerate(prompt):
            hidden[i, j] = torch.eye(WIDTH)[(ord(letter) - ord("a")) % WIDTH] + 5.0
            mask[i, j] = 1
    return hidden, mask


def router_of(**options) -> Router:
    router = Router(encode, **options)
    router.add("a", ["aaa", "aab", "a"])
    router.add("b", ["bbb", "bbc"])
    router.add("d", ["ddd", "dd"])
    return router


def test_embeddings_are_means_over_the_mask():
    """What padded positions hold, here NaN, does not count."""
    got = Router(encode).embed(["aab", "c"])
    expected = torch.stack([torch.tensor([2, 1, 0, 0, 0, 0]) / 3 + 5, torch.tensor([0, 0, 1, 0, 0, 0]) + 5.0])
    assert_close(got, expected / expected.norm(dim=1, keepdim=True), F32)


def test_scores_are_cosines_about_the_center():
    router = router_of()
    routing = router.route(["aab", "dd", "bd"])
    assert routing.names == ["a", "b", "d"] and routing.choices == ["a", "d", routing.choices[2]]
    prototypes = torch.stack([router.embed(p).mean(0) for p in (["aaa", "aab", "a"], ["bbb", "bbc"], ["ddd", "dd"])])
    center = prototypes.mean(0)
    embedded = router.embed(["aab", "dd", "bd"])
    for i, e in enumerate(embedded):
        for j, p in enumerate(prototypes):
            expected = torch.nn.functional.cosine_similarity(e - center, p - center, dim=0)
            assert_close(routing.scores[i, j], expected, F32, slack=10.0)
    assert routing.scores[0, 1] < 0.3, "without the center all cosines would be near 1"


def test_one_adapter_and_the_threshold():
    router = Router(encode, threshold=0.999)
    router.add("a", ["aaa"])
    assert router.route(["aa", "bbbbb"]).choices == ["a", None], "one prototype: the plain cosine"
    router = router_of(threshold=0.5)
    assert router.route(["aaa", "eef", "d"]).choices == ["a", None, "d"]
    router.threshold = -1.0
    assert None not in router.route(["aaa", "eef", "d"]).choices


def test_mixes_are_the_softmax_of_the_best():
    router = router_of(top_k=2, temperature=0.3)
    routing = router.route(["aab", "dddb"])
    for choice, scores in zip(routing.choices, routing.scores, strict=True):
        best = scores.topk(2)
        weights = (best.values / 0.3).softmax(0).tolist()
        assert list(choice) == [routing.names[i] for i in best.indices]
        assert list(choice.values()) == pytest.approx(weights) and sum(choice.values()) == pytest.approx(1.0)
    router.top_k = 9
    assert len(router.route(["aab"]).choices[0]) == 3, "no more than there are"


def test_a_bank_takes_the_choices(tmp_path):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3))
    state = {k: t.clone() for k, t in base.state_dict().items()}
    bank = AdapterBank(base, capacity=3, max_rank=4)
    for seed, name in enumerate("abd"):
        fresh = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3))
        fresh.load_state_dict(state)
        save(fresh, tmp_path / name, {"r": 2, "target_modules": "all-linear"}, seed)
        bank.add(name, tmp_path / name)
    x = torch.randn(2, WIDTH)
    router = router_of(threshold=0.3)
    with bank.select(router.route(["aab", "eef"]).choices):
        got = base(x)
    with bank.select(["a", None]):
        assert torch.equal(got, base(x))
    router.top_k = 2
    choices = router.route(["aab", "dd"]).choices
    with bank.select(choices):
        assert not torch.equal(base(x), got)


def test_add_replaces_and_remove_forgets():
    router = router_of()
    router.add("b", ["eee"])
    assert router.route(["ee"]).choices == ["b"] and router.names == ["a", "b", "d"]
    router.remove("d")
    assert router.names == ["a", "b"]
    with pytest.raises(KeyError, match="d"):
        router.remove("d")


def test_save_and_load(tmp_path):
    router = router_of(threshold=0.2, top_k=2, temperature=0.4)
    assert router.save(tmp_path / "new" / "router") == tmp_path / "new" / "router"
    loaded = Router.load(tmp_path / "new" / "router", encode)
    prompts = ["aab", "eef", "dd"]
    assert loaded.route(prompts).choices == router.route(prompts).choices
    assert torch.equal(loaded.route(prompts).scores, router.route(prompts).scores)
    Router(encode).save(tmp_path / "new" / "router")
    assert Router.load(tmp_path / "new" / "router", encode).names == []
    assert sorted(p.name for p in (tmp_path / "new" / "router").iterdir()) == [SETTINGS_NAME, PROTOTYPES_NAME]


def settings(change):
    def damage(folder):
        values = json.loads((folder / SETTINGS_NAME).read_text())
        change(values)
        (folder / SETTINGS_NAME).write_text(json.dumps(values))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SETTINGS_NAME).write_text("{"), "router.json: expected the settings of a router"),
        (lambda f: (f / SETTINGS_NAME).write_text("[1]"), "router.json: expected the settings of a router"),
        (settings(lambda v: v.pop("names")), "router.json: .*KeyError.*names"),
        (settings(lambda v: v.update(names=3)), "router.json: expected the settings"),
        (settings(lambda v: v.update(format=9)), "router.json: .*expected format 1"),
        (settings(lambda v: v.update(temperature=0)), "router.json: .*temperature: expected a number > 0, got 0"),
        (settings(lambda v: v["names"].append("x")), "router.safetensors: expected 4 prototypes of one width"),
        (settings(lambda v: v.update(names=["a", "a", "b"])), "router.safetensors: expected 3 prototypes"),
        (lambda f: (f / PROTOTYPES_NAME).write_bytes(b"123456789"), "router.safetensors: expected a whole safetensors"),
    ],
)
def test_damaged_files_are_named(damage, message, tmp_path):
    router_of().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Router.load(tmp_path, encode)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=SETTINGS_NAME):
        Router.load(tmp_path, encode)
    router_of().save(tmp_path)
    (tmp_path / PROTOTYPES_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=PROTOTYPES_NAME):
        Router.load(tmp_path, encode)


def test_bad_arguments_are_named():
    for options, message in (
        ({"threshold": 2.0}, "threshold: expected a cosine, from -1 to 1, got 2.0"),
        ({"top_k": 0}, "top_k: expected an int >= 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Router(encode, **options)
    router = Router(encode)
    with pytest.raises(RuntimeError, match="expected adapters to choose from"):
        router.route(["a"])
    with pytest.raises(ValueError, match="prompts: expected a list of at least one example prompt for x, got 'abc'"):
        router.add("x", "abc")
    with pytest.raises(ValueError, match="prompts: expected at least one token, got none in prompt 1"):
        router.add("x", ["abc", ""])
    with pytest.raises(ValueError, match="name: expected a string"):
        router.add("", ["abc"])
    with pytest.raises(ValueError, match=r"encode: expected hidden states \[1, tokens, width\] .* got \[2, 3\]"):
        Router(lambda prompts: (torch.zeros(2, 3), torch.zeros(2))).add("x", ["abc"])
    router.add("x", ["abc"])
    router.encode = lambda prompts: (torch.ones(len(prompts), 2, WIDTH + 1), torch.ones(len(prompts), 2))
    with pytest.raises(ValueError, match="encode: expected hidden states of width 6, that of the prototypes, got 7"):
        router.route(["abc"])
    with pytest.raises(ValueError, match="y: expected hidden states of width 6, got 7"):
        router.add("y", ["abc"])


@pytest.mark.slow
def test_three_kinds_of_prompts_on_a_real_model():
    """SmolLM2-135M: prompts about Python, cooking and law, which it has not been told apart by any training."""
    pytest.importorskip("transformers")
    from peftkern.finetune import model as finetune_model
    from peftkern.finetune.errors import FinetuneError

    try:
        source = finetune_model.find_model(None)
    except FinetuneError as error:
        pytest.skip(str(error))
    model = finetune_model.load_base(source, "fp32", torch.device("cpu"))
    bank = AdapterBank(model, ["q_proj", "v_proj"], capacity=1, max_rank=4)
    router = Router(transformers_encoder(model, finetune_model.load_tokenizer(source), max_length=64), threshold=0.1)
    examples = {
        "python": [
            "How do I reverse a list in Python?", "Explain what a decorator does.", "Why does this for loop never end?",
            "Write a function that counts the words of a string.", "What is the difference between a tuple and a list?",
        ],
        "cooking": [
            "How long do I boil an egg?", "Give me a recipe for tomato soup.", "What can I use instead of butter?",
            "How do I keep rice from sticking?", "Which spices go well with lamb?",
        ],
        "law": [
            "Can my landlord raise the rent without notice?", "What makes a contract binding?",
            "How do I appeal a court decision?", "Is a spoken agreement enforceable?", "Who pays for damage?",
        ],
    }  # fmt: skip
    for name, prompts in examples.items():
        router.add(name, prompts)
    asked = {
        "python": ["How can I sort a dictionary by value?", "What does the yield statement return?",
                   "Write a class with a property and a static method.", "How do I catch an exception?"],
        "cooking": ["How do I bake bread without yeast?", "What is a good sauce for pasta?",
                    "How hot should the oven be for roast chicken?", "Can I freeze cooked potatoes?"],
        "law": ["May my employer dismiss me without a reason?", "Can I sue my neighbour for the noise?",
                "What happens if I break a lease?", "Does a will have to be signed by witnesses?"],
    }  # fmt: skip
    right = total = 0
    for name, prompts in asked.items():
        choices = router.route(prompts).choices
        right += sum(choice == name for choice in choices)
        total += len(choices)
    assert right >= total - 1, f"{right} of {total}"
    assert bank.counters.loads == 0
    alone = router.embed(asked["law"][:1])
    assert_close(router.embed([asked["law"][0], examples["python"][3]])[:1], alone, F32, slack=100.0)  # padding
