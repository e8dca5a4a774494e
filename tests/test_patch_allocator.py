# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's rank allocation in patched HF PEFT models: PEFT's schedule, masks and losses, and its state in every way
out of the patch."""

import copy
import io
import pickle

import pytest
import torch
from test_adapt import TOKENS
from torch import nn

import peftkern

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft.tuners.adalora.layer import RankAllocator  # noqa: E402
from test_patch import adalora, build, relative  # noqa: E402

STEPS, TINIT, TFINAL, DELTA = 64, 6, 16, 3
STATE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def model_and_optimizer(dtype=torch.float32):
    config = adalora(
        total_step=STEPS, tinit=TINIT, tfinal=TFINAL, deltaT=DELTA, orth_reg_weight=0.3, task_type="CAUSAL_LM"
    )
    model = build(config, dtype)
    return model, optimizer_of(model)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[tuple[float, dict]]:
    """Loss and rank pattern of each step."""
    log = []
    for step in steps:
        tokens = (TOKENS + step) % 48
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        log.append((loss.item(), copy.deepcopy(model.peft_config["default"].rank_pattern or {})))
    return log


def assert_same_training(got: list, expected: list) -> None:
    for step, ((ours, ranks), (theirs, expected_ranks)) in enumerate(zip(got, expected, strict=True), 1):
        assert ranks == expected_ranks, f"step {step}"
        assert ours == pytest.approx(theirs, abs=1e-4), f"step {step}"


@pytest.fixture(scope="module")
def pefts() -> list[tuple[float, dict]]:
    """What an unpatched model does."""
    return train(*model_and_optimizer(), range(1, STEPS + 1))


def spied(monkeypatch) -> list[str]:
    """Fills with the methods of PEFT's allocator that do its work."""
    calls: list[str] = []
    for name in ("update_ipt", "mask_to_budget", "mask_using_rank_pattern"):
        original = getattr(RankAllocator, name)

        def spy(self, *args, _name=name, _original=original):
            calls.append(_name)
            return _original(self, *args)

        monkeypatch.setattr(RankAllocator, name, spy)
    return calls


def test_same_masks_and_losses_as_peft(pefts, monkeypatch):
    assert len({str(ranks) for _, ranks in pefts}) > 8, "the masks change"
    model, optimizer = model_and_optimizer()
    peftkern.patch(model)
    calls = spied(monkeypatch)
    assert_same_training(train(model, optimizer, range(1, STEPS + 1)), pefts)
    assert not calls and "adalora.RankAllocator, patched: one call for all layers" in peftkern.explain(model)
    E = torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_E" in n])
    assert int((E != 0).sum()) <= 3 * 14, "target_r of each layer"
    assert not model.base_model.rankallocator.exp_avg_ipt, "PEFT forgets them with the last allocation"


def test_averages_are_pefts():
    ours, theirs = model_and_optimizer(), model_and_optimizer()
    peftkern.patch(ours[0])
    for steps in (range(1, 2), range(2, TINIT + DELTA)):
        train(*ours, steps), train(*theirs, steps)
        a, b = ours[0].base_model.rankallocator, theirs[0].base_model.rankallocator
        for name in STATE:
            mine, reference = getattr(a, name), getattr(b, name)
            assert mine.keys() == reference.keys() and len(mine) == 3 * 14
            assert all(mine[n].shape == t.shape and mine[n].dtype == t.dtype for n, t in reference.items())
            if name != "ipt":
                assert max(relative(mine[n], t) for n, t in reference.items()) < 1e-4, name


@pytest.mark.parametrize("at", [3, 20, STEPS - TFINAL - 1, STEPS - TFINAL])
@pytest.mark.parametrize("change", ["patch", "unpatch"])
def test_changing_over_in_mid_training(pefts, change, at, monkeypatch):
    """Up to step `at` with one allocator, then with the other: at a final step too, which scores what is there."""
    model, optimizer = model_and_optimizer()
    if change == "unpatch":
        peftkern.patch(model)
    log = train(model, optimizer, range(1, at + 1))
    (peftkern.patch if change == "patch" else peftkern.unpatch)(model)
    allocator = model.base_model.rankallocator
    assert (type(allocator) is RankAllocator) == (change == "unpatch")
    if change == "unpatch":
        assert not any("peftkern" in name for name in vars(allocator))
        storages = {t.untyped_storage().data_ptr() for name in STATE[1:] for t in getattr(allocator, name).values()}
        assert len(storages) in (0, 2 * 3 * 14), "tensors of their own again"
    calls = spied(monkeypatch)
    log += train(model, optimizer, range(at + 1, STEPS + 1))
    assert_same_training(log, pefts)
    # with no update between, PEFT's method scores the averages that were handed over
    assert bool(calls) == (change == "unpatch" or at == STEPS - TFINAL - 1)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "dictionaries"])
