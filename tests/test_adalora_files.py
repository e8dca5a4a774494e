# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA adapters in HF PEFT's files, both ways, and as plain LoRA."""

import json

import pytest
import torch
from adalora_models import adapted, batches, config, mlp, randomized, trained
from conftest import assert_close
from safetensors.torch import load_file
from torch import nn

import peftkern
from peftkern import AdaLoRALinear, LoRALinear, NF4Config
from peftkern.rank_allocator import adalora_layers


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


# ---- files -----------------------------------------------------------------------------------------------------------


def train_peft(peft, steps=26, seed=0, **changes):
    """A model that HF PEFT's AdaLoRA has trained and masked, in its final phase; one layer has lost every rank."""
    c = config(**changes)
    names = ("init_r", "target_r", "total_step", "tinit", "tfinal")
    theirs = peft.get_peft_model(
        mlp(seed=seed),
        peft.AdaLoraConfig(target_modules=["0", "2", "4"], lora_alpha=8, **{name: getattr(c, name) for name in names}),
    )
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for step, (x, y) in enumerate(batches(steps), start=1):
        nn.functional.mse_loss(theirs(x), y).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return theirs.eval()


def read(folder):
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT warns of layers without rank
@pytest.mark.parametrize("steps", [3, 26])
@pytest.mark.parametrize("target_r", [1, 2])
def test_peft_s_files_are_read_and_written_bit_for_bit(peft, tmp_path, steps, target_r):
    theirs = train_peft(peft, steps, target_r=target_r)
    x = torch.randn(5, 24)
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "theirs")
    saved, their_config = read(tmp_path / "theirs")
    assert (their_config["rank_pattern"] is None) == (steps == 3)

    ours = peftkern.load_adapter(mlp(), tmp_path / "theirs").eval()
    for name, layer in adalora_layers(ours).items():
        for attribute, p in layer.adapter_parameters().items():
            assert torch.equal(p, saved[f"base_model.model.{name}.{attribute}"])
        assert layer.scaling == 8 / (6 + 1e-5) and layer.init_r == 6
    assert_close(ours(x), expected, torch.float32)

    peftkern.save_adapter(ours, tmp_path / "ours")
    written, our_config = read(tmp_path / "ours")
    assert written.keys() == saved.keys() and all(torch.equal(written[k], saved[k]) for k in saved)
    for field in ("rank_pattern", "init_r", "target_r", "lora_alpha", "total_step", "tinit", "tfinal", "peft_type"):
        assert our_config[field] == their_config[field], field
    again = peft.PeftModel.from_pretrained(mlp(), tmp_path / "ours").eval()
    reloaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "theirs").eval()
    assert torch.equal(again(x), reloaded(x))


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("prune", ["never", "final"])
@pytest.mark.parametrize("steps", [3, 12, 30])
def test_peft_reads_what_we_wrote(peft, tmp_path, steps, prune):
    model, _, allocator = trained(steps, prune=prune)
    x = torch.randn(5, 24)
    peftkern.save_adapter(model, tmp_path)
    tensors, written = read(tmp_path)
    if steps > 4:
        ranks = {name.removesuffix(".lora_E"): sum(p) for name, p in written["rank_pattern"].items()}
        assert ranks == allocator.ranks() and {len(p) for p in written["rank_pattern"].values()} == {6}
    theirs = peft.PeftModel.from_pretrained(mlp(), tmp_path).eval()
    assert_close(theirs(x), model.eval()(x), torch.float32)
    values = dict(theirs.named_parameters())
    assert all(torch.equal(values[f"{key}.default"], t) for key, t in tensors.items())
    fresh = peftkern.load_adapter(adapted(seed=4).eval(), tmp_path)  # into a model that has another adapter
    fresh.load_state_dict(mlp().state_dict(), strict=False)
    assert torch.equal(fresh(x), peftkern.load_adapter(mlp(), tmp_path).eval()(x))


