# SPDX-License-Identifier: Apache-2.0
"""Adapter files: to HF PEFT and back, bit for bit; damaged files and full disks."""

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import BF16, F16, F32
from test_adapt import TOKENS, adapted, mlp, randomize, snapshot, tiny_llama, unchanged
from torch import nn

import peftkern
from peftkern import LoraConfig, LoRALinear, NF4Linear, QLoRALinear
from peftkern.adapter_io import CONFIG_NAME, PREFIX, WEIGHTS_NAME


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def adapter_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that trained, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def randomize_trained(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)


CONFIGS = {
    "all-linear": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "patterns": {
        "r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_dropout": 0.25, "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3}, "alpha_pattern": {"v_proj": 5},
    },
    "regex": {"r": 2, "target_modules": r".*layers\.0.*(q|k)_proj", "exclude_modules": ["k_proj"]},
    "bias all": {"r": 2, "target_modules": ["q_proj", "down_proj"], "bias": "all"},
    "bias lora_only": {"r": 2, "target_modules": ["k_proj"], "bias": "lora_only"},
}  # fmt: skip
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
dtypes = pytest.mark.parametrize("adapter_dtype", [F32, BF16], ids=str)


def trained_llama(config: dict, adapter_dtype: torch.dtype = F32) -> nn.Module:
    model = peftkern.adapt(tiny_llama(), LoraConfig(**config))
    randomize_trained(model)
    for layer in adapted(model).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(adapter_dtype), layer.lora_B.data.to(adapter_dtype)
    return model.eval()


@configs
@dtypes
def test_peft_loads_what_we_save(peft, config, adapter_dtype, tmp_path):
    ours = trained_llama(config, adapter_dtype)
    assert peftkern.save_adapter(ours, tmp_path / "new" / "adapter") == tmp_path / "new" / "adapter"
    folder = tmp_path / "new" / "adapter"
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), folder, autocast_adapter_dtype=False).eval()
    modules = dict(theirs.named_modules())
    layers = adapted(ours)
    assert layers.keys() == {
        n.removeprefix(PREFIX) for n, m in modules.items() if isinstance(m, peft.tuners.lora.Linear)
    }
    for name, layer in layers.items():
        other = modules[PREFIX + name]
        for mine, linear in ((layer.lora_A, other.lora_A.default), (layer.lora_B, other.lora_B.default)):
            assert mine.dtype == adapter_dtype and torch.equal(mine.float(), linear.weight)  # theirs: the model's dtype
        assert other.scaling["default"] == layer.scaling
    assert {t.dtype for n, t in load_file(folder / WEIGHTS_NAME).items() if "lora_" in n} == {adapter_dtype}
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


@configs
@dtypes
def test_we_load_what_peft_saves(peft, config, adapter_dtype, tmp_path):
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**copy.deepcopy(config)))
    randomize_trained(theirs)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter_dtype)
    theirs.eval().save_pretrained(tmp_path)
    ours = peftkern.load_adapter(tiny_llama(), tmp_path).eval()
    stored = load_file(tmp_path / WEIGHTS_NAME)
    peftkern.save_adapter(ours, tmp_path / "again")
    assert equal(load_file(tmp_path / "again" / WEIGHTS_NAME), stored), "bit for bit, there and back"
    layers = adapted(ours)
    assert {f"{PREFIX}{n}.lora_A.weight" for n in layers} == {n for n in stored if "lora_A" in n}
    for name, layer in layers.items():
        assert layer.lora_A.dtype == layer.lora_B.dtype == adapter_dtype
        assert torch.equal(layer.lora_A, stored[f"{PREFIX}{name}.lora_A.weight"])
        assert layer.lora_dropout == config.get("lora_dropout", 0.0)
    tolerance = 1e-5 if adapter_dtype == F32 else 1e-2  # PEFT rounds the activations to the adapter's dtype
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=tolerance, atol=tolerance)
    assert (config.get("bias", "none") == "none") == (not any("bias" in n for n in adapter_of(ours)))


