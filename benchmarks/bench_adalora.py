# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA on SmolLM2-135M, 210 linear layers: what the allocator costs against HF PEFT's, what a step costs against a
LoRA step of the same rank and against HF PEFT's AdaLoRA, and what pruning saves."""

import copy
import statistics
import time

import pytest
import torch
from conftest import ROWS, medians
from train_step import BATCH, LENGTH, Trainee

import peftkern
from peftkern.rank_allocator import adalora_layers

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

RANK = 12


def adalora_config(r=RANK, **changes):
    # a budget that falls at every step of the benchmark
    return peftkern.AdaLoraConfig(
        init_r=r, target_r=r // 2, total_step=10_000, lora_alpha=32, lora_dropout=0.05, **changes
    )


class AdaLoraTrainee(Trainee):
    """A Trainee with the orthogonality term and the allocator, ours or HF PEFT's, which adds the term by itself."""

    def __init__(self, model, batches, allocator="ours"):
        super().__init__(model, batches)
        ours = allocator == "ours"
        self.allocator = peftkern.RankAllocator(self.model, optimizer=self.optimizer) if ours else None

    def step(self) -> float:
        ids = self.batches[self.at % len(self.batches)]
        self.at += 1
        loss = self.model(input_ids=ids, labels=ids).loss
        if self.allocator:
            loss = loss + self.allocator.config.orth_reg_weight * peftkern.orthogonality(self.model)
        loss.backward()
        self.optimizer.step()
        if not self.allocator:
            self.model.base_model.update_and_allocate(self.at)
        self.optimizer.zero_grad()
        return loss.item()


def ours(base, batches, r=RANK):
    torch.manual_seed(0)
    return AdaLoraTrainee(peftkern.adapt(copy.deepcopy(base), adalora_config(r)), batches)


def theirs(base, batches, r=RANK):
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=r, target_r=r // 2, total_step=10_000, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return AdaLoraTrainee(peft.get_peft_model(copy.deepcopy(base), config), batches, allocator="theirs")


@pytest.fixture(scope="module")
def base(smollm2):
    return smollm2


def timed_calls(trainees, calls, rounds):
    """Median seconds of a call that follows the backward pass and the optimizer's step of a small batch, in turns."""
    times = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls) if i % 2 else reversed(list(calls)):
            trainee = trainees[name]
            ids = trainee.batches[i, :1, :32]
            trainee.model(input_ids=ids, labels=ids).loss.backward()
            trainee.optimizer.step()
            before = time.perf_counter()
            calls[name](i + 1)
            times[name].append(time.perf_counter() - before)
            trainee.optimizer.zero_grad()
    return {name: statistics.median(t) for name, t in times.items()}


def test_allocator_step(base, batches):
    """The allocator alone, at an allocation: inside a training loop, and again and again on what the caches hold."""
    trainees = {"peftkern": ours(base, batches), "HF PEFT": theirs(base, batches)}
    mine, other = trainees.values()
    mine.allocator.remove()
    calls = {"peftkern": mine.allocator.update_and_allocate, "HF PEFT": other.model.base_model.update_and_allocate}
    case = "AdaLoRA allocator, SmolLM2-135M, init_r 12"
    inside = timed_calls(trainees, calls, 9)
    for trainee in trainees.values():
        ids = batches[0, :1, :32]
        trainee.model(input_ids=ids, labels=ids).loss.backward()
    alone = {name: medians({name: lambda c=call: c(1)}, 1.5, (9, 60))[name] for name, call in calls.items()}
    for where, t in (("in a step", inside), ("repeated", alone)):
        ROWS.append((f"{case}, {where}", "HF PEFT", *(1e3 * t[n] for n in calls), t["HF PEFT"] / t["peftkern"]))
    assert mine.allocator.keep is not None


def test_allocator_grows_with_the_parameters():
    """The same number of layers, ever larger ones; all but the first need more than the caches hold."""
    calls = {}
    for width in (2048, 4096, 8192, 16384, 32768):
        layers = torch.nn.ModuleList(peftkern.AdaLoRALinear(width, 4, r=RANK) for _ in range(48))
        for p in layers.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        n = sum(m.lora_A.numel() + m.lora_B.numel() for m in layers)
        calls[n] = peftkern.RankAllocator(layers, adalora_config()).update_and_allocate
    times = medians(calls, 3.0, (9, 60))
    print("\n| parameters, M | ms | ns a parameter |\n|---:|---:|---:|")
    for n, t in times.items():
        print(f"| {n / 1e6:.1f} | {t * 1e3:.2f} | {t / n * 1e9:.2f} |")
    (_, n1, *_, n2) = times
    assert times[n2] / times[n1] < 1.5 * n2 / n1


