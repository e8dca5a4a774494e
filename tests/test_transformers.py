# SPDX-License-Identifier: Apache-2.0
"""``from_pretrained`` with NF4Config: what is quantized, saved, reloaded, refused. Models are made here, offline."""

import copy
import json
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from samples import BF16, F16, F32
from torch import nn

import peftkern
from peftkern import LoraConfig, NF4Config, NF4Linear, dequantize_nf4, quantize_nf4

transformers = pytest.importorskip("transformers", minversion="5.23")
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [NF4Config(), NF4Config(128, True)], ids=["64", "128-double"])
IDS = torch.arange(24).reshape(2, 12) * 5 % 128


def tiny_llama(dtype=BF16, **options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | options))).to(dtype).eval()


def load(folder, config=None, dtype=BF16, **options):
    if config is not None:
        options["quantization_config"] = config
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def assert_same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_reload_is_equal(model, folder, **options):
    save(model, folder)
    reloaded, report = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    assert_same_state(model, reloaded)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in reloaded.parameters()]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reloaded(IDS).logits)
    return reloaded


@CONFIGS
@pytest.mark.parametrize("shards", [None, "30KB"], ids=["", "sharded"])
def test_loading_quantizes_each_linear(tmp_path, config, shards):
    dense = tiny_llama()
    save(dense, tmp_path / "dense", **({"max_shard_size": shards} if shards else {}))
    assert (len(list((tmp_path / "dense").glob("*.safetensors"))) > 3) == bool(shards)
    model = load(tmp_path / "dense", config)
    for name, linear in dense.named_modules():
        if isinstance(linear, nn.Linear):
            got = model.get_submodule(name)
            if name == "lm_head":
                assert type(got) is nn.Linear and torch.equal(got.weight, linear.weight)
                continue
            expected = NF4Linear.from_linear(linear, config.block_size, config.double_quant)
            assert type(got) is NF4Linear and got.nf4_config == expected.nf4_config, name
            assert got.quantized_dtype == BF16 and not any(p.requires_grad for p in got.parameters())
            assert_same_state(got, expected)
    assert_reload_is_equal(model, tmp_path / "nf4")
    described = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert described == {
        "quant_method": "peftkern", "block_size": config.block_size, "double_quant": config.double_quant,
        "modules_to_not_convert": None,
    }  # fmt: skip
    with safe_open(tmp_path / "nf4" / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.mlp.up_proj.weight").get_shape() == [96, 32]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_dtype_asked_for_is_quantized_and_remembered(tmp_path, dtype):
    """Also from a float32 checkpoint: cast first, as transformers does for bitsandbytes."""
    dense = tiny_llama(F32)
    model = load(save(dense, tmp_path / "dense"), NF4Config(), dtype)
    layer = model.model.layers[0].mlp.up_proj
    expected = quantize_nf4(dense.model.layers[0].mlp.up_proj.weight.to(dtype))
    assert torch.equal(layer.weight, expected.packed) and layer.dequantize().dtype == dtype
    assert torch.equal(layer.dequantize(), dequantize_nf4(expected))
    assert model.dtype == dtype and model.model.norm.weight.dtype == dtype
    reloaded = assert_reload_is_equal(model, tmp_path / "nf4")  # the dtype is in config.json
    assert reloaded.dtype == dtype and reloaded.model.layers[0].mlp.up_proj.quantized_dtype == dtype


def test_what_is_not_converted(tmp_path):
    dense = save(tiny_llama(tie_word_embeddings=True), tmp_path / "tied")
    names = ["q_proj", "model.layers.1.mlp", r"model\.layers\.0\.self_attn\.[kv]_proj"]
    config = NF4Config(modules_to_not_convert=names)
    model = load(dense, config)
    kept = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, NF4Linear)}
    layers = [f"model.layers.{i}" for i in (0, 1)]
    expected = {f"{layer}.self_attn.q_proj" for layer in layers} | {"lm_head"}
    expected |= {f"{layers[0]}.self_attn.{n}_proj" for n in "kv"}
    expected |= {f"{layers[1]}.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert kept == expected
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reloaded = assert_reload_is_equal(model, tmp_path / "nf4")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert reloaded.config.quantization_config == config


def test_conv1d_becomes_an_nf4_linear(tmp_path):
    """GPT-2 keeps [in, out]; NF4 blocks run along the inputs of an output, as everywhere."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32)
    dense = transformers.GPT2LMHeadModel(config).eval()
    model = load(save(dense, tmp_path / "dense"), NF4Config(), F32)
    conv, layer = dense.transformer.h[1].mlp.c_fc, model.transformer.h[1].mlp.c_fc
    assert type(layer) is NF4Linear and layer.weight.shape == (256, 32)
    assert torch.equal(layer.dequantize(), dequantize_nf4(quantize_nf4(conv.weight.T)))
    assert torch.equal(layer.bias, conv.bias)
    with torch.no_grad():
        for module in dense.modules():
            if isinstance(module, transformers.pytorch_utils.Conv1D):
                module.weight.copy_(dequantize_nf4(quantize_nf4(module.weight.T)).T)
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    assert_reload_is_equal(model, tmp_path / "nf4")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "meta"], ids=str)
def test_device_map(tmp_path, device_map):
    model = load(save(tiny_llama(), tmp_path), NF4Config(double_quant=True), device_map=device_map)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.device.type == (device_map if isinstance(device_map, str) else "cpu")
    if device_map == "meta":  # materialize, and load what another process has quantized
        source = load(tmp_path, NF4Config(double_quant=True))
        model.to_empty(device="cpu").load_state_dict(source.state_dict())
        assert_same_state(model, source)


def test_offloading_to_disk(tmp_path):
    pytest.importorskip("accelerate")
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    options = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    dense = save(tiny_llama(), tmp_path / "dense")
    with pytest.raises(ValueError, match='device_map: expected no "disk"'):
        load(dense, NF4Config(), **options)
    model = load(dense, NF4Config(double_quant=True))
    with torch.no_grad():
        offloaded = load(save(model, tmp_path / "nf4"), **options)
        assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
        assert torch.equal(offloaded(IDS).logits, model(IDS).logits)


# ---- experts --------------------------------------------------------------------------------------------------------


def tiny_mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def tiny_qwen_moe():
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": 16, "moe_intermediate_size": 48}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2)
    return transformers.Qwen3MoeForCausalLM(config)


def tiny_gpt_oss():
    """Transposed weights, biases, interleaved gates with a gate function of its own."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16, layer_types=["full_attention"] * 2
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(p)
    return model


MOE = pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen_moe, tiny_gpt_oss])