@configs
def test_round_trip(config, tmp_path):
    model = trained_llama(config)
    peftkern.save_adapter(model, str(tmp_path))
    fresh = peftkern.load_adapter(tiny_llama(), str(tmp_path)).eval()
    assert equal(adapter_of(fresh), adapter_of(model))
    assert torch.equal(fresh(TOKENS).logits, model(TOKENS).logits)
    again = peftkern.adapt(tiny_llama(), LoraConfig(**config | {"lora_alpha": 99, "lora_dropout": 0.5})).eval()
    peftkern.load_adapter(again, tmp_path)  # into one that has adapters: values and scaling are the file's
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert {m.lora_dropout for m in adapted(again).values()} == {config.get("lora_dropout", 0.0)}
    peftkern.save_adapter(again, tmp_path / "again")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_quantized_and_merged_models(tmp_path):
    config = LoraConfig(r=2)
    model = peftkern.adapt(tiny_llama(), config, quantize="nf4").eval()
    randomize(model)
    peftkern.save_adapter(model, tmp_path / "a")
    peftkern.merge(model)
    peftkern.save_adapter(model, tmp_path / "b")
    assert equal(load_file(tmp_path / "a" / WEIGHTS_NAME), load_file(tmp_path / "b" / WEIGHTS_NAME))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"q_proj: expected an unmerged layer to load an adapter into; call unmerge"):
        peftkern.load_adapter(model, tmp_path / "a")
    assert unchanged(model, before)
    peftkern.unmerge(model)
    base = tiny_llama().eval()
    for parent in list(base.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(parent, name, NF4Linear.from_linear(child))
    peftkern.load_adapter(base, tmp_path / "a")
    assert torch.equal(base(TOKENS).logits, model(TOKENS).logits)


def test_models_put_together_by_hand(peft, tmp_path):
    """No config to write down: it is what the layers say, and it means these layers alone."""

    def base():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), nn.Linear(8, 4)
        ).eval()

    model = base()
    model[0] = LoRALinear.from_linear(model[0], r=2, lora_alpha=3, lora_dropout=0.1)
    model[1][1] = LoRALinear.from_linear(model[1][1], r=4, lora_alpha=5)
    model[1][2] = LoRALinear.from_linear(model[1][2], r=2, lora_alpha=3)
    model[2] = LoRALinear.from_linear(model[2], r=3, lora_alpha=4)
    model[2].bias.requires_grad_()
    randomize(model.eval())
    with torch.no_grad():
        model[2].bias += 1
    peftkern.save_adapter(model, tmp_path)
    x = torch.randn(5, 8)
    ours = peftkern.load_adapter(base(), tmp_path).eval()
    assert torch.equal(ours(x), model(x))
    assert [m.scaling for m in adapted(ours).values()] == [m.scaling for m in adapted(model).values()]
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(theirs(x), model(x))
    model[0] = LoRALinear.from_linear(base()[0], r=2, use_rslora=True)
    with pytest.raises(RuntimeError, match=r"1\.1: expected use_rslora=True, one value for all layers of an adapter"):
        peftkern.save_adapter(model, tmp_path)


def test_the_config_is_what_peft_reads(peft, tmp_path, recwarn):
    model = peftkern.adapt(tiny_llama(), LoraConfig(**CONFIGS["patterns"], task_type="CAUSAL_LM"))
    peftkern.save_adapter(model, tmp_path)
    recwarn.clear()
    read = peft.LoraConfig.from_pretrained(tmp_path)
    assert not [str(w.message) for w in recwarn if "keyword" in str(w.message) or "nexpected" in str(w.message)]
    for field, value in CONFIGS["patterns"].items():
        got = getattr(read, field)
        assert (sorted(got) if isinstance(got, set) else got) == (sorted(value) if isinstance(value, list) else value)
    assert read.task_type == "CAUSAL_LM" and read.inference_mode and read.peft_type == "LORA"


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compiled", "parallel"]
)
def test_wrappers_do_not_change_the_names(wrap, tmp_path):
    model = peftkern.adapt(mlp(), LoraConfig(r=2, lora_alpha=5))
    randomize(model)
    peftkern.save_adapter(model, tmp_path / "plain")
    peftkern.save_adapter(wrap(model), tmp_path / "wrapped")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    for base in (mlp(), peftkern.adapt(mlp(), LoraConfig(r=2))):
        wrapped = wrap(base)
        assert peftkern.load_adapter(wrapped, tmp_path / "plain") is wrapped
        assert equal(adapter_of(base), adapter_of(model)) and base[0].scaling == 2.5


