# SPDX-License-Identifier: Apache-2.0
"""Where other libraries' entry points lead to ours. Importing this imports none of them."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from ..ops import NF4Config
from .bnb import BnbCheckpoint, convert_bnb, load_bnb

__all__ = ["convert_bnb", "load_bnb"]

_REGISTRY = "transformers.quantizers.auto"
_OLDEST = (5, 23)  # transformers that casts a checkpoint tensor to the dtype asked for, not to that of packed weights


def _register(registry: ModuleType) -> None:
    """Two entries in the tables by which transformers chooses a quantizer."""
    for config, quantizer in ((NF4Config, _nf4_quantizer), (BnbCheckpoint, _bnb_quantizer)):
        registry.AUTO_QUANTIZATION_CONFIG_MAPPING[config.quant_method] = config
        registry.AUTO_QUANTIZER_MAPPING[config.quant_method] = quantizer


def _check_transformers() -> None:
    """Raises ImportError for a transformers that loads in another way."""
    version = sys.modules["transformers"].__version__
    if tuple(int(n) for n in version.split(".")[:2]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ImportError(f"transformers: expected version {oldest} or later to load NF4 weights, got {version}")


def _nf4_quantizer(config: NF4Config, **kwargs: Any) -> Any:
    _check_transformers()
    from .transformers import NF4Quantizer

    return NF4Quantizer(config, **kwargs)


def _bnb_quantizer(config: NF4Config, **kwargs: Any) -> Any:
    _check_transformers()
    from .transformers import BnbQuantizer

    return BnbQuantizer(config, **kwargs)


class _RegisterOnImport(MetaPathFinder):
    """Registers when transformers imports its tables, in whichever order the user imports the two packages."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _REGISTRY:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            exec_module = spec.loader.exec_module

            def exec_and_register(module: ModuleType) -> None:
                exec_module(module)
                _register(module)

            spec.loader.exec_module = exec_and_register  # type: ignore[method-assign]
        return spec


if _REGISTRY in sys.modules:
    _register(sys.modules[_REGISTRY])
else:
    sys.meta_path.insert(0, _RegisterOnImport())
