# SPDX-License-Identifier: Apache-2.0
"""RankAllocator: its schedule, HF PEFT's and the published masks, training loops, resuming, data parallel."""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from adalora_models import NAMES, adamw, adapted, batches, config, copy_from_peft, mlp, randomized, train, trained
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import leave_together
from torch import nn

import peftkern
from peftkern import AdaLoraConfig, AdaLoRALinear, RankAllocator, reference
from peftkern.rank_allocator import adalora_layers


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


# ---- the schedule ----------------------------------------------------------------------------------------------------


@given(
    init_r=st.integers(1, 20), target_r=st.integers(1, 20), total=st.integers(2, 60), data=st.data(),
    delta=st.integers(1, 7),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_schedule_is_peft_s(init_r, target_r, total, data, delta):
    peft_layer = pytest.importorskip("peft.tuners.adalora.layer")
    tfinal = data.draw(st.integers(0, total - 1))
    tinit = data.draw(st.integers(0, total - tfinal - 1))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    c = AdaLoraConfig(init_r=init_r, target_r=target_r, total_step=total, tinit=tinit, tfinal=tfinal, deltaT=delta)
    allocator = RankAllocator(peftkern.adapt(model, c))
    theirs = object.__new__(peft_layer.RankAllocator)
    theirs.peft_config, theirs.init_bgt, theirs.target_bgt = c, 3 * init_r, 3 * target_r
    for step in range(1, total + 3):
        budget, mask = theirs.budget_schedule(step)
        ours = allocator.schedule(step)
        assert ours[0] == budget, step
        if step < total - tfinal:
            assert ours[1] == mask, step
        else:  # HF PEFT's model forces the mask at this step, and only repeats it afterwards
            assert ours[1] == (step == total - tfinal), step


# ---- against HF PEFT -------------------------------------------------------------------------------------------------


@pytest.fixture
def float64(monkeypatch, threads):
    """The same modules and the same allocator over reference.py, which takes float64; the kernels do not."""
    threads(1)

    def linear(x, weight, A=None, B=None, *, lam=None, bias=None, scaling=1.0, dropout_p=0.0, training=True):
        assert not (training and dropout_p)
        return reference.adapted_linear(x, weight, A, B, lam=lam, bias=bias, scaling=scaling)

    def update(A, E, B, sensitivity, uncertainty, beta1, beta2, grad_scale=None, table=None):
        slices, _ = peftkern.ops.rank_allocation.state_layout(
            [(*a.shape, b.shape[0]) for a, b in zip(A, B, strict=True)]
        )
        scores = []
        for parameters, pieces in zip(zip(A, E, B, strict=True), slices, strict=True):
            elements = []
            for p, piece in zip(parameters, pieces, strict=True):
                s, u = sensitivity[piece].view(p.shape), uncertainty[piece].view(p.shape)
                new_s, new_u = reference.update_importance(p, p.grad, s, u, beta1, beta2)
                s.copy_(new_s)
                u.copy_(new_u)
                elements.append(new_s * new_u)
            scores.append(reference.triplet_scores(*elements))
        return torch.cat(scores)

    def mask(E, keep, table=None):
        for e, k in zip(E, keep.split([len(e) for e in E]), strict=True):
            e.masked_fill_(~k[:, None], 0.0)

    allocator = "peftkern.rank_allocator"
    monkeypatch.setattr("peftkern.modules.adapted.adapted_linear", linear)
    monkeypatch.setattr(f"{allocator}.update_importance", update)
    monkeypatch.setattr(f"{allocator}.rank_mask", reference.rank_mask)
    monkeypatch.setattr(f"{allocator}.mask_ranks", mask)
    monkeypatch.setattr(f"{allocator}.orthogonality_penalty", reference.orthogonality)


class SideBySide:
    """A small Llama with AdaLoRA, twice: HF PEFT's, and ours in the same start. step() trains both on one batch."""

    STEPS = 200

    def __init__(self, peft, dtype, delta=1, lr=3e-3):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64,
            )
        )  # fmt: skip
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        options = {
            "init_r": 6, "target_r": 3, "tinit": 20, "tfinal": 40, "deltaT": delta, "total_step": self.STEPS,
            "lora_alpha": 16, "target_modules": names,
        }  # fmt: skip
        theirs_config = peft.AdaLoraConfig(**options, task_type="CAUSAL_LM")
        self.theirs = peft.get_peft_model(copy.deepcopy(base), theirs_config).to(dtype)
        self.ours = peftkern.adapt(base, AdaLoraConfig(**options)).to(dtype)
        copy_from_peft(self.ours, self.theirs)
        self.optimizers = [
            torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=lr) for m in (self.theirs, self.ours)
        ]
        self.allocator = RankAllocator(self.ours, optimizer=self.optimizers[1])
        self.number, self.generator = 0, torch.Generator().manual_seed(1)

    def step(self):
        """(HF PEFT's loss, ours)"""
        self.number += 1
        start = torch.randint(64, (4, 1), generator=self.generator)
        ids = (start + torch.arange(16) * torch.randint(1, 4, (4, 1), generator=self.generator)) % 64
        losses = []
        for model, optimizer in zip((self.theirs, self.ours), self.optimizers, strict=True):
            loss = model(input_ids=ids, labels=ids).loss
            if model is self.ours:  # HF PEFT adds it by itself
                loss = loss + self.allocator.config.orth_reg_weight * peftkern.orthogonality(model)
            loss.backward()
            optimizer.step()
            if model is self.theirs:
                model.base_model.update_and_allocate(self.number)
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def masks(self):
        """(HF PEFT's mask, ours) over all triplets, or None before there is one."""
        pattern = self.theirs.peft_config["default"].rank_pattern
        assert bool(pattern) == (self.allocator.keep is not None)
        if not pattern:
            return None
        theirs = [pattern[f"{name}.lora_E.default"] for name in self.allocator.layers]
        return torch.tensor(theirs).flatten(), self.allocator.keep