def test_a_layer_without_any_rank_survives_the_files(tmp_path):
    model, optimizer, _ = trained(30, prune="final")
    model[0].lora_E.data.zero_()
    peftkern.prune_ranks(model, optimizer)
    assert model[0].r == 0
    x = torch.randn(9, 24)  # of fewer rows the product is made another way without lam
    loaded = peftkern.load_adapter(mlp(), peftkern.save_adapter(model, tmp_path))
    assert loaded[0].r == 0 and torch.equal(loaded.eval()(x), model.eval()(x))
    loaded[0].merge()
    assert torch.equal(loaded(x), model(x))


def test_layers_put_in_by_hand_can_be_saved(tmp_path):
    model = mlp()
    model[2] = randomized(AdaLoRALinear.from_linear(model[2], r=5, lora_alpha=3))
    loaded = peftkern.load_adapter(mlp(), peftkern.save_adapter(model, tmp_path))
    x = torch.randn(3, 24)
    assert torch.equal(loaded.eval()(x), model.eval()(x)) and type(loaded[0]) is nn.Linear
    model[0] = AdaLoRALinear.from_linear(model[0], r=4, lora_alpha=3)
    with pytest.raises(RuntimeError, match=r"expected init_r=4, one value for all layers of an adapter, got 5"):
        peftkern.save_adapter(model, tmp_path)
    model[0] = LoRALinear.from_linear(mlp()[0])
    with pytest.raises(RuntimeError, match=r"2: expected a LoRALinear, got AdaLoRALinear"):
        peftkern.save_adapter(model, tmp_path)


