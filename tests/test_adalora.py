# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA whole: layers, the allocator against HF PEFT and the published formulas, pruning, files, resuming."""

import copy
import json
import math
import warnings

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import peftkern
from peftkern import AdaLoraConfig, AdaLoRALinear, LoRALinear, NF4Config, RankAllocator, reference
from peftkern.ops.adapted_linear import draw_seed
from peftkern.rank_allocator import adalora_layers

NAMES = ("lora_A", "lora_E", "lora_B")


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def mlp(width=24, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, 20), nn.Tanh(), nn.Linear(20, 6))


def config(**changes):
    return AdaLoraConfig(**{"init_r": 6, "target_r": 2, "total_step": 30, "tinit": 4, "tfinal": 8, **changes})


def adapted(quantize=None, seed=0, **changes):
    return peftkern.adapt(mlp(seed=seed), config(**changes), quantize=quantize)


def batches(n, seed=1, rows=8, width=24):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, width, generator=g), torch.randn(rows, 6, generator=g)) for _ in range(n)]


def train(model, optimizer, data, after=lambda: None):
    """Losses of one step a batch; after() is called between step and zero_grad."""
    losses = []
    for x, y in data:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        after()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model, lr=1e-2, **options):
    return torch.optim.AdamW(peftkern.trainable_parameters(model), lr=lr, **options)


