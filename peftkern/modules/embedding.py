# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapted import AdaptedLinear
from .dora import out_scale
from .lora import LoRALinear, check_lora
from .nf4_linear import refuse_hooks


class LoRAEmbedding(LoRALinear):
    """A frozen embedding plus a trainable low-rank update (LoRA): ``W[x] + scaling * A.T[x] B.T``.

    weight: [num_embeddings, embedding_dim], frozen, shared with the nn.Embedding it was made from, and so with a head
    that is tied to it; lora_embedding_A: [r, num_embeddings], zero at the start; lora_embedding_B: [embedding_dim, r].
    As a linear layer it is one of num_embeddings in and embedding_dim out that is called with indices; names and start
    are HF PEFT's, and as there lora_dropout has no effect. An ``embed_scale`` (Gemma, BART) multiplies the sum.

    >>> LoRAEmbedding.from_embedding(nn.Embedding(100, 16), r=4)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 16])
    """

    fan_in_fan_out = True
    file_suffixes = {}  # noqa: RUF012
    padding_idx: int | None
    scale_grad_by_freq: bool

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """options: those of from_embedding."""
        self._wrap(nn.Embedding(num_embeddings, embedding_dim, device=device, dtype=dtype), **options)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **options: Any) -> LoRAEmbedding:
        """An adapter around embedding, whose weight is shared and frozen. options: r, lora_alpha, lora_dropout,
        use_rslora, use_dora, init_lora_weights and adapter_dtype, as for LoRALinear. Raises TypeError for an embedding
        that does more than look up and scale, or changes its weight (max_norm), or has sparse gradients."""
        self = cls.__new__(cls)
        self._wrap(embedding, **options)
        return self

    def _wrap(
        self,
        embedding: nn.Embedding,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> None:
        check_lora(r, lora_alpha, lora_dropout, init_lora_weights)
        check_is_embedding(embedding)
        AdaptedLinear.__init__(self, embedding.num_embeddings, embedding.embedding_dim)
        self._hold(embedding.weight)
        self.bias = None
        self.padding_idx, self.scale_grad_by_freq = embedding.padding_idx, embedding.scale_grad_by_freq
        self._shell = _without_tensors(embedding)
        scale = getattr(embedding, "embed_scale", None)
        if isinstance(scale, Tensor):
            self.register_buffer("embed_scale", scale, persistent=False)
        else:
            self.embed_scale = scale
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype, use_dora)

    @classmethod
    def from_linear(cls, *args: Any, **kwargs: Any) -> LoRALinear:
        raise TypeError("LoRAEmbedding.from_linear: expected from_embedding")

    # Under their names in LoRALinear, whose code they go through.
    @property
    def lora_A(self) -> Tensor:
        return self.lora_embedding_A

    @property
    def lora_B(self) -> Tensor:
        return self.lora_embedding_B

    def _new_factors(self, **like: Any) -> None:
        self.lora_embedding_A = nn.Parameter(torch.empty(self.r, self.in_features, **like))
        self.lora_embedding_B = nn.Parameter(torch.empty(self.out_features, self.r, **like))

    @torch.no_grad()
    def _reset_factors(self, init_lora_weights: bool | str) -> None:
        """A zero and B ~ N(0, 1), whatever the start of the linear layers is; False: both random."""
        self.lora_embedding_A.zero_() if init_lora_weights else self.lora_embedding_A.normal_()
        self.lora_embedding_B.normal_()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
        return {name: self._parameters[name] for name in names if self._parameters.get(name) is not None}

    @property
    def num_embeddings(self) -> int:
        return self.in_features

    @property
    def embedding_dim(self) -> int:
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: integers [...] -> [..., embedding_dim], in the dtype of the weight."""
        y = self._look_up(x, self.weight)
        dtype = y.dtype
        if not self.merged:
            y = y + self.scaling * (self._look_up(x, self.lora_embedding_A.t()) @ self.lora_embedding_B.t())
            if self.use_dora:
                y = out_scale(self) * y
        if self.embed_scale is not None:
            # a tensor in the dtype of the weight, as the class itself rounds it
            y = y * (self.embed_scale.to(dtype) if isinstance(self.embed_scale, Tensor) else self.embed_scale)
        return y.to(dtype)

    def _look_up(self, x: Tensor, table: Tensor) -> Tensor:
        return F.embedding(x, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def plain(self) -> nn.Embedding:
        """The embedding without its adapter, of the class it had; the weight is shared."""
        embedding = _without_tensors(self._shell)
        embedding.weight = self.weight
        embedding._buffers.update(self._buffers)
        return embedding.train(self.training)


def check_is_embedding(embedding: nn.Module) -> None:
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"embedding: expected an nn.Embedding, got {type(embedding).__name__}")
    kind = type(embedding)
    scale = getattr(embedding, "embed_scale", None)
    scales = isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.numel() == 1)
    if kind.forward is not nn.Embedding.forward and not scales:
        raise TypeError(f"embedding: expected an nn.Embedding, got {kind.__name__}, which has a forward of its own")
    if embedding.max_norm is not None or embedding.sparse:
        raise TypeError("embedding: expected max_norm=None and sparse=False, so that its weight stays as it is")
    refuse_hooks("embedding", embedding, "nn.Embedding")


def _without_tensors(module: nn.Module) -> nn.Module:
    """A shallow copy that holds no parameter and no buffer: the class and its options."""
    shell = copy.copy(module)
    shell._parameters, shell._buffers = {}, {}
    return shell