def test_layer_by_rank():
    """What the low-rank part costs above the same frozen layer: forward and backward, 1,024 rows in bf16."""
    ranks = (4, 8, 12, 16, 24, 32, 48, 64)
    print(f"\n| in x out | frozen, ms | {' | '.join(f'r = {r}' for r in ranks)} |\n|---|{'---:|' * (len(ranks) + 1)}")
    for fan_in, fan_out in ((576, 576), (576, 1536), (1536, 576)):
        frozen = torch.nn.Linear(fan_in, fan_out, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        layers = {r: peftkern.AdaLoRALinear.from_linear(frozen, r=r, lora_dropout=0.05) for r in ranks}
        for layer in layers.values():
            layer.warns_without_allocator = False
            torch.nn.init.normal_(layer.lora_E)
        x = torch.randn(1024, fan_in, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(1024, fan_out, dtype=torch.bfloat16)

        def step(layer, x=x, grad=grad):
            x.grad = None
            for p in layer.parameters():
                p.grad = None
            layer(x).backward(grad)

        providers = {r: lambda layer=layer: step(layer) for r, layer in (("frozen", frozen), *layers.items())}
        t = {name: 1e3 * seconds for name, seconds in medians(providers, 6.0, (15, 55)).items()}
        above = " | ".join(f"+{t[r] - t['frozen']:.2f}" for r in ranks)
        print(f"| {fan_in} x {fan_out} | {t['frozen']:.2f} | {above} |")
        assert t[64] > t[4]


def test_step_against_lora(compare, base, batches):
    mine = ours(base, batches)
    config = peftkern.LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.05)
    lora = Trainee(peftkern.adapt(copy.deepcopy(base), config), batches)
    compare(
        f"AdaLoRA step, SmolLM2-135M, {BATCH}x{LENGTH}, bf16, r=12",
        {"peftkern": mine.step, "peftkern LoRA, r=12": lora.step},
        seconds=30.0, rounds=(5, 12),
    )  # fmt: skip


def test_step_against_peft(compare, base, batches):
    compare(
        f"AdaLoRA step, SmolLM2-135M, {BATCH}x{LENGTH}, bf16, r=12",
        {"peftkern": ours(base, batches).step, "HF PEFT": theirs(base, batches).step},
        seconds=20.0, rounds=(4, 12),
    )  # fmt: skip


def adapter_bytes(trainee) -> int:
    """Parameters, gradients, optimizer state and averages."""
    total = 0
    for p in peftkern.trainable_parameters(trainee.model):
        state = trainee.optimizer.state.get(p, {}).values()
        total += sum(t.nbytes for t in (p, p.grad, *state) if isinstance(t, torch.Tensor))
    averages = (trainee.allocator.sensitivity, trainee.allocator.uncertainty)
    return total + sum(t.nbytes for t in averages if t is not None)


@pytest.mark.parametrize("r", [12, 16, 32, 64])
def test_pruning_to_half_the_budget(compare, base, batches, r):
    masked, ids = ours(base, batches, r), batches[0]
    masked.step()
    layers = list(adalora_layers(masked.model).values())
    scores = torch.cat([m.lora_E.detach().abs().view(-1) for m in layers])
    keep = peftkern.ops.rank_mask(scores, scores.numel() // 2, exact=True)
    with torch.no_grad():
        peftkern.ops.mask_ranks([m.lora_E for m in layers], keep)
    pruned = ours(base, batches, r)
    pruned.model.load_state_dict(masked.model.state_dict())
    pruned.optimizer.load_state_dict(masked.optimizer.state_dict())
    pruned.allocator.load_state_dict(masked.allocator.state_dict())
    peftkern.prune_ranks(pruned.model, pruned.optimizer)
    pruned.allocator.ranks()
    with torch.no_grad():
        outputs = [t.model.eval()(input_ids=ids).logits for t in (masked, pruned)]
    assert torch.equal(*outputs), "outputs of the pruned model, bit for bit"
    before, after = adapter_bytes(masked), adapter_bytes(pruned)
    print(f"\nr = {r}: adapter, gradients, optimizer and averages {before / 2**20:.1f} -> {after / 2**20:.1f} MiB")
    for trainee in (masked, pruned):  # the masks stay as they are: nothing is allocated while this is timed
        trainee.model.train()
        trainee.allocator.remove()
    result = compare(
        f"AdaLoRA step, pruned to half of r={r}", {"peftkern": pruned.step, "only masked": masked.step},
        seconds=25.0, rounds=(5, 10),
    )  # fmt: skip
    assert after < 0.6 * before and result["peftkern"] < 1.05 * result["only masked"]
