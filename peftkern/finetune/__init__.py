# SPDX-License-Identifier: Apache-2.0
"""`peftkern finetune`: fine-tune a causal language model with peftkern's LoRA or QLoRA layers, in one command.

From Python: `peftkern.finetune.run(Options(method="qlora", data="notes.txt", output="out"))`.

    cli       argparse and exit codes
    options   every argument, its default and its check
    job       the whole run, in order
    data      documents -> split -> token blocks, label masks
    model     find, load, adapt, generate
    train     transformers.Trainer, checkpoints, Ctrl-C, loss log
    files     atomic writes, checkpoint verification
    report    loss.png, report.json, the final table
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .cli import add_arguments, main
from .errors import FinetuneError, Interrupted
from .options import Options

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FinetuneError", "Interrupted", "Options", "add_arguments", "main", "run"]


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """Run one fine-tuning and return what is written to `report.json`; see `peftkern.finetune.run`."""
    from .job import run as run_now  # imports transformers, which `peftkern info` and `peftkern bench` do without

    return run_now(options, console)
