# SPDX-License-Identifier: Apache-2.0
"""transformers.Trainer with adapter-only, checked checkpoints, a clean stop on Ctrl-C, and a loss log."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from . import files
from .data import IGNORE, Collator, Dataset
from .errors import FinetuneError, Interrupted
from .options import Options

KEPT_CHECKPOINTS = 2  # the newest, and one to fall back to if it turns out damaged
TRAINER_STATE = "trainer_state.json"
ALLOCATOR_STATE = "rank_allocator.pt"


# ----------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per learnt token, and its exponential, over the held-out examples."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(model: Any, dataset: Dataset, collate: Collator, batch_size: int, limit: int) -> Evaluation:
    """The held-out loss: the same batches in the same order on every call, each token weighing the same."""
    model.eval()
    examples = dataset.examples[:limit]
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = {
            name: tensor.to(model.device) for name, tensor in collate(examples[start : start + batch_size]).items()
        }
        learnt = int((batch["labels"][:, 1:] != IGNORE).sum())
        total += float(model(**batch, use_cache=False).loss) * learnt
        tokens += learnt
    return Evaluation(total / tokens, tokens)


# ---------------------------------------------------------------------------------------------------- interruption


class StopRequest:
    """Turns SIGINT and SIGTERM into a stop after the running step.

    Outside of `deferred()`, and on a second signal, they raise KeyboardInterrupt at once.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self._deferring = False
        self._say = say

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle the signals inside this block, then give the old handlers back. Only the main thread can do that."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside this block the first signal only sets `requested`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, number: int, frame: object) -> None:
        if not self._deferring or self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._say("stopping after this step and saving a checkpoint; once more stops at once, without saving")


class _StopCallback(TrainerCallback):
    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stop.requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


# -------------------------------------------------------------------------------------------------------- logging