def test_copied_saved_and_resumed(pefts, way):
    at = 25
    model, optimizer = model_and_optimizer()
    peftkern.patch(model)
    log = train(model, optimizer, range(1, at + 1))
    if way == "deepcopy":
        twin = copy.deepcopy(model)
        assert type(twin.base_model.rankallocator) is type(model.base_model.rankallocator)
        assert twin.base_model.rankallocator.peft_config is twin.peft_config["default"], "one config, as before"
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
        assert type(twin.base_model.rankallocator) is RankAllocator, "PEFT's own, loadable without peftkern"
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert type(twin.base_model.rankallocator) is RankAllocator
    else:  # as a script does that writes the allocator's dictionaries into its checkpoint
        file = io.BytesIO()
        torch.save({name: getattr(model.base_model.rankallocator, name) for name in STATE}, file)
        file.seek(0)
        twin = model_and_optimizer()[0]
        twin.load_state_dict(model.state_dict())
        twin.peft_config["default"].rank_pattern = model.peft_config["default"].rank_pattern
        for name, saved in torch.load(file).items():
            setattr(twin.base_model.rankallocator, name, saved)
    peftkern.patch(twin)
    resumed = optimizer_of(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it would share the tensors
    train(model, optimizer, range(at + 1, at + 8))  # which the twin must not notice
    log += train(twin, resumed, range(at + 1, STEPS + 1))
    assert_same_training(log, pefts)


def test_averages_that_someone_changes_count():
    model, optimizer = model_and_optimizer()
    peftkern.patch(model)
    train(model, optimizer, range(1, 11))
    allocator = model.base_model.rankallocator
    first = next(name for name in allocator.exp_avg_ipt if "lora_E" in name)
    for change in (lambda t: t.zero_(), lambda t: allocator.exp_avg_ipt.__setitem__(first, t + 1e6)):
        change(allocator.exp_avg_ipt[first])
        twin = copy.deepcopy(model)
        got = allocator.mask_to_budget(model.base_model.model, 40)
        expected = RankAllocator.mask_to_budget(twin.base_model.rankallocator, twin.base_model.model, 40)
        assert got == expected
    assert all(got[first]), "the largest sensitivity of all"


def test_a_missing_gradient_is_pefts_error():
    model, _ = model_and_optimizer()
    peftkern.patch(model)
    with pytest.raises(TypeError):
        model.base_model.update_and_allocate(1)


def test_adapters_that_are_left_to_peft(monkeypatch):
    """In float64 PEFT's averages are more precise than our kernels'."""
    model, _ = model_and_optimizer()
    model.double()
    peftkern.patch(model)
    calls = spied(monkeypatch)
    train(model, optimizer_of(model), range(1, 4))
    assert calls == ["update_ipt"] * 3
    assert "RankAllocator, patched: HF PEFT's own: the adapters are not float32" in peftkern.explain(model)


def test_the_orthogonality_term():
    model, _ = model_and_optimizer()
    twin = copy.deepcopy(model)
    peftkern.patch(model)
    for weight in (0.0, 2.5):
        results = []
        for m in (model, twin):
            m.peft_config["default"].orth_reg_weight = weight
            m.zero_grad()
            loss = m(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            results.append((loss.item(), torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])))
        (ours, our_grad), (theirs, their_grad) = results
        assert ours == pytest.approx(theirs, rel=1e-6) and relative(our_grad, their_grad) < 1e-6
    model.peft_config["default"].orth_reg_weight = -1.0
    with pytest.raises(ValueError, match="orth_reg_weight"):
        model(input_ids=TOKENS, labels=TOKENS)
