# SPDX-License-Identifier: Apache-2.0
"""One fine-tuning run from settings to report: load, evaluate, train, evaluate, save, reload, compare."""

from __future__ import annotations

import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import data, files, report
from . import model as models
from .errors import FinetuneError
from .options import Options
from .train import Evaluation, StopRequest, evaluate, train

RUN_NOTE = "run.json"
GPU_TOLERANCE = 1e-3  # on the CPU the reloaded adapter must give the same bits


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """Run `peftkern finetune` and return what it writes to `report.json`.

    Raises FinetuneError on bad input. On Ctrl-C and SIGTERM raises Interrupted (during training, after saving a
    checkpoint) or KeyboardInterrupt (at any other time).
    """
    console = console or Console()
    stop = StopRequest(lambda text: console.print(text, markup=False, highlight=False))
    with stop.installed():
        return _run(options.checked(), console, stop)


def _run(options: Options, console: Console, stop: StopRequest) -> dict[str, Any]:
    import transformers

    import peftkern
    from peftkern.rank_allocator import adalora_layers

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    started = time.perf_counter()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = Path(options.output)
    source = models.find_model(options.model)
    corpus = data.load_corpus(options.data)
    files.make_output(output)
    checkpoint = _starting_point(output, options, say)

    say(f"loading {source.name} ({options.dtype}, {device.type})")
    tokenizer = models.load_tokenizer(source)
    training_part, held_out_part = data.split_documents(corpus, options.eval_fraction, options.seed)
    dataset = data.build_dataset(training_part, tokenizer, options.seq_len, "training")
    held_out = data.build_dataset(held_out_part, tokenizer, options.seq_len, "held-out")
    _say_data(say, corpus, dataset, held_out, options)
    steps = options.total_steps(len(dataset))
    identity = {**options.identity(), "data_fingerprint": corpus.fingerprint(), "total_steps": steps}
    if checkpoint is not None:
        _check_same_run(output, identity)

    model = models.load_base(source, options.dtype, device)
    models.check_seq_len(model, options)
    model = models.adapt(model, options, steps)
    size = models.describe_size(model, options)
    if checkpoint is None:  # everything that can be wrong with the input was looked at: the old run may go
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    _note_run(output, identity, finished=False)
    kernels = peftkern.explain(model.train()).splitlines()
    for line in kernels:
        say(line)
    collate = data.Collator(tokenizer.pad_token_id)
    prompt = _prompt(options, corpus.kind, held_out_part)

    def measure(model: Any) -> tuple[Evaluation, str]:
        loss = evaluate(model, held_out, collate, options.batch_size, options.eval_limit)
        sample = models.generate(model, tokenizer, prompt, options.seq_len)
        say(f"held-out loss {loss.loss:.4f}, perplexity {loss.perplexity:.2f} ({loss.tokens:,} tokens)")
        return loss, sample

    before, sample_before = measure(model)  # an adapter starts as zero: this is the (quantized) base model
    result = train(model, dataset, collate, options, console, stop, resume_from=checkpoint)
    peak = report.peak_memory_bytes()
    after, sample_after = measure(model)

    ranks = {name: layer.r for name, layer in adalora_layers(model).items()}
    adapter = output / "adapter"
    _save_adapter(model, adapter)
    batch = collate(held_out.examples[: options.batch_size])
    expected = _logits(model, batch)
    del model
    say("reloading the saved adapter into a fresh base model")
    difference = (expected - _reloaded_logits(source, options, steps, device, adapter, batch)).abs().max().item()

    text_prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    summary: dict[str, Any] = {
        "model": source.name,
        "data": corpus.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "settings": identity,
        "size": size,
        "kernels": kernels,
        "documents": {"training": dataset.documents, "held_out": held_out.documents},
        "tokens": {"training": dataset.tokens, "held_out": after.tokens},
        "held_out": {
            "before": {"loss": before.loss, "perplexity": before.perplexity},
            "after": {"loss": after.loss, "perplexity": after.perplexity},
            "change_percent": 100 * (after.loss / before.loss - 1),
        },
        "training": {
            "steps": result.steps,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
            "first_loss": result.history[0]["loss"],
            "last_loss": result.history[-1]["loss"],
            "resumed_from": None if checkpoint is None else str(checkpoint),
        },
        "ranks": ranks,
        "samples": {"prompt": text_prompt, "before": sample_before, "after": sample_after},
        "reload_check": {
            "max_abs_difference": difference,
            "passed": difference <= (GPU_TOLERANCE if device.type == "cuda" else 0.0),  # False for nan too
        },
        "peak_memory_bytes": peak,
        "total_seconds": time.perf_counter() - started,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "files": {
            "adapter": str(adapter),
            "log": str(output / "train_log.jsonl"),
            "plot": str(output / "loss.png"),
            "report": str(output / "report.json"),
        },
    }
    report.plot_loss(output / "loss.png", summary, result.history)
    if ranks:
        summary["files"]["ranks"] = str(output / "ranks.png")
        report.plot_ranks(output / "ranks.png", summary)
    report.write_report(output / "report.json", summary)
    _note_run(output, identity, finished=True)
    report.print_report(console, summary)
    return summary


