# SPDX-License-Identifier: Apache-2.0
"""`peftkern finetune`: checkpoints, resume, damage, a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from finetune_runs import completion_rows, interrupt_at, losses, options, text_rows, write_rows

import peftkern
from peftkern.finetune import FinetuneError, Interrupted, Options, files, run

pytestmark = pytest.mark.usefixtures("one_thread")

# --------------------------------------------------------------------------------------------- checkpoints, resume


@pytest.mark.parametrize("changes", [dict(method="lora", grad_accum=2), dict(method="qlora", dtype="bf16")])
def test_interrupted_and_resumed_run_gives_the_same_losses(tiny, tmp_path, monkeypatch, changes):
    """Across an epoch boundary, with dropout, at a step that is no regular checkpoint."""
    rows = write_rows(tmp_path / "few.jsonl", completion_rows()[:10])
    common = dict(data=rows, dropout=0.2, steps=14, eval_fraction=0.2, **changes)
    whole = options(tiny, tmp_path, output=str(tmp_path / "whole"), **common)
    expected = run(whole)

    broken = options(tiny, tmp_path, output=str(tmp_path / "broken"), **common)
    for step in (6, 11):
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(Interrupted) as caught:
                run(broken)
        broken = _resumed(broken)
        assert files.step_of(Path(caught.value.checkpoint)) == step
        assert files.newest_intact(Path(broken.output) / "checkpoints", print) == Path(caught.value.checkpoint)
    summary = run(broken)

    assert losses(broken.output) == losses(whole.output)
    assert summary["held_out"] == expected["held_out"]
    assert summary["samples"] == expected["samples"]
    adapters = [Path(o.output, "adapter", "adapter_model.safetensors").read_bytes() for o in (whole, broken)]
    assert adapters[0] == adapters[1]


def _resumed(settings: Options, **changes) -> Options:
    from dataclasses import replace

    return replace(settings, resume=True, **changes)


def test_checkpoints_hold_the_adapter_and_not_the_base(tiny, tmp_path):
    settings = options(tiny, tmp_path, save_steps=3)
    run(settings)
    folder = Path(settings.output) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    names = {path.name for path in (folder / "checkpoint-8").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    } <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    for checkpoint in folder.iterdir():
        files.verify(checkpoint)


def test_resume_after_training_was_done_only_finishes_the_rest(tiny, tmp_path, monkeypatch):
    settings = options(tiny, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(peftkern, "load_adapter", _raise(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    first = losses(settings.output)
    summary = run(_resumed(settings))
    assert losses(settings.output) == first and summary["training"]["steps"] == 8 and summary["reload_check"]["passed"]


def _raise(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_damaged_checkpoints_are_passed_over_or_named(tiny, tmp_path, monkeypatch, capsys):
    settings = options(tiny, tmp_path, save_steps=2)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Interrupted):
            run(settings)
    folder = Path(settings.output) / "checkpoints"
    newest, older = files.checkpoints(folder)
    assert [files.step_of(newest), files.step_of(older)] == [5, 4]

    os.truncate(newest / "adapter_model.safetensors", 100)
    said = []
    assert files.newest_intact(folder, said.append) == older
    assert "adapter_model.safetensors" in said[0] and "100" in said[0] and "truncated" in said[0]
    summary = run(_resumed(settings))
    assert summary["training"]["resumed_from"] == str(older) and len(losses(settings.output)) == 8
    assert "passed over" in capsys.readouterr().out

    for checkpoint in files.checkpoints(folder):
        content = bytearray((checkpoint / "optimizer.pt").read_bytes())
        content[-40] ^= 1
        (checkpoint / "optimizer.pt").write_bytes(content)
    with pytest.raises(FinetuneError, match=r"no intact checkpoint left in .*optimizer\.pt.*SHA-256"):
        run(_resumed(settings))
    for checkpoint in files.checkpoints(folder):
        (checkpoint / "checksums.json").write_text('{"optimizer.pt"')
    with pytest.raises(FinetuneError, match=r"checksums\.json.*damaged"):
        run(_resumed(settings))


def test_resume_needs_the_same_settings_and_data(tiny, tmp_path, monkeypatch):
    settings = options(tiny, tmp_path)
    with pytest.raises(
        FinetuneError, match=r"--resume: expected a checkpoint to resume from in .*checkpoints', got none"
    ):
        run(_resumed(settings))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            run(settings)
    with pytest.raises(FinetuneError, match=r"--rank: expected 4, as in the run that --resume continues, got 8"):
        run(_resumed(settings, rank=8))
    with pytest.raises(FinetuneError, match=r"--steps or --epochs: expected 8, .*got 9"):
        run(_resumed(settings, steps=9))
    with pytest.raises(
        FinetuneError, match=r"--output: .* holds an unfinished run \(checkpoint-3\); expected --resume"
    ):
        run(settings)
    write_rows(Path(settings.data), text_rows()[:-1])
    with pytest.raises(FinetuneError, match=r"--data: expected"):
        run(_resumed(settings))
    assert files.checkpoints(Path(settings.output) / "checkpoints")  # none of these lost anything
    summary = run(Options(**{**vars(settings), "overwrite": True}))
    assert summary["training"]["resumed_from"] is None


def test_full_disk_while_saving_keeps_the_earlier_checkpoint(tiny, tmp_path, monkeypatch):
    settings, original, saved = options(tiny, tmp_path, save_steps=2), peftkern.save_adapter, []

    def save_adapter(model, folder, **options):
        original(model, folder, **options)
        saved.append(folder)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_at_the_end(model, folder, **options):
        if Path(folder).name == "adapter":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(model, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(peftkern, "save_adapter", save_adapter)
        with pytest.raises(
            FinetuneError, match=r"cannot save the checkpoint .*checkpoint-4.*No space left.*checkpoint-2.* is kept"
        ):
            run(settings)
    folder = Path(settings.output) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    with monkeypatch.context() as patch:
        patch.setattr(peftkern, "save_adapter", full_at_the_end)
        with pytest.raises(
            FinetuneError, match=r"cannot save the adapter in .*No space left.*--resume finishes the run"
        ):
            run(_resumed(settings))
    assert run(_resumed(settings))["training"]["steps"] == 8


def test_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    files.write_atomic(path, "old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FinetuneError, match=r"cannot write .*report\.json.*No space left"):
        files.write_atomic(path, half)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("at", [3, 6, 10])
def test_adalora_resumes_exactly(tiny, tmp_path, monkeypatch, at):
    from dataclasses import replace

    from safetensors.torch import load_file

    changes = dict(method="adalora", steps=12, rank=3, t_init=2, t_final=4, save_steps=100, dropout=0.1)
    whole = options(tiny, tmp_path, **changes)
    report = run(whole)
    part = options(tiny, tmp_path, output=str(tmp_path / "part"), data=whole.data, **changes)
    interrupt_at(monkeypatch, at)
    with pytest.raises(Interrupted):
        run(part)
    assert len(losses(part.output)) == at
    monkeypatch.undo()
    resumed = run(replace(part, resume=True))
    assert losses(part.output) == losses(whole.output) and resumed["ranks"] == report["ranks"]
    tensors = [load_file(Path(o) / "adapter" / "adapter_model.safetensors") for o in (part.output, whole.output)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[1])
