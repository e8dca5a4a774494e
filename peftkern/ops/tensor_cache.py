# SPDX-License-Identifier: Apache-2.0
"""What is computed from tensors that seldom change (a frozen weight, adapters in inference), kept until one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class TensorCache:
    """Values by name. A value is good for a key and for tensors of the same storage and version, the counter that torch
    raises with every change in place."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple, Any, Sequence[Tensor]]] = {}

    def __reduce__(self):
        """A copy, and what is unpickled, starts empty: its tensors are others."""
        return TensorCache, ()

    def get(self, name: str, key: tuple, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """make(), or what it gave before for these tensors and this key. Not kept, so that it is part of the graph,
        where gradients flow through it, nor under torch.compile; inference tensors have no version."""
        if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
            return make()
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return make()
        key += tuple((t.data_ptr(), t._version, t.dtype) for t in tensors)
        entry = self._entries.get(name)
        if entry is None or entry[0] != key:
            # with their memory, so that no other tensor can come to lie there while the entry lives; not with the
            # tensors, since a parameter may be given other data (module.to(dtype))
            entry = self._entries[name] = (key, make(), [t.detach() for t in tensors])
        return entry[1]
