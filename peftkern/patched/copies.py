# SPDX-License-Identifier: Apache-2.0
"""How what was patched is copied and saved."""

from __future__ import annotations

import copy
import copyreg
from typing import Any, ClassVar

CACHES = (  # attributes that are never copied or saved
    "_peftkern_plan", "_peftkern_cache", "_peftkern_bank", "_peftkern_mixture",
    "_peftkern_batch", "_peftkern_layers", "_peftkern_triplets",
    "_peftkern_state", "_peftkern_keep",
)  # fmt: skip


class Patched:
    """Copying keeps the patched class, pickling stores PEFT's: the file loads where peftkern is not installed."""

    _peftkern_class: ClassVar[type]

    def __reduce_ex__(self, protocol):
        # not copyreg.__newobj__, which insists on the object's own class
        return copyreg._reconstructor, (self._peftkern_class, object, None), self._plain_state()

    def __copy__(self):
        new = type(self).__new__(type(self))
        _set_state(new, self._plain_state())
        return new

    def _plain_state(self) -> dict[str, Any]:
        """The state as PEFT's class would have it."""
        return {name: value for name, value in self.__dict__.items() if name not in CACHES}


def _deepcopy(old: Patched, memo: dict) -> Patched:
    new = memo[id(old)] = type(old).__new__(type(old))
    _set_state(new, copy.deepcopy(old._plain_state(), memo))
    return new


def _set_state(new: Any, state: dict[str, Any]) -> None:
    if hasattr(new, "__setstate__"):
        new.__setstate__(state)
    else:
        new.__dict__.update(state)


def keep_class_in_deep_copies(classes: list[type]) -> None:
    """Not by a method __deepcopy__: PeftModel looks names up in the LoraModel inside it, and would be copied by that
    one's."""
    copy._deepcopy_dispatch |= dict.fromkeys(classes, _deepcopy)
