# SPDX-License-Identifier: Apache-2.0
"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored [in, out]. Its adapted layer is any other's with
``fan_in_fan_out``. Nothing here imports transformers before there is such a layer."""

from __future__ import annotations

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def new_conv1d(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """A Conv1D with these parameters, weight [in, out]."""
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D.__new__(Conv1D)
    nn.Module.__init__(conv)
    conv.nx, conv.nf = weight.shape
    conv.weight, conv.bias = weight, bias
    return conv
