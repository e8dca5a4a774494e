# SPDX-License-Identifier: Apache-2.0
"""`peftkern finetune` on a tiny random Llama: runs of all methods, and the command."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetune_runs import chat_rows, completion_rows, losses, options, text_rows, write_rows

import peftkern
from peftkern.finetune import FinetuneError, Options, data, files, run
from peftkern.finetune import cli as finetune_cli
from peftkern.finetune import model as finetune_model
from peftkern.finetune import report as finetune_report
from peftkern.finetune import train as finetune_train

pytestmark = pytest.mark.usefixtures("one_thread")

# ----------------------------------------------------------------------------------------------------------- runs

ROWS = {"text": text_rows, "completion": completion_rows, "chat": chat_rows}


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("text", dict(method="lora", dtype="fp32")),
        ("completion", dict(method="qlora", dtype="fp32", double_quant=False, targets="q_proj,down_proj")),
        ("chat", dict(method="qlora", dtype="bf16", grad_accum=2)),
        ("txt", dict(method="lora", dtype="bf16", epochs=0.5, steps=None)),
    ],
)
def test_run_trains_saves_reloads_and_reports(tiny, tmp_path, kind, changes):
    if kind == "txt":
        path = tmp_path / "text.txt"
        path.write_text("\n\n".join(row["text"] for row in text_rows()))
        source = str(path)
    else:
        source = write_rows(tmp_path / f"{kind}.jsonl", ROWS[kind]())
    settings = options(tiny, tmp_path, data=source, **{"steps": 12, **changes})
    summary = run(settings)
    out = Path(settings.output)

    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["reload_check"] == {"max_abs_difference": 0.0, "passed": True}
    assert any("LoRALinear" in line for line in summary["kernels"])
    assert summary["held_out"]["after"]["loss"] < summary["held_out"]["before"]["loss"]
    before = summary["held_out"]["before"]
    assert before["perplexity"] == pytest.approx(math.exp(before["loss"]))
    assert summary["training"]["steps"] == len(losses(out)) == summary["settings"]["total_steps"]
    assert summary["training"]["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 2**20
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and (out / "loss.png").stat().st_size > 10_000
    assert summary["samples"]["prompt"] and "after" in summary["samples"]

    size = summary["size"]
    assert size["adapted_layers"] == (4 if kind == "completion" else 14)
    bits = size["base_bits_per_parameter"]
    assert (4.0 < bits < 4.6) if settings.method == "qlora" else bits == {"fp32": 32, "bf16": 16}[settings.dtype]

    from safetensors.torch import load_file

    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in adapter.values()) == size["trainable_parameters"]
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)


def test_saved_adapter_opens_in_hugging_face_peft(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    settings = options(tiny, tmp_path, dropout=0.0)
    run(settings)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    theirs = peft.PeftModel.from_pretrained(base, Path(settings.output) / "adapter").eval()
    ours = finetune_model.adapt(AutoModelForCausalLM.from_pretrained(tiny), settings.checked(), 8)
    peftkern.load_adapter(ours, str(Path(settings.output) / "adapter"))
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_evaluation_weighs_every_learnt_token_the_same(tiny, tokenizer, tmp_path):
    model = finetune_model.load_base(finetune_model.find_model(tiny), "fp32", torch.device("cpu"))
    corpus = data.load_corpus(write_rows(tmp_path / "a.jsonl", completion_rows()[:5]))
    dataset = data.build_dataset(corpus, tokenizer, 32, "held-out")
    collate = data.Collator(tokenizer.pad_token_id)
    one, four = (finetune_train.evaluate(model, dataset, collate, size, 64) for size in (1, 4))
    assert one.tokens == four.tokens == sum(label != data.IGNORE for e in dataset.examples for label in e["labels"][1:])
    assert one.loss == pytest.approx(four.loss, rel=1e-5)


def test_gradient_checkpointing_changes_no_loss(tiny, tmp_path):
    plain = options(tiny, tmp_path, dropout=0.1, output=str(tmp_path / "plain"))
    run(plain)
    recomputed = options(tiny, tmp_path, dropout=0.1, output=str(tmp_path / "recomputed"), gradient_checkpointing=True)
    run(recomputed)
    assert losses(recomputed.output) == losses(plain.output)


def test_diverged_training_stops_with_a_message(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_train.Trainer, "training_step", lambda self, *a, **k: torch.tensor(math.nan))
    with pytest.raises(FinetuneError, match=r"the loss became nan at step 1; try a smaller --lr than 0.01"):
        run(options(tiny, tmp_path))


# -------------------------------------------------------------------------------------------------- as a command


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "peftkern.finetune", *arguments]


def environment() -> dict[str, str]:
    root = str(Path(peftkern.__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), root])}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_a_checkpoint_prints_the_resume_command_and_exits_130(tiny, tmp_path, number):
    settings = options(tiny, tmp_path, steps=200, method="qlora", save_steps=1000, threads=1)
    process = subprocess.Popen(
        command(*shlex.split(finetune_cli.resume_command(settings))[2:-1]),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log, deadline = Path(settings.output) / "train_log.jsonl", time.monotonic() + 240
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    (checkpoint,) = files.checkpoints(Path(settings.output) / "checkpoints")
    assert f"saved up to step {files.step_of(checkpoint)}. Continue with:" in printed
    line = next(line.strip() for line in printed.splitlines() if line.strip().startswith("peftkern finetune"))
    finished = subprocess.run(
        command(*shlex.split(line)[2:]), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    assert len(losses(settings.output)) == 200
    assert "logits equal, bit for bit" in finished.stdout


@pytest.mark.slow
def test_default_run_lowers_the_held_out_loss_by_a_tenth(tmp_path):
    """What `make demo` shows: the default model and text, QLoRA."""
    try:
        finetune_model.find_model(None)
    except FinetuneError as error:
        pytest.skip(str(error))
    summary = run(Options(output=str(tmp_path / "out"), steps=30))
    assert summary["held_out"]["change_percent"] <= -10
    assert summary["size"]["base_bits_per_parameter"] <= 4.13
    assert summary["reload_check"]["passed"]


# -------------------------------------------------------------------------------------------------------- AdaLoRA


@pytest.mark.parametrize("changes", [dict(method="adalora"), dict(method="qadalora", grad_accum=2, delta_t=2)])
def test_adalora_end_to_end(tiny, tmp_path, changes):
    settings = options(tiny, tmp_path, steps=12, rank=3, t_init=2, t_final=4, **changes)
    report = run(settings)
    ranks = report["ranks"]
    assert len(ranks) == 14 and sum(ranks.values()) == 14 * 3 and len(set(ranks.values())) > 1
    assert report["reload_check"] == {"max_abs_difference": 0.0, "passed": True}
    log = [json.loads(line) for line in (Path(settings.output) / "train_log.jsonl").read_text().splitlines()]
    budgets = [entry["budget"] for entry in log]
    assert budgets[:2] == [14 * 5] * 2 and budgets[7:] == [14 * 3] * 5
    assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) > 4
    assert (Path(settings.output) / "ranks.png").stat().st_size > 5000
    written = json.loads((Path(settings.output) / "adapter" / "adapter_config.json").read_text())
    assert {name.removesuffix(".lora_E"): sum(p) for name, p in written["rank_pattern"].items()} == ranks
    assert written["peft_type"] == "ADALORA" and report["settings"]["alpha"] == 10.0


def test_adalora_schedule_that_does_not_fit(tiny, tmp_path):
    with pytest.raises(
        FinetuneError, match=r"--t-init and --t-final: expected less than the 8 steps together, got 3 \+ 5"
    ):
        run(options(tiny, tmp_path, method="adalora", t_init=3, t_final=5))


def test_ranks_are_laid_out_by_layer_and_module():
    ranks = {"model.layers.10.mlp.up": 3, "model.layers.2.mlp.up": 1, "model.layers.2.attn.q": 2, "head": 5}
    kinds, layers, grid = finetune_report.rank_grid(ranks)
    assert kinds == ["mlp.up", "attn.q", "head"] and layers == ["2", "10", "-"]
    cells = [[None if math.isnan(v) else v for v in row] for row in grid]
    assert cells == [[1, 3, None], [2, None, None], [None, None, 5]]