def test_the_loaded_adapter_is_independent_of_the_file(tmp_path):
    model = peftkern.adapt(mlp(), LoraConfig(r=2))
    randomize(model)
    peftkern.save_adapter(model, tmp_path)
    fresh = peftkern.load_adapter(mlp(), tmp_path)
    before = adapter_of(fresh)
    path = tmp_path / WEIGHTS_NAME
    with open(path, "r+b") as f:  # in place, as a writer that does not rename would
        f.write(b"\0" * path.stat().st_size)
    assert equal(adapter_of(fresh), before)


def test_a_module_with_two_names_is_saved_under_the_first(peft, tmp_path):
    """HF PEFT's key for it. There the module itself stays at the other name, here the adapter works at both."""

    def base():
        torch.manual_seed(0)
        linear = nn.Linear(8, 8)
        return nn.Sequential(linear, nn.ReLU(), nn.Linear(8, 8), linear)

    model = peftkern.adapt(base(), LoraConfig(r=2))
    assert model[0] is model[3] and sorted(adapted(model)) == ["0", "2"]
    randomize(model)
    peftkern.save_adapter(model, tmp_path / "ours")
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules="all-linear"))
    theirs.save_pretrained(tmp_path / "theirs")
    names = set(load_file(tmp_path / "ours" / WEIGHTS_NAME))
    assert names == set(load_file(tmp_path / "theirs" / WEIGHTS_NAME))
    fresh = peftkern.load_adapter(base(), tmp_path / "ours")
    x = torch.randn(3, 8)
    assert fresh[0] is fresh[3] and torch.equal(fresh(x), model(x))
    merged = peftkern.merge(model, unload=True)
    assert merged[0] is merged[3] and type(merged[3]) is nn.Linear