def experts_of(model) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith("experts")}


def round_to_nf4(w: torch.Tensor, config: NF4Config, transposed: bool) -> torch.Tensor:
    def one(e):
        return dequantize_nf4(quantize_nf4(e, config.block_size, config.double_quant))

    return torch.stack([one(e.T).T if transposed else one(e) for e in w])


@MOE
@CONFIGS
def test_fused_experts_are_quantized(tmp_path, make, config):
    dense = make().eval()
    model = load(save(dense, tmp_path / "dense"), config, F32)
    assert len(experts_of(model)) == 2
    for name, experts in experts_of(model).items():
        assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.uint8, name
        assert not experts.gate_up_proj.requires_grad
    footprint = peftkern.memory_footprint(model)
    experts_weights = sum(m.gate_up_proj.numel() + m.down_proj.numel() for m in experts_of(dense).values())
    linear_weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    assert footprint["quantized_params"] == experts_weights + linear_weights
    assert 4 < footprint["bits_per_param"] < 4.6
    assert "NF4 experts, one after the other" in peftkern.explain(model)
    with torch.no_grad():  # the same model with its weights rounded, in transformers' own code
        for name, module in dense.named_modules():
            if name in experts_of(dense):
                for p in (module.gate_up_proj, module.down_proj):
                    p.copy_(round_to_nf4(p, config, module.is_transposed))
            elif isinstance(module, nn.Linear) and isinstance(model.get_submodule(name), NF4Linear):
                module.weight.copy_(model.get_submodule(name).dequantize())
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-5)
    assert_reload_is_equal(model, tmp_path / "nf4")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(IDS).logits, model(IDS).logits)
        assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, model(IDS).logits)


