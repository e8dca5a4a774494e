# SPDX-License-Identifier: Apache-2.0
"""What is timed: ops at the layer shapes of real models, and sweeps over one size at a time."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace

LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "SmolLM2-135M": {"q_proj": (576, 576), "k_proj": (576, 192), "up_proj": (576, 1536), "down_proj": (1536, 576)},
    "Llama-3.2-1B": {"q_proj": (2048, 2048), "k_proj": (2048, 512), "up_proj": (2048, 8192), "down_proj": (8192, 2048)},
    "Llama-3-8B": {
        "q_proj": (4096, 4096),
        "k_proj": (4096, 1024),
        "up_proj": (4096, 14336),
        "down_proj": (14336, 4096),
    },
    "Qwen2.5-7B": {"q_proj": (3584, 3584), "k_proj": (3584, 512), "up_proj": (3584, 18944), "down_proj": (18944, 3584)},
}
"""(in_features, out_features) of the linear layers, from the models' published configurations."""

WEIGHT_OPS = ("quantize", "dequantize", "nf4_forward", "nf4_dx", "row_norms", "nf4_row_norms")
ADAPTER_OPS = ("lora", "qlora", "multi_lora", "dora_norm")
ALLOCATION_OPS = ("importance", "budget_mask", "masked_ranks", "orthogonality")
OPS = (*WEIGHT_OPS, *ADAPTER_OPS, *ALLOCATION_OPS, "svd")


@dataclass(frozen=True)
class Case:
    """One line of the table. rows: M, the tokens; r and dropout: of the ops with an adapter; layers: so many after each
    other, or in one call; threads: 0 for torch's choice; device: of torch; sweep: the size this case belongs to a sweep
    of, if any."""

    op: str
    model: str
    layer: str
    in_features: int
    out_features: int
    rows: int = 0
    dtype: str = "bfloat16"
    r: int = 16
    dropout: float = 0.05
    block_size: int = 64
    layers: int = 1
    threads: int = 0
    sweep: str = ""
    device: str = "cpu"

    @property
    def name(self) -> str:
        words = [
            self.op,
            f"{self.in_features}x{self.out_features}",
            self.dtype.replace("float", "fp").replace("bfp", "bf"),
        ]
        if self.rows:
            words.insert(1, f"M={self.rows}")
        if self.op not in WEIGHT_OPS:
            words.append(f"r={self.r}")
        if self.layers > 1:
            words.append(f"layers={self.layers}")
        if self.threads:
            words.append(f"threads={self.threads}")
        return " ".join(words)


def _at(op: str, model: str, layer: str, **sizes) -> Case:
    return Case(op, model, layer, *LAYERS[model][layer], **sizes)


def targets() -> list[Case]:
    """The cases with a stated target (docs/performance.md)."""
    square = {"model": "Llama-3-8B", "layer": "q_proj"}
    found = [_at("dequantize", **square), _at("quantize", **square, dtype="float32")]
    found += [_at("nf4_forward", **square, rows=m) for m in (1, 4, 16, 64, 512)]
    found += [_at("nf4_dx", **square, rows=512)]
    found += [_at(op, **square, rows=512, dtype="float32") for op in ("nf4_forward", "nf4_dx")]
    for dtype in ("bfloat16", "float32"):
        found.append(_at("lora", "SmolLM2-135M", "up_proj", rows=512, dtype=dtype))
        found.append(_at("lora", "Llama-3.2-1B", "q_proj", rows=512, dtype=dtype))
        found.append(_at("lora", **square, rows=1024, dtype=dtype))
    return found


def single_ops() -> list[Case]:
    """Every op, on a layer of an 8B model; AdaLoRA's, and the SVD of compress(), on 210 layers in one call."""
    square = {"model": "Llama-3-8B", "layer": "q_proj"}
    adapters = {"model": "SmolLM2-135M", "layer": "up_proj", "layers": 210}
    found = [_at("dequantize", **square), _at("quantize", **square, dtype="float32")]
    found += [_at("nf4_forward", **square, rows=m) for m in (1, 512)]
    found += [_at(op, **square, rows=512) for op in ("nf4_dx", "qlora", "multi_lora")]
    found += [_at("lora", **square, rows=1024)]
    found += [_at(op, **square) for op in ("row_norms", "nf4_row_norms", "dora_norm")]
    found += [_at(op, **adapters, r=12, dtype="float32") for op in ALLOCATION_OPS]
    return [*found, _at("svd", **adapters, dtype="float64")]


def quick() -> list[Case]:
    """A minute: small cases of a layer with a weight."""
    found = [_at("dequantize", "SmolLM2-135M", "up_proj"), _at("quantize", "SmolLM2-135M", "up_proj", dtype="float32")]
    found += [_at(op, "SmolLM2-135M", "up_proj", rows=m) for op in ("nf4_forward",) for m in (1, 64)]
    found += [_at(op, "SmolLM2-135M", "up_proj", rows=64) for op in ("nf4_dx", "lora", "qlora")]
    return found


def sweeps() -> list[Case]:
    """Growth in one size at a time: M, r, threads, layers."""
    base = _at("lora", "Llama-3.2-1B", "q_proj", rows=512)
    decode = _at("nf4_forward", "Llama-3-8B", "q_proj", rows=1)
    found = [replace(base, rows=m, sweep="M") for m in (128, 256, 512, 1024, 2048)]
    found += [replace(decode, rows=m, sweep="M") for m in (1, 4, 16, 64, 256)]
    found += [replace(base, r=r, sweep="r") for r in (8, 16, 32, 64, 128, 256)]
    for case in (
        base,
        decode,
        replace(base, op="qlora"),
        replace(decode, rows=512),
        _at("dequantize", "Llama-3-8B", "q_proj"),
    ):
        found += [replace(case, threads=t, sweep="threads") for t in (1, 2)]
    found += [replace(base, rows=256, layers=n, sweep="layers") for n in (1, 2, 4, 8)]
    return found


def models() -> list[Case]:
    """Every op at every layer shape of every model."""
    found = []
    for model, layers in LAYERS.items():
        for layer in layers:
            found += [_at("dequantize", model, layer), _at("quantize", model, layer, dtype="float32")]
            found += [_at("nf4_forward", model, layer, rows=m) for m in (1, 512)]
            found += [_at(op, model, layer, rows=512) for op in ("nf4_dx", "lora", "qlora")]
    return found


SUITES = {"quick": quick, "targets": targets, "ops": single_ops, "sweeps": sweeps, "models": models}


def select(suites: Iterable[str], pattern: str = "*") -> list[Case]:
    """The cases of the suites, each once, whose name or model matches a shell pattern."""
    found = dict.fromkeys(case for suite in suites for case in SUITES[suite]())
    return [c for c in found if fnmatch.fnmatch(c.name, pattern) or fnmatch.fnmatch(f"{c.model} {c.layer}", pattern)]
