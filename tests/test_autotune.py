# SPDX-License-Identifier: Apache-2.0
"""autotune: products are timed once for a bucket of shapes, the fastest way is taken, and files keep what was timed."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import assert_close

import peftkern
from peftkern.autotune import _machine, timed_products
from peftkern.ops.library import ops


def layer(**kwargs) -> peftkern.LoRALinear:
    return peftkern.LoRALinear.from_linear(torch.nn.Linear(128, 64), r=3, quantize="nf4", **kwargs)


def product_of(rows: int) -> str:
    (found,) = [p for p in timed_products() if f"forward M<={rows} " in p]
    return found


def test_times_each_way_that_accepts_and_takes_the_fastest():
    peftkern.autotune(True)
    module, x = layer(), torch.randn(3, 128)
    y = module(x)
    timings = timed_products()[product_of(4)]
    assert set(timings) >= {"nf4_few_rows", "library"} and min(timings.values()) > 0
    assert list(timings.values()) == sorted(timings.values()), "the fastest comes first"
    ops.set_product("forward", next(iter(timings)))
    peftkern.autotune(False)
    assert torch.equal(module(x), y)


def test_what_is_remembered_decides():
    module, x = layer(), torch.randn(3, 128)
    module.lora_B.data.normal_()
    results = {}
    for way in ("library", "nf4_few_rows"):
        ops.set_product("forward", way)
        results[way] = module(x)
    ops.set_product("forward", "")
    peftkern.autotune(True)
    module(x)
    product = product_of(4)
    for way, other in (("library", "nf4_few_rows"), ("nf4_few_rows", "library")):
        ops.add_timed_products([f"{product}\t{other}\t2.0\t{way}\t1.0"])
        assert list(timed_products()[product]) == [way, other]
        assert torch.equal(module(x), results[way])
    assert not torch.equal(results["library"], results["nf4_few_rows"]), "else this would show nothing"
    ops.add_timed_products([f"{product}\tof an older version\t1.0"])
    assert torch.equal(module(x), results["nf4_few_rows"]), "an unknown way is passed over"


def test_buckets_and_gradients():
    peftkern.autotune(True)
    module = layer(lora_dropout=0.1)
    for rows in (5, 8, 7, 9):
        module(torch.randn(rows, 128, requires_grad=True)).sum().backward()
    products = timed_products()
    assert len([p for p in products if "forward" in p]) == 2
    assert len([p for p in products if "gradient" in p and p.endswith("dropout")]) == 2
    assert all(p.startswith(f"cpu {peftkern.cpu_isa()}, {torch.get_num_threads()} threads: ") for p in products)
    assert all("128x64 Float weight NF4/64 r<=4 Float" in p for p in products)


def test_results_stay_those_of_the_reference():
    peftkern.autotune(True)
    x = torch.randn(6, 128, requires_grad=True)
    w, a, b = torch.randn(64, 128), torch.randn(3, 128), torch.randn(64, 3)
    y = peftkern.adapted_linear(x, w, a, b, scaling=0.5)
    y.sum().backward()
    merged = (w + 0.5 * b @ a).double()
    assert_close(y, x.double() @ merged.T, torch.float32, "y")
    assert_close(x.grad, torch.ones(6, 64).double() @ merged, torch.float32, "dx")


def test_off_by_default_and_after_false():
    layer()(torch.randn(2, 128))
    assert not timed_products()
    peftkern.autotune(True)
    peftkern.autotune(False)
    layer()(torch.randn(2, 128))
    assert not timed_products()


def test_a_forced_way_is_not_timed():
    peftkern.autotune(True)
    ops.set_product("forward", "library")
    layer()(torch.randn(2, 128))
    assert not timed_products()


def test_file_keeps_timings_and_those_of_others(tmp_path):
    path = tmp_path / "cache" / "timings.json"
    peftkern.autotune(path)
    layer()(torch.randn(2, 128))
    timed = timed_products()
    peftkern.autotune(False)
    assert json.loads(path.read_text()) == {_machine(): timed}
    other = {"cpu none, 1 threads: forward": {"library": 1.0}}
    path.write_text(json.dumps({_machine(): timed, "another machine": other}))
    ops.forget_timed_products()
    peftkern.autotune(str(path))
    assert timed_products() == timed
    layer()(torch.randn(20, 128))
    peftkern.autotune(False)
    content = json.loads(path.read_text())
    assert content["another machine"] == other and len(content[_machine()]) == 2
    assert [p.name for p in path.parent.iterdir()] == ["timings.json"]


def test_a_relative_path_is_that_of_the_call(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    peftkern.autotune("t.json")
    layer()(torch.randn(2, 128))
    monkeypatch.chdir(tmp_path / "elsewhere")
    peftkern.autotune(False)
    assert (tmp_path / "t.json").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_file_is_written_at_exit(tmp_path):
    code = "import torch, peftkern; peftkern.autotune('t.json'); peftkern.nf4_linear(torch.randn(2, 128), " \
           "peftkern.quantize_nf4(torch.randn(64, 128)))"  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=env)
    (timed,) = json.loads((tmp_path / "t.json").read_text()).values()
    assert any("forward M<=2 128x64" in product for product in timed)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"m": {"p": {}}}', '{"m": {"p": {"way": "fast"}}}', '{"m": {"p": {"w": -1.0}}}']
)
def test_another_file_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="setting: expected a file that autotune has written"):
        peftkern.autotune(path)
    layer()(torch.randn(2, 128))
    assert path.read_text() == text and not timed_products()


def test_a_setting_of_another_kind():
    with pytest.raises(TypeError, match="setting: expected True, False or a path, got int"):
        peftkern.autotune(1)


@pytest.mark.parametrize("line", ["", "product", "product\tway", "product\tway\tfast", "product\t\t1.0"])
def test_damaged_lines(line):
    with pytest.raises(RuntimeError, match="timed product: expected a product, ways and seconds between tabs"):
        ops.add_timed_products([line])
    assert not timed_products()


def test_explain_shows_the_choice():
    peftkern.autotune(True)
    module = layer()
    module(torch.randn(2, 128))
    assert "timed: cpu " in peftkern.explain(module) and "forward M<=2 128x64" in peftkern.explain(module)
    assert "timed" not in peftkern.explain(peftkern.LoRALinear(32, 32))


def test_threads_and_forks():
    peftkern.autotune(True)
    module = layer()
    xs = [torch.randn(n, 128) for n in range(1, 40)]
    errors = []

    def run():
        try:
            for x in xs:
                module(x)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    pid = os.fork()
    if pid == 0:  # a child that inherits a table which is perhaps in use
        torch.set_num_threads(1)
        os._exit(0 if ops.timed_products() is not None else 1)
    for t in threads:
        t.join()
    assert os.waitpid(pid, 0)[1] == 0 and not errors
    assert len(timed_products()) == 7  # 1, 2, 4, ... 64


def test_compiled_models_time_when_they_run_not_when_traced():
    peftkern.autotune(True)
    module = layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 128)
    torch.testing.assert_close(compiled(x), module(x))
    assert len(timed_products()) == 1