@pytest.mark.slow
@pytest.mark.parametrize("delta", [1, 10])
def test_same_masks_as_peft_in_fp64(peft, float64, delta):
    run = SideBySide(peft, torch.float64, delta)
    compared, losses = 0, []
    for _ in range(run.STEPS):
        theirs, ours = run.step()
        assert ours == pytest.approx(theirs, abs=1e-4)
        losses.append(ours)
        if masks := run.masks():
            assert torch.equal(*masks), f"step {run.number}"
            compared += 1
    assert compared == 180 if delta == 1 else compared == 171
    assert losses[-1] < 0.8 * losses[0]
    assert sum(run.allocator.ranks().values()) <= run.allocator.target_budget < run.allocator.initial_budget
    assert len(set(run.allocator.ranks().values())) > 2


@pytest.mark.slow
def test_same_training_as_peft_in_fp32(peft):
    """Rounding differs, so a mask may differ where two scores are all but equal."""
    run = SideBySide(peft, torch.float32)
    equal = total = 0
    for _ in range(run.STEPS):
        theirs, ours = run.step()
        assert ours == pytest.approx(theirs, abs=1e-3), f"step {run.number}"
        if masks := run.masks():
            equal += int((masks[0] == masks[1]).sum())
            total += masks[0].numel()
    assert equal >= 0.99 * total, f"{equal} of {total}"


class PublishedAllocator:
    """The allocator of the paper's authors (loralib, QingruZhang/AdaLoRA), written anew from its formulas, in fp64."""

    def __init__(self, layers, c):
        self.layers, self.c, self.state = layers, c, {}
        self.total_rank = sum(m.init_r for m in layers)
        self.target_rank = c.target_r * len(layers)

    def schedule_threshold(self, step):
        c = self.c
        if step <= c.tinit:
            return self.total_rank, False
        if step > c.total_step - c.tfinal:
            return self.target_rank, True
        coefficient = 1 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit)
        rank = int(self.target_rank + (self.total_rank - self.target_rank) * coefficient**3)
        return rank, step % c.deltaT == 0

    def masks(self, step):
        """What E keeps at this step, or None; parameters and gradients are those after the optimizer's step."""
        if step < self.c.total_step - self.c.tfinal:
            for m in self.layers:
                for name, p in m.adapter_parameters().items():
                    importance = (p.detach().double() * p.grad.double()).abs()
                    average, uncertainty = self.state.get((m, name), (0.0, 0.0))
                    average = self.c.beta1 * average + (1 - self.c.beta1) * importance
                    uncertainty = self.c.beta2 * uncertainty + (1 - self.c.beta2) * (importance - average).abs()
                    self.state[m, name] = average, uncertainty
        rank, mask = self.schedule_threshold(step)
        if not mask:
            return None
        scores = []
        for m in self.layers:
            A, E, B = (self.state[m, name][0] * self.state[m, name][1] for name in NAMES)
            scores.append(E.view(-1) + A.mean(dim=1) + B.mean(dim=0))
        every = torch.cat(scores)
        threshold = torch.kthvalue(every, self.total_rank - rank)[0]
        return every > threshold


