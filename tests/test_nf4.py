# SPDX-License-Identifier: Apache-2.0
"""NF4 against its definition, bit for bit, on every instruction set and device."""

import os
import signal
import threading

import pytest
import torch
from samples import BF16, F16, F32, NF4_SAMPLES, NF4Sample

import peftkern
from peftkern import NF4Weight, reference
from peftkern.ops.library import ops

samples = pytest.mark.parametrize("sample", NF4_SAMPLES, ids=str)


def equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.shape == expected.shape and got.dtype == expected.dtype and torch.equal(got.cpu(), expected.cpu())


@samples
def test_quantize_equals_definition(sample, device, isa):
    w = sample.make(device)
    q = peftkern.quantize_nf4(w, sample.block_size, sample.double_quant)
    packed, absmax = reference.quantize_nf4(w.cpu(), sample.block_size)
    assert equal(q.packed.reshape(-1), packed)
    assert q.shape == tuple(w.shape) and q.dtype == w.dtype
    assert q.packed.shape == ((w.shape[0], w.shape[1] // 2) if w.dim() == 2 and w.shape[1] % 2 == 0 else packed.shape)
    if sample.double_quant:
        codes, nested, offset = reference.quantize_absmax(absmax)
        assert equal(q.absmax, codes) and equal(q.nested_absmax, nested) and equal(q.offset, offset)
    else:
        assert equal(q.absmax, absmax)


@samples
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dequantize_equals_definition(sample, dtype, device, isa):
    q = peftkern.quantize_nf4(sample.make(device), sample.block_size, sample.double_quant)
    absmax = q.absmax.cpu()
    if sample.double_quant:
        absmax = reference.dequantize_absmax(absmax, q.nested_absmax.cpu(), q.offset.cpu())
        assert equal(q.float_absmax(), absmax)
    expected = reference.dequantize_nf4(q.packed.cpu(), absmax, sample.block_size, q.shape, dtype)
    assert equal(peftkern.dequantize_nf4(q, dtype), expected)
    assert peftkern.dequantize_nf4(q).dtype == sample.dtype


def test_quantizing_a_dequantized_weight_changes_nothing(device, isa):
    """fp32 values of a block are code * absmax with code +-1 present, so they find their codes again."""
    w = torch.randn(64, 128, device=device)
    q = peftkern.quantize_nf4(w)
    again = peftkern.quantize_nf4(peftkern.dequantize_nf4(q))
    assert equal(again.packed, q.packed) and equal(again.absmax, q.absmax)


def test_error_is_within_half_a_step(device):
    w = torch.randn(256, 256, device=device)
    error = (peftkern.dequantize_nf4(peftkern.quantize_nf4(w)) - w).abs().reshape(-1, 64)
    half_step = 0.5 * torch.tensor(reference.NF4_CODES).diff().max()
    assert (error <= (half_step + 1e-6) * w.abs().reshape(-1, 64).amax(1, keepdim=True)).all()


def test_every_threshold_and_its_neighbours(device, isa):
    """Ties go to the lower code; one ulp above, to the higher."""
    codes = torch.tensor(reference.NF4_CODES)
    t = (codes[1:] + codes[:-1]) / 2
    around = torch.cat([torch.nextafter(t, torch.tensor(-2.0)), t, torch.nextafter(t, torch.tensor(2.0))])
    w = torch.zeros(64)
    w[0], w[1 : 1 + len(around)] = 1.0, around
    q = peftkern.quantize_nf4(w.to(device))
    code = torch.stack([q.packed >> 4, q.packed & 15], 1).reshape(-1)[1 : 1 + len(around)].cpu()
    expected = torch.cat([torch.arange(15), torch.arange(15), torch.arange(1, 16)])
    assert torch.equal(code, expected.to(torch.uint8))


def test_all_zero_blocks(device, isa):
    w = torch.zeros(3, 64, device=device)
    w[1] = torch.randn(64)
    q = peftkern.quantize_nf4(w)
    assert (q.packed[0] == 0x77).all() and (q.packed[2] == 0x77).all()
    assert q.absmax[0] == 0 and not peftkern.dequantize_nf4(q)[[0, 2]].any()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 3e38])
def test_extreme_magnitudes(magnitude, isa):
    w = torch.linspace(-1, 1, 192).reshape(3, 64) * magnitude
    q = peftkern.quantize_nf4(w)
    packed, absmax = reference.quantize_nf4(w, 64)
    assert equal(q.packed.reshape(-1), packed) and equal(q.absmax, absmax)
    for dtype in (F32, BF16, F16):
        assert equal(peftkern.dequantize_nf4(q, dtype), reference.dequantize_nf4(packed, absmax, 64, (3, 64), dtype))


def test_conversions_to_16_bit_equal_torch(isa):
    """Every exponent and rounding case, through absmax times code 1.0, whose product is absmax itself."""
    bits = torch.arange(0, 0x7F800000, 0x7FFF, dtype=torch.int32)  # odd step: all low bits occur
    absmax = bits.view(torch.float32)
    packed = torch.full((absmax.numel() * 16,), 0xFF, dtype=torch.uint8)
    for dtype in (BF16, F16):
        got = ops.dequantize_nf4(packed, absmax, None, None, 32, [absmax.numel(), 32], dtype)
        assert equal(got, absmax[:, None].expand(-1, 32).to(dtype).contiguous())


