# SPDX-License-Identifier: Apache-2.0
"""NF4 bases and adapters over several processes: DDP, FSDP2, distributed checkpoints; gloo on the CPU.

Each process group answers many questions, since a process takes seconds to start; every one is compared with the same
training in one process, which is run on the whole batch.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import leave_together
from torch import nn

import peftkern
from peftkern import AdaLoraConfig, LoraConfig, NF4Config
from peftkern.rank_allocator import adalora_layers

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch without gloo", allow_module_level=True)

ROOT = Path(__file__).parent.parent
STEPS, SAVED, ROWS = 4, 2, 3  # optimizer steps; after how many a checkpoint is written; rows a share
ADALORA_STEPS = 12
SHARES = 6  # of ROWS rows in the global batch: 2 and 3 processes divide it


class Block(nn.Module):
    """Row counts that 2 and 3 do not divide, and an odd number of inputs, whose packed weight is flat."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(64), nn.Linear(64, 97)
        self.mid, self.down = nn.Linear(97, 50), nn.Linear(50, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.mid(torch.relu(self.up(self.norm(x))))))


def make_model(p: float = 0.0, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(*(Block() for _ in range(2)), nn.Linear(64, 8))
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=p, init_lora_weights=False)
    return peftkern.adapt(model, config, quantize=NF4Config(32, double_quant=True))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    rows = ROWS * SHARES
    return torch.randn(rows, 64, generator=generator), torch.randint(8, (rows,), generator=generator)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(peftkern.trainable_parameters(model), lr=1e-2)


def train(model, optimizer, steps=range(STEPS)) -> list[float]:
    """The mean loss over all processes, each step; each process takes its share of the rows."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    curve = []
    for step in steps:
        x, target = (t.chunk(world)[rank] for t in batch(step))
        loss = nn.functional.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
        curve.append(mean.item() / world)
    return curve


def shard(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model[:2]:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().cpu()


def report(model, curve) -> dict:
    """What is compared: the losses, and every parameter, gathered."""
    return {"losses": curve, "state": {n: whole(p) for n, p in model.named_parameters()}}


def worker(rank: int, world: int, folder: str, cases: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    results = {}
    for case in cases:
        results[case] = globals()[f"case_{case}"](Path(folder))
        dist.barrier()
    files = [result_file(Path(folder), world, r) for r in range(world)]
    torch.save(results, files[rank])
    leave_together(files[rank], files)


def result_file(folder: Path, world: int, rank: int) -> Path:
    return folder / f"result-{world}-{rank}.pt"


def run(folder: Path, world: int, cases: tuple[str, ...]) -> list[dict]:
    """One dict of results a process."""
    mp.spawn(worker, (world, str(folder), cases), nprocs=world)
    return [torch.load(result_file(folder, world, rank)) for rank in range(world)]


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


# ---- cases: each runs in every process of a group -------------------------------------------------------------------


def case_ddp(folder):
    """Rank 1 starts from other bytes: DDP broadcasts frozen uint8 parameters too."""
    model = nn.parallel.DistributedDataParallel(make_model(seed=dist.get_rank()))
    return report(model.module, train(model, make_optimizer(model)))


def case_ddp_dropout(folder):
    """Masks come from the generator of each process, as those of nn.Dropout do."""
    model = nn.parallel.DistributedDataParallel(make_model(p=0.5)).train()
    x = torch.ones(4, 64)
    with torch.no_grad():
        torch.manual_seed(7)
        same = model(x)
        torch.manual_seed(7 + dist.get_rank())
        other, plain = model(x), nn.functional.dropout(x, 0.5)
    model(x).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return {"same": same, "other": other, "plain": plain, "grads": grads}


def case_fsdp(folder):
    model = shard(make_model(), mesh())
    weight = model[0].mid.weight
    assert weight.dtype == torch.uint8 and weight.to_local().numel() < weight.numel()
    return report(model, train(model, make_optimizer(model)))


def case_keep_gathered(folder):
    model = shard(make_model(), mesh(), reshard_after_forward=False)
    return report(model, train(model, make_optimizer(model)))


def case_cpu_offload(folder):
    from torch.distributed.fsdp import CPUOffloadPolicy

    model = shard(make_model(), mesh(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    return report(model, train(model, make_optimizer(model)))


def case_mixed_precision(folder):
    """Float parameters are cast for the computation; NF4 bytes and their float32 scales are not."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    model = shard(make_model(), mesh(), mp_policy=policy)
    seen = {}

    def look(layer, args):
        q = layer.base_weight()
        seen.update(x=args[0].dtype, A=layer.lora_A.dtype, packed=q.packed.dtype, scale=q.float_absmax().dtype)
        seen["value"] = peftkern.dequantize_nf4(q, torch.float32)

    model[0].up.register_forward_pre_hook(look)
    return report(model, train(model, make_optimizer(model))) | {"seen": seen}


