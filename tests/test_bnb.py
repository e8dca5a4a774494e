# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes: its NF4 values, and its checkpoints in our modules. The layout is tested without it, too."""

import json

import pytest
import torch
from samples import BF16, F16, F32
from torch import nn

import peftkern
from peftkern import LoRALinear, NF4Config, NF4Linear, NF4Weight, QLoRALinear, reference

DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def stored_weight(w: torch.Tensor, block_size: int = 64, nested: bool = False, prefix: str = "weight") -> dict:
    """w as ``bitsandbytes.nn.Linear4bit`` saves it, from the definition: QuantState.as_dict(packed=True)."""
    packed, absmax = reference.quantize_nf4(w, block_size)
    state = {
        "quant_type": "nf4", "blocksize": block_size, "dtype": str(w.dtype).removeprefix("torch."),
        "shape": list(w.shape),
    }  # fmt: skip
    entries = {"": packed[:, None], ".absmax": absmax, ".quant_map": torch.tensor(reference.NF4_CODES)}
    if nested:
        codes, nested_absmax, offset = reference.quantize_absmax(absmax)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
        entries |= {
            ".absmax": codes, ".nested_absmax": nested_absmax, ".nested_quant_map": reference.dynamic_codes(),
        }  # fmt: skip
    entries[".quant_state.bitsandbytes__nf4"] = json_entry(state)
    return {prefix + name: t for name, t in entries.items()}