def test_16_bit_inputs_are_widened_exactly(isa):
    for dtype in (BF16, F16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        finite = every[torch.isfinite(every)]
        q = peftkern.quantize_nf4(finite, 32)
        packed, absmax = reference.quantize_nf4(finite, 32)
        assert equal(q.packed, packed) and equal(q.absmax, absmax)


def test_dynamic_code_book_is_the_formula():
    """The table in csrc/nf4.h against the construction in reference.py, through dequantize_absmax."""
    codes = torch.arange(256, dtype=torch.uint8)
    got = ops.dequantize_absmax(codes, torch.ones(1), torch.zeros(()))
    assert torch.equal(got, reference.dynamic_codes())


def test_double_quantization_takes_4_127_bits():
    q = peftkern.quantize_nf4(torch.randn(4096, 4096), 64, double_quant=True)
    bits = 8 * q.nbytes / 4096**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)


def test_repeats_to_the_bit_on_any_number_of_threads(isa, threads):
    w = torch.randn(1000, 999)
    results = []
    for n in (1, 2, 3):
        threads(n)
        q = peftkern.quantize_nf4(w, 64, double_quant=True)
        results.append((q.packed, q.absmax, q.nested_absmax, q.offset, peftkern.dequantize_nf4(q, BF16)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 63, 64, 999])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_non_finite_weights_are_refused(value, at, dtype, device, isa):
    w = torch.randn(1000).to(dtype)
    w[at] = value
    with pytest.raises(ValueError, match="w: expected finite weights, got 1 NaN or infinite of 1000"):
        peftkern.quantize_nf4(w.to(device))


@pytest.mark.parametrize("block_size", [0, -64, 16, 48, 8192, "64", None])
def test_bad_block_sizes_are_refused(block_size):
    with pytest.raises(ValueError, match="block_size: expected one of"):
        peftkern.quantize_nf4(torch.randn(64), block_size)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"w: expected dtype float32, bfloat16 or float16, got torch\.float64"):
        peftkern.quantize_nf4(torch.randn(64, dtype=torch.float64))
    q = peftkern.quantize_nf4(torch.randn(4, 64))
    with pytest.raises(TypeError, match=r"dtype: expected float32, bfloat16 or float16, got torch\.int8"):
        peftkern.dequantize_nf4(q, torch.int8)
    for packed, absmax, message, raw_message in [
        (q.packed[:3], q.absmax, "q.packed: expected 128 values", "packed: expected 128 bytes for 256 weights, got 96"),
        (q.packed.int(), q.absmax, "got 128 of torch.int32", "packed: expected dtype Byte, got Int"),
        (q.packed, q.absmax[:2], "q.absmax: expected 4 values", "absmax: expected 4 values for 256 weights"),
        (q.packed, q.absmax.double(), "got 4 of torch.float64", "absmax: expected dtype Float, got Double"),
    ]:
        with pytest.raises(ValueError, match=message):
            peftkern.dequantize_nf4(NF4Weight(packed, absmax, 64, (4, 64), F32))
        with pytest.raises(RuntimeError, match=raw_message):
            ops.dequantize_nf4(packed, absmax, None, None, 64, [4, 64], F32)
    with pytest.raises(RuntimeError, match=r"shape: expected sizes >= 0 of at most 2\^60 elements"):
        ops.dequantize_nf4(
            torch.zeros(2**21, dtype=torch.uint8), torch.ones(2**16), None, None, 64, [2**22, 2**42 + 1], F32
        )
    with pytest.raises(RuntimeError, match="nested_absmax: expected 1 values for 4 codes, got 2"):
        ops.dequantize_absmax(torch.zeros(4, dtype=torch.uint8), torch.ones(2), torch.zeros(()))
    with pytest.raises(RuntimeError, match="shape: expected sizes >= 0"):
        ops.dequantize_nf4(q.packed, q.absmax, None, None, 64, [-4, 64], F32)


def test_fork_while_threads_use_the_buffer_cache():
    """A child must not find the lock of the buffer cache held by a thread that it does not have."""
    q, done = peftkern.quantize_nf4(torch.randn(2048, 1536)), threading.Event()

    def work():
        while not done.is_set():
            ops.dequantize_nf4(q.packed, q.absmax, None, None, 64, [2048, 1536], F32)
            peftkern.empty_cpu_cache()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        for _ in range(40):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # a hang ends in a signal
                ops.empty_cpu_cache()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        for t in threads:
            t.join()


def test_zero_sized_shapes():
    for shape in ((0,), (0, 64), (64, 0)):
        q = peftkern.quantize_nf4(torch.empty(shape), double_quant=True)
        assert peftkern.dequantize_nf4(q).shape == shape


def test_sample_layouts_are_what_they_say():
    assert not NF4Sample((36, 65), layout="transposed").make().is_contiguous()
    assert NF4Sample((36, 65), layout="expanded").make().stride(0) == 0