def case_meta(folder):
    """Built and sharded without memory; the values come from the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    source = make_model()
    with torch.device("meta"):
        model = make_model()
    shard(model, mesh()).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if dist.get_rank() == 0 else {}, options=options)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        assert full.keys() == source.state_dict().keys()
        assert all(torch.equal(full[k], t) for k, t in source.state_dict().items())
    return report(model, train(model, make_optimizer(model)))


def case_accelerate(folder):
    """The FSDP2 of accelerate, and so of Trainer, which both offer on GPUs alone: their function that shards a model,
    weights broadcast from the first process included, with what it reads of an Accelerator."""
    try:
        from accelerate.utils import FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    except ImportError:
        return None
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=True, state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"), torch_device_mesh=None,
    )  # fmt: skip
    model = fsdp2_prepare_model(accelerator, make_model(seed=dist.get_rank()))
    assert hasattr(model[0].mid.weight, "full_tensor")
    return report(model, train(model, make_optimizer(model)))


def case_save_checkpoint(folder):
    """Steps, a checkpoint, steps; and the adapter in HF PEFT's format, gathered."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = shard(make_model(), mesh())
    optimizer = make_optimizer(model)
    curve = train(model, optimizer, range(SAVED))
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / "checkpoint")
    curve += train(model, optimizer, range(SAVED, STEPS))
    peftkern.save_adapter(model, folder / "adapter")
    return report(model, curve)


def case_resume_checkpoint(folder):
    """From a checkpoint that another number of processes wrote, into a model that starts elsewhere."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = shard(make_model(seed=5), mesh())
    optimizer = make_optimizer(model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=folder / "checkpoint")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return report(model, train(model, optimizer, range(SAVED, STEPS)))


def case_load_adapter(folder):
    model = shard(make_model(seed=0), mesh())
    peftkern.load_adapter(model, folder / "adapter")
    return report(model, [])


def make_adalora() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(2)), nn.Linear(64, 8))
    config = AdaLoraConfig(init_r=5, target_r=2, total_step=ADALORA_STEPS, tinit=1, tfinal=2)
    return peftkern.adapt(model, config, quantize=NF4Config(32))


def train_adalora(model) -> dict:
    """With the orthogonality term; the mask after each step."""
    optimizer = make_optimizer(model)
    allocator, masks = peftkern.RankAllocator(model, optimizer=optimizer), []
    optimizer.register_step_post_hook(lambda *_: masks.append(None if allocator.keep is None else allocator.keep.cpu()))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    curve = []
    for step in range(ADALORA_STEPS):
        x, target = (t.chunk(world)[rank] for t in batch(step))
        loss = nn.functional.cross_entropy(model(x).float(), target)
        (loss + 0.1 * peftkern.orthogonality(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        curve.append(mean.item() / world)
    return {"masks": masks, "ranks": allocator.ranks(), **report(model, curve)}


def case_adalora(folder):
    model = shard(make_adalora(), mesh())
    result = train_adalora(model)
    peftkern.save_adapter(model, folder / f"adalora-{dist.get_world_size()}")
    return result


def case_adalora_refusals(folder):
    model = shard(make_adalora(), mesh())
    messages = []
    for call in (
        lambda: peftkern.RankAllocator(model, prune="final"),
        lambda: peftkern.prune_ranks(model),
        lambda: peftkern.RankAllocator(nn.ModuleList([model[0], make_adalora()[0]]), model.peftkern_config),
    ):
        with pytest.raises((ValueError, RuntimeError)) as error:
            call()
        messages.append(str(error.value))
    return messages


# ---- the tests ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    """The same training in this process, on the whole batch."""
    model = make_model()
    return report(model, train(model, make_optimizer(model)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


CASES = (
    "ddp",
    "ddp_dropout",
    "fsdp",
    "keep_gathered",
    "cpu_offload",
    "mixed_precision",
    "meta",
    "save_checkpoint",
    "accelerate",
    "adalora",
    "adalora_refusals",
)


@pytest.fixture(scope="module")
def two(folder):
    return run(folder, 2, CASES)


@pytest.fixture(scope="module")
def three(folder, two):
    return run(folder, 3, ("ddp", "fsdp", "mixed_precision", "resume_checkpoint", "load_adapter", "adalora"))


def test_the_fsdp2_of_accelerate(two, alone):
    if two[0]["accelerate"] is None:
        pytest.skip("without accelerate")
    assert_same_training(two, alone, "accelerate")


def assert_same_training(results, alone, case, first=0, rtol=1e-5):
    for result in results:
        got = result[case]
        assert got["losses"] == pytest.approx(alone["losses"][first:], rel=rtol)
        for name, expected in alone["state"].items():
            value = got["state"][name]
            if expected.is_floating_point():
                torch.testing.assert_close(value, expected, rtol=50 * rtol, atol=50 * rtol, msg=name)
            else:
                assert torch.equal(value, expected), name


@pytest.mark.parametrize("case", ["ddp", "fsdp", "keep_gathered", "cpu_offload", "meta", "save_checkpoint"])
def test_two_processes_train_as_one(two, alone, case):
    assert_same_training(two, alone, case)


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_three_processes_train_as_one(three, alone, case):
    assert_same_training(three, alone, case)


@pytest.fixture(scope="module")
def adalora_alone():
    return train_adalora(make_adalora())


@pytest.mark.parametrize("world", ["two", "three"])
def test_adalora_allocates_as_one(request, adalora_alone, folder, world):
    """Sharded A, E and B, 5 triplets over 2 and 3 processes: the masks of one process at every step."""
    results = request.getfixturevalue(world)
    assert_same_training(results, adalora_alone, "adalora", rtol=1e-4)
    for result in results:
        got, expected = result["adalora"]["masks"], adalora_alone["masks"]
        assert len(got) == ADALORA_STEPS and sum(mask is not None for mask in got) >= ADALORA_STEPS - 1
        for a, b in zip(got, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        assert result["adalora"]["ranks"] == adalora_alone["ranks"]
    loaded = peftkern.load_adapter(make_adalora(), folder / f"adalora-{dict(two=2, three=3)[world]}")
    assert {name: layer.r for name, layer in adalora_layers(loaded).items()} == adalora_alone["ranks"]
    assert sum(adalora_alone["ranks"].values()) == 2 * 7 and len(set(adalora_alone["ranks"].values())) > 1


def test_what_adalora_refuses_of_a_sharded_model(two):
    for messages in (result["adalora_refusals"] for result in two):
        assert 'prune: expected "never"' in messages[0]
        assert "got ones FSDP2 has sharded" in messages[1]
        assert "expected every adapter sharded on axis 0 by one mesh" in messages[2]


def test_resume_with_another_number_of_processes(three, alone):
    assert_same_training(three, alone, "resume_checkpoint", first=SAVED)


def test_adapter_files_of_a_sharded_model(three, alone, folder):
    assert_same_training(three, alone, "load_adapter", first=STEPS)
    model = peftkern.load_adapter(make_model(seed=0), folder / "adapter")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.data, alone["state"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("world", ["two", "three"])
def test_mixed_precision_leaves_nf4_alone(request, alone, world):
    results = request.getfixturevalue(world)
    expected = peftkern.dequantize_nf4(make_model()[0].up.base_weight(), torch.float32)
    for result in results:
        seen = result["mixed_precision"]["seen"]
        assert (seen["x"], seen["A"], seen["packed"], seen["scale"]) == (
            torch.bfloat16, torch.bfloat16, torch.uint8, torch.float32,
        )  # fmt: skip
        assert torch.equal(seen["value"], expected)
        assert result["mixed_precision"]["losses"] == pytest.approx(alone["losses"], rel=2e-2)


def test_dropout_differs_between_processes_as_torchs_does(two):
    a, b = (result["ddp_dropout"] for result in two)
    assert torch.equal(a["same"], b["same"])
    assert not torch.equal(a["other"], b["other"]) and not torch.equal(a["plain"], b["plain"])
    assert all(torch.equal(x, y) for x, y in zip(a["grads"], b["grads"], strict=True)), "reduced over the processes"


TRAINER = """
import os, sys, torch, peftkern
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 32
    def __getitem__(self, i):
        ids = torch.arange(i, i + 12) % 64
        return {"input_ids": ids, "labels": ids}

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.1, **sizes))
peftkern.adapt(model, peftkern.LoraConfig(r=4, lora_alpha=16), quantize="nf4")
world = int(os.environ.get("WORLD_SIZE", 1))
arguments = TrainingArguments(
    "out", max_steps=4, per_device_train_batch_size=8 // world, report_to="none", use_cpu=True, learning_rate=1e-2,
    logging_steps=1, disable_tqdm=True, save_strategy="no",
)
trainer = Trainer(model, arguments, train_dataset=Rows())
trainer.train()
if trainer.args.process_index == 0:
    for entry in trainer.state.log_history[:-1]:
        print(f"step loss {entry['loss']:.3f}")
    print(type(trainer.model_wrapped).__name__)