@MOE
def test_gradients_through_quantized_experts(tmp_path, make):
    dense = make().train()
    model = load(save(dense, tmp_path / "dense"), NF4Config(), F32).train()
    for name, experts in experts_of(dense).items():
        with torch.no_grad():
            for leaf in ("gate_up_proj", "down_proj"):
                p = getattr(experts, leaf)
                p.copy_(round_to_nf4(p, NF4Config(), experts.is_transposed))
        theirs, ours = experts, model.get_submodule(name)
        x = torch.randn(10, 64)
        index = torch.stack([torch.randperm(3)[:2] for _ in range(10)])  # the last expert gets nothing
        weights = torch.rand(10, 2)
        grads = []
        for module in (theirs, ours):
            leaves = [t.clone().requires_grad_() for t in (x, weights)]
            module(leaves[0], index, leaves[1]).square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_adapters_beside_and_on_experts(tmp_path):
    """On the linear layers, ours and PEFT's; PEFT's on the experts themselves only if these are dense."""
    peft = pytest.importorskip("peft")
    folder = save(tiny_mixtral(), tmp_path / "dense")
    model = peftkern.adapt(load(folder, NF4Config(), F32), LoraConfig(r=2))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in peftkern.trainable_parameters(model))
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    packed = peft.get_peft_model(load(folder, NF4Config(), F32), config)
    with pytest.raises(RuntimeError, match="expected experts in NF4 without a parametrization"):
        packed(IDS)
    dense = peft.get_peft_model(load(folder, NF4Config(modules_to_not_convert=["experts"]), F32), config)
    dense(input_ids=IDS, labels=IDS).loss.backward()


def test_experts_left_dense(tmp_path):
    folder = save(tiny_mixtral(), tmp_path / "dense")
    model = load(folder, NF4Config(modules_to_not_convert=["model.layers.0.mlp.experts"]), F32)
    kinds = [experts.gate_up_proj.dtype for experts in experts_of(model).values()]
    assert kinds == [F32, torch.uint8]
    assert_reload_is_equal(model, tmp_path / "nf4")


def test_unknown_stacked_weights_are_refused(tmp_path):
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1, head_dim=16, moe_layers=[0, 1]
    )  # fmt: skip
    folder = save(transformers.Llama4ForCausalLM(config), tmp_path / "dense")
    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.experts\.gate_up_proj: .*Llama4TextExperts"):
        load(folder, NF4Config(), F32)
    model = load(folder, NF4Config(modules_to_not_convert=["experts"]), F32)
    assert type(model.model.layers[0].self_attn.q_proj) is NF4Linear
    assert model.model.layers[0].feed_forward.experts.gate_up_proj.dtype == F32


# ---- errors and environment -----------------------------------------------------------------------------------------


def test_bad_weights_are_named(tmp_path, caplog):
    caplog.set_level("WARNING", logger="transformers")  # `peftkern finetune` lowers it for its process
    folder = save(tiny_llama(F32), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion of the weights"):  # of transformers, which logs them first
        load(folder, NF4Config(), F32)
    assert "model.layers.1.mlp.up_proj.weight: w: expected finite weights" in caplog.text


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path):
    model = load(save(tiny_llama(), tmp_path / "dense"), NF4Config())
    save(model, tmp_path / "nf4")
    path = tmp_path / "nf4" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["block_size"] = 32
    path.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # of transformers, which lists them
        load(tmp_path / "nf4")
    config["quantization_config"] = {"quant_method": "peftkern", "blocksize": 64}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected the fields of NF4Config, got .*blocksize"):
        load(tmp_path / "nf4")
    with pytest.raises(ValueError, match="modules_to_not_convert: expected a list of names"):
        NF4Config(modules_to_not_convert="lm_head")
    with pytest.raises(ValueError, match="quantize: expected an NF4Config without modules_to_not_convert"):
        peftkern.adapt(nn.Sequential(nn.Linear(8, 8)), LoraConfig(), NF4Config(modules_to_not_convert=["0"]))


