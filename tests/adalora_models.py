# SPDX-License-Identifier: Apache-2.0
"""Small AdaLoRA models, their data and a training loop, for the tests of AdaLoRA."""

import torch
from torch import nn

import peftkern
from peftkern import AdaLoraConfig, RankAllocator
from peftkern.rank_allocator import adalora_layers

NAMES = ("lora_A", "lora_E", "lora_B")


def mlp(width=24, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, 20), nn.Tanh(), nn.Linear(20, 6))


def config(**changes):
    return AdaLoraConfig(**{"init_r": 6, "target_r": 2, "total_step": 30, "tinit": 4, "tfinal": 8, **changes})


def adapted(quantize=None, seed=0, **changes):
    return peftkern.adapt(mlp(seed=seed), config(**changes), quantize=quantize)


def batches(n, seed=1, rows=8, width=24):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(rows, width, generator=g), torch.randn(rows, 6, generator=g)) for _ in range(n)]


def train(model, optimizer, data, after=lambda: None):
    """Losses of one step a batch; after() is called between step and zero_grad."""
    losses = []
    for x, y in data:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        after()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model, lr=1e-2, **options):
    return torch.optim.AdamW(peftkern.trainable_parameters(model), lr=lr, **options)


def randomized(layer, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in layer.adapter_parameters().values():
        p.data.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    layer.warns_without_allocator = False
    return layer


def trained(steps=24, quantize=None, **options):
    model = adapted(quantize=quantize)
    optimizer = adamw(model, weight_decay=0.0)
    allocator = RankAllocator(model, optimizer=optimizer, **options)
    train(model, optimizer, batches(steps))
    return model, optimizer, allocator


def copy_from_peft(ours, theirs):
    values = dict(theirs.named_parameters())
    for name, layer in adalora_layers(ours).items():
        for attribute, p in layer.adapter_parameters().items():
            p.data = values[f"base_model.model.{name}.{attribute}.default"].detach().clone()
