# SPDX-License-Identifier: Apache-2.0
"""The triplets of AdaLoRA layers that FSDP2 has sharded.

A process has some rows of A, E and B: of A and E whole triplets, of B a part of every column. It updates the averages
of its rows, which stay sharded like the parameters, and scores what it has:

    [triplet j is ours] (s(E[j]) + mean of s over row j of A) + (our rows / all rows) (mean of s over our column j of B)

The sum of that over all processes is the score, and all that is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops import mask_ranks, update_importance
from .ops.rank_allocation import state_layout


def is_sharded(t: Tensor) -> bool:
    """A DTensor? Without importing torch.distributed.tensor, which takes longer than all of peftkern."""
    return hasattr(t, "full_tensor")


class ShardedTriplets:
    """A, E, B: DTensors of every layer, sharded on axis 0 by one mesh, as fully_shard does; replicas may be beside."""

    def __init__(self, A: Sequence[Any], E: Sequence[Any], B: Sequence[Any]) -> None:
        self._parameters = [*A, *E, *B]
        first = E[0]
        alike = all(
            is_sharded(p) and p.placements == first.placements and p.device_mesh == first.device_mesh
            for p in (first, *self._parameters)
        )
        axes = [i for i, placement in enumerate(first.placements) if not placement.is_replicate()] if alike else []
        if len(axes) != 1 or not first.placements[axes[0]].is_shard(0):
            raise ValueError("model: expected every adapter sharded on axis 0 by one mesh, as FSDP2's fully_shard does")
        self._group = first.device_mesh.get_group(axes[0])
        own: list[Tensor] = []
        at = 0
        for e in E:
            start = min(dist.get_rank(self._group) * -(-len(e) // dist.get_world_size(self._group)), len(e))
            own.append(torch.arange(at + start, at + start + len(e.to_local())))
            at += len(e)
        self._triplets, self._own = at, torch.cat(own).to(first.to_local().device)
        parts = torch.tensor([len(b.to_local()) / len(b) for b in B for _ in range(b.shape[1])])
        self._part_of_B = parts.to(self._own.device)
        rows = [(len(a.to_local()), a.shape[1], 0) for a in A]
        columns = [(b.shape[1], 0, len(b.to_local())) for b in B]
        _, self.state_size = state_layout(rows + columns)  # a layer of A and E alone, and one of B alone, of each

    @torch.no_grad()
    def update(
        self, sensitivity: Tensor, uncertainty: Tensor, beta1: float, beta2: float, grad_scale: Tensor | None
    ) -> Tensor:
        """update_importance of all layers: the averages of what this process has, and the scores of all triplets."""
        local = [_local(p) for p in self._parameters]
        n = len(local) // 3
        A, E, B = local[:n], local[n : 2 * n], local[2 * n :]
        no_A = [b.new_empty(b.shape[1], 0) for b in B]
        no_E = [b.new_zeros(b.shape[1], 1) for b in B]
        no_B = [a.new_empty(0, a.shape[0]) for a in A]
        parts = update_importance(A + no_A, E + no_E, no_B + B, sensitivity, uncertainty, beta1, beta2, grad_scale)
        of_rows, of_columns = parts.split([len(self._own), self._triplets])
        scores = (of_columns * self._part_of_B).index_add_(0, self._own, of_rows)
        dist.all_reduce(scores, group=self._group)
        return scores

    def mask(self, keep: Tensor) -> None:
        """Zeroes our part of E where keep, bool [triplets], is False."""
        n = len(self._parameters) // 3
        mask_ranks([e.to_local() for e in self._parameters[n : 2 * n]], keep[self._own])


def _local(p: Any) -> Tensor:
    """This process's rows of a parameter, with those of its gradient."""
    t = p.to_local().detach()
    t.grad = None if p.grad is None else p.grad.to_local()
    return t
