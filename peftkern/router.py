# SPDX-License-Identifier: Apache-2.0
"""Which adapter a prompt is for: the one whose example prompts the base model sees as most alike."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .adapter_bank import Choice
from .files import write_whole

Encoder = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Prompts -> the base model's last hidden states [prompts, tokens, width] and the attention mask [prompts, tokens]."""

SETTINGS_NAME = "router.json"
PROTOTYPES_NAME = "router.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Routing:
    """Where prompts go. choices: for each a name, {name: weight} or None, as ``AdapterBank.select`` takes them;
    scores: float32 [prompts, adapters], the cosines, in the order of names."""

    choices: list[Choice]
    scores: Tensor
    names: list[str]


class Router:
    """Nearest-prototype routing of prompts to adapters.

    A prompt becomes the mean of its last hidden states over the attention mask, an adapter's prototype the mean over
    its example prompts, each of length 1 first. The score is their cosine, after the mean of all prototypes is taken
    off both, once there are two: all hidden states of a language model point nearly the same way, and only what is left
    tells them apart.

    encode: what makes hidden states of prompts; ``transformers_encoder`` makes one.
    threshold: a prompt whose best score is below it goes to the base model. top_k: how many adapters are mixed, with
        the softmax of their scores / temperature as weights; 1: the best one alone.
    Raises ValueError naming a bad argument.

    Nearest class mean: Mensink et al. 2013, "Distance-based image classification"; task vectors for choosing adapters:
    LoraRetriever, Zhao et al. 2024, arXiv 2402.09997.

    >>> def encode(prompts):  # letters as one-hot vectors stand in for a model
    ...     hidden = torch.stack([torch.eye(128)[[ord(c) for c in p]] for p in prompts])
    ...     return hidden, torch.ones(hidden.shape[:2])
    >>> router = Router(encode, threshold=0.1)
    >>> router.add("vowels", ["aeio", "eeou"])
    >>> router.add("digits", ["1234", "9923"])
    >>> router.route(["aaee", "2143", "xyzw"]).choices
    ['vowels', 'digits', None]
    """

    def __init__(self, encode: Encoder, *, threshold: float = 0.0, top_k: int = 1, temperature: float = 0.1) -> None:
        _check_settings(threshold, top_k, temperature)
        self.encode, self.threshold, self.top_k, self.temperature = encode, threshold, top_k, temperature
        self._prototypes: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        return list(self._prototypes)

    def add(self, name: str, prompts: Sequence[str]) -> None:
        """The prototype of an adapter from prompts it is for; known names are replaced. A few dozen suffice."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"name: expected a string, got {name!r}")
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts: expected a list of at least one example prompt for {name}, got {prompts!r}")
        prototype = self.embed(prompts).mean(0)
        first = next(iter(self._prototypes.values()), prototype)
        if prototype.shape != first.shape:
            raise ValueError(f"{name}: expected hidden states of width {first.numel()}, got {prototype.numel()}")
        self._prototypes[name] = prototype

    def remove(self, name: str) -> None:
        """Forgets an adapter. Raises KeyError if there is none of that name."""
        del self._prototypes[name]

    def route(self, prompts: Sequence[str]) -> Routing:
        """Chooses for each prompt. Raises RuntimeError before the first add()."""
        if not self._prototypes:
            raise RuntimeError("router: expected adapters to choose from, got none; call add() first")
        scores = self._scores(self.embed(prompts))
        k = min(self.top_k, len(self._prototypes))
        best, which = scores.topk(k, dim=1)
        weights = (best / self.temperature).softmax(1).tolist()
        names, choices = self.names, []
        for row, (score, indices) in enumerate(zip(best[:, 0].tolist(), which.tolist(), strict=True)):
            if not score >= self.threshold:  # also of NaN
                choices.append(None)
            elif k == 1:
                choices.append(names[indices[0]])
            else:
                choices.append({names[i]: w for i, w in zip(indices, weights[row], strict=True)})
        return Routing(choices, scores, names)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """float32 [prompts, width], each of length 1: the means of the last hidden states over the attention mask."""
        with torch.no_grad():
            hidden, mask = self.encode(prompts)
        if hidden.dim() != 3 or hidden.shape[0] != len(prompts) or mask.shape != hidden.shape[:2]:
            raise ValueError(
                f"encode: expected hidden states [{len(prompts)}, tokens, width] and a mask of their first two sizes, "
                f"got {list(hidden.shape)} and {list(mask.shape)}"
            )
        weights = mask.to(hidden.device).float()
        empty = (weights.sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"prompts: expected at least one token, got none in prompt {empty[0]}")
        # where and not times: what a padded position holds may be NaN
        kept = torch.where(weights[:, :, None] > 0, hidden.float() * weights[:, :, None], 0.0)
        return torch.nn.functional.normalize(kept.sum(1) / weights.sum(1, keepdim=True), dim=1).cpu()

    def _scores(self, embedded: Tensor) -> Tensor:
        prototypes = torch.stack(list(self._prototypes.values()))
        if embedded.shape[1] != prototypes.shape[1]:
            raise ValueError(
                f"encode: expected hidden states of width {prototypes.shape[1]}, that of the prototypes, got "
                f"{embedded.shape[1]}"
            )
        center = prototypes.mean(0) if len(prototypes) > 1 else torch.zeros(prototypes.shape[1])
        normalize = torch.nn.functional.normalize
        return normalize(embedded - center, dim=1) @ normalize(prototypes - center, dim=1).T

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes prototypes and settings to directory, which is made if need be; returns it."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "format": FORMAT, "names": self.names, "threshold": self.threshold, "top_k": self.top_k,
            "temperature": self.temperature,
        }  # fmt: skip
        tensors = {str(i): t.contiguous() for i, t in enumerate(self._prototypes.values())}
        text = json.dumps(settings, indent=2) + "\n"
        write_whole(
            {
                folder / PROTOTYPES_NAME: lambda path: save_file(tensors, path),
                folder / SETTINGS_NAME: lambda path: path.write_text(text),
            }
        )
        return folder

    @classmethod
    def load(cls, directory: str | os.PathLike, encode: Encoder) -> Router:
        """The router that save() wrote, with encode as its model. Raises FileNotFoundError for a missing file,
        ValueError, naming it, for a damaged one."""
        folder = Path(directory)
        path = folder / SETTINGS_NAME
        try:
            settings = json.loads(path.read_text())
            names = settings["names"]
            if settings["format"] != FORMAT or not all(isinstance(name, str) for name in names):
                raise ValueError(f"expected format {FORMAT} and names, got {settings['format']!r} and {names!r}")
            options = {name: settings[name] for name in ("threshold", "top_k", "temperature")}
            router = cls(encode, **options)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}: expected the settings of a router: {error!r}") from error
        path = folder / PROTOTYPES_NAME
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a whole safetensors file: {error}") from error
        shapes = {t.shape for t in tensors.values()}
        whole = all(t.dtype == torch.float32 and t.dim() == 1 and bool(t.isfinite().all()) for t in tensors.values())
        if tensors.keys() != {str(i) for i in range(len(names))} or len(set(names)) < len(names) or len(shapes) > 1:
            raise ValueError(f"{path}: expected {len(names)} prototypes of one width, got {sorted(tensors)}")
        if not whole:
            raise ValueError(f"{path}: expected prototypes of finite float32 values")
        router._prototypes = {name: tensors[str(i)].clone() for i, name in enumerate(names)}
        return router


def _check_settings(threshold: float, top_k: int, temperature: float) -> None:
    if not isinstance(threshold, (int, float)) or not -1.0 <= threshold <= 1.0:
        raise ValueError(f"threshold: expected a cosine, from -1 to 1, got {threshold!r}")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k: expected an int >= 1, got {top_k!r}")
    if not isinstance(temperature, (int, float)) or not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a number > 0, got {temperature!r}")


def transformers_encoder(model: Any, tokenizer: Any, max_length: int = 512) -> Encoder:
    """An encoder that runs a transformers model, without adapters of a bank that is around it unless some are selected,
    on prompts cut to max_length tokens."""

    def encode(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=max_length)
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        # the body alone: the logits of the head would be the largest tensor of all, for nothing
        return model.base_model(**inputs).last_hidden_state, inputs["attention_mask"]

    return encode