def json_entry(state: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def defined_value(state: dict, shape: tuple[int, ...], block_size: int, prefix: str = "weight") -> torch.Tensor:
    """The float32 weight of a stored one, by the definition."""
    absmax = state[f"{prefix}.absmax"]
    if f"{prefix}.nested_absmax" in state:
        described = json.loads(bytes(state[f"{prefix}.quant_state.bitsandbytes__nf4"].tolist()))
        offset = torch.tensor(described["nested_offset"], dtype=F32)
        absmax = reference.dequantize_absmax(absmax, state[f"{prefix}.nested_absmax"], offset)
    return reference.dequantize_nf4(state[prefix].view(torch.uint8), absmax, block_size, shape, F32)


def load_into_all(state: dict, fan_out: int, fan_in: int) -> list[NF4Linear | QLoRALinear]:
    """Every NF4 module, created with other settings than the checkpoint's, loaded with strict=True."""
    bias = {"bias": torch.randn(fan_out)}
    linears = [NF4Linear(fan_in, fan_out, block_size=b, double_quant=dq) for b, dq in ((64, False), (256, True))]
    adapted = [QLoRALinear(fan_in, fan_out, r=2), LoRALinear.from_linear(nn.Linear(fan_in, fan_out), 2, quantize="nf4")]
    for layer in linears:
        layer.load_state_dict(state | bias, strict=True)
    for layer in adapted:
        layer.load_state_dict(state | bias | {"lora_A": layer.lora_A, "lora_B": layer.lora_B}, strict=True)
    return linears + adapted


# ---- the layout, without bitsandbytes -------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("block_size, shape", [(64, (24, 64)), (32, (300, 96)), (128, (15, 33)), (4096, (70, 130))])
def test_stored_weights_load(block_size, shape, nested, dtype):
    w = torch.randn(shape).to(dtype)
    state = stored_weight(w, block_size, nested)
    expected = defined_value(state, shape, block_size)
    for layer in load_into_all(state, *shape):
        assert layer.nf4_config == NF4Config(block_size, nested) and layer.quantized_dtype == dtype
        assert torch.equal(peftkern.dequantize_nf4(layer.base_weight(), F32), expected)
        assert not layer.weight.requires_grad and layer(torch.randn(2, shape[1])).shape == (2, shape[0])
        fresh = NF4Linear(shape[1], shape[0], block_size=block_size, double_quant=nested)
        fresh.load_state_dict({n: t for n, t in layer.state_dict().items() if "lora" not in n}, strict=True)
        assert torch.equal(fresh.dequantize(F32), expected), "saved again, in our own layout"


def test_stored_weights_load_inside_a_model():
    def model():
        return nn.Sequential(NF4Linear(64, 32, bias=False), nn.ReLU(), NF4Linear(32, 16, double_quant=True))

    w0, w2 = torch.randn(32, 64), torch.randn(16, 32)
    state = stored_weight(w0, 64, True, "0.weight") | stored_weight(w2, 32, False, "2.weight")
    state["2.bias"] = torch.randn(16)
    keys = list(state)
    loaded = model()
    loaded.load_state_dict(state, strict=True)
    assert list(state) == keys, "the caller's dict is left as it was"
    assert torch.equal(loaded[0].dequantize(F32), defined_value(state, (32, 64), 64, "0.weight"))
    assert torch.equal(loaded[2].dequantize(F32), defined_value(state, (16, 32), 32, "2.weight"))
    del state["2.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"2\.bias"'):
        model().load_state_dict(state)


NESTED = {
    "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [24, 64], "nested_blocksize": 256,
    "nested_dtype": "float32", "nested_offset": 1.0,
}  # fmt: skip
STATE = "quant_state.bitsandbytes__nf4"
DAMAGE = {
    "no JSON": (STATE, torch.tensor([123, 34, 200], dtype=torch.uint8), "expected .*JSON"),
    "not an object": (STATE, json_entry([1, 2]), "expected .*JSON"),
    "no shape": (STATE, json_entry({"blocksize": 64, "dtype": "float32"}), "expected .*JSON"),
    "other dtype": (STATE, json_entry(NESTED | {"dtype": "float99"}), "expected .*JSON"),
    "other shape": (STATE, json_entry(NESTED | {"shape": [48, 32]}), r"expected shape \(24, 64\)"),
    "larger shape": (STATE, json_entry(NESTED | {"shape": [24, 128]}), "packed: expected 1536 values"),
    "block size": (STATE, json_entry(NESTED | {"blocksize": 48}), "block_size: expected one of"),
    "other block size": (STATE, json_entry(NESTED | {"blocksize": 128}), "absmax: expected 12"),
    "nested block size": (STATE, json_entry(NESTED | {"nested_blocksize": 128}), "nested_blocksize 256, got 128"),
    "nested offset": (STATE, json_entry(NESTED | {"nested_offset": "x"}), "0.weight"),
    "no quant_state": (STATE, None, f"expected the entry .*weight.{STATE}"),
    "code book": ("quant_map", torch.linspace(-1, 1, 16), "weight.quant_map: expected the standard code book of 16"),
    "no code book": ("quant_map", None, "expected the entry .*weight.quant_map"),
    "nested code book": ("nested_quant_map", torch.ones(256), "weight.nested_quant_map: expected the standard"),
    "no nested code book": ("nested_quant_map", None, "expected the entry .*weight.nested_quant_map"),
    "no nested absmax": ("nested_absmax", None, "expected the entry .*weight.nested_absmax"),
    "short nested absmax": ("nested_absmax", torch.ones(0), "nested_absmax: expected 1 values"),
    "no absmax": ("absmax", None, "expected the entry .*weight.absmax"),
    "short absmax": ("absmax", torch.zeros(23, dtype=torch.uint8), "absmax: expected 24 values"),
    "float absmax": ("absmax", torch.zeros(24), "absmax: expected 24 values of torch.uint8"),
    "no weight": ("", None, "0.weight"),
    "short weight": ("", torch.zeros(700, 1, dtype=torch.uint8), "0.weight: .*700"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entries_are_named(damage):
    part, value, message = DAMAGE[damage]
    layers = nn.ModuleList([NF4Linear(64, 24, bias=False)])
    before = {n: t.clone() for n, t in layers.state_dict().items()}
    state = stored_weight(torch.randn(24, 64), 64, True, "0.weight")
    name = "0.weight" + ("." + part if part else "")
    assert name in state
    if value is None:
        del state[name]
    else:
        state[name] = value
    with pytest.raises(ValueError, match=message) as error:
        layers.load_state_dict(state)
    assert "0.weight" in str(error.value)
    after = layers.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def test_fp4_is_refused():
    state = stored_weight(torch.randn(24, 64))
    state["weight.quant_state.bitsandbytes__fp4"] = state.pop("weight.quant_state.bitsandbytes__nf4")
    layer = NF4Linear(64, 24, bias=False)
    with pytest.raises(ValueError, match=r"bitsandbytes__nf4.*got .*bitsandbytes__fp4"):
        layer.load_state_dict(state)


# ---- bitsandbytes itself --------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_codes_and_absmax_are_those_of_bitsandbytes(bnb, block_size, dtype):
    for shape in ((64, 64), (7, 96), (5, 33), (3, 1000), (1, 4097), (4099,), (3, 5, 7), (129, 257)):
        w = torch.randn(shape).to(dtype)
        if w.numel() > block_size:
            w.view(-1)[:block_size] = 0
        q = peftkern.quantize_nf4(w, block_size)
        packed, state = bnb.functional.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
        assert torch.equal(q.packed.reshape(-1), packed.reshape(-1)), shape
        assert q.absmax.dtype == state.absmax.dtype and torch.equal(q.absmax, state.absmax), shape


@pytest.mark.parametrize("scale", [0.0, 1e-40])
def test_a_shorter_last_block_of_zeros(bnb, scale):
    """Its absmax is 1e-38, the divisor; that of a whole block of zeros is 0."""
    w = torch.randn(96) * scale
    q = peftkern.quantize_nf4(w)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(q.packed, packed.reshape(-1)) and torch.equal(q.absmax, state.absmax)
    assert torch.equal(peftkern.dequantize_nf4(q), reference.dequantize_nf4(packed, state.absmax, 64, (96,), F32))


@DTYPES
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantized_values_are_those_of_bitsandbytes(bnb, block_size, dtype):
    """Where a row is a multiple of the block; elsewhere bitsandbytes' CPU code restarts the blocks at each row."""
    w = torch.randn(6, 2 * block_size).to(dtype)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    expected = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(peftkern.dequantize_nf4(peftkern.quantize_nf4(w, block_size)), expected)


def linear4bit(bnb, w: torch.Tensor, nested: bool, quant_type="nf4", storage=torch.uint8, block_size=64) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        w.shape[1],
        w.shape[0],
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
        compute_dtype=F32,
    )
    layer.weight = bnb.nn.Params4bit(
        w, requires_grad=False, compress_statistics=nested, quant_type=quant_type, quant_storage=storage,
        blocksize=block_size, module=layer,
    )  # fmt: skip
    layer.bias = nn.Parameter(torch.randn(w.shape[0]))
    return layer.to("cpu")


@DTYPES
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("shape", [(24, 64), (300, 128), (16, 96)], ids=str)
def test_checkpoints_of_linear4bit_load(bnb, shape, nested, dtype):
    theirs = linear4bit(bnb, torch.randn(shape).to(dtype), nested)
    state = theirs.state_dict()
    assert ("weight.nested_absmax" in state) == nested
    expected = defined_value(state, shape, 64)
    ours = NF4Linear(shape[1], shape[0], block_size=128)
    ours.load_state_dict(state, strict=True)
    assert ours.nf4_config == NF4Config(64, nested)
    assert torch.equal(ours.dequantize(F32), expected) and ours.dequantize().dtype == dtype
    assert torch.equal(ours.bias, theirs.bias)
    if shape[1] % 64 == 0:
        assert torch.equal(ours.dequantize(), bnb.functional.dequantize_4bit(theirs.weight, theirs.weight.quant_state))
        x = torch.randn(3, shape[1])
        torch.testing.assert_close(
            ours(x), theirs(x), rtol=1e-2 if dtype != F32 else 1e-4, atol=5e-2 if dtype != F32 else 1e-4
        )
    expected_state = stored_weight(torch.zeros(shape, dtype=dtype), 64, nested) | {"bias": None}
    assert state.keys() == expected_state.keys(), "the hand-made layout of this file is bitsandbytes'"


@pytest.mark.parametrize("storage", [torch.uint8, BF16, F32], ids=str)
def test_every_quant_storage_loads(bnb, storage):
    theirs = linear4bit(bnb, torch.randn(24, 64), True, storage=storage)
    state = theirs.state_dict()
    assert state["weight"].dtype == storage
    ours = NF4Linear(64, 24)
    ours.load_state_dict(state, strict=True)
    assert ours.weight.dtype == torch.uint8 and torch.equal(ours.dequantize(F32), defined_value(state, (24, 64), 64))


def test_fp4_checkpoint_is_refused(bnb):
    theirs = linear4bit(bnb, torch.randn(24, 64), False, quant_type="fp4")
    with pytest.raises(ValueError, match="bitsandbytes__fp4"):
        NF4Linear(64, 24).load_state_dict(theirs.state_dict())


def test_from_bnb_reads_what_bitsandbytes_stores(bnb):
    w = torch.randn(24, 64)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    entries = {"w": packed} | {f"w.{k}": t for k, t in state.as_dict(packed=True).items()}
    q = NF4Weight.from_bnb(entries, "w")
    assert torch.equal(peftkern.dequantize_nf4(q), bnb.functional.dequantize_4bit(packed, state))
