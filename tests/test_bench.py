# SPDX-License-Identifier: Apache-2.0
"""`peftkern bench`: the measuring, the checks that a wrong result does not pass, the command and what it writes."""

import json
import re
import time

import pytest
import torch

import peftkern
from peftkern.__main__ import main
from peftkern.bench import cases, plots, providers, report
from peftkern.bench.cli import run_case
from peftkern.bench.measure import Ceilings, Timing, copies, last_level_cache, measure

LIMITS = Ceilings(1e10, {"float32": 1e11, "bfloat16": 1e12})


def small(op: str, **sizes) -> cases.Case:
    return cases.Case(op, "none", "none", 128, 64, **{"rows": 0 if "quantize" in op else 4, "r": 4, **sizes})


PEERS = {
    **dict.fromkeys(("quantize", "dequantize", "nf4_forward", "nf4_dx"), "bitsandbytes"),
    **dict.fromkeys(("dora_norm", "masked_ranks", "orthogonality"), "HF PEFT's"),
    **dict.fromkeys(("lora", "qlora", "importance"), "HF PEFT"),
    "multi_lora": "a loop over the adapters",
    "svd": "torch.linalg.svd",
}


@pytest.mark.parametrize("op", cases.OPS)
def test_every_op_runs_and_is_checked(op):
    pytest.importorskip("peft")
    single = op in ("quantize", "svd", *cases.ALLOCATION_OPS)
    case = small(op, dtype="float32" if single else "bfloat16", layers=3 if single else 1)
    result = run_case(case, LIMITS, seconds=0.02, isas=True)
    assert providers.OURS in result.timings and len(result.timings) >= 3
    assert all(0 < t.p20 <= t.p50 <= t.p80 for t in result.timings.values())
    assert result.fraction > 0 and result.nbytes > 0
    assert any(PEERS.get(op, "plain torch") in peer for peer in {*result.timings, *result.left_out})
    if op not in ("quantize", "dequantize", "nf4_forward", "nf4_dx", "lora", "qlora"):
        assert not result.left_out  # nothing of theirs needs a package, besides HF PEFT, or has another result


def test_a_wrong_result_of_ours_stops_the_run(monkeypatch):
    monkeypatch.setattr(peftkern, "nf4_linear", lambda x, q: torch.zeros(len(x), q.shape[0], dtype=x.dtype))
    with pytest.raises(providers.WrongResult, match="off by"):
        run_case(small("nf4_forward"), LIMITS, seconds=0.01)


def test_a_wrong_gradient_of_ours_stops_the_run(monkeypatch):
    forward = peftkern.LoRALinear.forward
    monkeypatch.setattr(
        peftkern.LoRALinear, "forward", lambda self, x: forward(self, x) + 0.5 * (x.sum() - x.detach().sum())
    )
    with pytest.raises(providers.WrongResult, match="off by"):
        run_case(small("lora", dtype="float32"), LIMITS, seconds=0.01)


def test_a_peer_with_a_wrong_result_is_left_out_and_named():
    work = providers.Work(flops=0, nbytes=1)
    work.add("peer", lambda: lambda i: torch.tensor([1.0, 3.0]), providers.close(torch.tensor([1.0, 2.0]), 0.1))
    work.add("absent", lambda: providers.require("no_such_package"), lambda result: None)
    assert not work.calls
    assert "off by 5.0e-01" in work.left_out["peer"] and "not installed" in work.left_out["absent"]


def test_measure_takes_turns_and_alternates():
    order = []
    calls = {name: lambda turn, name=name: order.append(name) for name in "ab"}
    timings = measure(calls, seconds=0.0, rounds=(4, 4))
    assert {t.readings for t in timings.values()} == {4}
    firsts = re.findall("[ab]", re.sub(r"(.)\1*", r"\1", "".join(order)))
    assert firsts[:2] == ["a", "b"] and {"a", "b"} == set(order)


def test_readings_of_short_and_long_calls_last_alike():
    count = dict.fromkeys(("short", "long"), 0)

    def call(name, seconds):
        def work(turn):
            count[name] += 1
            time.sleep(seconds)

        return work

    timings = measure({"short": call("short", 0.002), "long": call("long", 0.02)}, seconds=0.0, rounds=(3, 3))
    assert count["long"] == 2 + 3 and 2 + 3 * 3 <= count["short"] <= 2 + 3 * 5
    assert 0.002 <= timings["short"].p50 < 0.015 < timings["long"].p50


def test_measure_knows_twice_the_work():
    x = torch.randn(400, 400, dtype=torch.float64)

    def work(times):
        return lambda turn: [x @ x for _ in range(times)]

    timings = measure({"one": work(1), "four": work(4)}, seconds=0.5)
    assert 2 < timings["four"].p50 / timings["one"].p50 < 8


def test_cold_buffers_exceed_the_cache():
    assert copies(1 << 20) >= 1
    nbytes = last_level_cache() // 4
    assert copies(nbytes) * nbytes > last_level_cache()
    assert copies(1 << 40) == 1