def test_saving_needs_an_adapter(tmp_path):
    with pytest.raises(RuntimeError, match="model: expected one with adapters"):
        peftkern.save_adapter(mlp(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- damaged files --------------------------------------------------------------------------------------------------


def change(edit):
    """edit, given the file's tensors, in place."""

    def harm(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return harm


def change_config(folder: Path, **values) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def overwrite(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


A0, B3 = f"{PREFIX}0.lora_A.weight", f"{PREFIX}3.lora_B.weight"
ST, JS = WEIGHTS_NAME, CONFIG_NAME

DAMAGE = {
    "truncated": (lambda d: (d / ST).write_bytes((d / ST).read_bytes()[:-40]), ST, "truncated or damaged"),
    "half a header": (lambda d: (d / ST).write_bytes((d / ST).read_bytes()[:20]), ST, "truncated or damaged"),
    "empty": (lambda d: (d / ST).write_bytes(b""), ST, "truncated or damaged"),
    "grown": (lambda d: (d / ST).write_bytes((d / ST).read_bytes() + b"x"), ST, "truncated or damaged"),
    "header size": (lambda d: overwrite(d / ST, 0, b"\xff" * 8), ST, "truncated or damaged"),
    "header bytes": (lambda d: overwrite(d / ST, 30, b"\x00\x01"), ST, "truncated or damaged"),
    "not safetensors": (lambda d: (d / ST).write_bytes(b"PK\x03\x04" * 100), ST, "truncated or damaged"),
    "missing tensor": (change(lambda t: t.pop(B3)), ST, f"1 missing .*{B3}.*0 unknown"),
    "extra tensor": (change(lambda t: t.update(z=torch.ones(2))), ST, "0 missing.*1 unknown .*'z'"),
    "renamed tensor": (change(lambda t: t.update(z=t.pop(A0))), ST, f"1 missing .*{A0}.*1 unknown"),
    "transposed": (
        change(lambda t: t.update({A0: t[A0].T.contiguous()})), ST,
        rf"{A0}: expected shape \[2, 16\], got \[16, 2\]",
    ),
    "rank": (change(lambda t: t.update({B3: t[B3][:, :1].clone()})), ST, f"{B3}: expected shape"),
    "NaN": (change(lambda t: t[A0].fill_(torch.nan)), ST, f"{A0}: expected finite values"),
    "inf": (change(lambda t: t[B3].view(-1)[-1:].fill_(-torch.inf)), ST, f"{B3}: expected finite"),
    "integers": (change(lambda t: t.update({A0: t[A0].long()})), ST, f"{A0}: expected dtype.*int64"),
    "doubles": (change(lambda t: t.update({A0: t[A0].double()})), ST, f"{A0}: expected dtype.*float64"),
    "no weights": (lambda d: (d / ST).unlink(), ST, "no such file|No such file"),
    "no config": (lambda d: (d / JS).unlink(), JS, "no such file|No such file"),
    "bad JSON": (lambda d: (d / JS).write_text((d / JS).read_text()[:-9]), JS, "expected JSON"),
    "binary config": (lambda d: (d / JS).write_bytes(b"\xff\xfe\x00{}"), JS, "expected JSON"),
    "a list": (lambda d: (d / JS).write_text("[1]"), JS, "expected a JSON object, got list"),
    "empty object": (lambda d: (d / JS).write_text("{}"), JS, "expected LORA or ADALORA, got None"),
    "other method": (lambda d: change_config(d, peft_type="IA3"), JS, "expected LORA or ADALORA, got 'IA3'"),
    "modules_to_save": (lambda d: change_config(d, modules_to_save=["nowhere"]), "", "modules_to_save: expected names"),
    "lora_bias": (lambda d: change_config(d, lora_bias=True), JS, "config.lora_bias"),
    "unknown option": (lambda d: change_config(d, use_magic=3), JS, "config.use_magic"),
    "no targets": (lambda d: change_config(d, target_modules=None), JS, "config.target_modules"),
    "r": (lambda d: change_config(d, r="2"), JS, "r: expected an int >= 1, got '2'"),
    "alpha": (lambda d: change_config(d, lora_alpha="16"), JS, "lora_alpha: expected a finite number, got '16'"),
    "other r": (lambda d: change_config(d, r=3), ST, r"expected shape \[3, 16\], got \[2, 16\]"),
    "bias": (lambda d: change_config(d, bias="all"), ST, "expected 9 tensors.*3 missing .*bias"),
    "targets": (lambda d: change_config(d, target_modules=["3"]), ST, "expected 2 tensors.*4 unknown"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters_change_nothing(damage, tmp_path):
    harm, file, message = DAMAGE[damage]
    saved = peftkern.adapt(mlp(), LoraConfig(r=2))
    randomize(saved)
    peftkern.save_adapter(saved, tmp_path)
    harm(tmp_path)
    plain = mlp()
    plain[0].bias.requires_grad_(False)
    models = [plain]
    if damage not in ("other r", "bias", "targets"):  # what an adapted model decides itself
        models.append(peftkern.adapt(mlp(), LoraConfig(r=2)))
    for model in models:
        before = snapshot(model)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            peftkern.load_adapter(model, tmp_path)
        assert file in str(error.value)
        assert isinstance(error.value, FileNotFoundError) == damage.startswith("no ") or damage == "no targets"
        assert unchanged(model, before)


def test_adapters_of_another_model(tmp_path):
    peftkern.save_adapter(peftkern.adapt(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])), tmp_path)
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"target_modules: .*matches none"):
        peftkern.load_adapter(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        peftkern.load_adapter(model, tmp_path / "nowhere")
    assert unchanged(model, before)
    other = peftkern.adapt(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"expected 8 tensors for this model; 4 missing .*v_proj"):
        peftkern.load_adapter(other, tmp_path)
    assert unchanged(other, before)


def test_biases_keep_the_dtype_of_the_model(tmp_path):
    saved = peftkern.adapt(mlp().to(BF16), LoraConfig(r=2, bias="all"))
    peftkern.save_adapter(saved, tmp_path)
    assert load_file(tmp_path / WEIGHTS_NAME)[f"{PREFIX}0.base_layer.bias"].dtype == BF16
    model = peftkern.load_adapter(mlp(), tmp_path)
    assert model[0].bias.dtype == F32 and torch.equal(model[0].bias, saved[0].bias.float())
    assert model[0].lora_A.dtype == F32
    half = peftkern.adapt(mlp(), LoraConfig(r=2, bias="all")).half()
    peftkern.load_adapter(half, tmp_path)
    assert {p.dtype for p in half.parameters()} == {F16}


# ---- failing disks --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, its content, and another adapter to save over it."""
    first, second = peftkern.adapt(mlp(), LoraConfig(r=2)), peftkern.adapt(mlp(), LoraConfig(r=3, lora_alpha=4))
    folder = peftkern.save_adapter(first, tmp_path / "adapter")
    return folder, {p.name: p.read_bytes() for p in folder.iterdir()}, second


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    "function", ["os.replace", "os.fsync", "peftkern.adapter_io.save_file", "pathlib.Path.write_text"]
)
@pytest.mark.parametrize("first_write", [True, False])
def test_a_full_disk_leaves_the_old_adapter(saved, function, first_write, monkeypatch):
    folder, before, model = saved
    if first_write:
        folder = folder.parent / "new"
        before = {}

    def no_space(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(function, no_space)
    with pytest.raises(OSError, match=r"could not write.*No space left") as error:
        peftkern.save_adapter(model, folder)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(folder)
    assert content(folder) == before, "no file changed, none left over"
    peftkern.save_adapter(model, folder)  # and with space again, it works
    assert peftkern.load_adapter(mlp(), folder)[0].r == 3


def test_an_interrupt_leaves_the_old_adapter(saved, monkeypatch):
    folder, before, model = saved

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("peftkern.adapter_io.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        peftkern.save_adapter(model, folder)
    assert content(folder) == before


FULL_DISK = """
import resource, signal, sys
import torch, peftkern
model = peftkern.adapt(torch.nn.Sequential(torch.nn.Linear(512, 512)), peftkern.LoraConfig(r=64))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    peftkern.save_adapter(model, sys.argv[1])
except OSError as error:
    print("OSError", error)
"""


@pytest.mark.parametrize("limit", [100_000, 100], ids=["weights", "at once"])
def test_a_disk_that_is_really_full(tmp_path, limit):
    """The kernel refuses to write on: a limit on the size of a file stands in for a full disk."""
    pytest.importorskip("resource")
    model = peftkern.adapt(nn.Sequential(nn.Linear(512, 512)), LoraConfig(r=2))
    peftkern.save_adapter(model, tmp_path)
    before = content(tmp_path)
    root = Path(peftkern.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OSError") and "could not write" in done.stdout
    assert content(tmp_path) == before


def test_qlora_layers_save_like_lora_layers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(QLoRALinear(64, 8, r=2, init_lora_weights=False))
    peftkern.save_adapter(model, tmp_path)
    other = nn.Sequential(QLoRALinear(64, 8, r=2))
    peftkern.load_adapter(other, tmp_path)
    assert equal(adapter_of(other), adapter_of(model))


def test_a_failure_between_the_two_renames_rolls_back(tmp_path, monkeypatch):
    """Old weights and old config, or new ones; not one of each."""
    old, new = (peftkern.adapt(nn.Sequential(nn.Linear(64, 8)), peftkern.LoraConfig(r=r)) for r in (2, 4))
    peftkern.save_adapter(old, tmp_path)
    replace, calls = os.replace, []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(*args)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="what was there before is kept"):
        peftkern.save_adapter(new, tmp_path)
    monkeypatch.undo()
    peftkern.load_adapter(old, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