class _LogCallback(TrainerCallback):
    """Keeps `train_log.jsonl`, one line per step; a resumed run first cuts it back to what its checkpoint knows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        files.write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in loss_history(state)))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FinetuneError(
                    f"the loss became {logs['loss']} at step {state.global_step}; "
                    f"try a smaller --lr than {args.learning_rate}"
                )
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**logs, "step": state.global_step}) + "\n")
            except OSError as error:
                raise FinetuneError(f"cannot write {str(self.path)!r}: {error.strerror or error}") from error


def loss_history(state: TrainerState) -> list[dict[str, float]]:
    """The logged steps: dicts with "step", "loss", "grad_norm", "learning_rate", "epoch"."""
    return [entry for entry in state.log_history if "loss" in entry]


class _Meter(TrainerCallback):
    """Tokens per second of the optimizer steps alone (no saving, no logging), leaving out the first, a warm-up."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._steps = 0
        self._step_tokens = 0
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_tokens, self._started = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        self._step_tokens += tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._steps == 1:
            self.tokens, self.seconds = 0, 0.0
        self._steps += 1
        self.tokens += self._step_tokens
        self.seconds += time.perf_counter() - self._started

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class _ProgressCallback(TrainerCallback):
    """A progress bar on a terminal; about ten plain lines elsewhere (a log file, CI)."""

    def __init__(self, console: Console, meter: _Meter) -> None:
        self.console = console
        self.meter = meter
        self.loss = math.nan
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, loss=math.nan, speed=0.0)
        if self.console.is_terminal:
            self.bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        step, last, speed = state.global_step, state.max_steps, self.meter.tokens_per_second
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, loss=logs["loss"], speed=speed)
        elif step % max(1, last // 10) == 0 or step == last:
            self.console.print(f"step {step}/{last}  loss {logs['loss']:.3f}  {speed:.0f} tokens/s", highlight=False)

    def stop(self) -> None:
        """Leave the terminal as it was; also on an exception, when the Trainer does not call `on_train_end`."""
        self.bar.stop()


# ------------------------------------------------------------------------------------------------------- training


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold the adapter instead of the model, and appear whole or not at all."""

    def __init__(self, *args: Any, checkpoint_folder: Path, meter: _Meter, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoint_folder = checkpoint_folder
        self.meter = meter
        self.last_checkpoint: Path | None = None
        self.allocator: Any = None  # of AdaLoRA's ranks

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        import peftkern

        optimizer = super().create_optimizer(*args, **kwargs)
        config = getattr(self.model, "peftkern_config", None)
        if self.allocator is None and isinstance(config, peftkern.AdaLoraConfig):
            self.allocator = peftkern.RankAllocator(
                cast(torch.nn.Module, self.model), config, self.optimizer, prune="final"
            )
        return optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """With AdaLoRA the orthogonality term's gradient, but not its value: the log stays that of the text."""
        import peftkern

        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.allocator is None or not model.training:
            return result
        weight = self.allocator.config.orth_reg_weight
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:  # else the Trainer divides
            weight /= self.current_gradient_accumulation_steps
        term = weight * peftkern.orthogonality(cast(torch.nn.Module, self.model))
        term = term - term.detach()
        return (result[0] + term, result[1]) if return_outputs else result + term

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.allocator is not None and "loss" in logs:
            logs["budget"] = self.allocator.budget
        super().log(logs, *args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.meter.add(int(inputs["attention_mask"].sum()))
        return super().training_step(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        import peftkern

        model = cast(torch.nn.Module, self.model)
        peftkern.save_adapter(model, output_dir or str(self.args.output_dir), drop_masked=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.allocator is not None:
            torch.save(self.allocator.state_dict(), Path(output_dir) / ALLOCATOR_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.allocator is not None and checkpoint is not None:
            self.allocator.load_state_dict(torch.load(Path(checkpoint) / ALLOCATOR_STATE, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        import peftkern

        peftkern.load_adapter(cast(torch.nn.Module, self.model if model is None else model), resume_from_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The Trainer writes into its output_dir, a scratch folder here; the whole checkpoint then moves out of it.
        name = f"checkpoint-{self.state.global_step}"
        scratch, final = self.checkpoint_folder / files.PARTIAL, self.checkpoint_folder / name
        if self.last_checkpoint == final:
            return
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
            files.seal(scratch / name, final)
        except Exception as error:
            kept = (
                f"the checkpoint {str(self.last_checkpoint)!r} is kept"
                if self.last_checkpoint
                else "there is no earlier one"
            )
            raise FinetuneError(f"cannot save the checkpoint {str(final)!r}: {error}; {kept}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self.last_checkpoint = final
        for old in files.checkpoints(self.checkpoint_folder)[KEPT_CHECKPOINTS:]:
            shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class TrainResult:
    """What training leaves behind besides the changed adapter."""

    history: list[dict[str, float]]
    tokens_per_second: float
    seconds: float
    steps: int


def train(
    model: Any,
    dataset: Dataset,
    collate: Collator,
    options: Options,
    console: Console,
    stop: StopRequest,
    resume_from: Path | None = None,
) -> TrainResult:
    """Train the adapter; raises `Interrupted` after saving a checkpoint if a stop was requested."""
    output = Path(options.output)
    folder = output / "checkpoints"
    steps = options.total_steps(len(dataset))
    arguments = TrainingArguments(
        output_dir=str(folder / files.PARTIAL),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps / 20),
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a diverged run
        save_strategy="steps",
        save_steps=options.save_steps or max(1, math.ceil(steps / 4)),
        seed=options.seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the Trainer would wrap the model in DataParallel
    if options.gradient_checkpointing:
        _checkpoint_activations(model)
    model.config.use_cache = False
    meter = _Meter()
    progress = _ProgressCallback(console, meter)
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[_StopCallback(stop), meter, _LogCallback(output / "train_log.jsonl"), progress],
        checkpoint_folder=folder,
        meter=meter,
    )
    trainer.last_checkpoint = resume_from
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    started = time.perf_counter()
    if (
        resume_from is not None and files.step_of(resume_from) >= steps
    ):  # training was done; what comes after it was not
        trainer._load_from_checkpoint(str(resume_from))
        trainer.state = TrainerState.load_from_json(str(resume_from / TRAINER_STATE))
    else:
        with stop.deferred():
            try:
                trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
            finally:
                progress.stop()
                shutil.rmtree(folder / files.PARTIAL, ignore_errors=True)
    model.config.use_cache = True
    if stop.requested:
        raise Interrupted(None if trainer.last_checkpoint is None else str(trainer.last_checkpoint))
    return TrainResult(
        history=loss_history(trainer.state),
        tokens_per_second=meter.tokens_per_second,
        seconds=time.perf_counter() - started,
        steps=trainer.state.global_step,
    )


def _checkpoint_activations(model: Any) -> None:
    """Recompute activations in backward. The name of the switch changed within transformers 5."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
