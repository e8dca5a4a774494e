# SPDX-License-Identifier: Apache-2.0
"""QLoRA sharded over processes by FSDP2: quantize, shard, train, save a resumable checkpoint and the adapter.

A tiny random Llama stands in for a real one, so that this runs in seconds; put `from_pretrained(...)` in its place.
Run: torchrun --nproc-per-node 2 examples/qlora_fsdp.py      (or accelerate launch, or python for one process)
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import peftkern

for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
    os.environ.setdefault(name, str(value))
cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(device.type, (world,))

torch.manual_seed(0)  # the same model everywhere; each process keeps its part of it below
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).to(device)
peftkern.prepare(model)  # frozen, with activation checkpointing
peftkern.adapt(model, peftkern.LoraConfig(r=8, lora_alpha=16), quantize=peftkern.NF4Config(double_quant=True))
for layer in model.model.layers:  # as for any model: first the layers, then what is left
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
torch.manual_seed(rank)  # from here on each process draws its own dropout masks

tokens = torch.tensor(list((b"the quick brown fox jumps over the lazy dog. " * 20)[:512])).reshape(4, 128)
tokens = tokens.chunk(world)[rank].to(device)
optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model), lr=5e-3)
for step in range(5):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        print(f"step {step}: loss {total.item() / world:.3f}")

folder = [tempfile.mkdtemp() if rank == 0 else None]
dist.broadcast_object_list(folder)
states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
dcp.save(states, checkpoint_id=f"{folder[0]}/step-5")  # any number of processes can go on from it
peftkern.save_adapter(model, f"{folder[0]}/adapter")  # every process calls it, the first writes: HF PEFT's format
dist.destroy_process_group()
