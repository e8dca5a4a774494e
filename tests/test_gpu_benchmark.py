# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py where there is no GPU: what it says, and all of it on the CPU. benchmarks/sass.py on a listing."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_dora_norm
import test_jacobi_svd
import test_rank_allocation
import torch

import peftkern
from peftkern.bench.cases import OPS

ROOT = Path(__file__).parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so():
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.startswith("error: no GPU") and not done.stdout


TIMED = ["nf4_forward", "masked_ranks", "svd"]


@pytest.fixture
def gpu(monkeypatch):
    """The script with a few samples of each list, and the cases that it chooses, small."""
    module = script("gpu")
    for name, most in (("SAMPLES", 6), ("MULTI_SAMPLES", 3), ("NF4_SAMPLES", 4)):
        monkeypatch.setattr(module, name, getattr(module, name)[:most])
    monkeypatch.setattr(module, "ceilings", lambda dtypes, device: module.report.Ceilings(1e9, {"bfloat16": 1e9}))

    def small(suites, pattern):
        chosen = {c.op: c for c in select(suites, pattern)}
        assert set(chosen) == set(OPS), "every op is timed; here three, as tests/test_bench.py runs them all"
        sizes = {"in_features": 128, "out_features": 64, "rows": 4}
        return [replace(chosen[op], **sizes, layers=min(chosen[op].layers, 3)) for op in TIMED]

    select = module.select
    monkeypatch.setattr(module, "select", small)
    return module


def test_all_of_it_on_the_cpu(gpu, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    command = ["gpu.py", "--device", "cpu", "--seconds", "0.01", "--json", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", [*command, "--plot", str(tmp_path)])
    assert gpu.main() == 0
    out = capsys.readouterr().out
    count = len(list(gpu.checks("cpu")))
    assert out.startswith("CPU: no figure below is of a GPU") and f"{count} of {count} checks passed" in out
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [result["case"]["op"] for result in results] == TIMED
    assert all(result["case"]["device"] == "cpu" and result["ratios"] for result in results)
    assert (tmp_path / "bench.html").exists()


OTHER_OPS = {  # beside the layers and NF4: where the tests of each find it
    "dora_norm": test_dora_norm,
    "update_importance": test_rank_allocation,
    "rank_mask": test_rank_allocation,
    "mask_ranks": test_rank_allocation,
    "orthogonality_penalty": test_rank_allocation,
    "jacobi_svd": test_jacobi_svd,
}


@pytest.mark.parametrize("op", OTHER_OPS)
def test_every_op_is_checked(op, gpu, monkeypatch):
    def wrong(*args, **kwargs):
        raise RuntimeError("wrong")

    for name in ("SAMPLES", "MULTI_SAMPLES", "NF4_SAMPLES"):
        monkeypatch.setattr(gpu, name, [])
    monkeypatch.setattr(OTHER_OPS[op], op, wrong)
    count, failed = gpu.failures("cpu")
    assert 3 <= len(failed) < count and set(failed.values()) == {"RuntimeError: wrong"}


def test_nothing_is_timed_where_a_result_is_wrong(gpu, monkeypatch, capsys):
    forward = peftkern.adapted_linear
    monkeypatch.setattr(peftkern, "adapted_linear", lambda *args, **kwargs: 1.1 * forward(*args, **kwargs))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    assert gpu.main() == 1
    out = capsys.readouterr().out
    assert "FAILED 32x64x48" in out and out.count("FAILED") == 6 and "roofline" not in out


def test_samples_move():
    call = script("gpu").SAMPLES[2].make()
    assert call.to("meta").x.device.type == "meta" and call.x.device == torch.device("cpu")


LISTING = """
        Function : two_loops
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                      /* 0x00000a0000017a02 */
                                                                               /* 0x000fc40000000f00 */
        /*0010*/                   LDS.64 R2, [R4] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   LDS.64 R2, [R4] ;
        /*0050*/                   FMUL R2, R2, R3 ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0080*/                   FMUL R2, R2, R3 ;
        /*0090*/               @P0 BRA.U 0x40 ;
        /*00a0*/              @!P1 BRA 0x30 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0x0 ;
        Function : no_tensor_core
        /*0000*/                   FMUL R2, R2, R3 ;
        /*0010*/                   BRA 0x0;
"""


def test_main_loop_of_a_listing():
    """The loop with the most HMMA, in one that has no more; the stretch goes round its end: FMUL, BRA, LDS, FMUL."""
    sass = script("sass")
    (loop,) = sass.main_loops(LISTING)
    assert loop == sass.Loop("two_loops", instructions=6, hmma=2, longest_gap=4, around=8, spills=0)
    assert loop.per_hmma == pytest.approx(3.0)
