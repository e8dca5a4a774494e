# SPDX-License-Identifier: Apache-2.0
"""What was built, what runs, and which path a call takes."""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable
from importlib import metadata

import torch
from torch import nn

from .autotune import timed_products
from .modules import AdaptedLinear, BaseWeight, LoRAEmbedding
from .ops.adapted_linear import base_arguments
from .ops.library import ops
from .patch import explain_allocator, explain_layer, is_peft_layer

_product_ways = ops.product_ways.default

PEERS = ("transformers", "peft", "bitsandbytes")
MOST_ROWS = 1 << 20  # explain() looks no further


def cpu_isa() -> str:
    """The instruction set the CPU kernels use."""
    return ops.cpu_isa()


def set_cpu_isa(name: str) -> None:
    """Makes the CPU kernels use "scalar", "avx2", "avx512", "avx512bf16" or "amx"; "" chooses the best again.

    The environment variable PEFTKERN_CPU_ISA sets it from the start. Raises ValueError if this machine lacks it.
    """
    if name and name not in ops.cpu_isas():
        raise ValueError(f"name: expected one of {ops.cpu_isas()} or '', got {name!r}")
    ops.set_cpu_isa(name)


def empty_cpu_cache() -> int:
    """Frees the large CPU buffers that dequantized weights leave behind for the next ones; returns their bytes.

    At most 256 MiB are kept, or the last buffer if that alone is larger (csrc/cpu/large_buffers.h)."""
    return ops.empty_cpu_cache()


def info() -> dict[str, str]:
    """Versions, what was compiled, what this machine runs: the lines of ``peftkern info``."""
    from . import __version__

    archs = ops.cuda_archs()
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    report = {
        "peftkern": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu isa": f"{cpu_isa()} (this machine can run {', '.join(ops.cpu_isas())})",
        "cpu threads": str(torch.get_num_threads()),
        "cuda kernels": f"compiled for {archs}"
        if archs
        else "not compiled in (no nvcc at build time, or PEFTKERN_CUDA=0)",
        "gpu": ", ".join(gpus) or "none",
    }
    return report | {name: _version(name) for name in PEERS}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def explain(module: nn.Module) -> str:
    """Which path a call of module takes and why: a line for each way its layers work, with how many and one example; HF
    PEFT's layers included, patched or not. The ways to make the products with a weight, and up to how many rows each is
    taken on the weight's device, go by the names and the rules of csrc/products.h.

    >>> from peftkern import LoRALinear
    >>> print(explain(LoRALinear(64, 32)))  # doctest: +ELLIPSIS
    1 LoRALinear: ...
    """
    groups: dict[str, list[str]] = {}
    plain = 0
    inside = None  # the PEFT layer whose inner modules come next: it has spoken for them
    for name, layer in module.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if (text := explain_allocator(layer)) is not None:
            groups.setdefault(text, []).append(name)
        if is_peft_layer(layer):
            groups.setdefault(explain_layer(layer), []).append(name)
            inside = f"{name}." if name else ""
        elif isinstance(layer, BaseWeight):
            groups.setdefault(f"{type(layer).__name__}: {_path(layer)}", []).append(name)
        elif hasattr(layer, "nf4_experts"):
            groups.setdefault(f"{type(layer).__name__}: NF4 experts, one after the other as NF4Linear", []).append(name)
        elif isinstance(layer, nn.Linear):
            plain += 1
    lines = []
    for path, names in groups.items():
        example = f" (e.g. {names[0]})" if names[0] else ""
        lines.append(f"{len(names)} {path}{example}")
    if plain:
        lines.append(f"{plain} plain nn.Linear: torch's own path, no kernel of peftkern")
    lines += _timed(module)
    return "\n".join(lines) or "no layer of peftkern and no nn.Linear"


