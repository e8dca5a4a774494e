# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments to the modules and wrong inputs to their calls: the exception names the argument and what came."""

import copy

import pytest
import torch
from samples import BF16, F32
from torch import nn

import peftkern
from peftkern import LoraConfig, LoRALinear, NF4Config, NF4Linear, QLoRALinear
from peftkern.ops.library import ops

ADAPTED = pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear])
LAYERS = pytest.mark.parametrize("cls", [LoRALinear, QLoRALinear, NF4Linear])

OPTIONS = [
    ({"r": 0}, "r: expected an int >= 1, got 0"),
    ({"r": -1}, "r: expected an int >= 1, got -1"),
    ({"r": 1.5}, "r: expected an int >= 1, got 1.5"),
    ({"r": "8"}, "r: expected an int >= 1, got '8'"),
    ({"r": True}, "r: expected an int >= 1, got True"),
    ({"lora_dropout": 1.0}, "lora_dropout: expected 0 <= p < 1, got 1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout: expected 0 <= p < 1, got -0.1"),
    ({"lora_dropout": float("nan")}, "lora_dropout: expected 0 <= p < 1, got nan"),
    ({"lora_dropout": "0.1"}, "lora_dropout: expected 0 <= p < 1, got '0.1'"),
    ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number, got inf"),
    ({"lora_alpha": "16"}, "lora_alpha: expected a finite number, got '16'"),
    ({"init_lora_weights": "eva"}, "init_lora_weights: expected one of .*got 'eva'"),
    ({"init_lora_weights": None}, "init_lora_weights: expected one of .*got None"),
]
options = pytest.mark.parametrize("option, message", OPTIONS, ids=str)


