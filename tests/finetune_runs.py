# SPDX-License-Identifier: Apache-2.0
"""What the tests of `peftkern finetune` share: a tiny random Llama, rows of data, options, a signal in a step."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="peftkern finetune needs transformers (the extra demo)")
for name in ("tokenizers", "safetensors", "accelerate", "rich", "matplotlib"):
    pytest.importorskip(name, reason=f"peftkern finetune needs {name} (the extra demo)")

from peftkern.finetune import Options  # noqa: E402
from peftkern.finetune import train as finetune_train  # noqa: E402

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SENTENCES = [f"The {a} {b} {c} the {d}." for a in ("red", "old") for b in ("fox", "cat") for c in ("sees", "likes")
             for d in ("moon", "river", "hill", "house")]  # fmt: skip


def write_rows(path: Path, rows: list) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def text_rows() -> list[dict]:
    return [{"text": " ".join(SENTENCES[i:] + SENTENCES[:i])} for i in range(len(SENTENCES))]


def completion_rows() -> list[dict]:
    return [{"prompt": f"Say {i}: ", "completion": sentence} for i, sentence in enumerate(SENTENCES)]


def chat_rows() -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": sentence}]}
        for i, sentence in enumerate(SENTENCES)
    ]


def options(tiny: str, folder: Path, **changes) -> Options:
    arguments = dict(
        model=tiny, method="lora", rank=4, steps=8, batch_size=2, seq_len=32, lr=1e-2, dtype="fp32", eval_limit=8,
        output=str(folder / "out"),
    )  # fmt: skip
    arguments.update(changes)
    if "data" not in arguments:
        arguments["data"] = write_rows(folder / "text.jsonl", text_rows())
    return Options(**arguments)


def losses(folder: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]


def interrupt_at(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Deliver a signal to this process in the middle of a training step."""
    original = finetune_train.AdapterTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1 and not self.stopped_by_test:
            self.stopped_by_test = True  # with gradient accumulation a step comes here more than once
            signal.raise_signal(number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(finetune_train.AdapterTrainer, "stopped_by_test", False, raising=False)
    monkeypatch.setattr(finetune_train.AdapterTrainer, "training_step", training_step)
