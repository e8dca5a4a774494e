# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import NF4Config, quantize_nf4
from .adapted import AdaptedLinear
from .base_weight import parameter_of
from .dora import adapted_norm, dora_delta, out_scale, start_magnitude
from .starts import STARTS, decompose, is_decomposition, is_start, orthogonal_factors

Quantize = str | NF4Config | None


def quantize_config(quantize: Quantize) -> NF4Config | None:
    """None, "nf4" or an NF4Config as the user gives it."""
    if isinstance(quantize, NF4Config) and quantize.modules_to_not_convert:
        raise ValueError(
            "quantize: expected an NF4Config without modules_to_not_convert, which is for from_pretrained; here the "
            "layers that get an adapter are quantized"
        )
    if quantize is None or isinstance(quantize, NF4Config):
        return quantize
    if quantize == "nf4":
        return NF4Config()
    raise ValueError(f'quantize: expected None, "nf4" or an NF4Config, got {quantize!r}')


def check_lora(
    r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str, r_name: str = "r"
) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"{r_name}: expected an int >= 1, got {r!r}")
    if not isinstance(lora_alpha, Real) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha: expected a finite number, got {lora_alpha!r}")
    if not isinstance(lora_dropout, Real) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout: expected 0 <= p < 1, got {lora_dropout!r}")
    if not is_start(init_lora_weights):
        raise ValueError(f"init_lora_weights: expected one of {STARTS}, got {init_lora_weights!r}")
    if init_lora_weights == "orthogonal" and r % 2:
        raise ValueError(f'{r_name}: expected an even rank for init_lora_weights="orthogonal", got {r}')


class LoRALinear(AdaptedLinear):
    """A frozen linear layer plus a trainable low-rank update (LoRA, Hu et al. 2021, arXiv 2106.09685, section 4.1):
    ``y = x W^T + scaling * (drop(x) A^T) B^T + bias``, scaling = lora_alpha / r, or / sqrt(r) with use_rslora.

    weight: [out_features, in_features], frozen; lora_A: [r, in_features]; lora_B: [out_features, r]; bias, frozen.
    dtype: of weight and bias; adapter_dtype: of lora_A and lora_B, float32 by default, as HF PEFT keeps them.
    init_lora_weights: True: A Kaiming-uniform, B zero; "gaussian": A ~ N(0, 1 / r^2), B zero; False: both random;
        "orthogonal", "pissa", "pissa_niter_<n>", "olora": modules/starts.py. The last three take scaling * B A out of
        the weight, which is then a copy.
    use_dora: DoRA, with ``lora_magnitude_vector`` [out_features], which trains too (modules/dora.py).
    Raises ValueError naming the argument for sizes or ranks < 1, or a dropout outside [0, 1).

    >>> layer = LoRALinear(64, 32, r=4)
    >>> layer(torch.randn(8, 64)).shape, sum(p.numel() for p in layer.parameters() if p.requires_grad)
    (torch.Size([8, 32]), 384)
    """

    file_suffixes: ClassVar[dict[str, str]] = {"lora_A": ".weight", "lora_B": ".weight"}
    quantized_base: ClassVar[NF4Config | None] = None  # how from_linear quantizes a dense weight if it is not told

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> None:
        check_lora(r, lora_alpha, lora_dropout, init_lora_weights)
        self._start_base(in_features, out_features, bias, device, dtype)
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype, use_dora)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        quantize: Quantize = None,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        use_dora: bool = False,
    ) -> LoRALinear:
        """An adapter around linear, an nn.Linear, an NF4Linear or transformers' Conv1D, whose weight and bias are
        shared and frozen.

        quantize: "nf4" or an NF4Config to quantize a dense weight first; the original is then not kept.
        """
        check_lora(r, lora_alpha, lora_dropout, init_lora_weights)
        config = quantize_config(quantize)
        if not is_decomposition(init_lora_weights):
            self = cls._around(linear, config, cls.quantized_base)
            config = None
        else:  # what is left of the dense weight is quantized
            self = cls._around(linear, None)
            config = config or cls.quantized_base
        self._add_adapter(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype, use_dora, config)
        return self

    def _add_adapter(
        self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, init_lora_weights: bool | str,
        adapter_dtype: torch.dtype | None, use_dora: bool = False, quantize: NF4Config | None = None,
    ) -> None:  # fmt: skip
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        like = {"device": self.weight.device, "dtype": adapter_dtype or torch.float32}
        self._new_factors(**like)
        self.reset_adapter(init_lora_weights)
        if quantize is not None:
            self.set_base_weight(quantize_nf4(self.base_weight(), quantize.block_size, quantize.double_quant))
        self.use_dora = use_dora
        if use_dora:
            start_magnitude(self)

    @torch.no_grad()
    def reset_adapter(self, init_lora_weights: bool | str = True) -> None:
        """Draws lora_A anew and zeroes lora_B (False: draws both; a start that decomposes the weight: from that)."""
        self._reset_factors(init_lora_weights)
        if self.use_dora:
            self.lora_magnitude_vector.copy_(adapted_norm(self))

    def _new_factors(self, **like: Any) -> None:
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.r, **like))

    def _reset_factors(self, init_lora_weights: bool | str) -> None:
        if is_decomposition(init_lora_weights):
            self._decompose_base(init_lora_weights)
        elif init_lora_weights == "orthogonal":
            A, B = orthogonal_factors(self.r, self.in_features, self.out_features)
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        elif init_lora_weights == "gaussian":
            self.lora_A.normal_(std=1.0 / self.r)
            self.lora_B.zero_()
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            self.lora_B.zero_() if init_lora_weights else nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def _decompose_base(self, start: str) -> None:
        weight = self.base_weight()
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"init_lora_weights: expected a dense weight to decompose for {start!r}, got an NF4 one; "
                "quantize= quantizes what is left of a dense one"
            )
        A, B = decompose(weight.float(), self.r, self.scaling, start)
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        self.set_base_weight((weight.float() - self.low_rank_weight()).to(weight.dtype))

    def terms(self) -> dict[str, Any]:
        A, B = parameter_of(self, "lora_A"), parameter_of(self, "lora_B")
        terms = {"A": A, "B": B, "scaling": self.scaling, "dropout_p": self.lora_dropout}
        if self.use_dora:  # training with dropout is not one call: modules/dora.py
            terms["out_scale"] = out_scale(self)
        return terms

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        delta = self.low_rank_weight()
        return dora_delta(self, self.dense_weight(), delta) if self.use_dora else delta

    @torch.no_grad()
    def low_rank_weight(self) -> Tensor:
        """scaling * B A, float32 [out_features, in_features]: with DoRA not all that the adapter changes."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    def extra_repr(self) -> str:
        dora = ", use_dora=True" if self.use_dora else ""
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}{dora}"
        )


class QLoRALinear(LoRALinear):
    """LoRALinear over an NF4 base (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, equation 5).

    quantize: an NF4Config, or "nf4" (default: block_size 64 with double quantization, as in the paper). The other
    arguments, and those of from_linear, are LoRALinear's.

    >>> QLoRALinear(64, 32, r=4)(torch.randn(8, 64)).shape
    torch.Size([8, 32])
    """

    quantized_base = NF4Config(64, double_quant=True)

    def __init__(self, *args: Any, quantize: Quantize = None, **kwargs: Any) -> None:
        config = quantize_config(quantize) or self.quantized_base
        super().__init__(*args, **kwargs)
        self.set_base_weight(quantize_nf4(self.weight, config.block_size, config.double_quant))
        if self.use_dora:
            start_magnitude(self)  # of the quantized weight
