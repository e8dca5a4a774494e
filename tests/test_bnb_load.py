# SPDX-License-Identifier: Apache-2.0
"""Whole models that bitsandbytes quantized: read from disk without it, and converted in memory."""

import json
import subprocess
import sys

import pytest
import torch
from samples import BF16, F16, F32
from test_bnb import json_entry, stored_weight
from torch import nn

import peftkern
from peftkern import NF4Config, NF4Linear, NF4Weight, dequantize_nf4

transformers = pytest.importorskip("transformers", minversion="5.23")
from safetensors.torch import load_file, save_file  # noqa: E402
from test_transformers import IDS, assert_reload_is_equal, assert_same_state, load, save, tiny_llama  # noqa: E402

STATE = "quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def write_bnb_folder(folder, nested: bool, shards: int = 1, dtype=BF16, **model_options) -> nn.Module:
    """A checkpoint as transformers and bitsandbytes write one, from the definition of the layout; returns the model."""
    dense = tiny_llama(dtype, **model_options)
    dense.config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip
    dense.config.architectures = ["LlamaForCausalLM"]
    dense.config.save_pretrained(folder)
    linears = {n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    state = {}
    for name, t in dense.state_dict().items():
        if name.removesuffix(".weight") in linears:
            state |= {k: v.clone() for k, v in stored_weight(t, 64, nested, name).items()}
        elif not (name == "lm_head.weight" and dense.config.tie_word_embeddings):
            state[name] = t
    files = {}
    for i in range(shards):  # the entries of one weight may lie in different files
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {k: state[k] for k in list(state)[i::shards]}
        save_file(part, folder / name, {"format": "pt"})
        files |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return dense


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_checkpoint_is_read_byte_for_byte(tmp_path, nested, shards, tied):
    dense = write_bnb_folder(tmp_path, nested, shards, tie_word_embeddings=tied, attention_bias=not tied)
    model = peftkern.load_bnb(tmp_path)
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert len(quantized) == 14 and type(model.lm_head) is nn.Linear
    for name, layer in quantized.items():
        stored = NF4Weight.from_bnb(stored_weight(dense.get_submodule(name).weight, 64, nested))
        assert layer.nf4_config == NF4Config(64, nested) and layer.quantized_dtype == BF16
        weight = layer.base_weight()
        for part in ("packed", "absmax", "nested_absmax", "offset"):
            a, b = getattr(weight, part), getattr(stored, part)
            assert a is b is None or torch.equal(a.reshape(-1), b.reshape(-1)), f"{name}.{part}"
    for name, p in dense.named_parameters():
        if name.rpartition(".")[0] not in quantized:
            assert torch.equal(model.get_parameter(name), p), name
    reloaded = assert_reload_is_equal(model, tmp_path / "ours")
    assert reloaded.config.quantization_config == NF4Config(64, nested, ["lm_head"])
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_another_dtype(tmp_path, dtype):
    write_bnb_folder(tmp_path, True)
    model = peftkern.load_bnb(tmp_path, dtype=dtype, device_map="cpu")
    assert model.dtype == model.model.norm.weight.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.quantized_dtype == BF16, "the dtype that was quantized"
    assert model(IDS).logits.dtype == dtype


def test_bitsandbytes_is_not_needed(tmp_path):
    """A process in which importing it fails."""
    (tmp_path / "bnb").mkdir()
    write_bnb_folder(tmp_path / "bnb", True, 2)
    torch.save(peftkern.load_bnb(tmp_path / "bnb").state_dict(), tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["bitsandbytes"] = None
import torch, peftkern
try:
    import bitsandbytes
except ImportError:
    pass
else:
    raise SystemExit("bitsandbytes was imported")
model = peftkern.load_bnb({str(tmp_path / "bnb")!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
state = model.state_dict()
assert state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)
peftkern.adapt(model, peftkern.LoraConfig(r=2))
ids = torch.arange(8)[None]
model(input_ids=ids, labels=ids).loss.backward()
print("trained")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "trained", out.stderr


UP = "model.layers.1.mlp.up_proj.weight"


def damage(tensors, kind):
    if kind == "fp4":
        tensors[f"{UP}.quant_state.bitsandbytes__fp4"] = tensors.pop(f"{UP}.{STATE}")
    elif kind == "int8":
        for key in [k for k in tensors if k.startswith(UP)]:
            del tensors[key]
        tensors[UP] = torch.zeros(96, 64, dtype=torch.int8)
        tensors[UP.replace("weight", "SCB")] = torch.ones(96)
    elif kind == "no absmax":
        del tensors[f"{UP}.absmax"]
    elif kind == "code book":
        tensors[f"{UP}.quant_map"] = torch.linspace(-1, 1, 16)
    elif kind == "no state":
        del tensors[f"{UP}.{STATE}"]
    elif kind == "shape":
        described = json.loads(bytes(tensors[f"{UP}.{STATE}"].tolist()))
        tensors[f"{UP}.{STATE}"] = json_entry(described | {"shape": [64, 96]})
    elif kind == "unknown layer":
        for key in [k for k in tensors if k.startswith(UP)]:
            tensors[key.replace("up_proj", "side_proj")] = tensors[key].clone()


@pytest.mark.parametrize(
    "kind, message",
    [
        ("fp4", f"{UP}: expected NF4, got fp4"),
        ("int8", f"{UP}: expected NF4, got int8"),
        ("no absmax", f"{UP}: expected the entry 'weight.absmax'"),
        ("code book", f"{UP}: weight.quant_map: expected the standard code book"),
        ("no state", f"{UP}: weight: expected the entry 'weight.{STATE}'"),
        ("shape", f"{UP}: expected shape [96, 64], got [64, 96]"),
        ("unknown layer", "side_proj.weight: expected an nn.Linear of the model"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, kind, message, caplog):
    caplog.set_level("WARNING", logger="transformers")  # `peftkern finetune` lowers it for its process
    write_bnb_folder(tmp_path, False)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors, kind)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)) as error:
        peftkern.load_bnb(tmp_path)
    # What comes up while a tensor is converted transformers logs, and raises an error of its own at the end.
    assert message in (caplog.text if type(error.value) is RuntimeError else str(error.value))


def test_other_checkpoints_are_refused(tmp_path):
    save(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="path: expected a checkpoint quantized by bitsandbytes"):
        peftkern.load_bnb(tmp_path)


# ---- bitsandbytes itself --------------------------------------------------------------------------------------------


def load_with_bnb(folder, nested=False, **options):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": F32} | options
    return load(folder, transformers.BitsAndBytesConfig(bnb_4bit_use_double_quant=nested, **settings), F32)


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_real_checkpoints_and_models(bnb, tmp_path, nested):
    # Rows that are multiples of a block, as in real models; elsewhere bitsandbytes' CPU code restarts the blocks.
    dense = save(tiny_llama(F32, intermediate_size=128), tmp_path / "dense")
    theirs = load_with_bnb(dense, nested)
    save(theirs, tmp_path / "bnb", max_shard_size="30KB")
    ours = peftkern.load_bnb(tmp_path / "bnb")
    theirs.train()  # in eval mode bitsandbytes repacks the weights for the CPU, with rounded scales
    with torch.no_grad():
        expected = theirs(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        values = {n: bnb.functional.dequantize_4bit(m.weight, m.weight.quant_state).clone()
                  for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}  # fmt: skip
        pointers = {n: theirs.get_submodule(n).weight.data_ptr() for n in values}
        assert peftkern.convert_bnb(theirs) is theirs
        assert_same_state(theirs, ours)
        for name, value in values.items():
            layer = theirs.get_submodule(name)
            assert layer.weight.data_ptr() == pointers[name], "the bytes are shared"
            assert torch.equal(layer.dequantize(), value)
        assert torch.equal(theirs(IDS).logits, ours(IDS).logits)
    assert not getattr(theirs, "is_loaded_in_4bit", False)
    assert_reload_is_equal(theirs, tmp_path / "ours")
    if not nested:  # quantized by us: the same bytes
        assert_same_state(ours, load(dense, NF4Config(), F32))


def test_real_checkpoints_of_conv1d(bnb, tmp_path):
    """GPT-2: bitsandbytes stores them transposed, as [out, in]."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=32)
    theirs = load_with_bnb(save(transformers.GPT2LMHeadModel(config), tmp_path / "dense")).train()
    save(theirs, tmp_path / "bnb")
    ours = peftkern.load_bnb(tmp_path / "bnb")
    for name, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            expected = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
            assert torch.equal(ours.get_submodule(name).dequantize(), expected), name
    assert sum(isinstance(m, NF4Linear) for m in ours.modules()) == 4
    assert_reload_is_equal(ours, tmp_path / "ours")


def test_convert_refuses(bnb, tmp_path):
    peft = pytest.importorskip("peft")
    dense = save(tiny_llama(F32), tmp_path)
    with pytest.raises(ValueError, match="Linear4bit layers, got one without"):
        peftkern.convert_bnb(load(dense))
    fp4 = load_with_bnb(dense, bnb_4bit_quant_type="fp4")
    before = {n: type(m) for n, m in fp4.named_modules()}
    with pytest.raises(ValueError, match=r"q_proj\.weight: expected quant_type 'nf4', got 'fp4'"):
        peftkern.convert_bnb(fp4)
    assert before == {n: type(m) for n, m in fp4.named_modules()}
    with pytest.raises(ValueError, match="lm_head: expected bitsandbytes' Linear4bit, got Linear8bitLt"):
        model = load_with_bnb(dense)
        model.lm_head = bnb.nn.Linear8bitLt(64, 128, bias=False)
        peftkern.convert_bnb(model)
    wrapped = peft.get_peft_model(load_with_bnb(dense), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj: .*without HF PEFT's adapters"):
        peftkern.convert_bnb(wrapped)


def test_a_model_repacked_for_the_cpu_is_refused(bnb):
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4").to("cpu").eval()
    with torch.no_grad():
        layer(torch.randn(2, 128))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks only on CPUs with AVX-512 BF16")
    with pytest.raises(ValueError, match=r"0\.weight: .*before its first call in eval mode"):
        peftkern.convert_bnb(nn.Sequential(layer))


def test_convert_a_plain_module(bnb):
    """A layer that has not been quantized yet is quantized as bitsandbytes would."""
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=True)
    w = layer.weight.data.clone()
    model = nn.Sequential(layer, nn.ReLU(), bnb.nn.Linear4bit(32, 8, bias=False, quant_type="nf4").to("cpu"))
    peftkern.convert_bnb(model)
    assert [type(m) for m in model] == [NF4Linear, nn.ReLU, NF4Linear]
    assert model[0].nf4_config == NF4Config(64, True) and model[0].bias is layer.bias
    assert torch.equal(model[0].dequantize(), dequantize_nf4(peftkern.quantize_nf4(w, 64, True)))
    assert model(torch.randn(3, 64)).shape == (3, 8)