def _timed(module: nn.Module) -> list[str]:
    """What autotune has timed for the shapes of module's layers: the way that is taken, and the others."""
    shapes = {f" {m.in_features}x{m.out_features} " for m in module.modules() if isinstance(m, BaseWeight)}
    lines = []
    for product, timings in timed_products().items():
        if any(shape in product for shape in shapes):
            ways = ", ".join(f"{way} {1e6 * seconds:.1f} us" for way, seconds in timings.items())
            lines.append(f"timed: {product}: {ways}")
    return lines


def _path(layer: BaseWeight) -> str:
    if isinstance(layer, LoRAEmbedding):
        parts = [f"rows of a dense {_name(layer.weight.dtype)} weight looked up by torch"]
        if not layer.merged:
            parts.append(f"rank-{layer.r} rows of the adapter looked up, and multiplied, by torch")
        return "; ".join(parts)
    device = layer.weight.device.type
    runs = device == "cpu" or (device == "cuda" and bool(ops.cuda_archs()))
    if device == "cpu":
        kernels = f"CPU kernels ({cpu_isa()})"
    elif device == "cuda":
        kernels = "CUDA kernels" if runs else "none: CUDA kernels were not compiled in, the call will fail"
    else:
        kernels = f"none: there is no backend for {device}, the call will fail"
    if layer.nf4_config is None:
        base = f"dense {_name(layer.weight.dtype)} weight, cast each call for activations of another dtype"
    else:
        scales = "8-bit absmax" if layer.nf4_config.double_quant else "float32 absmax"
        base = f"NF4 weight (blocks of {layer.nf4_config.block_size}, {scales}), dequantized each call except by nf4_*"
    parts = [kernels, base]
    if runs:
        parts.append(_products(layer))
    if isinstance(layer, AdaptedLinear):
        parts.append(_adapter_path(layer))
    return "; ".join(parts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _products(layer: BaseWeight) -> str:
    """The ways of both products, by the number of rows."""
    terms = layer.terms() if isinstance(layer, AdaptedLinear) and not layer.merged else {}
    adapter = [terms.get(name) for name in ("A", "B", "lam", "out_scale")]
    weight, device = layer.base_weight(), layer.weight.device
    x, grad = (torch.empty(1, n, dtype=weight.dtype, device=device) for n in (layer.in_features, layer.out_features))
    *base, _ = base_arguments(x, weight)

    def ways(rows: int) -> list[str]:
        return _product_ways(x.expand(rows, -1), grad.expand(rows, -1), *base, *adapter)

    forward, gradient = (_by_rows(lambda rows, i=i: ways(rows)[i]) for i in (0, 1))
    return f"{_name(weight.dtype)} activations: " + (
        f"forward and gradient {forward}" if forward == gradient else f"forward {forward}, gradient {gradient}"
    )


def _by_rows(way_of: Callable[[int], str]) -> str:
    """ "a up to 8 rows, then b" of the way for a number of rows; no way comes back after another."""
    found, rows = [], 1
    while rows <= MOST_ROWS:
        way = way_of(rows)
        rows += bisect_left(range(rows, MOST_ROWS + 1), True, key=lambda n, way=way: way_of(n) != way)
        found.append(f"{way} up to {rows - 1} rows" if rows <= MOST_ROWS else way)
    return ", then ".join(found)


def _adapter_path(layer: AdaptedLinear) -> str:
    if layer.merged:
        return "adapter merged into the weight, no low-rank work"
    terms = layer.terms()
    a = terms["A"]
    if a is None:
        return "no low-rank part"
    text = f"fused rank-{a.shape[0]} kernels on {_name(a.dtype)} adapters, float32 sums, no cast pass"
    if terms.get("out_scale") is not None:
        text += "; DoRA: the norms of the adapted rows made each call, without that matrix"
        if terms.get("dropout_p"):
            text += f"; dropout {terms['dropout_p']} of torch's, in two calls" if layer.training else ""
    elif terms.get("dropout_p"):
        text += (
            f"; dropout {terms['dropout_p']} inside them, mask regenerated in backward"
            if layer.training
            else (f"; dropout {terms['dropout_p']} off (eval mode)")
        )
    return text
