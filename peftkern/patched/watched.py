# SPDX-License-Identifier: Apache-2.0
"""Does calling a module run nothing but its class's forward?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watched:
    """Asked in each call for 25 modules of a layer with 8 adapters, whose dictionaries have left the caches since the
    last one. So of each only the length is looked at: hooks are registered in dictionaries that stay, and an instance's
    own forward makes its own longer."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.own = [module.__dict__ for module in modules]
        self.hooks = [own[name] for own in self.own for name in _HOOKS]
        self.lengths: list[int] = []
        self.plain = False

    def undisturbed(self) -> bool:
        if any(self.hooks):
            return False
        lengths = list(map(len, self.own))
        if lengths != self.lengths:
            self.plain = not any("forward" in own for own in self.own)
            if not torch.compiler.is_compiling():
                self.lengths = lengths
        return self.plain