@pytest.mark.parametrize("delta", [1, 5])
def test_same_masks_as_the_published_formulas(delta):
    model = adapted(total_step=60, tinit=5, tfinal=20, deltaT=delta)
    allocator = RankAllocator(model)
    published = PublishedAllocator(list(allocator.layers.values()), allocator.config)
    optimizer, compared = adamw(model, lr=3e-2), 0
    for step, (x, y) in enumerate(batches(60), start=1):
        (nn.functional.mse_loss(model(x), y) + 0.1 * peftkern.orthogonality(model)).backward()
        optimizer.step()
        expected = published.masks(step)
        allocator.update_and_allocate()
        optimizer.zero_grad()
        if expected is not None:
            assert torch.equal(allocator.keep, expected), step
            every_e = torch.cat([m.lora_E.view(-1) for m in allocator.layers.values()])
            assert torch.equal(every_e != 0, expected), step
            compared += 1
    assert compared == (55 if delta == 1 else 27)
    assert sum(allocator.ranks().values()) == 3 * 2


# ---- the allocator in a training loop --------------------------------------------------------------------------------


def test_hooked_to_the_optimizer_nothing_more_is_to_be_called():
    model = adapted()
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer=optimizer)
    budgets = []
    train(model, optimizer, batches(30), after=lambda: budgets.append(allocator.budget))
    assert allocator.step == 30 and budgets[3] == 18 and budgets[21] == budgets[-1] == 6
    assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) > 8
    kept = sum(int((m.lora_E != 0).sum()) for m in adalora_layers(model).values())
    assert kept == sum(allocator.ranks().values()) == 6
    assert allocator.sensitivity is None and allocator.uncertainty is None
    with pytest.raises(RuntimeError, match=r"update_and_allocate: the optimizer given to this RankAllocator calls it"):
        allocator.update_and_allocate()
    allocator.remove()
    train(model, optimizer, batches(1))
    assert allocator.step == 30


def test_by_hand_it_is_the_same():
    results = []
    for by_hand in (False, True):
        model = adapted()
        optimizer = adamw(model)
        allocator = RankAllocator(model, optimizer=None if by_hand else optimizer)
        losses = train(model, optimizer, batches(30), allocator.update_and_allocate if by_hand else lambda: None)
        results.append((losses, allocator.ranks()))
    assert results[0] == results[1]


def test_it_warns_without_an_allocator(recwarn):
    model = adapted()
    with pytest.warns(UserWarning, match="trains without a RankAllocator"):
        model(torch.randn(2, 24))
    fresh = adapted()
    allocator = RankAllocator(fresh)
    assert allocator.step == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh(torch.randn(2, 24))
        adapted().eval()(torch.randn(2, 24))
        with torch.no_grad():
            adapted()(torch.randn(2, 24))


def test_it_warns_where_the_call_by_hand_is_forgotten():
    for forgotten in (False, True):
        model = adapted()
        optimizer, allocator = adamw(model), RankAllocator(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, batches(3), (lambda: None) if forgotten else allocator.update_and_allocate)
        assert any("trains without a RankAllocator" in str(w.message) for w in caught) == forgotten


def test_gradient_accumulation_counts_optimizer_steps():
    model = adapted()
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer=optimizer)
    for i, (x, y) in enumerate(batches(12)):
        (nn.functional.mse_loss(model(x), y) / 3).backward()
        if i % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert allocator.step == 4


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaling(fused, unscale):
    """Scaled by a power of two the training is the same, bit for bit; a step that the scaler skips does not count.
    unscale: before the step, as for clipping."""
    results = []
    for scale in (None, 1024.0):
        model = adapted()
        optimizer = adamw(model, fused=fused)
        allocator = RankAllocator(model, optimizer=optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=1000, enabled=scale is not None)
        for i, (x, y) in enumerate(batches(24)):
            loss = scaler.scale(nn.functional.mse_loss(model(x), y))
            loss.backward()
            if scale and i == 10:  # an extra, bad, batch
                model[0].lora_A.grad[0, 0] = math.inf
                steps = allocator.step
                scaler.step(optimizer)
                scaler.update(scale)
                assert allocator.step == steps
                optimizer.zero_grad()
                scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((allocator.step, [p.detach().clone() for p in model.parameters()], allocator.ranks()))
    assert results[0][0] == results[1][0] == 24 and results[0][2] == results[1][2]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