def randomized(layer, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in layer.adapter_parameters().values():
        p.data.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    layer.warns_without_allocator = False
    return layer


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layer_matches_the_reference(device, isa, base, dropout):
    dtype = torch.bfloat16 if base == "bf16" else torch.float32
    linear = nn.Linear(64, 40, dtype=dtype, device=device)
    quantize = NF4Config(32) if base == "nf4" else None
    layer = AdaLoRALinear.from_linear(linear, r=5, lora_alpha=9, lora_dropout=dropout, quantize=quantize)
    randomized(layer)
    x = torch.randn(3, 7, 64, dtype=dtype, device=device, requires_grad=True)
    torch.manual_seed(5)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.manual_seed(5)
    seed = int(draw_seed(x.device)) if dropout else 0
    weight = layer.base_weight() if quantize is None else peftkern.dequantize_nf4(layer.base_weight(), dtype)
    exact = {name: p.detach().cpu().double().requires_grad_() for name, p in layer.adapter_parameters().items()}
    x64 = x.detach().cpu().double().requires_grad_()
    expected = reference.adapted_linear(
        x64, weight.cpu().double(), exact["lora_A"], exact["lora_B"], lam=exact["lora_E"].view(-1),
        bias=layer.bias.cpu().double(), scaling=9 / (5 + 1e-5), dropout_p=dropout, seed=seed,
    )  # fmt: skip
    expected.backward(grad.cpu().double())
    assert_close(y, expected, dtype, "y")
    assert_close(x.grad, x64.grad, dtype, "dx")
    for name, p in layer.adapter_parameters().items():
        assert p.grad.shape == p.shape
        assert_close(p.grad, exact[name].grad, dtype, name)


def test_start_is_the_base_layer_bit_for_bit():
    linear = nn.Linear(32, 24)
    layer = AdaLoRALinear.from_linear(linear, r=200).eval()
    x = torch.randn(5, 32)
    assert torch.equal(layer(x), linear(x))
    assert not layer.lora_E.any() and layer.weight is linear.weight and layer.bias is linear.bias
    for t in (layer.lora_A, layer.lora_B):
        assert t.std().item() == pytest.approx(0.02, rel=0.1) and abs(t.mean().item()) < 2e-3
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == list(NAMES)


def test_scaling_is_peft_s_rule():
    assert AdaLoRALinear(8, 8, r=12, lora_alpha=32).scaling == 32 / (12 + 1e-5)
    assert AdaLoRALinear(8, 8, r=12, lora_alpha=0).scaling == 12 / (12 + 1e-5)
    assert AdaLoRALinear(8, 8, r=12, lora_alpha=-1).scaling == 12 / (12 + 1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merge_and_unmerge(quantize):
    layer = randomized(AdaLoRALinear(64, 48, r=4, lora_alpha=4, quantize=quantize)).eval()
    x = torch.randn(6, 64)
    before = layer(x)
    original = {n: p.clone() for n, p in layer.named_parameters()}
    layer.merge(safe=True)
    assert layer.merged and ("uint8" in str(layer.weight.dtype)) == (quantize is not None)
    slack = 0.35 if quantize else 1e-5  # requantized
    assert (layer(x) - before).norm() / before.norm() < slack
    layer.unmerge()
    assert torch.equal(layer(x), before)
    assert all(torch.equal(p, original[n]) for n, p in layer.named_parameters())


def test_layer_has_the_output_of_peft_s(peft):
    model = mlp()
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.AdaLoraConfig(target_modules=["0", "2"], init_r=5, total_step=9, lora_alpha=7)
    )
    ours = peftkern.adapt(model, peft.AdaLoraConfig(target_modules=["0", "2"], init_r=5, total_step=9, lora_alpha=7))
    for module in theirs.modules():
        for p in getattr(module, "lora_E", {}).values():
            nn.init.normal_(p)
    copy_from_peft(ours, theirs)
    x = torch.randn(5, 24)
    assert_close(ours.eval()(x), theirs.eval()(x), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, r"r: expected an int >= 1, got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout: expected 0 <= p < 1, got 1.0"),
        ({"lora_alpha": math.nan}, r"lora_alpha: expected a finite number, got nan"),
        ({"init_lora_weights": "gaussian"}, r"init_lora_weights: expected True or False, got 'gaussian'"),
        ({"quantize": "int4"}, r"quantize: expected None, \"nf4\" or an NF4Config"),
        ({"in_features": 0}, r"in_features: expected an int >= 1, got 0"),
    ],
)
def test_bad_arguments_of_the_layer(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaLoRALinear(**{"in_features": 8, "out_features": 8, **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_step": None}, r"total_step: expected an int >= 1, got None"),
        ({"init_r": 0}, r"init_r: expected an int >= 1, got 0"),
        ({"tinit": 22}, r"tinit: expected less than total_step - tfinal = 22, .*got 22"),
        ({"beta1": 1.0}, r"beta1: expected a number between 0 and 1, got 1.0"),
        ({"deltaT": 0}, r"deltaT: expected an int >= 1, got 0"),
        ({"orth_reg_weight": -1}, r"orth_reg_weight: expected a finite number >= 0, got -1"),
        ({"rank_pattern": {"0.lora_E": [True]}}, r"rank_pattern\['0.lora_E'\]: expected a list of 6 booleans"),
        ({"target_modules": []}, r"target_modules: expected names"),
        ({"bias": "some"}, r"bias: expected one of"),
    ],
)
def test_bad_fields_of_the_config(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_peft_options_that_change_the_result_are_refused(peft):
    with pytest.raises(ValueError, match=r"config.layers_to_transform: expected its default"):
        peftkern.adapt(
            mlp(), peft.AdaLoraConfig(target_modules=["0"], total_step=9, layers_to_transform=[0])
        )  # fmt: skip


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


def copy_from_peft(ours, theirs):
    values = dict(theirs.named_parameters())
    for name, layer in adalora_layers(ours).items():
        for attribute, p in layer.adapter_parameters().items():
            p.data = values[f"base_model.model.{name}.{attribute}.default"].detach().clone()


@pytest.fixture
def float64(monkeypatch, threads):
    """The same modules and the same allocator over reference.py, which takes float64; the kernels do not."""
    threads(1)

    def linear(x, weight, A=None, B=None, *, lam=None, bias=None, scaling=1.0, dropout_p=0.0, training=True):
        assert not (training and dropout_p)
        return reference.adapted_linear(x, weight, A, B, lam=lam, bias=bias, scaling=scaling)

    def update(A, E, B, sensitivity, uncertainty, beta1, beta2, grad_scale=None):
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

    def mask(E, keep):
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


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaling(fused):
    """Scaled by a power of two the training is the same, bit for bit; a step that the scaler skips does not count."""
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
    assert torch.equal(model.eval()(torch.ones(2, 24)), mlp()(torch.ones(2, 24)))


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


# ---- pruning ---------------------------------------------------------------------------------------------------------


def trained(steps=24, quantize=None, **options):
    model = adapted(quantize=quantize)
    optimizer = adamw(model, weight_decay=0.0)
    allocator = RankAllocator(model, optimizer=optimizer, **options)
    train(model, optimizer, batches(steps))
    return model, optimizer, allocator


@pytest.mark.parametrize("quantize", [None, NF4Config(32)])
def test_pruning_changes_no_bit_of_the_output(isa, quantize):
    model, optimizer, allocator = trained(quantize=quantize)
    x = torch.randn(70, 24)
    model.eval()
    before, few = model(x), model(x[:3])
    ranks = allocator.ranks()
    sizes = {name: p.numel() for name, p in model.named_parameters() if "lora" in name}
    assert peftkern.prune_ranks(model, optimizer) == ranks and min(ranks.values()) < 6
    assert torch.equal(model(x), before) and torch.equal(model(x[:3]), few)
    for name, p in model.named_parameters():
        if "lora" in name:
            layer = name.split(".")[0]
            assert p.numel() == sizes[name] // 6 * ranks[layer]
            assert all(s.shape == p.shape for s in optimizer.state[p].values() if s.dim())
    assert allocator.ranks() == ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_without_some_triplets_of_zero(isa, dtype):
    """A sum of many ranks, in the order that every instruction set takes it, without the terms that are zero."""
    layer = randomized(AdaLoRALinear(129, 67, r=40, adapter_dtype=dtype, dtype=dtype))
    layer.lora_E.data[torch.rand(40, generator=torch.Generator().manual_seed(2)) < 0.6] = 0
    x = torch.randn(37, 129).to(dtype).requires_grad_()
    pruned = copy.deepcopy(layer)
    kept = (layer.lora_E != 0).view(-1)
    peftkern.prune_ranks(pruned)
    results = []
    for m in (layer, pruned):
        (dx,) = torch.autograd.grad(m(x).square().sum(), x, retain_graph=False)
        m.zero_grad()
        y = m(x)
        y.square().sum().backward()
        results.append((y, dx, m.lora_A.grad, m.lora_B.grad, m.lora_E.grad))
    (y, dx, dA, dB, dE), small = results
    for whole, cut in zip((y, dx, dA[kept], dB[:, kept], dE[kept]), small, strict=True):
        assert torch.equal(whole, cut)


@pytest.mark.parametrize("prune", ["final", "always"])
def test_pruning_during_training(prune):
    model, optimizer, allocator = trained(30, prune=prune)
    assert {name: m.r for name, m in adalora_layers(model).items()} == allocator.ranks()
    assert sum(allocator.ranks().values()) == 6 and allocator.keep.all()
    if prune == "final":  # the very same training as with masks
        masked, _, same = trained(30, prune="never")
        assert same.ranks() == allocator.ranks()
        x = torch.randn(5, 24)
        assert torch.equal(model.eval()(x), masked.eval()(x))
        for name, layer in adalora_layers(model).items():
            kept = (masked.get_submodule(name).lora_E != 0).view(-1)
            assert torch.equal(layer.lora_A, masked.get_submodule(name).lora_A[kept])
    assert optimizer.state[model[0].lora_A]["exp_avg"].shape == model[0].lora_A.shape


def test_the_state_of_the_allocator_follows_a_pruning_by_hand():
    model, optimizer, allocator = trained(12)
    ranks = allocator.ranks()
    old = {name: s.clone() for name, s in zip(("s", "u"), (allocator.sensitivity, allocator.uncertainty), strict=True)}
    slices, kept = allocator._slices, [(m.lora_E != 0).view(-1) for m in allocator.layers.values()]
    peftkern.prune_ranks(model, optimizer)
    assert allocator.ranks() == ranks
    for i, (layer, keep) in enumerate(zip(allocator.layers.values(), kept, strict=True)):
        new = allocator.sensitivity[allocator._slices[i][0]].view(layer.r, -1)
        assert torch.equal(new, old["s"][slices[i][0]].view(6, -1)[keep])
        new = allocator.uncertainty[allocator._slices[i][2]].view(-1, layer.r)
        assert torch.equal(new, old["u"][slices[i][2]].view(-1, 6)[:, keep])
    train(model, optimizer, batches(18, seed=5))
    assert sum(allocator.ranks().values()) == 6


def test_pruning_refuses_what_it_cannot_do():
    fresh = adapted()
    with pytest.raises(RuntimeError, match=r"expected AdaLoRALinear layers of which some E is not 0"):
        peftkern.prune_ranks(fresh)
    model, _, _ = trained()
    factored = torch.optim.Adafactor(peftkern.trainable_parameters(model))
    nn.functional.mse_loss(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    factored.step()
    for m in adalora_layers(model).values():
        m.lora_E.data[0] = 0
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"optimizer: expected a state whose tensors are shaped like their parameters"
    ):
        peftkern.prune_ranks(model, factored)
    model[0].merge()
    with pytest.raises(RuntimeError, match=r"0: expected an unmerged layer"):
        peftkern.prune_ranks(model)
    assert [p.shape for p in model.parameters()][: len(shapes)] == shapes


def test_compiled_layer():
    layer = randomized(AdaLoRALinear(32, 24, r=4)).eval()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 32)
    assert_close(compiled(x), layer(x), torch.float32)


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
    x = torch.randn(3, 24)
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
    torch.save({"masks": masks, "E": [m.lora_E.detach() for m in allocator.layers.values()]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_all_processes_have_the_same_masks(tmp_path):
    torch.multiprocessing.spawn(replica, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first["masks"]) == 30 and first["masks"][-1] is not None
    for a, b in zip(first["masks"], second["masks"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(first["E"], second["E"], strict=True))
