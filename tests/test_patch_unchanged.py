# SPDX-License-Identifier: Apache-2.0
"""What patch leaves as it was in an HF PEFT model: state dict, copies, files, merging, adapters, hooks, compiling."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from test_adapt import TOKENS, tiny_llama
from torch import nn

import peftkern

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from test_patch import (  # noqa: E402
    CONFIGS,
    assert_equal_results,
    build,
    fused_calls,
    lora,
    patched_layers,
    randomize,
    relative,
    run,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_state_and_names(name):
    model = build(CONFIGS[name]())
    before = {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    names, text = [n for n, _ in model.named_modules()], repr(model)
    assert peftkern.patch(model) is model
    assert patched_layers(model)
    run(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(id(t) == before[n][0] and torch.equal(t, before[n][1]) for n, t in after.items())
    assert [n for n, _ in model.named_modules()] == names and repr(model) == text
    peftkern.patch(model)  # again: nothing
    assert peftkern.unpatch(model) is model
    assert not patched_layers(model) and not any("_peftkern_plan" in vars(m) for m in model.modules())
    assert repr(model) == text
    peftkern.unpatch(model)


def test_a_model_without_peft():
    with pytest.raises(ValueError, match=r"^model: expected one with HF PEFT adapters, got one without a PEFT layer"):
        peftkern.patch(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("copied", ["deepcopy", "copy of a layer"])
def test_copies_are_patched_and_independent(copied):
    model = peftkern.patch(build(lora()))
    expected = run(model)
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
        assert patched_layers(twin) == patched_layers(model)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        assert_equal_results(run(twin), expected, tolerance=0)
    else:
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        x = torch.randn(2, 32)
        assert type(copy.copy(layer)) is type(layer) and torch.equal(copy.copy(layer)(x), layer(x))


@pytest.mark.parametrize("save", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_pickles_are_plain_peft(save, tmp_path):
    model = peftkern.patch(build(lora()))
    expected = run(model)
    model.zero_grad()
    if save:
        twin = pickle.loads(save(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert not patched_layers(twin) and type(twin) is type(model)
    assert_equal_results(run(twin), expected)
    # a process that cannot import peftkern
    torch.save(model.base_model.model.model.layers[0].mlp, tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['peftkern'] = None; m = torch.load(sys.argv[1], weights_only=False); print(m)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert out.returncode == 0 and "lora_A" in out.stdout, out.stderr


def test_save_pretrained(tmp_path):
    model = build(lora())
    model.save_pretrained(tmp_path / "plain")
    peftkern.patch(model).save_pretrained(tmp_path / "patched")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    again = peftkern.patch(
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "patched", is_trainable=True).train()
    )
    assert_equal_results(run(again), run(model), tolerance=0)


@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
def test_merge_disable_and_back(name):
    model = build(CONFIGS[name]()).eval()
    plain = copy.deepcopy(model)
    peftkern.patch(model)

    def both(f):
        a, b = f(model), f(plain)
        assert relative(a, b) <= 1e-6
        return a

    logits = both(lambda m: m(TOKENS).logits)

    def disabled(m):
        with m.disable_adapter():
            return m(TOKENS).logits

    assert relative(both(disabled), logits) > 1e-3
    model.merge_adapter(), plain.merge_adapter()
    assert relative(both(lambda m: m(TOKENS).logits), logits) < 1e-5
    model.unmerge_adapter(), plain.unmerge_adapter()
    assert relative(both(lambda m: m(TOKENS).logits), logits) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    model, plain = model.merge_and_unload(safe_merge=True), plain.merge_and_unload(safe_merge=True)
    assert not patched_layers(model)
    both(lambda m: m(TOKENS).logits)


def test_adapters_come_and_go():
    model = peftkern.patch(build(lora(target_modules=["q_proj"])))
    plain = build(lora(target_modules=["q_proj"]))

    def same():
        assert_equal_results(run(model), run(plain))

    same()
    for m in (model, plain):
        torch.manual_seed(9)
        m.add_adapter("two", lora(r=2, target_modules=["q_proj", "up_proj"]))
        randomize(m)
    same()
    assert len(patched_layers(model)) == 5, "the model's, two layers, and the two that the second adapter made"
    for m in (model, plain):
        m.set_adapter("two")
    same()
    for m in (model, plain):  # in a place the plan has been made for
        m.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(0.5)
    same()
    for m in (model, plain):
        m.base_model.add_weighted_adapter(["default", "two"], [0.7, 0.3], "mixed", combination_type="cat")
        m.set_adapter("mixed")
    same()
    for m in (model, plain):
        m.delete_adapter("mixed")
        m.set_adapter("default")
    same()
    for m in (model, plain):
        m.delete_adapter("default")
    same()
    assert "no active adapter" not in peftkern.explain(model)


def test_modules_assigned_without_pefts_methods(monkeypatch):
    """Straight into a layer's dictionaries, under plans that have been made."""
    model = peftkern.patch(build(lora()))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    slow = fused_calls(model, monkeypatch)
    run(model)

    def same_as_peft():
        assert_equal_results(run(model), run(peftkern.unpatch(copy.deepcopy(model))))

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    before = layer.lora_A["default"]
    for new in (nn.Linear(32, 4, bias=False), nn.Linear(32, 4), Doubled(32, 4, bias=False)):
        layer.lora_A["default"] = new
        slow.clear()
        run(model)
        assert slow == ([] if type(new) is nn.Linear and new.bias is None else [layer])
        same_as_peft()
    layer.lora_A["default"] = before
    layer.lora_dropout["default"] = nn.Dropout1d(0.0)
    slow.clear()
    run(model)
    assert slow == [layer] and "a dropout of Dropout1d" in peftkern.explain(model)
    layer.lora_dropout["default"] = nn.Identity()
    for held in (layer.lora_A, layer.lora_B, layer.lora_dropout):
        held["more"] = copy.deepcopy(held["default"])
    layer.scaling["more"], layer.lora_bias["more"], layer.use_dora["more"] = 3.0, False, False
    layer._active_adapter.append("more")  # in place, which set_adapter does not do
    slow.clear()
    y = layer(torch.ones(2, 32))
    assert not slow
    torch.testing.assert_close(y, peftkern.unpatch(copy.deepcopy(layer))(torch.ones(2, 32)))