@pytest.mark.parametrize("order", ["peftkern, transformers", "transformers, peftkern"])
def test_import_order_and_cost(tmp_path, order):
    """A reload needs only both imports, in any order; importing us imports no other library."""
    save(load(save(tiny_llama(), tmp_path / "dense"), NF4Config()), tmp_path / "nf4")
    reload = f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'nf4')!r})"
    code = f"import {order}\n{reload}\nprint(type(model.model.layers[0].mlp.up_proj).__name__)"
    if order.startswith("peftkern"):
        heavy = {"transformers", "peft", "accelerate", "bitsandbytes", "trl", "torch.distributed.tensor"}
        code = f"import sys, peftkern\nassert not {heavy} & set(sys.modules)\n{code}"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip().splitlines()[-1:] == ["NF4Linear"], out.stderr


def test_an_older_transformers_is_refused(tmp_path, monkeypatch):
    folder = save(tiny_llama(), tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.22.1")
    with pytest.raises(ImportError, match="transformers: expected version 5.23 or later .*, got 5.22.1"):
        load(folder, NF4Config())


def test_dequantize_and_memory(tmp_path):
    model = load(save(tiny_llama(), tmp_path), NF4Config())
    footprint = peftkern.memory_footprint(model)
    assert footprint["bits_per_param"] == 4.5
    expected = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    dense = model.dequantize()
    for name, weight in expected.items():
        assert type(dense.get_submodule(name)) is nn.Linear and torch.equal(dense.get_submodule(name).weight, weight)
    assert not getattr(dense, "is_quantized", False) and not hasattr(dense.config, "quantization_config")


def test_adapters_on_a_quantized_model(tmp_path):
    """adapt() takes what from_pretrained quantized; the result is that of quantizing in adapt()."""
    folder = save(tiny_llama(), tmp_path / "dense")
    one = load(folder, NF4Config(double_quant=True))
    other = load(folder)
    logits = []
    for model, quantize in ((one, None), (other, NF4Config(double_quant=True))):
        torch.manual_seed(1)
        peftkern.adapt(model, LoraConfig(r=4, init_lora_weights=False), quantize=quantize)
        logits.append(model.eval()(IDS).logits)
    assert torch.equal(*logits)


LOAD_AND_WATCH = """
import sys, threading
import torch, transformers, peftkern
from transformers.models.llama import modeling_llama

def own_memory():  # without mapped files, whose pages the kernel drops when it needs them
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

peftkern.quantize_nf4(torch.randn(256, 256))
before, peak, done = own_memory(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, own_memory())

threading.Thread(target=watch, daemon=True).start()
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=peftkern.NF4Config(double_quant=True), dtype=torch.bfloat16
)
done.set()
layers = sum(isinstance(m, peftkern.NF4Linear) for m in model.modules())
print(peak - before, peftkern.memory_footprint(model)["total_bytes"], layers)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_loading(tmp_path_factory):
    """A checkpoint of 1 GiB, written shard by shard: at most 1.2 times the NF4 model and one tensor in float32."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=12, vocab_size=512, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        config.save_pretrained(folder)
        with torch.device("meta"):
            shapes = {name: t.shape for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
        values = torch.randn(2048 * 5632, dtype=BF16)
        files: dict[str, dict[str, torch.Size]] = {}
        for name, shape in shapes.items():
            part = name.split(".")[2] if ".layers." in name else "rest"
            files.setdefault(f"model-{part}.safetensors", {})[name] = shape
        for file, parts in files.items():
            tensors = {name: values[: shape.numel()].reshape(shape).clone() for name, shape in parts.items()}
            save_file(tensors, f"{folder}/{file}", {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, parts in files.items() for name in parts}}
        Path(folder, "model.safetensors.index.json").write_text(json.dumps(index))
        assert sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) > 2**30
        out = subprocess.run([sys.executable, "-c", LOAD_AND_WATCH, folder], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    peak, final, layers = map(int, out.stdout.split())
    assert layers == 12 * 7 and final < 0.29 * 2**30
    assert final * 0.8 < peak < 1.2 * final + 4 * 2048 * 5632, f"{peak / 2**20:.0f} of {final / 2**20:.0f} MiB"