def test_ceiling_that_binds():
    assert LIMITS.fraction(1.0, nbytes=5e9, flops=0, dtype="bfloat16") == (0.5, "memory")
    assert LIMITS.fraction(1.0, nbytes=1, flops=8e11, dtype="bfloat16") == (0.8, "compute")


def test_suites_have_no_case_twice_and_select_by_pattern():
    for suite in cases.SUITES:
        found = cases.select([suite])
        assert found and len(set(found)) == len(found)
        assert all(c.op in cases.OPS for c in found)
    assert {c.op for c in cases.select(["ops"])} == set(cases.OPS)
    assert {c.op for c in cases.select(["targets"], "nf4_dx*")} == {"nf4_dx"}
    assert {c.model for c in cases.select(["models"], "Qwen*")} == {"Qwen2.5-7B"}


def test_table_and_ratio():
    timings = {"peftkern": Timing(0.9e-3, 1e-3, 1.1e-3, 5), "peer": Timing(1.9e-3, 2e-3, 2.1e-3, 5)}
    result = report.Result(small("lora"), timings, {"gone": "ImportError: gone"}, 1e9, 1e6, 0.25, "memory")
    text = report.table([result])
    assert "2.00x" in text and "25% memory" in text and len({len(line) for line in text.splitlines()}) == 1
    assert report.left_out([result]) == "left out: gone, ImportError: gone (e.g. lora M=4 128x64 bf16 r=4)"


def test_command_writes_json_and_plots(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    swept = [
        small("lora", sweep="M"),
        small("lora", rows=8, sweep="M"),
        small("dequantize", threads=1, sweep="threads"),
    ]
    monkeypatch.setitem(cases.SUITES, "quick", lambda: [small("dequantize"), small("nf4_forward"), *swept])
    monkeypatch.setattr("peftkern.bench.measure.ceilings", lambda dtypes: LIMITS)
    arguments = ["bench", "--seconds", "0.02", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "plots")]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "b.json").read_text())
    assert len(content["results"]) == 5 and content["versions"]["torch"] == torch.__version__
    assert all(r["ratios"] for r in content["results"][:2])
    for name in ("speed", "roofline", "scaling"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "plots" / "bench.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and not re.search(r'(src|href)="http', page)
    assert "dequantize 128x64 bf16" in page and "dequantize 128x64 bf16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only: expected a pattern that matches a case, got 'nothing'"),
        (["--seconds", "0"], "--seconds: expected a number > 0"),
        (["--threads", "0"], "--threads: expected a number >= 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_list(capsys):
    assert main(["bench", "--suite", "sweeps", "--list"]) == 0
    assert "lora M=512 2048x2048 bf16 r=16" in capsys.readouterr().out


def test_plots_of_one_kind_only(tmp_path):
    pytest.importorskip("matplotlib")
    timings = {"peftkern": Timing(1, 1, 1, 5), "peer": Timing(2, 2, 2, 5)}
    result = report.Result(small("lora"), timings, {}, 1e9, 1e6, 0.25, "memory")
    written = plots.write(tmp_path, report.environment(LIMITS), LIMITS, [result], report.table([result]))
    assert [p.name for p in written] == ["speed.png", "roofline.png", "bench.html"]


def test_growth_of_a_sweep():
    """Time over time beside size over size, sizes in order, each sweep by itself; the distance from a line."""

    def result(seconds: float, ceiling: str = "compute", **sizes) -> report.Result:
        timings = {providers.OURS: Timing(seconds, seconds, seconds, 5)}
        return report.Result(small("lora", **sizes), timings, {}, 1e9, 1e6, 0.25, ceiling)

    results = [result(t, rows=m, sweep="M") for m, t in ((256, 2.2), (128, 1.0), (512, 4.0))]
    results += [result(t, r=r, sweep="r") for r, t in ((16, 1.0), (64, 1.5), (128, 2.0), (256, 3.0))]
    results += [result(t, threads=n, sweep="threads") for n, t in ((1, 1.0), (2, 0.5))] + [result(9.0)]
    results += [result(t, "memory", threads=n, rows=1, sweep="threads") for n, t in ((1, 1.0), (2, 0.8))]
    name = "lora 128x64 bf16"
    assert report.growth(results, lambda threads: {1: 1.0, 2: 1.3}[threads]).splitlines() == [
        f"growth with M, {name} r=4: 128 -> 256: 2.20 for 2, 256 -> 512: 1.82 for 2, off a straight line by 10.0%",
        f"growth with r, {name.replace('lora', 'lora M=4')} r=0: 16 -> 64: 1.50 for 4, 64 -> 128: 1.33 for 2, "
        "128 -> 256: 1.50 for 2, off a straight line from 64 on by 0.0%",
        f"growth with threads, {name.replace('lora', 'lora M=4')} r=4: 1 -> 2: 2.00x as fast",
        f"growth with threads, {name.replace('lora', 'lora M=1')} r=4: 1 -> 2: 1.25x as fast, a copy 1.30x",
    ]