def test_hooks_run(monkeypatch):
    model = peftkern.patch(build(lora()))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    slow = fused_calls(model, monkeypatch)
    expected = run(model)
    seen = []
    on_layer = layer.register_forward_hook(lambda m, i, o: seen.append("layer"))
    run(model)
    assert seen == ["layer"] and not slow, "a hook on the layer itself needs no other path"
    for inner in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]):
        seen.clear()
        hook = inner.register_forward_hook(lambda m, i, o: seen.append("inner"))
        assert_equal_results(run(model), expected)
        assert sorted(seen) == ["inner", "layer"] and slow == [layer]
        assert "an inner module has a hook" in peftkern.explain(model)
        hook.remove()
        slow.clear()
    on_layer.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    seen.clear()
    run(model)
    everywhere.remove()
    assert len(slow) == 14 and seen.count("Linear") == 14 + 3 * 14 + 1
    doubled = layer.lora_A["default"].weight.register_hook(lambda g: 2 * g)
    got = run(model)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    torch.testing.assert_close(got[name], 2 * expected[name])
    doubled.remove()


def test_replaced_forwards_are_respected():
    """As accelerate sets them, on the layer and inside."""
    model = peftkern.patch(build(lora()))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    old = layer.base_layer.forward
    layer.base_layer.forward = lambda x: old(x) + 1
    x = torch.randn(2, 32)
    with_one = layer(x)
    assert "an inner module has a hook or a forward of its own" in peftkern.explain(model)
    del layer.base_layer.forward
    torch.testing.assert_close(with_one, layer(x) + 1)
    layer.forward = lambda x: x
    assert layer(x) is x and "a forward is set on the instance" in peftkern.explain(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = peftkern.patch(build(lora(lora_dropout=0.3)))
    expected = run(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal_results(run(model), expected, tolerance=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["lora", "dora", "adalora"])
def test_compile(name, backend):
    torch._dynamo.reset()
    model = peftkern.patch(build(CONFIGS[name]()))
    expected = run(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_equal_results(run(compiled, use_cache=False), {**expected}, tolerance=2e-6)


def test_patched_after_compilation():
    torch._dynamo.reset()
    model = build(lora())
    compiled = torch.compile(model, backend="aot_eager")
    expected = run(compiled)
    peftkern.patch(model)
    assert_equal_results(run(compiled), expected)
    torch._dynamo.reset()
