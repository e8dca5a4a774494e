# SPDX-License-Identifier: Apache-2.0
"""Text in, token blocks out: read documents, split off held-out ones, tokenize, pack, mask, batch.

A *document* is the unit of the held-out split: one topic of the language reference, one section of a `.txt` file, or
one row of a `.jsonl` file. The split comes before tokenizing, so no block mixes training and held-out text.

* text documents are joined with an end-of-text token and cut into blocks of exactly `seq_len` tokens; every token is
  learnt;
* `{"prompt", "completion"}` and `{"messages"}` rows stay one example each; only the completion, or what the assistant
  says, is learnt: all other labels are `IGNORE`, which the loss skips.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .errors import FinetuneError

IGNORE = -100
"""Label of a token that is not learnt; torch's cross-entropy skips it by default."""

DEFAULT_DATA = "Python language reference"

_SECTION_CHARS = (
    2000  # a .txt section: large enough to be read alone, small enough to give a short file some held-out text
)
_MIN_SHARED_CHARS = 40  # shorter paragraphs ("For example:") may repeat; a longer one is the same text under two topics
_ROW_KINDS = '{"text"}, {"prompt", "completion"} or {"messages"}'


@dataclass
class Corpus:
    """Documents of one kind: strings ("text"), (prompt, completion) pairs ("completion"), or message lists ("chat")."""

    name: str
    kind: str
    documents: list[Any]
    origins: list[str]  # where each document came from, for error messages

    def fingerprint(self) -> str:
        """A hash of all documents: a resumed run must see the same data."""
        return hashlib.sha256(json.dumps([self.kind, self.documents]).encode()).hexdigest()[:16]


