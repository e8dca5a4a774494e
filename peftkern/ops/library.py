# SPDX-License-Identifier: Apache-2.0
"""Loads the extension, which registers ``torch.ops.peftkern``, once for all ops."""

import torch

try:
    from .. import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "peftkern: the compiled extension peftkern/_C.abi3.so is missing or does not load. Build it with "
        "`pip install . --no-build-isolation` or `make build`, and run from an installed copy or the built checkout. "
        f"The loader said: {error}"
    ) from error

ops = torch.ops.peftkern

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
