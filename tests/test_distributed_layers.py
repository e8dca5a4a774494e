# SPDX-License-Identifier: Apache-2.0
"""FSDP2 with what is more than a LoRA product: DoRA's norms, adapted embeddings, tied ones, modules that train as a
whole. Losses and every parameter as in one process, and files of the sharded model."""

import contextlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import leave_together
from test_distributed import Block, make_optimizer, mesh, report, result_file, train
from torch import nn

import peftkern
from peftkern import LoraConfig, NF4Config

STEPS = range(3)


class Model(nn.Module):
    """Tokens, made of the floats that train() gives, through an embedding, blocks and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(53, 64), nn.ModuleList([Block(), Block()]), nn.Linear(64, 53)
        self.norm = nn.LayerNorm(64)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed((x[:, :6].abs() * 20).long() % 53).mean(1)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


MODELS = {
    "dora": ({"target_modules": "all-linear", "use_dora": True}, None),
    "dora-nf4": ({"target_modules": ["up", "mid", "down"], "use_dora": True}, NF4Config(32)),
    "embedding": ({"target_modules": ["embed", "up"]}, None),
    "embedding-dora": ({"target_modules": ["embed", "up"], "use_dora": True}, None),
    "embedding-nf4": ({"target_modules": ["embed", "mid"]}, NF4Config(32, double_quant=True)),
    "whole-head": ({"target_modules": ["up", "mid"], "modules_to_save": ["head", "norm"]}, None),
    "whole-nf4": ({"target_modules": ["up"], "modules_to_save": ["embed", "head"]}, NF4Config(32)),
    "tied-head": ({"target_modules": ["up"], "tied": True}, None),
    "tied-embedding": ({"target_modules": ["embed", "up"], "tied": True}, None),
}


PATCHED = {
    "patched": {"target_modules": ["up", "mid", "down"]},
    "patched-dora": {"target_modules": ["up", "mid"], "use_dora": True, "use_rslora": True},
    "patched-whole": {"target_modules": ["up"], "modules_to_save": ["head"]},
}


def make_patched(case: str) -> nn.Module:
    """HF PEFT's model on our kernels."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **PATCHED[case])
    return peftkern.patch(peft.get_peft_model(Model(), config))


def make(case: str, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    options, quantize = MODELS[case]
    options = dict(options)
    model = Model(tied=options.pop("tied", False))
    return peftkern.adapt(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options), quantize=quantize)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in [m for m in model.modules() if isinstance(m, Block)]:
        fully_shard(block, mesh=mesh())
    return fully_shard(model, mesh=mesh())


@contextlib.contextmanager
def count_calls():
    """How often a fused call is made by a patched layer, and how often HF PEFT's own forward runs."""
    from peft.tuners.lora import Linear

    from peftkern.patched import layer

    calls = {"fused": 0, "peft": 0}

    def counted(kind, function):
        def call(*args, **kwargs):
            calls[kind] += 1
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "adapted_linear", counted("fused", layer.adapted_linear))
        patch.setattr(layer, "dora_linear", counted("fused", layer.dora_linear))
        patch.setattr(Linear, "forward", counted("peft", Linear.forward))
        yield calls


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {}
    for case in MODELS:
        try:
            model = sharded(make(case))
            results[case] = report(model, train(model, make_optimizer(model), STEPS))
            peftkern.save_adapter(model, Path(folder) / case)
            again = peftkern.load_adapter(sharded(make(case, seed=1)), Path(folder) / case)
            results[case]["trained"] = {n for n, p in model.named_parameters() if p.requires_grad}
            results[case]["loaded"] = report(again, [])["state"]
        except Exception as error:
            results[case] = f"{type(error).__name__}: {error}"
        dist.barrier()
    for case in PATCHED if find_spec("peft") else ():
        model = sharded(make_patched(case))
        with count_calls() as calls:
            results[case] = report(model, train(model, make_optimizer(model), STEPS)) | {"fused": calls}
        dist.barrier()
    files = [result_file(Path(folder), world, r) for r in range(world)]
    torch.save(results, files[rank])
    leave_together(files[rank], files)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    mp.spawn(worker, (2, str(folder)), nprocs=2)
    return folder, [torch.load(result_file(folder, 2, rank), weights_only=False) for rank in range(2)]


@pytest.mark.filterwarnings("ignore:.*tied")
@pytest.mark.parametrize("case", MODELS)
def test_trains_as_one_process(two, case):
    folder, results = two
    model = make(case)
    alone = report(model, train(model, make_optimizer(model), STEPS))
    for result in (r[case] for r in results):
        assert not isinstance(result, str), result
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert result["state"].keys() == alone["state"].keys()
        for name, expected in alone["state"].items():
            torch.testing.assert_close(result["state"][name], expected, rtol=1e-3, atol=1e-4, msg=name)
        for name in result["trained"]:
            assert torch.equal(result["loaded"][name], result["state"][name]), name
    loaded = peftkern.load_adapter(make(case, seed=1), folder / case)
    for name in results[0][case]["trained"]:
        assert torch.equal(loaded.get_parameter(name), results[0][case]["state"][name]), name


@pytest.mark.parametrize("case", PATCHED)
def test_patched_models_train_as_one_process(two, case):
    pytest.importorskip("peft")
    model = make_patched(case)
    alone = report(model, train(model, make_optimizer(model), STEPS))
    for result in (r[case] for r in two[1]):
        assert result["fused"] == {"fused": 2 * len(STEPS) * len(PATCHED[case]["target_modules"]), "peft": 0}
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, expected in alone["state"].items():
            torch.testing.assert_close(result["state"][name], expected, rtol=1e-3, atol=1e-4, msg=name)
