# SPDX-License-Identifier: Apache-2.0
"""Does AdaLoRA find better ranks than LoRA's equal ones? Test loss at equal final budget, over 5 seeds.

python benchmarks/adalora_vs_lora.py teacher   a teacher of layers side by side, whose true ranks differ and are known
python benchmarks/adalora_vs_lora.py chain     the same layers in a chain, where one can make up for another
python benchmarks/adalora_vs_lora.py text      SmolLM2-135M on Python's language reference

LoRA has rank r everywhere; AdaLoRA starts at 2 r and ends with a mean of r, its pruned triplets removed: as many
parameters at the end, twice as many at the start. Each method takes the learning rate, and of several --scaling the
one, with the lowest validation loss on a seed that is not counted: AdaLoRA's E starts at 0 and needs higher ones. What
is reported is the loss on other data. With --results FILE every run is a line of that file, and what is there already
is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import peftkern
from peftkern.rank_allocator import adalora_layers

SEEDS = range(1, 6)
TASKS = ("teacher", "chain", "text")
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
Result = tuple[float, float, dict[str, int]]  # validation and test loss, final ranks


def fit(model: nn.Module, method: str, r: int, lr: float, steps: int, loss_of: Callable, targets, alpha: float):
    """Trains the adapter of method; returns the final ranks."""
    if method == "lora":
        config = peftkern.LoraConfig(r=r, lora_alpha=alpha * r, target_modules=targets)
    else:
        config = peftkern.AdaLoraConfig(
            init_r=2 * r, target_r=r, total_step=steps, tinit=steps // 10, tfinal=3 * steps // 10,
            lora_alpha=alpha * 2 * r, orth_reg_weight=0.1, target_modules=targets,
        )  # fmt: skip
    peftkern.adapt(model, config).train()
    optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / max(steps // 20, 1)) * 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    if method == "adalora":
        peftkern.RankAllocator(model, optimizer=optimizer, prune="final")
    for step in range(steps):
        loss = loss_of(model, step)
        if method == "adalora":
            loss = loss + config.orth_reg_weight * peftkern.orthogonality(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: layer.r for name, layer in adalora_layers(model).items()}


# ---- a teacher with known ranks --------------------------------------------------------------------------------------

TRUE_RANKS = (0, 1, 2, 4, 6, 11)  # mean 4
WIDTH = 48


class SideBySide(nn.Module):
    """Layers that each have an output of their own, so that what one lacks no other can make up for."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def teacher_run(method: str, seed: int, lr: float, scaling: float, chain: bool = False) -> Result:
    """A frozen network of 6 layers, side by side or in a chain; the teacher is it plus updates of rank TRUE_RANKS,
    in an order that the seed shuffles; noise on the targets, 512 samples to learn from."""
    torch.manual_seed(seed)
    true = [TRUE_RANKS[i] for i in torch.randperm(len(TRUE_RANKS)).tolist()]
    layers = [nn.Linear(WIDTH, WIDTH) for _ in true]
    base = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh()))) if chain else SideBySide(layers)
    teacher = copy.deepcopy(base).requires_grad_(False)
    for layer, rank in zip((m for m in teacher.modules() if isinstance(m, nn.Linear)), true, strict=True):
        layer.weight += 0.3 * torch.randn(WIDTH, rank) @ torch.randn(rank, WIDTH) / WIDTH**0.5
    x, *held_out = torch.randn(512, WIDTH), torch.randn(2048, WIDTH), torch.randn(2048, WIDTH)
    y = teacher(x)
    y = y + 0.05 * torch.randn_like(y)
    order = torch.Generator().manual_seed(seed)

    def loss_of(model, step):
        rows = torch.randint(len(x), (64,), generator=order)
        return nn.functional.mse_loss(model(x[rows]), y[rows])

    ranks = fit(base, method, 4, lr, 1500, loss_of, "all-linear", scaling)
    with torch.no_grad():
        losses = [nn.functional.mse_loss(base.eval()(x), teacher(x)).item() for x in held_out]
    return *losses, {f"true {t}": r for t, r in sorted(zip(true, ranks.values(), strict=False))}


# ---- text ------------------------------------------------------------------------------------------------------------