@dataclass
class Dataset(torch.utils.data.Dataset):
    """Tokenized examples, each a dict of two equally long lists, "input_ids" and "labels"."""

    examples: list[dict[str, list[int]]]
    documents: int
    truncated: int = 0  # examples cut at seq_len
    dropped: int = 0  # examples with nothing left to learn after the cut
    first_origin: str = ""
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(len(example["input_ids"]) for example in self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


# -------------------------------------------------------------------------------------------------------- reading


def load_corpus(path: str | None) -> Corpus:
    """Read `--data`: a `.txt` or `.jsonl` file, or Python's own language reference when no path is given."""
    if path is None:
        return _language_reference()
    file = Path(path)
    if file.suffix not in (".txt", ".jsonl"):
        raise FinetuneError(f"--data: expected a file ending in .txt or .jsonl, got {path!r}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FinetuneError(f"--data: cannot read {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FinetuneError(f"--data: {path!r} is not UTF-8 text: {error}") from error
    corpus = _read_jsonl(path, text) if file.suffix == ".jsonl" else _read_txt(path, text)
    if not corpus.documents:
        raise FinetuneError(f"--data: {path!r} holds no text")
    return corpus


def _language_reference() -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FinetuneError(
            "--data: this Python was installed without pydoc_data.topics; name a .txt or .jsonl file"
        ) from error
    # Topics share text ("with" is also a part of "compound"). Each paragraph is kept once, or training would see
    # held-out text.
    seen: set[str] = set()
    documents, origins = [], []
    for topic, text in sorted(topics.items()):
        paragraphs = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen:
                paragraphs.append(paragraph)
            if len(key) >= _MIN_SHARED_CHARS:
                seen.add(key)
        document = "\n\n".join(paragraphs).strip()
        if document:
            documents.append(document)
            origins.append(f"topic {topic!r}")
    return Corpus(DEFAULT_DATA, "text", documents, origins)


def _read_txt(path: str, text: str) -> Corpus:
    """Cut at blank lines (at line ends if there are none) into sections of about `_SECTION_CHARS` characters."""
    separator = "\n\n" if text.strip().count("\n\n") else "\n"
    documents, part = [], ""
    for piece in text.split(separator):
        part += piece + separator
        if len(part) >= _SECTION_CHARS:
            documents.append(part.strip())
            part = ""
    documents.append(part.strip())
    documents = [document for document in documents if document]
    return Corpus(path, "text", documents, [f"{path}, section {i + 1}" for i in range(len(documents))])


def _read_jsonl(path: str, text: str) -> Corpus:
    kind, documents, origins, first = None, [], [], ""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FinetuneError(f"{where}: expected one JSON object, got {_short(line)} ({error})") from error
        row_kind, document = _parse_row(row, where)
        if kind is None:
            kind, first = row_kind, where
        elif kind != row_kind:
            raise FinetuneError(f"{where}: expected the kind of row that {first} has ({kind}), got {row_kind}")
        documents.append(document)
        origins.append(where)
    return Corpus(path, kind or "text", documents, origins)


def _parse_row(row: Any, where: str) -> tuple[str, Any]:
    if not isinstance(row, dict):
        raise FinetuneError(f"{where}: expected an object {_ROW_KINDS}, got {type(row).__name__} {_short(row)}")
    if "messages" in row:
        return "chat", _parse_messages(row["messages"], where)
    if "prompt" in row or "completion" in row:
        return "completion", (_string(row, "prompt", where), _string(row, "completion", where, empty=False))
    if "text" in row:
        return "text", _string(row, "text", where, empty=False)
    raise FinetuneError(f"{where}: expected an object {_ROW_KINDS}, got the keys {sorted(row)}")


def _parse_messages(messages: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise FinetuneError(f'{where}: "messages": expected a non-empty list, got {_short(messages)}')
    parsed = []
    for i, message in enumerate(messages):
        at = f'{where}: "messages"[{i}]'
        if not isinstance(message, dict):
            raise FinetuneError(f'{at}: expected an object {{"role", "content"}}, got {_short(message)}')
        parsed.append({"role": _string(message, "role", at, empty=False), "content": _string(message, "content", at)})
    if not any(message["role"] == "assistant" for message in parsed):
        raise FinetuneError(
            f'{where}: "messages": expected at least one with the role "assistant" to learn from, '
            f"got the roles {[message['role'] for message in parsed]}"
        )
    return parsed


def _string(row: dict[str, Any], key: str, where: str, empty: bool = True) -> str:
    if key not in row:
        raise FinetuneError(f"{where}: expected the key {key!r}, got the keys {sorted(row)}")
    value = row[key]
    if not isinstance(value, str) or not (empty or value.strip()):
        expected = "a string" if empty else "a non-empty string"
        raise FinetuneError(f"{where}: {key!r}: expected {expected}, got {type(value).__name__} {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------------------------------------------ splitting


def split_documents(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Split into (training, held-out) by document; the held-out share of all characters is just below `fraction`.

    The same corpus, fraction and seed give the same split. A document too large for that share stays in training.
    """
    sizes = [len(json.dumps(document)) for document in corpus.documents]
    if len(sizes) < 2:
        raise FinetuneError(
            f"--data: {corpus.name!r} has {len(sizes)} document; expected at least 2, one of them to be held out"
        )
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    wanted = left = fraction * sum(sizes)
    held_out = []
    for index in order:
        if sizes[index] <= left:
            held_out.append(index)
            left -= sizes[index]
        if (
            left < wanted / 10
        ):  # close enough: filling up to the last character would hold out all the shortest documents
            break
    if not held_out:
        held_out = [min(order, key=lambda index: sizes[index])]
    chosen = set(held_out)

    def part(keep: bool) -> Corpus:
        indices = [index for index in range(len(sizes)) if (index in chosen) is keep]
        documents, origins = corpus.documents, corpus.origins
        return Corpus(corpus.name, corpus.kind, [documents[i] for i in indices], [origins[i] for i in indices])

    return part(False), part(True)


# ----------------------------------------------------------------------------------------------------- tokenizing


def build_dataset(corpus: Corpus, tokenizer: Any, seq_len: int, what: str) -> Dataset:
    """Tokenize one side of the split; `what` ("training" or "held-out") is for the error message."""
    if corpus.kind == "text":
        return _packed(corpus, tokenizer, seq_len, what)
    examples, truncated, dropped = [], 0, 0
    for document, origin in zip(corpus.documents, corpus.origins, strict=True):
        if corpus.kind == "chat":
            ids, labels = tokenize_chat(tokenizer, document, origin)
        else:
            ids, labels = tokenize_completion(tokenizer, *document)
        truncated += len(ids) > seq_len
        ids, labels = ids[:seq_len], labels[:seq_len]
        # The first label is never predicted, so it does not count as something to learn.
        if all(label == IGNORE for label in labels[1:]):
            dropped += 1
            continue
        examples.append({"input_ids": ids, "labels": labels})
    if not examples:
        raise FinetuneError(
            f"--data: no {what} example of {corpus.name!r} has a token to learn within --seq-len {seq_len} "
            f"({len(corpus.documents)} rows looked at)"
        )
    return Dataset(examples, len(corpus.documents), truncated, dropped, corpus.origins[0])


def _packed(corpus: Corpus, tokenizer: Any, seq_len: int, what: str) -> Dataset:
    stream: list[int] = []
    for document in corpus.documents:
        stream += _with_eos(tokenizer, tokenizer(document, verbose=False)["input_ids"])
    blocks = [stream[i : i + seq_len] for i in range(0, len(stream) - seq_len + 1, seq_len)]
    if not blocks:
        raise FinetuneError(
            f"--data: the {what} text of {corpus.name!r} has {len(stream)} tokens in {len(corpus.documents)} "
            f"documents; expected at least one block of --seq-len {seq_len} (give more text, a smaller --seq-len"
            + (", or a larger --eval-fraction)" if what == "held-out" else ")")
        )
    return Dataset(
        [{"input_ids": b, "labels": list(b)} for b in blocks], len(corpus.documents), first_origin=corpus.origins[0]
    )


def _with_eos(tokenizer: Any, ids: list[int]) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def tokenize_completion(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of prompt + completion + end of text; the prompt is not learnt."""
    ids, labels = _label_spans(tokenizer, prompt + completion, [(len(prompt), len(prompt + completion))], special=True)
    ended = _with_eos(tokenizer, ids)
    if len(ended) > len(ids):
        labels.append(ended[-1])
    elif ids and ids[-1] == tokenizer.eos_token_id:
        labels[-1] = ids[-1]
    return ended, labels


def tokenize_chat(tokenizer: Any, messages: Sequence[dict[str, str]], origin: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of a conversation in the model's chat template; only what the assistant says is learnt.

    The span of an assistant turn is what the template adds after the generation prompt, its end-of-turn mark included:
    exactly what the model has to produce. Works with any template that renders a conversation's beginning the same way
    alone and in the whole.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise FinetuneError(
            '--data: rows of {"messages"} need a --model whose tokenizer has a chat template; this one has none'
        )
    messages = list(messages)

    def render(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    try:
        text = render(len(messages))
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = render(i, prompt=True), render(i + 1)
            if not after.startswith(before):
                before = render(i)  # some templates write no generation prompt, or another one, into the past
            if not (text.startswith(after) and after.startswith(before)):
                raise FinetuneError(
                    f'{origin}: "messages"[{i}]: the chat template renders this turn differently inside the whole '
                    "conversation, so its tokens cannot be told apart; expected a template that only appends"
                )
            spans.append((len(before), len(after)))
    except FinetuneError:
        raise
    except Exception as error:  # templates raise their own (jinja2) errors, for example on an unknown role
        raise FinetuneError(f'{origin}: the chat template rejects these "messages": {error}') from error
    return _label_spans(tokenizer, text, spans, special=False)


def _label_spans(
    tokenizer: Any, text: str, spans: Iterable[tuple[int, int]], special: bool
) -> tuple[list[int], list[int]]:
    """Tokenize the whole text at once, and learn the tokens that begin inside one of the character spans."""
    if not tokenizer.is_fast:
        raise FinetuneError(
            "--model: expected a fast tokenizer (with a tokenizer.json), which knows the character span of every "
            f"token, got {type(tokenizer).__name__}"
        )
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    spans = list(spans)
    labels = [
        token if end > start and any(low <= start < high for low, high in spans) else IGNORE
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return list(encoded["input_ids"]), labels


# ------------------------------------------------------------------------------------------------------- batching


@dataclass
class Collator:
    """Pad a list of examples on the right to the longest of them; padding is neither attended to nor learnt."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)

        def pad(rows: Iterable[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)

        return {
            "input_ids": pad((example["input_ids"] for example in examples), self.pad_token_id),
            "attention_mask": pad(([1] * len(example["input_ids"]) for example in examples), 0),
            "labels": pad((example["labels"] for example in examples), IGNORE),
        }


def default_prompt(corpus: Corpus) -> str | list[dict[str, str]]:
    """What the model is asked to continue before and after training: a beginning from the first held-out document."""
    document = corpus.documents[0]
    if corpus.kind == "completion":
        return document[0]
    if corpus.kind == "chat":
        return document[: next(i for i, message in enumerate(document) if message["role"] == "assistant")]
    paragraphs = [paragraph.split() for paragraph in document.split("\n\n")]
    return " ".join(next(filter(_is_prose, paragraphs), document.split())[:10])


def _is_prose(words: list[str]) -> bool:
    """Tell a paragraph from a heading, a grammar rule or code."""
    return len(words) >= 20 and sum(word.strip(".,;:()").isalpha() for word in words) >= 0.8 * len(words)
