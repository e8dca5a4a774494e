# SPDX-License-Identifier: Apache-2.0
import torch

from .adapted_linear import adapted_linear
from .nf4 import NF4Weight, dequantize_nf4


def dora_norm(weight, A, B, scaling, cache=None):
    with torch.no_grad():
        w = dequantize_nf4(weight, torch.float32) if isinstance(weight, NF4Weight) else weight.float()
        return (w + scaling * (B.float() @ A.float())).norm(dim=1)


def dora_linear(x, weight, A, B, out_scale, *, scaling, bias, dropout):
    if dropout is None:
        return adapted_linear(x, weight, A, B, out_scale=out_scale, bias=bias, scaling=scaling)
    d = dropout(x)
    return adapted_linear(d, weight, A, B, out_scale=out_scale, scaling=scaling) + adapted_linear(
        x - d, weight, bias=bias
    )