class Text:
    """SmolLM2-135M and the demo's text, an example of 128 tokens a step; training, validation, test by document."""

    STEPS, BATCH, EXAMPLES = 120, 1, 16

    def __init__(self) -> None:
        from peftkern.finetune import data
        from peftkern.finetune.model import find_model, load_base, load_tokenizer

        source = find_model(None)
        self.base = load_base(source, "bf16", torch.device("cpu"))
        tokenizer = load_tokenizer(source)
        train, held_out = data.split_documents(data.load_corpus(None), 0.2, 0)
        validation, test = data.split_documents(held_out, 0.5, 0)
        self.train, self.validation, self.test = (
            torch.tensor([e["input_ids"] for e in data.build_dataset(part, tokenizer, 128, "text").examples])
            for part in (train, validation, test)
        )

    def loss(self, model: nn.Module, examples: torch.Tensor) -> float:
        parts = [model(input_ids=ids, labels=ids).loss.item() for ids in examples[: self.EXAMPLES].split(8)]
        return statistics.mean(parts)

    def run(self, method: str, seed: int, lr: float, scaling: float) -> Result:
        torch.manual_seed(seed)
        model, order = copy.deepcopy(self.base), torch.Generator().manual_seed(seed)

        def loss_of(model, step):
            ids = self.train[torch.randint(len(self.train), (self.BATCH,), generator=order)]
            return model(input_ids=ids, labels=ids).loss

        ranks = fit(model, method, 4, lr, self.STEPS, loss_of, "all-linear", scaling)
        with torch.no_grad():
            return self.loss(model.eval(), self.validation), self.loss(model, self.test), ranks


class Runs:
    """Runs of one task, from the file if it has them."""

    def __init__(self, task: str, file: Path | None) -> None:
        self.task, self.file, self.text = task, file, None
        self.done: dict[tuple, Result] = {}

    def __call__(self, method: str, scaling: float, lr: float, seed: int) -> Result:
        key = (self.task, scaling, method, seed, lr)
        if self.file and self.file.exists():
            self.done |= {tuple(k): result for k, result in map(json.loads, self.file.read_text().splitlines())}
        if key not in self.done:
            self.done[key] = self.run(method, scaling, lr, seed)
            if self.file:
                with self.file.open("a") as f:
                    print(json.dumps((key, self.done[key])), file=f)
        return self.done[key]

    def run(self, method: str, scaling: float, lr: float, seed: int) -> Result:
        if self.task != "text":
            return teacher_run(method, seed, lr, scaling, chain=self.task == "chain")
        self.text = self.text or Text()
        return self.text.run(method, seed, lr, scaling)

    def best(self, method: str, scalings: list[float]) -> tuple[float, float]:
        """Scaling and learning rate; of a scaling, rising rates until validation gets worse."""
        losses: dict[tuple[float, float], float] = {}
        for scaling in scalings:
            lowest = math.inf
            for lr in LEARNING_RATES:
                loss = losses[scaling, lr] = self(method, scaling, lr, 100)[0]
                print(f"{method:8} scaling {scaling:g} lr {lr:g}: validation loss {loss:.5f}", flush=True)
                if not loss <= lowest:
                    break
                lowest = loss
        return min(losses, key=lambda k: losses[k])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--scaling", type=float, nargs="+", default=[2.0], help="of the update, for both methods")
    parser.add_argument("--results", type=Path, help="JSON lines, to go on from")
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    run = Runs(args.task, args.results)
    results: dict[str, list[float]] = {}
    for method in ("lora", "adalora"):
        scaling, lr = run.best(method, args.scaling)
        results[method] = []
        for seed in SEEDS:
            _, loss, ranks = run(method, scaling, lr, seed)
            results[method].append(loss)
            spread = (ranks if len(ranks) <= 6 else f"{min(ranks.values())} to {max(ranks.values())}") or ""
            print(f"{method:8} scaling {scaling:g} lr {lr:g} seed {seed}: test loss {loss:.5f}  {spread}", flush=True)
    for method, losses in results.items():
        print(f"{method:8} mean {statistics.mean(losses):.5f}, standard deviation {statistics.stdev(losses):.5f}")
    better = sum(a < b for a, b in zip(results["adalora"], results["lora"], strict=True))
    ratio = statistics.mean(results["adalora"]) / statistics.mean(results["lora"])
    print(f"AdaLoRA is better for {better} of {len(results['lora'])} seeds; ratio of the means {ratio:.3f}")


if __name__ == "__main__":
    main()
