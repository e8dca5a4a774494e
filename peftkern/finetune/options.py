# SPDX-License-Identifier: Apache-2.0
"""The settings of one fine-tuning run: one home for every default, and for every check of a value."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..ops.nf4 import BLOCK_SIZES
from .errors import FinetuneError

METHODS = ("lora", "qlora", "adalora", "qadalora")
DTYPES = ("bf16", "fp32")
DEFAULT_STEPS = 40

# A resumed run may have other values of these. For steps and epochs the resulting number of steps is compared instead.
_MAY_CHANGE_ON_RESUME = frozenset(
    ("threads", "save_steps", "resume", "overwrite", "output", "prompt", "gradient_checkpointing", "eval_limit")
) | {"steps", "epochs"}


@dataclass(frozen=True)
class Options:
    """Every argument of `peftkern finetune`, with its default. Call `checked()` before use."""

    model: str | None = None
    data: str | None = None
    method: str = "qlora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.05
    targets: str = "all-linear"
    init_rank: int | None = None
    orth_weight: float = 0.5
    t_init: int | None = None
    t_final: int | None = None
    delta_t: int = 1
    block_size_nf4: int = 64
    double_quant: bool = True
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    seq_len: int = 256
    lr: float = 1e-3
    grad_accum: int = 1
    eval_fraction: float = 0.1
    eval_limit: int = 64
    seed: int = 0
    dtype: str | None = None
    threads: int | None = None
    save_steps: int | None = None
    resume: bool = False
    overwrite: bool = False
    output: str = "finetune-output"
    prompt: str | None = None
    gradient_checkpointing: bool = False

    def checked(self) -> Options:
        """Check every value, and fill in those that follow from others (`alpha`, `dtype`)."""
        for name in ("rank", "batch_size", "grad_accum", "eval_limit", "delta_t"):
            self._require(name, getattr(self, name) >= 1, "a whole number >= 1")
        self._require("seq_len", self.seq_len >= 8, "a whole number >= 8")
        self._require("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2**32 - 1")
        for name in ("steps", "threads", "save_steps", "init_rank"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "a whole number >= 1")
        for name in ("t_init", "t_final"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 0, "a whole number >= 0")
        self._require("orth_weight", 0 <= self.orth_weight < math.inf, "a number >= 0")
        for name in ("alpha", "epochs"):
            value = getattr(self, name)
            self._require(name, value is None or (value > 0 and math.isfinite(value)), "a number > 0")
        self._require("lr", self.lr > 0 and math.isfinite(self.lr), "a number > 0")
        self._require("dropout", 0 <= self.dropout < 1, "a number from 0 up to, not including, 1")
        self._require("eval_fraction", 0 < self.eval_fraction < 1, "a number between 0 and 1")
        self._require("method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        self._require("dtype", self.dtype is None or self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._require(
            "block_size_nf4",
            self.block_size_nf4 in BLOCK_SIZES,
            f"one of {', '.join(str(size) for size in BLOCK_SIZES)}",
        )
        self._require("targets", bool(self.target_names()), "all-linear or a comma-separated list of module names")
        if self.steps is not None and self.epochs is not None:
            raise FinetuneError(
                f"--epochs: expected only one of --steps and --epochs, got both ({self.steps}, {self.epochs})"
            )
        if self.resume and self.overwrite:
            raise FinetuneError("--overwrite: expected only one of --resume and --overwrite, got both")
        init_rank = math.ceil(1.5 * self.rank) if self.init_rank is None else self.init_rank
        return replace(
            self,
            init_rank=init_rank,
            alpha=float(2 * (init_rank if self.adaptive else self.rank) if self.alpha is None else self.alpha),
            dtype=self.dtype or default_dtype(),
        )

    @property
    def quantized(self) -> bool:
        """Is the base in NF4?"""
        return self.method in ("qlora", "qadalora")

    @property
    def adaptive(self) -> bool:
        """Does a RankAllocator decide the ranks?"""
        return self.method in ("adalora", "qadalora")

    def schedule(self, steps: int) -> tuple[int, int]:
        """AdaLoRA's (tinit, tfinal) of a run of so many steps: a tenth and three tenths unless given."""
        t_init = steps // 10 if self.t_init is None else self.t_init
        t_final = 3 * steps // 10 if self.t_final is None else self.t_final
        if self.adaptive and t_init + t_final >= steps:
            raise FinetuneError(
                f"--t-init and --t-final: expected less than the {steps} steps together, got {t_init} + {t_final}"
            )
        return t_init, t_final

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise FinetuneError(f"--{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)!r}")

    def target_names(self) -> str | list[str]:
        """`--targets` as PEFT's `target_modules` wants it."""
        if self.targets == "all-linear":
            return self.targets
        return [name.strip() for name in self.targets.split(",") if name.strip()]

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run."""
        if self.epochs is None:
            return DEFAULT_STEPS if self.steps is None else self.steps
        per_epoch = math.ceil(math.ceil(examples / self.batch_size) / self.grad_accum)
        return max(1, math.ceil(self.epochs * per_epoch))

    def identity(self) -> dict[str, Any]:
        """The settings that must be equal for a resumed run to continue exactly."""
        return {name: value for name, value in asdict(self).items() if name not in _MAY_CHANGE_ON_RESUME}


def default_dtype() -> str:
    """bf16 where the hardware multiplies it at full speed, else fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    try:
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    except (AttributeError, RuntimeError):  # a torch built without oneDNN
        return "fp32"