def _starting_point(output: Path, options: Options, say: Any) -> Path | None:
    """The checkpoint to resume from, or None; refuses to start over an unfinished run unless told so."""
    folder, note = output / "checkpoints", output / RUN_NOTE
    if options.resume:
        return files.newest_intact(folder, say)
    found = files.checkpoints(folder)
    if found and not options.overwrite and not (note.is_file() and files.read_json(note).get("finished")):
        raise FinetuneError(
            f"--output: {str(output)!r} holds an unfinished run ({found[0].name}); expected --resume to continue it, "
            "--overwrite to start anew, or another --output"
        )
    return None


def _note_run(output: Path, identity: dict[str, Any], finished: bool) -> None:
    """Keep the settings for `--resume`, and whether there is anything left to resume."""
    files.write_atomic(output / RUN_NOTE, json.dumps({"settings": identity, "finished": finished}, indent=1) + "\n")


def _check_same_run(output: Path, identity: dict[str, Any]) -> None:
    """A resumed run must have the settings and the data of the run it continues."""
    for name, was in files.read_json(output / RUN_NOTE).get("settings", {}).items():
        if name in identity and identity[name] != was:
            named = {"data_fingerprint": "data", "total_steps": "steps or --epochs"}.get(name, name.replace("_", "-"))
            raise FinetuneError(
                f"--{named}: expected {was!r}, as in the run that --resume continues, got {identity[name]!r}"
            )


def _say_data(say: Any, corpus: data.Corpus, dataset: data.Dataset, held_out: data.Dataset, options: Options) -> None:
    say(
        f"{corpus.name}: {dataset.documents} documents to train on "
        f"({len(dataset)} examples, {dataset.tokens:,} tokens), "
        f"{held_out.documents} held out ({len(held_out)} examples, {held_out.tokens:,} tokens)"
    )
    for part in (dataset, held_out):
        if part.truncated or part.dropped:
            say(
                f"{part.truncated} examples cut at --seq-len {options.seq_len}; {part.dropped} left out, as nothing to "
                "learn remained"
            )


def _prompt(options: Options, kind: str, held_out: data.Corpus) -> str | list[dict[str, str]]:
    if options.prompt is None:
        return data.default_prompt(held_out)
    return [{"role": "user", "content": options.prompt}] if kind == "chat" else options.prompt


@torch.no_grad()
def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return model(**inputs, use_cache=False).logits.float().cpu()


def _save_adapter(model: Any, folder: Path) -> None:
    import peftkern

    try:
        peftkern.save_adapter(model, folder)
    except OSError as error:
        raise FinetuneError(
            f"cannot save the adapter in {str(folder)!r}: {error}; the trained state is in the last checkpoint, "
            "so --resume finishes the run once there is room"
        ) from error


def _reloaded_logits(
    source: models.ModelSource, options: Options, steps: int, device: torch.device, adapter: Path,
    batch: dict[str, torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    import peftkern

    fresh = models.adapt(models.load_base(source, options.dtype, device), options, steps)
    peftkern.load_adapter(fresh, adapter)
    return _logits(fresh, batch)
