# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .embedding import LoRAEmbedding
from .lora import LoRALinear


class TiedLoRALinear(LoRALinear):
    """A head over the weight of an embedding, with the adapter of that embedding too (config.ensure_weight_tying): its
    A is the transposed lora_embedding_B and its B the transposed lora_embedding_A. It has no parameters of its own, the
    gradients add up in the embedding's, and merged weights stay one if the embedding is merged first."""

    @classmethod
    def from_tied(cls, linear: nn.Linear, embedding: LoRAEmbedding) -> TiedLoRALinear:
        self = cls._around(linear, None)
        self._source = [embedding]  # in a list, so that it is no module inside this one
        for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "scaling"):
            setattr(self, name, getattr(embedding, name))
        return self

    @property
    def lora_A(self) -> Tensor:
        return self._source[0].lora_embedding_B.t()

    @property
    def lora_B(self) -> Tensor:
        return self._source[0].lora_embedding_A.t()

    def adapter_parameters(self) -> dict[str, Any]:
        """Views of the embedding's, under the names that HF PEFT saves them by a second time."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def merge(self, safe: bool = False) -> None:
        super().merge(safe)
        if self._source[0].merged:
            self._hold(self._source[0].weight)
