# SPDX-License-Identifier: Apache-2.0
"""The expert weights of a mixture-of-experts layer in NF4.

transformers keeps all experts of a layer in one module, with parameters ``gate_up_proj`` (or ``up_proj``) and
``down_proj`` of shape [experts, out, in], or [experts, in, out] if ``is_transposed``. In NF4 each expert is quantized
on its own, always as [out, in], and the same names hold uint8 [experts, out, in / 2] (flat if in is odd), next to
``{name}_absmax``, ``{name}_nested_absmax`` and ``{name}_absmax_offset``: bytes, as in modules/base_weight.py, with one
row an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops import NF4Config, NF4Weight, nf4_linear, quantize_nf4
from .base_weight import bytes_of, floats_of

ENDINGS = ("", "_absmax", "_nested_absmax", "_absmax_offset")


class Stack(NamedTuple):
    """How the experts of one parameter are held; ``module.nf4_experts`` maps its name to this."""

    config: NF4Config
    experts: int
    shape: tuple[int, int]  # [out, in] of each
    dtype: torch.dtype


def is_experts(module: nn.Module) -> bool:
    """Is this an experts module of the shape that ``nf4_experts_forward`` computes?"""
    marks = ("has_gate", "has_bias", "is_transposed", "num_experts")
    return all(hasattr(module, mark) for mark in marks) and all(hasattr(module, name) for name in weight_names(module))


def weight_names(experts: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


@torch.no_grad()
def quantize_stack(w: Tensor, config: NF4Config, transposed: bool) -> dict[str, Tensor]:
    """w, [experts, out, in] or transposed, as the tensors that hold it, by the ending of their name."""
    parts: dict[str, list[Tensor]] = {}
    for expert in w:
        q = quantize_nf4(expert.T if transposed else expert, config.block_size, config.double_quant)
        for ending, part in zip(ENDINGS, (q.packed, q.absmax, q.nested_absmax, q.offset), strict=True):
            if part is not None:
                parts.setdefault(ending, []).append(bytes_of(part) if ending else part)
    return {ending: torch.stack(rows) for ending, rows in parts.items()}


def quantize_experts(experts: nn.Module, config: NF4Config) -> None:
    """Turns the weights of an experts module to NF4, in place; a meta module becomes one to load NF4 into."""
    stacks = {}
    for name in weight_names(experts):
        w = getattr(experts, name)
        tensors = quantize_stack(w, config, experts.is_transposed)
        out_features, in_features = (w.shape[2], w.shape[1]) if experts.is_transposed else w.shape[1:]
        stacks[name] = Stack(config, w.shape[0], (out_features, in_features), w.dtype)
        for ending, tensor in tensors.items():
            experts.register_parameter(name + ending, nn.Parameter(tensor, requires_grad=False))
    experts.nf4_experts = stacks


def stack_bytes(experts: nn.Module, name: str) -> int:
    """Every byte that a stack takes."""
    return sum(getattr(experts, name + ending).nbytes for ending in ENDINGS if hasattr(experts, name + ending))


def expert_weight(experts: nn.Module, name: str, expert: int) -> NF4Weight:
    """The weight of one expert; shares storage."""
    stack: Stack = experts.nf4_experts[name]
    packed, absmax = getattr(experts, name)[expert], getattr(experts, f"{name}_absmax")[expert]
    if not stack.config.double_quant:
        return NF4Weight(packed, floats_of(absmax), stack.config.block_size, stack.shape, stack.dtype)
    nested = floats_of(getattr(experts, f"{name}_nested_absmax")[expert])
    offset = floats_of(getattr(experts, f"{name}_absmax_offset")[expert])
    return NF4Weight(packed, absmax, stack.config.block_size, stack.shape, stack.dtype, nested, offset)


def nf4_experts_forward(experts: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts of a layer add up to: x, [tokens, hidden]; top_k_index and top_k_weights, [tokens, k].

    One expert after the other, so that the dense copies of two weights exist at a time, in the backward pass too. The
    k results of a token are added in the order of top_k_index. An index beyond the experts (expert parallelism marks
    with it what another device computes) counts as zero.
    """
    if hasattr(experts, "parametrizations"):  # which would add a dense update to packed bytes
        raise RuntimeError(
            f"{type(experts).__name__}: expected experts in NF4 without a parametrization, got one (HF PEFT's "
            "target_parameters?); leave them dense with modules_to_not_convert to train adapters on them"
        )
    up, down = weight_names(experts)
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    count = experts.nf4_experts[up].experts
    rows = torch.bincount(flat, minlength=count)[:count].tolist()
    chunks = x[order[: sum(rows)] // top_k_index.shape[-1]].split(rows)
    results = []
    for expert, chunk in enumerate(chunks):
        if chunk.shape[0]:
            y = nf4_linear(chunk, expert_weight(experts, up, expert), _bias(experts, up, expert))
            y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
            y = nf4_linear(y, expert_weight(experts, down, expert), _bias(experts, down, expert))
            results.append(experts.post_expert_norm(y) if getattr(experts, "has_post_expert_norm", False) else y)
    weights = top_k_weights.reshape(-1)[order[: sum(rows)], None]
    weighted = torch.cat(results) * weights if results else x.new_zeros(0, x.shape[-1])
    placed = weighted.new_zeros(flat.shape[0], x.shape[-1]).index_copy(0, order[: sum(rows)], weighted)
    return placed.view(*top_k_index.shape, x.shape[-1]).sum(dim=1).to(x.dtype)


def _bias(experts: nn.Module, name: str, expert: int) -> Tensor | None:
    return getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