DAMAGE = {
    "another init_r": (lambda c: c.update(init_r=5, rank_pattern=None), r"expected init_r 6, as in 0, got 5"),
    "pattern too short": (lambda c: c["rank_pattern"].update({"0.lora_E": [True]}), r"expected a list of 6 booleans"),
    "pattern of another rank": (
        lambda c: c["rank_pattern"].update({"0.lora_E": [True] * 6}), r"lora_A: expected shape \[6, 24\]"
    ),
    "pattern that is no dict": (lambda c: c.update(rank_pattern=[1, 2]), r"rank_pattern: expected a dict of layer"),
    "no total_step": (lambda c: c.update(total_step=None), r"total_step: expected an int >= 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_change_nothing(tmp_path, name):
    change, message = DAMAGE[name]
    source, _, _ = trained(30)
    folder = peftkern.save_adapter(source, tmp_path)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    assert not all(values["rank_pattern"]["0.lora_E"])
    change(values)
    path.write_text(json.dumps(values))
    model = adapted()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        peftkern.load_adapter(model, folder)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_adapter_of_another_method_is_refused(tmp_path):
    lora = peftkern.adapt(mlp(), peftkern.LoraConfig(r=6))
    with pytest.raises(
        ValueError, match=r"expected peft_type ADALORA, as 0 is an AdaLoRALinear, got an adapter for LoRAL"
    ):
        peftkern.load_adapter(adapted(), peftkern.save_adapter(lora, tmp_path / "lora"))
    with pytest.raises(
        ValueError, match=r"expected peft_type LORA, as 0 is a LoRALinear, got an adapter for AdaLoRALin"
    ):
        peftkern.load_adapter(lora, peftkern.save_adapter(adapted(), tmp_path / "adalora"))


@pytest.mark.parametrize("quantize", [None, NF4Config(32)])
def test_to_lora(peft, tmp_path, quantize):
    model, _, allocator = trained(30, quantize=quantize)
    model[0].lora_E.data.zero_()  # a layer that loses its adapter
    x = torch.randn(5, 24)
    expected, ranks = model.eval()(x), {"2": allocator.ranks()["2"], "4": allocator.ranks()["4"]}
    assert all(ranks.values())
    assert peftkern.to_lora(model) is model
    assert not adalora_layers(model) and isinstance(model[0], nn.Linear)
    assert {name: m.r for name, m in model.named_modules() if isinstance(m, LoRALinear)} == ranks
    assert_close(model(x), expected, torch.float32)
    peftkern.save_adapter(model, tmp_path)
    _, written = read(tmp_path)
    assert written["peft_type"] == "LORA" and written["r"] == written["lora_alpha"] == max(ranks.values())
    assert written["rank_pattern"] == written["alpha_pattern"]
    if quantize is None:
        theirs = peft.PeftModel.from_pretrained(mlp(), tmp_path).eval()
        assert_close(theirs(x), expected, torch.float32)
    loaded = peftkern.load_adapter(mlp(), tmp_path).eval()
    if quantize is None:
        assert torch.equal(loaded(x), model(x))


def test_to_lora_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"model: expected one with AdaLoRALinear layers, got none"):
        peftkern.to_lora(mlp())
    with pytest.raises(RuntimeError, match=r"of which some E is not 0, got none"):
        peftkern.to_lora(adapted())
    with pytest.raises(ValueError, match=r"got such a layer itself"):
        peftkern.to_lora(randomized(AdaLoRALinear(8, 8)))
    model, _, _ = trained()
    model[2].merge()
    with pytest.raises(RuntimeError, match=r"2: expected an unmerged layer"):
        peftkern.to_lora(model)


# ---- compressed ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT warns of layers without rank
@pytest.mark.parametrize("steps", [3, 26])
def test_compress_turns_peft_s_adalora_into_lora(peft, tmp_path, steps):
    """E folded in, layers without rank left out; as a folder and as a state dict."""
    theirs = train_peft(peft, steps, target_r=1)
    x = torch.randn(5, 24)
    theirs.save_pretrained(tmp_path / "a")
    tensors, config = read(tmp_path / "a")
    before = {name: tensors[f"base_model.model.{name}.lora_A"].shape[0] for name in ("0", "2", "4")}
    assert (steps == 3) == (min(before.values()) == 6) and (steps == 3 or min(before.values()) == 0)
    report = peftkern.compress(tmp_path / "a", energy=1.0, output=tmp_path / "b")
    assert {name: layer.rank_before for name, layer in report.layers.items()} == before == {
        name: layer.rank for name, layer in report.layers.items()
    }  # fmt: skip
    written, new = read(tmp_path / "b")
    assert new["peft_type"] == "LORA" and all(key.endswith(".weight") for key in written)
    assert len(written) == 2 * sum(r > 0 for r in before.values())
    for loaded in (peft.PeftModel.from_pretrained(mlp(), tmp_path / "b"), peftkern.load_adapter(mlp(), tmp_path / "b")):
        assert_close(loaded.eval()(x), theirs(x), torch.float32)
    result = peftkern.compress(tensors, energy=1.0, config=config)
    assert all(torch.equal(result.state_dict[key.removesuffix(".weight")], t) for key, t in written.items())
    smaller = peftkern.compress(tmp_path / "a", budget=2, output=tmp_path / "c")
    assert smaller.rank == 2 and smaller.discarded_energy > 0
    assert smaller.discarded_energy == pytest.approx(
        peftkern.compress(peftkern.load_adapter(mlp(), tmp_path / "a"), budget=2).discarded_energy, rel=1e-9
    )


def test_compress_of_a_model_with_a_layer_without_rank(tmp_path):
    """Of our own files, with biases that train: their layer keeps rank 1, of zeros."""
    model = adapted(bias="lora_only").eval()
    for layer in adalora_layers(model).values():
        randomized(layer)
    model[0].lora_E.data.zero_()
    peftkern.prune_ranks(model)
    x = torch.randn(3, 24)
    expected = model(x)
    peftkern.save_adapter(model, tmp_path / "a")
    report = peftkern.compress(tmp_path / "a", energy=1.0, output=tmp_path / "b")
    assert (report.layers["0"].rank_before, report.layers["0"].rank) == (0, 1)
    tensors, _ = read(tmp_path / "b")
    assert not tensors["base_model.model.0.lora_A.weight"].any()
    base = mlp()
    assert_close(peftkern.load_adapter(base, tmp_path / "b").eval()(x), expected, torch.float32)
    report = peftkern.compress(model, energy=1.0)
    assert (report.layers["0"].rank_before, report.layers["0"].rank) == (0, 1)
    assert_close(model(x), expected, torch.float32)