sys.stdout.flush()
os._exit(0)  # destructors of the group race with gloo's threads: one run in fifty aborts (tests/processes.py)
"""
LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no",  # --multi_gpu is accelerate's name for one process a device, on the CPU as well
}


@pytest.mark.slow
@pytest.mark.parametrize("script, launcher", [("example", "torchrun"), ("trainer", "accelerate")])
def test_launchers(script, launcher, tmp_path):
    """FSDP2 in the example, started by torchrun, and DDP by Trainer, by accelerate: the losses of one process."""
    pytest.importorskip("accelerate")
    path = ROOT / "examples" / "qlora_fsdp.py"
    if script == "trainer":
        path = tmp_path / "train.py"
        path.write_text(TRAINER)

    def start(*launcher: str) -> list[str]:
        port = ["--main_process_port" if "accelerate" in launcher[0] else "--master-port", str(free_port())]
        command = [sys.executable, *(["-m", *launcher, *port] if launcher[0] else []), str(path)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert out.returncode == 0, out.stderr
        return out.stdout.splitlines()

    expected = [line for line in start("") if line.startswith("step")]
    lines = start(*LAUNCHERS[launcher].split())
    assert [line for line in lines if line.startswith("step")] == expected and len(expected) >= 4
    assert script == "example" or lines[-1] == "DistributedDataParallel"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