@ADAPTED
@options
def test_bad_adapter_options(cls, option, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        cls(64, 32, **option)
    linear = nn.Linear(64, 32)
    with pytest.raises(ValueError, match=f"^{message}"):
        cls.from_linear(linear, **option)
    assert linear.weight.requires_grad and linear.bias.requires_grad, "the layer is left as it was"


@options
def test_bad_options_of_a_config(option, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LoraConfig(**option)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"bias": "some"}, "bias: expected one of .*got 'some'"),
        ({"target_modules": []}, r"target_modules: expected names, a pattern or \"all-linear\", got \[\]"),
        ({"target_modules": ""}, "target_modules: expected names"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]: expected an int >= 1, got 0"),
        ({"rank_pattern": {"q": "4"}}, r"rank_pattern\['q'\]: expected an int >= 1, got '4'"),
        ({"alpha_pattern": {"q": "4"}}, r"alpha_pattern\['q'\]: expected a finite number, got '4'"),
        ({"alpha_pattern": {"q": float("nan")}}, r"alpha_pattern\['q'\]: expected a finite number, got nan"),
    ],
    ids=str,
)
def test_bad_fields_of_a_config(option, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LoraConfig(**option)


@LAYERS
@pytest.mark.parametrize("value", [0, -4, 1.5, "64", None])
def test_bad_sizes(cls, value):
    with pytest.raises(ValueError, match=r"^in_features: expected an int >= 1, got"):
        cls(value, 32)
    with pytest.raises(ValueError, match=r"^out_features: expected an int >= 1, got"):
        cls(64, value)


@pytest.mark.parametrize("value", [0, 16, 48, 8192, -64, "64", None])
def test_bad_block_sizes(value):
    linear = nn.Linear(64, 32)
    for call in (
        lambda: NF4Linear(64, 32, block_size=value),
        lambda: NF4Linear.from_linear(linear, block_size=value),
        lambda: QLoRALinear(64, 32, quantize=NF4Config(value)),
    ):
        with pytest.raises(ValueError, match=r"^block_size: expected one of .*4096.*got"):
            call()


@pytest.mark.parametrize("value", ["int4", "NF4", 4, True, {"block_size": 64}])
def test_bad_quantize(value):
    linear = nn.Linear(64, 32)
    message = '^quantize: expected None, "nf4" or an NF4Config, got'
    for call in (
        lambda: LoRALinear.from_linear(linear, quantize=value),
        lambda: QLoRALinear.from_linear(linear, quantize=value),
        lambda: QLoRALinear(64, 32, quantize=value),
        lambda: peftkern.adapt(nn.Sequential(linear), LoraConfig(), quantize=value),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert linear.weight.requires_grad


def test_quantizing_twice():
    for cls in (LoRALinear, QLoRALinear):
        with pytest.raises(ValueError, match="quantize: expected None for a layer whose weight is NF4 already"):
            cls.from_linear(NF4Linear(64, 32), quantize="nf4")


@LAYERS
@pytest.mark.parametrize("what", [nn.Conv1d(4, 4, 1), nn.Embedding(4, 4), torch.zeros(4, 4), None], ids=str)
def test_only_linears_can_be_adapted(cls, what):
    with pytest.raises(TypeError, match=f"linear: expected an nn.Linear, got {type(what).__name__}"):
        cls.from_linear(what)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_linears_with_a_forward_of_their_own_are_refused():
    linear = ScaledLinear(8, 8)
    with pytest.raises(TypeError, match="got ScaledLinear, which has a forward of its own"):
        LoRALinear.from_linear(linear)
    model = nn.Sequential(nn.Linear(8, 8), linear)
    with pytest.raises(TypeError, match=r"^1: linear: expected an nn\.Linear, got ScaledLinear"):
        peftkern.adapt(model, LoraConfig())
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_quantized(value):
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight[3, 5] = value
    for call in (
        lambda: NF4Linear.from_linear(linear),
        lambda: LoRALinear.from_linear(linear, quantize="nf4"),
        lambda: QLoRALinear.from_linear(linear),
    ):
        with pytest.raises(ValueError, match="expected finite weights, got 1 NaN or infinite of 2048"):
            call()
    assert linear.weight.requires_grad and linear.bias.requires_grad


@LAYERS
def test_bad_inputs(cls):
    layer = cls(64, 32)
    for x in (torch.randn(2, 63), torch.randn(64, 2), torch.randn(())):
        with pytest.raises(RuntimeError, match=r"(x|weight): expected (shape|at least)"):
            layer(x)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises((RuntimeError, TypeError), match="x: expected dtype"):
            layer(torch.ones(2, 64, dtype=dtype))


def test_a_weight_that_trains_is_refused():
    layer = LoRALinear(16, 8)
    layer.weight.requires_grad_()
    with pytest.raises(NotImplementedError, match="weight: expected requires_grad=False"):
        layer(torch.randn(2, 16))


def test_set_base_weight_refuses_what_does_not_fit():
    layer = LoRALinear(64, 32)
    weight = layer.weight
    q = peftkern.quantize_nf4(torch.randn(32, 64))
    short = copy.copy(q)
    object.__setattr__(short, "absmax", q.absmax[:3])
    for bad, message in [
        (torch.zeros(64, 32), r"weight: expected shape \(32, 64\), got \(64, 32\)"),
        (peftkern.quantize_nf4(torch.randn(32, 32)), r"weight: expected shape \(32, 64\), got \(32, 32\)"),
        (short, "weight.absmax: expected 32 values of torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer.set_base_weight(bad)
        assert layer.weight is weight and layer.nf4_config is None


def test_the_base_class_says_what_a_method_has_to_define():
    from peftkern.modules import AdaptedLinear

    layer = AdaptedLinear(4, 4)
    for name in ("terms", "delta_weight"):
        with pytest.raises(NotImplementedError, match=f"AdaptedLinear.{name}"):
            getattr(layer, name)()


@pytest.mark.parametrize("name", ["sse2", "AVX2", "avx-512", "cuda"])
def test_unknown_instruction_sets(name):
    before = peftkern.cpu_isa()
    with pytest.raises(ValueError, match=f"name: expected one of .*scalar.* or '', got '{name}'"):
        peftkern.set_cpu_isa(name)
    assert peftkern.cpu_isa() == before


def test_set_cpu_isa_takes_effect(isa):
    assert peftkern.cpu_isa() == isa
    assert f"CPU kernels ({isa})" in peftkern.explain(LoRALinear(8, 8))
    assert peftkern.info()["cpu isa"].startswith(f"{isa} (")
    peftkern.set_cpu_isa("")
    assert peftkern.cpu_isa() in peftkern.info()["cpu isa"]


# ---- explain, info, counting ----------------------------------------------------------------------------------------


def test_info_says_what_is_installed():
    report = peftkern.info()
    assert all(isinstance(k, str) and isinstance(v, str) and v for k, v in report.items())
    assert report["torch"] == torch.__version__
    assert {"peftkern", "python", "cpu isa", "cpu threads", "cuda kernels", "gpu", "peft", "bitsandbytes"} <= set(
        report
    )
    assert peftkern.cpu_isa() in report["cpu isa"]


def test_explain_says_which_path_is_taken():
    dropped = LoRALinear(64, 32, r=4, lora_dropout=0.1, dtype=BF16)
    assert "1 LoRALinear: CPU kernels" in peftkern.explain(dropped)
    assert "dense bfloat16 weight" in peftkern.explain(dropped) and "rank-4" in peftkern.explain(dropped)
    assert "mask regenerated in backward" in peftkern.explain(dropped)
    assert "dropout 0.1 off (eval mode)" in peftkern.explain(dropped.eval())
    assert "dropout" not in peftkern.explain(LoRALinear(64, 32))
    assert "float32 absmax" in peftkern.explain(NF4Linear(64, 32)) and "blocks of 64" in peftkern.explain(
        NF4Linear(64, 32)
    )
    assert "8-bit absmax" in peftkern.explain(QLoRALinear(64, 32))
    dropped.merge()
    assert "merged into the weight" in peftkern.explain(dropped)
    model = nn.Sequential(
        LoRALinear(64, 64), LoRALinear(64, 64), LoRALinear(64, 64, r=2), nn.Linear(64, 3), NF4Linear(64, 3)
    )
    lines = peftkern.explain(model).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "2 LoRALinear",
        "1 LoRALinear",
        "1 NF4Linear",
        "1 plain nn.Linear",
    ]
    assert "(e.g. 0)" in lines[0] and "(e.g. 2)" in lines[1] and "(e.g. 4)" in lines[2]
    assert peftkern.explain(nn.ReLU()) == "no layer of peftkern and no nn.Linear"
    assert "no backend for meta" in peftkern.explain(LoRALinear(64, 32, device="meta"))


def test_explain_goes_by_the_tables_of_the_products():
    layer = QLoRALinear(128, 64, r=4, dtype=BF16)
    assert "bfloat16 activations: forward nf4_few_rows up to " in peftkern.explain(layer)
    for direction in ("forward", "gradient"):
        ops.set_product(direction, "library_accumulate")
    assert "bfloat16 activations: forward and gradient library_accumulate;" in peftkern.explain(layer)


def test_qlora_takes_4_13_bits_a_weight():
    model = nn.ModuleList([QLoRALinear(576, 576, r=8), QLoRALinear(576, 1536, r=8, bias=False)])
    weights, blocks = [576 * 576, 576 * 1536], [576 * 576 // 64, 576 * 1536 // 64]
    # per layer: codes, absmax codes, one float32 per 256 blocks (rounded up), and one float32 offset
    by_hand = sum(n // 2 + b + 4 * -(-b // 256) + 4 for n, b in zip(weights, blocks, strict=True))
    trainable = 8 * (576 + 576) + 8 * (576 + 1536)
    report = peftkern.memory_footprint(model)
    assert report["quantized_bytes"] == by_hand
    assert report["quantized_bytes"] == sum(p.nbytes for p in model.parameters() if p.dtype == torch.uint8)
    assert report["quantized_params"] == sum(weights)
    assert report["bits_per_param"] == 8 * by_hand / sum(weights) <= 4.13
    assert report["trainable_params"] == trainable and report["trainable_bytes"] == 4 * trainable
    assert report["total_bytes"] == by_hand + 4 * trainable + 4 * 576 and report["buffer_bytes"] == 0


def test_memory_footprint_counts_each_storage_once():
    linear = nn.Linear(16, 16, bias=False, dtype=BF16)
    model = nn.Sequential(linear, linear, nn.Linear(16, 16), nn.BatchNorm1d(16))
    model[2].weight = nn.Parameter(torch.randn(16, 16))
    model.append(nn.Embedding(16, 16))
    model[4].weight = model[2].weight
    report = peftkern.memory_footprint(model)
    parameters = 2 * 256 + 4 * (256 + 16) + 4 * 32
    buffers = 4 * 32 + 8
    assert report["total_bytes"] == parameters + buffers and report["buffer_bytes"] == buffers
    assert report["bits_per_param"] == report["quantized_bytes"] == 0
    assert report["trainable_params"] == 256 + 256 + 16 + 32
    assert len(peftkern.trainable_parameters(model)) == 5
    adapted = LoRALinear.from_linear(nn.Linear(8, 4), r=2)
    assert [tuple(p.shape) for p in peftkern.trainable_parameters(adapted)] == [(2, 8), (4, 2)]
    assert peftkern.memory_footprint(adapted)["trainable_bytes"] == 4 * (16 + 8)
    assert peftkern.memory_footprint(adapted)["total_bytes"] == 4 * (32 + 4 + 24)
    assert adapted.lora_A.dtype == F32