class Branches(nn.Module):
    """A branch that is never called, as an unused head."""

    def __init__(self):
        super().__init__()
        self.used, self.head, self.unused = nn.Linear(24, 16), nn.Linear(16, 6), nn.Linear(16, 6)

    def forward(self, x):
        return self.head(torch.tanh(self.used(x)))


def test_layers_without_a_gradient_lose_their_rank_first():
    model = peftkern.adapt(Branches(), config(target_r=3, tfinal=2))
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer=optimizer)
    train(model, optimizer, batches(30))
    assert model.unused.lora_A.grad is None
    assert allocator.ranks()["unused"] == 0 and sum(allocator.ranks().values()) == 9


def test_frozen_layers_are_left_alone():
    model = adapted()
    frozen = randomized(model[0])
    for p in frozen.adapter_parameters().values():
        p.requires_grad_(False)
    before = frozen.lora_E.clone()
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer=optimizer)
    assert list(allocator.layers) == ["2", "4"] and allocator.initial_budget == 12
    train(model, optimizer, batches(30))
    assert torch.equal(frozen.lora_E, before) and sum(allocator.ranks().values()) == 4


@pytest.mark.parametrize("target_r", [6, 9])
def test_a_budget_that_does_not_fall_masks_nothing(target_r):
    """HF PEFT raises there: kthvalue(): selected number k out of range."""
    model = adapted(target_r=target_r)
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer=optimizer)
    train(model, optimizer, batches(30))
    assert set(allocator.ranks().values()) == {6}


def test_a_budget_of_nothing_masks_everything():
    model = adapted(target_r=0)
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer=optimizer, prune="final")
    train(model, optimizer, batches(30))
    assert set(allocator.ranks().values()) == {0} and model[0].lora_A.shape == (0, 24)
    assert_close(model.eval()(torch.ones(2, 24)), mlp()(torch.ones(2, 24)), torch.float32)


def test_exact_budget_with_equal_scores():
    model = adapted(tinit=1)
    for layer in adalora_layers(model).values():
        for p in layer.adapter_parameters().values():
            p.data.fill_(0.1)
    kept = []
    for exact in (False, True):
        copied = copy.deepcopy(model)
        optimizer = adamw(copied)
        allocator = RankAllocator(copied, optimizer=optimizer, exact=exact)
        train(copied, optimizer, batches(3))
        assert allocator.budget == 14
        kept.append(sum(allocator.ranks().values()))
    assert kept == [12, 14], "all triplets of a layer are equal: PEFT's rule drops a whole layer"


def test_16_bit_adapters():
    model = mlp().to(torch.bfloat16)
    replaced = nn.Sequential(
        *(
            AdaLoRALinear.from_linear(m, r=6, adapter_dtype=torch.bfloat16) if isinstance(m, nn.Linear) else m
            for m in model
        )
    )
    for name, p in replaced.named_parameters():
        p.requires_grad_("lora" in name)
    optimizer = adamw(replaced)
    allocator = RankAllocator(replaced, config(), optimizer)
    data = [(x.bfloat16(), y.bfloat16()) for x, y in batches(30)]
    train(replaced, optimizer, data)
    assert sum(allocator.ranks().values()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": peftkern.LoraConfig()}, r"config: expected an AdaLoraConfig, got LoraConfig"),
        ({"prune": "sometimes"}, r"prune: expected one of \('never', 'final', 'always'\), got 'sometimes'"),
        ({"model": mlp()}, r"config: expected an AdaLoraConfig, got NoneType"),
        ({"model": mlp(), "config": config()}, r"model: expected AdaLoRALinear layers that train, got none"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])},
            r"optimizer: expected one that trains the adapters, it lacks the lora_E of 3 of 3 layers, e.g. of '0'",
        ),
    ],
)
def test_bad_arguments_of_the_allocator(arguments, message):
    with pytest.raises(ValueError, match=message):
        RankAllocator(**{"model": adapted(), **arguments})


