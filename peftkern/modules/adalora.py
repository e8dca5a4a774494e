# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import quantize_nf4
from .adapted import AdaptedLinear
from .lora import Quantize, check_lora, quantize_config

WITHOUT_ALLOCATOR = (
    "an AdaLoRALinear trains without a RankAllocator: its rank stays at init_r and no triplet is ever pruned; create "
    "peftkern.RankAllocator(model, optimizer=optimizer), which hooks itself onto optimizer.step()"
)


class AdaLoRALinear(AdaptedLinear):
    """A frozen linear layer plus an update in the form of an SVD, whose rank a RankAllocator decides (AdaLoRA, Zhang et
    al. 2023, arXiv 2303.10512): ``y = x W^T + scaling * ((drop(x) A^T) * E) B^T + bias``.

    lora_A: [r, in_features]; lora_E: [r, 1], the singular values; lora_B: [out_features, r]; triplet j is row j of A,
    E[j] and column j of B. r is the number of triplets now, init_r that at the start.
    scaling = lora_alpha / (init_r + 1e-5), or init_r for lora_alpha where that is not above 0: HF PEFT's rule. It does
    not change with r, so that removing a triplet of E 0 changes nothing.
    init_lora_weights: True: E zero, A and B ~ N(0, 0.02^2); False: all random. The other arguments are LoRALinear's.
    Raises ValueError naming the argument for sizes or ranks < 1, or a dropout outside [0, 1).

    >>> layer = AdaLoRALinear(64, 32, r=4)
    >>> layer.eval()(torch.randn(8, 64)).shape, layer.lora_E.shape
    (torch.Size([8, 32]), torch.Size([4, 1]))
    """

    resizes: ClassVar[int] = 0  # counts changes of the rank of any layer, for a RankAllocator to notice

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 12,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        bias: bool = True,
        quantize: Quantize = None,
        init_lora_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        check_adalora(r, lora_alpha, lora_dropout, init_lora_weights)
        config = quantize_config(quantize)
        self._start_base(in_features, out_features, bias, device, dtype)
        if config is not None:
            self.set_base_weight(quantize_nf4(self.weight, config.block_size, config.double_quant))
        self._add_adapter(r, lora_alpha, lora_dropout, init_lora_weights, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 12,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        quantize: Quantize = None,
        init_lora_weights: bool = True,
        adapter_dtype: torch.dtype | None = None,
    ) -> AdaLoRALinear:
        """An adapter around linear, whose weight (dense, or an NF4Linear's) and bias are shared and frozen.

        quantize: "nf4" or an NF4Config to quantize a dense weight first; the original is then not kept.
        """
        check_adalora(r, lora_alpha, lora_dropout, init_lora_weights)
        self = cls._around(linear, quantize_config(quantize))
        self._add_adapter(r, lora_alpha, lora_dropout, init_lora_weights, adapter_dtype)
        return self

    def _add_adapter(
        self, r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool, adapter_dtype: torch.dtype | None
    ) -> None:
        self.set_scaling(lora_alpha, r)
        self.lora_dropout = lora_dropout
        self.present = [True] * r  # which of the init_r triplets have not been removed
        self.warns_without_allocator = True
        self.version_to_allocate: int | None = None  # of lora_E, where an allocator waits to be called by hand
        like = {"device": self.weight.device, "dtype": adapter_dtype or torch.float32}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **like))
        self.lora_E = nn.Parameter(torch.empty(r, 1, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **like))
        self.reset_adapter(init_lora_weights)

    def set_scaling(self, lora_alpha: float, init_r: int) -> None:
        """The scaling of an adapter that started with init_r triplets."""
        self.lora_alpha, self.init_r = lora_alpha, init_r
        self.scaling = adalora_scaling(lora_alpha, init_r)

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @torch.no_grad()
    def reset_adapter(self, init_lora_weights: bool = True) -> None:
        """Draws lora_A and lora_B anew and zeroes lora_E (False: draws all three from N(0, 1), as HF PEFT)."""
        std = 0.02 if init_lora_weights else 1.0
        self.lora_A.normal_(std=std)
        self.lora_B.normal_(std=std)
        self.lora_E.zero_() if init_lora_weights else self.lora_E.normal_()

    def terms(self) -> dict[str, Any]:
        return {
            "A": self.lora_A, "B": self.lora_B, "lam": self.lora_E.view(-1), "scaling": self.scaling,
            "dropout_p": self.lora_dropout,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features], in x's dtype."""
        if self.training and self.warns_without_allocator and not torch.compiler.is_compiling():
            self._warn_without_allocator()
        return super().forward(x)

    def _warn_without_allocator(self) -> None:
        waits = self.version_to_allocate == self.lora_E._version  # no optimizer has changed E yet
        if torch.is_grad_enabled() and self.lora_E.requires_grad and not self.merged and not waits:
            self.warns_without_allocator = False
            warnings.warn(WITHOUT_ALLOCATOR, UserWarning, stacklevel=1)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        return self.scaling * (self.lora_B.float() @ (self.lora_A.float() * self.lora_E.float()))

    @torch.no_grad()
    def keep_triplets(self, keep: Tensor) -> Tensor:
        """Removes the triplets for which keep, bool [r], is False from the parameters and their gradients, which stay
        the same objects; returns the indices of those that stay."""
        if keep.dtype != torch.bool or tuple(keep.shape) != (self.r,):
            raise ValueError(f"keep: expected bool of shape [{self.r}], got {keep.dtype} of shape {list(keep.shape)}")
        AdaLoRALinear.resizes += 1
        kept = iter(keep.tolist())
        self.present = [was and next(kept) for was in self.present]
        index = keep.nonzero().view(-1).to(self.lora_A.device)
        for name, p in self.adapter_parameters().items():
            grad = p.grad
            _set_data(p, p.data.index_select(rank_axis(name), index))
            if grad is not None:
                p.grad = grad.index_select(rank_axis(name), index)
        return index

    @torch.no_grad()
    def resize(self, present: list[bool]) -> None:
        """Makes room for the triplets of an adapter that started with len(present): the parameters, which stay the same
        objects, become uninitialised ones of that size. For loading."""
        AdaLoRALinear.resizes += 1
        self.present = list(present)
        r = sum(present)
        for name, p in self.adapter_parameters().items():
            shape = [r if axis == rank_axis(name) else size for axis, size in enumerate(p.shape)]
            _set_data(p, p.data.new_empty(shape))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Takes any rank up to init_r, since pruning changes it."""
        r = self.r
        A, E, B = (state_dict.get(f"{prefix}{name}") for name in self.adapter_parameters())
        fits = A is not None and E is not None and B is not None and A.dim() == E.dim() == B.dim() == 2
        if fits and A.shape[0] == E.shape[0] == B.shape[1] != r and A.shape[0] <= self.init_r:
            self.resize([i < A.shape[0] for i in range(self.init_r)])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        rank = f"r={self.r}" if self.r == self.init_r else f"r={self.r} of {self.init_r}"
        return f"{super().extra_repr()}, {rank}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"


def _set_data(p: nn.Parameter, data: Tensor) -> None:
    """Gives a parameter data of another shape, without a gradient.

    As long as a loss of an earlier step is alive, so is the node that accumulates the parameter's gradient, and it
    knows the old shape. torch makes a new one only if the dtype changes, hence the detour.
    """
    p.grad = None
    p.data = data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32)
    p.data = data


def rank_axis(name: str) -> int:
    """The axis of a parameter of AdaLoRALinear that counts its triplets."""
    return 1 if name == "lora_B" else 0


def adalora_scaling(lora_alpha: float, init_r: int) -> float:
    return (lora_alpha if lora_alpha > 0 else float(init_r)) / (init_r + 1e-5)


def check_adalora(r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool, r_name: str = "r") -> None:
    check_lora(r, lora_alpha, lora_dropout, init_lora_weights, r_name)
    if not isinstance(init_lora_weights, bool):
        raise ValueError(f"init_lora_weights: expected True or False, got {init_lora_weights!r}")