def test_other_objects_as_optimizer():
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got int"):
        RankAllocator(adapted(), optimizer=3)
    with pytest.raises(ValueError, match=r"form: expected one of \('peft', 'paper'\), got 'l2'"):
        peftkern.orthogonality(adapted(), form="l2")
    with pytest.raises(ValueError, match=r"model: expected one with AdaLoRALinear layers, got none"):
        peftkern.orthogonality(mlp())


@pytest.mark.parametrize("form", ["peft", "paper"])
def test_orthogonality_of_a_model(form):
    model = adapted()
    layers = [randomized(m, seed=i) for i, m in enumerate(adalora_layers(model).values())]
    exact = [[getattr(m, name).detach().double() for m in layers] for name in ("lora_A", "lora_B")]
    expected = reference.orthogonality(*exact, squared=form == "paper")
    assert_close(peftkern.orthogonality(model, form), expected, torch.float32)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", ["never", "always"])
@pytest.mark.parametrize("at", [2, 12, 25])
def test_resuming_is_exact(tmp_path, prune, at):
    whole, optimizer, allocator = trained(30, prune=prune)
    model, optimizer, first = trained(at, prune=prune)
    peftkern.save_adapter(model, tmp_path / "adapter", drop_masked=False)
    torch.save({"optimizer": optimizer.state_dict(), "allocator": first.state_dict()}, tmp_path / "state.pt")

    resumed = adapted(seed=0)
    peftkern.load_adapter(resumed, tmp_path / "adapter")
    optimizer = adamw(resumed, weight_decay=0.0)
    second = RankAllocator(resumed, optimizer=optimizer, prune=prune)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    second.load_state_dict(state["allocator"])
    train(resumed, optimizer, batches(30)[at:])
    assert second.step == 30 and second.ranks() == allocator.ranks()
    expected = dict(whole.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in resumed.named_parameters())


def test_state_of_another_model_is_refused():
    _, _, allocator = trained(12)
    state = allocator.state_dict()
    other = peftkern.adapt(nn.Sequential(nn.Linear(24, 6)), config())
    with pytest.raises(ValueError, match=r"state: expected one of 1 layers \['0'\]..., got 3 layers"):
        RankAllocator(other).load_state_dict(state)
    model, optimizer, pruned = trained(12)
    peftkern.prune_ranks(model, optimizer)
    with pytest.raises(ValueError, match=r"state: \d: expected \d triplets, as the model has, got one with 6"):
        pruned.load_state_dict(state)
    wrong = {**state, "scores": state["scores"][:-1]}
    with pytest.raises(ValueError, match=r"state: scores: expected shape \[18\], got \[17\]"):
        allocator.load_state_dict(wrong)


def test_state_dict_of_a_pruned_model():
    model, optimizer, _ = trained()
    peftkern.prune_ranks(model, optimizer)
    fresh = adapted(seed=3)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapted(init_r=2, target_r=1).load_state_dict(adapted().state_dict())


# ---- data parallel ---------------------------------------------------------------------------------------------------


def replica(rank, folder):
    """One of two processes under DistributedDataParallel. The second one's sums of scores are made to differ."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = adapted()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = adamw(model)
    allocator = RankAllocator(model, optimizer=optimizer)
    if rank == 1:
        agreed = allocator._agreed
        allocator._agreed = lambda scores: agreed(scores.copy_(scores.flip(0)))
    masks = []
    data = batches(30, seed=rank)
    train(
        parallel,
        optimizer,
        data,
        after=lambda: masks.append(None if allocator.keep is None else allocator.keep.clone()),
    )
    results = [Path(folder) / f"{r}.pt" for r in range(2)]
    torch.save({"masks": masks, "E": [m.lora_E.detach() for m in allocator.layers.values()]}, results[rank])
    leave_together(results[rank], results)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_all_processes_have_the_same_masks(tmp_path):
    torch.multiprocessing.spawn(replica, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first["masks"]) == 30 and first["masks"][-1] is not None
    for a, b in zip(first["masks"], second["masks"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(first["E"], second["E"], strict=True))
