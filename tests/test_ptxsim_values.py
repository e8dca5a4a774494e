# SPDX-License-Identifier: Apache-2.0
"""The PTX simulator's arithmetic: conversions, roundings, functions, every instruction and the tensor cores."""

import math
import struct

import numpy as np
import pytest
from ptxsim import Module, buffer, missing_tool
from ptxsim_kernels import FLOAT, INT, bfloat, compiled, from_bfloat, integers, random

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=str(missing_tool()))


def test_conversions_bit_by_bit():
    n = 1 << 17
    code = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32)
    x = code.view(FLOAT)
    h, b, widened = buffer(n, np.float16), buffer(n, np.uint16), buffer(n, FLOAT)
    i, tf32 = buffer(n, INT), buffer(n, np.uint32)
    module = compiled("arithmetic.cu")
    module.kernel("convert").launch(n // 256, 256, [buffer(x), h, b, widened, i, tf32, n]).check(
        written=[h, b, widened, i]
    )
    with np.errstate(all="ignore"):
        ok = ~np.isnan(x)
        assert (h.numpy(np.uint16) == x.astype(np.float16).view(np.uint16))[ok].all()
        assert (b.array == bfloat(x))[ok].all()
        assert (i.array == np.clip(np.rint(x.astype(float)), -(2**31), 2**31 - 1))[ok].all()
        assert (tf32.array == (code + np.uint32(0x1000) & ~np.uint32(0x1FFF)))[ok].all()
        halves = np.arange(n).astype(np.uint16).view(np.float16)
        assert (widened.array == halves)[~np.isnan(halves)].all()


def test_directed_rounding():
    n = 64
    x, y = (random(n) * FLOAT(1e3)).astype(FLOAT), buffer((n, 6), FLOAT)
    compiled("arithmetic.cu").kernel("directed").launch(1, 64, [buffer(x), y, n]).check()
    from fractions import Fraction as F

    for k in range(n):
        a, b = F(float(x[k])), F(float(x[(k + 1) % n]))
        down, up, cut, quotient, fma, nearest = (F(float(v)) for v in y.array[k])
        step = [F(float(np.spacing(abs(v)))) for v in y.array[k]]
        assert 0 <= a + b - down < step[0] and 0 <= up - (a + b) < step[1] and 0 <= abs(a * b) - abs(cut) < step[2]
        assert 0 <= quotient - a / b < step[3] and 0 <= a * b + a - fma < step[4]
        assert abs(a * b + a - nearest) <= step[5] / 2


def test_half_arithmetic():
    x = (random(64) * 10.0 ** integers(-4, 4, 64)).astype(FLOAT)
    h, b = buffer((64, 4), np.float16), buffer((64, 4), np.uint16)
    compiled("arithmetic.cu").kernel("halves").launch(1, 64, [buffer(x), h, b]).check()
    with np.errstate(over="ignore"):
        v = x.astype(np.float16)
        u, wide = v[np.arange(64) ^ 1], v.astype(float)
        fma = (wide * u.astype(float) + wide).astype(np.float16)
        assert (
            h.numpy(np.uint16).reshape(64, 4) == np.stack([v + u, v * u, fma, np.maximum(v, u)], 1).view(np.uint16)
        ).all()
    v = from_bfloat(bfloat(x))
    u = v[np.arange(64) ^ 1]
    fma = (v.astype(float) * u + v).astype(FLOAT)
    assert (b.array == np.stack([bfloat(v + u), bfloat(v * u), bfloat(fma), bfloat(np.maximum(v, u))], 1)).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_functions_within_ulps(arch):
    n = 1000
    x, y = random(n) * 3, buffer((n, 10), FLOAT)
    compiled("arithmetic.cu", arch).kernel("functions").launch(4, 256, [buffer(x), y, n]).check(written=[y])
    v, erf = x.astype(float), np.vectorize(math.erf)
    a, sine = np.abs(v), np.sin((x * FLOAT(100)).astype(float))
    columns = [np.exp(v), np.log(a), sine, np.tanh(v), a**-0.5, erf(v), a**1.7, v / 3, a**0.5, v * math.sin(2)]
    expected = np.stack(columns, 1)
    ulps = np.abs(y.array - expected) / np.spacing(np.abs(expected).astype(FLOAT))
    assert (ulps.max(0) < 5).all(), ulps.max(0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_integer_intrinsics(arch):
    x, y = integers(-(2**31), 2**31, 512), buffer(512, INT)
    compiled("arithmetic.cu", arch).kernel("integers").launch(1, 512, [buffer(x), y]).check(written=[y])

    def signed(value, width=32):
        value &= (1 << width) - 1
        return value - (1 << width) if value >> (width - 1) else value

    def expected(v):
        u = v & 0xFFFFFFFF
        return [
            v * 3,
            v ^ 5,
            32 - u.bit_length(),
            int(f"{u:032b}"[::-1], 2),
            u.bit_count(),
            (u & -u).bit_length(),
            (u >> 8) | (77 << 24),
            (99 << 5) | (u >> 27),
            int(v / 7),
            int(math.fmod(v, 11)),
            5 + sum(signed(u >> 8 * i, 8) * (4 - i) for i in range(4)),
            max(v, signed(-v)),
            (v * 123456789) >> 32,
            signed(v << 3) >> 1,
            sum((((u >> 8 * i) + 1) & 255) << 8 * i for i in range(4)),
            abs(v),
        ][v & 15]

    assert [signed(expected(int(v))) for v in x] == y.array.tolist()


def f32(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


INSTRUCTIONS = [  # (instruction on %a, %b, %c; their values; the result)
    ("bfe.u32 %d, %a, %b, %c", (0x12345678, 8, 12), 0x456),
    ("bfe.s32 %d, %a, %b, %c", (0xF00, 8, 4), -1),
    ("bfi.b32 %d, %a, %b, 4, 8", (0xAB, 0xFFFF0000), 0xFFFF0AB0),
    ("bfind.u32 %d, %a", (0x10000,), 16),
    ("bfind.s32 %d, %a", (-1,), -1),
    ("bfind.shiftamt.u32 %d, %a", (0x10000,), 15),
    ("bmsk.clamp.b32 %d, %a, %b", (4, 8), 0xFF0),
    ("brev.b64 %d, %a", (1,), 1 << 63),
    ("clz.b64 %d, %a", (1,), 63),
    ("popc.b64 %d, %a", (-1,), 64),
    ("cnot.b32 %d, %a", (0,), 1),
    ("shf.l.wrap.b32 %d, %a, %b, %c", (0x80000001, 0x12345678, 36), 0x23456788),
    ("shf.r.clamp.b32 %d, %a, %b, %c", (0x80000001, 0x12345678, 40), 0x12345678),
    ("lop3.b32 %d, %a, %b, %c, 0x96", (0b1100, 0b1010, 0b1111), 0b1001),
    ("lop3.b32 %d, %a, %b, %c, 0xE8", (0b1100, 0b1010, 0b0110), 0b1110),
    ("prmt.b32 %d, %a, %b, 0x5410", (0x11223344, 0x55667788), 0x77883344),
    ("prmt.b32 %d, %a, %b, 0x8888", (0x80, 0), -1),
    ("dp2a.lo.u32.u32 %d, %a, %b, %c", (0x00030002, 0x0504, 7), 30),
    ("dp2a.hi.s32.s32 %d, %a, %b, %c", (0xFFFE0003, 0xFF020000, 1), 9),
    ("dp4a.u32.s32 %d, %a, %b, %c", (0x01020304, 0x01FF0101, 0), 6),
    ("sad.s32 %d, %a, %b, %c", (-5, 7, 10), 22),
    ("mul.hi.u32 %d, %a, %b", (-1, -1), 0xFFFFFFFE),
    ("mul.hi.s32 %d, %a, %b", (-1, 1), -1),
    ("mul.hi.u64 %d, %a, %b", (1 << 63, 4), 2),
    ("mul.wide.s32 %d, %a, %b", (-2, 3), 2**64 - 6),
    ("mad.wide.u32 %d, %a, %b, %c", (0xFFFFFFFF, 2, 5), 0x200000003),
    ("div.s32 %d, %a, %b", (-(2**31), -1), -(2**31)),
    ("div.u32 %d, %a, %b", (7, 0), -1),
    ("rem.s32 %d, %a, %b", (-7, 3), -1),
    ("shl.b32 %d, %a, %b", (1, 32), 0),
    ("shr.s32 %d, %a, %b", (1 << 31, 40), -1),
    ("shr.u32 %d, %a, %b", (1 << 31, 31), 1),
    ("min.s32 %d, %a, %b", (-1, 1), -1),
    ("min.u32 %d, %a, %b", (-1, 1), 1),
    ("abs.s32 %d, %a", (-5,), 5),
    ("selp.b32 %d, %a, %b, %c", (5, 6, 0), 6),
    ("set.gt.u32.f32 %d, %a, %b", (f32(2), f32(1)), -1),
    ("set.gt.f32.s32 %d, %a, %b", (2, 1), f32(1)),
    ("cvt.s32.s8 %d, %a", (0x80,), -128),
    ("cvt.u8.u32 %d, %a", (0x1FF,), 0xFF),
    ("cvt.sat.u8.s32 %d, %a", (300,), 255),
    ("cvt.sat.u8.s32 %d, %a", (-5,), 0),
    ("cvt.rzi.s32.f32 %d, %a", (f32(-1.7),), -1),
    ("cvt.rni.s32.f32 %d, %a", (f32(2.5),), 2),
    ("cvt.rzi.u32.f32 %d, %a", (f32(-3),), 0),
    ("cvt.rzi.s32.f32 %d, %a", (f32(math.nan),), 0),
    ("cvt.rzi.s32.f32 %d, %a", (f32(1e20),), 2**31 - 1),
    ("cvt.rmi.f32.f32 %d, %a", (f32(-1.5),), f32(-2)),
    ("cvt.rz.f16.f32 %d, %a", (f32(1 + 0.9 / 1024),), 0x3C00),
    ("cvt.rp.f32.u32 %d, %a", (2**24 + 1,), f32(2**24 + 2)),
    ("cvt.rn.bf16x2.f32 %d, %a, %b", (f32(1), f32(2)), 0x3F804000),
    ("cvt.rn.relu.f16x2.f32 %d, %a, %b", (f32(-1), f32(2)), 0x4000),
    ("max.f32 %d, %a, %b", (f32(-0.0), f32(0.0)), 0),
    ("max.f32 %d, %a, %b", (f32(math.nan), f32(1)), f32(1)),
    ("add.sat.f32 %d, %a, %b", (f32(0.75), f32(0.5)), f32(1)),
    ("add.ftz.f32 %d, %a, %b", (1, 0), 0),
    ("add.f32 %d, %a, %b", (1, 0), 1),
    ("add.rn.f16x2 %d, %a, %b", (0x3C004000, 0x3C003C00), 0x40004200),
    ("fma.rn.relu.f16 %d, %a, %b, %c", (0x3C00, 0xC000, 0x3C00), 0),
    ("copysign.f32 %d, %a, %b", (f32(-1), f32(3)), f32(-3)),
    ("testp.infinite.f32 %d, %a", (f32(math.inf),), 1),
    ("testp.subnormal.f32 %d, %a", (1,), 1),
    ("ex2.approx.f32 %d, %a", (f32(-3),), f32(0.125)),
    ("rcp.rn.f32 %d, %a", (f32(4),), f32(0.25)),
    ("mov.b64 {%d, _}, %a", (0x1122334455667788,), 0x55667788),
    ("mov.b32 %d, {%a, %b}", (0x1234, 0x5678), 0x56781234),
]


@pytest.mark.parametrize(("instruction", "values", "expected"), INSTRUCTIONS, ids=[i[0] for i in INSTRUCTIONS])
def test_instruction(instruction, values, expected):
    loads = "".join(f"ld.param.u64 %{name}, [p{i}];\n" for i, name in enumerate(["out", "a", "b", "c"]))
    module = Module.from_ptx(
        f".visible .entry k({', '.join(f'.param .u64 p{i}' for i in range(4))})\n"
        f"{{\n.reg .b64 %out, %a, %b, %c, %d;\n{loads}{instruction};\nst.global.u64 [%out], %d;\nret;\n}}"
    )
    out = buffer(1, np.uint64)
    module.kernel("k").launch(1, 1, [out, *values, *[0] * (3 - len(values))]).check()
    mask = 2**64 - 1 if "64 %d" in instruction or "wide" in instruction else 2**32 - 1
    assert int(out.array[0]) & mask == expected & mask


MMA = {  # kernel: (K, numpy type of A and B, their values from the stored ones, accumulator)
    "mma_bf16": (16, np.uint16, from_bfloat, FLOAT),
    "mma_tf32": (8, FLOAT, lambda x: (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(FLOAT), FLOAT),
    "mma_s8": (32, np.int8, lambda x: x, INT),
    "mma_u8": (32, np.uint8, lambda x: x, INT),
    "mma_f16": (16, np.float16, lambda x: x, np.float16),
}


@pytest.mark.parametrize("name", MMA)
def test_mma(name):
    depth, dtype, value, accumulator = MMA[name]
    if name.endswith("8"):
        a, b = (integers(-128, 256, rows * depth).astype(dtype).reshape(rows, depth) for rows in (16, 8))
    else:
        a, b = (random(rows, depth, seed=rows) for rows in (16, 8))
        a, b = (bfloat(x) if dtype == np.uint16 else x.astype(dtype) for x in (a, b))
    c = buffer((16, 8), accumulator, name="c")
    compiled("mma.cu").kernel(name).launch(1, 32, [buffer(a), buffer(b), c]).check(written=[c])
    start = np.tile([[1, 2], [3, 4]], (1, 4)).repeat(8, axis=0)
    expected = value(a).astype(float) @ value(b).astype(float).T + start
    assert np.allclose(c.array, expected.astype(accumulator), rtol=2e-3 if name == "mma_f16" else 1e-6, atol=1e-5)


def test_truncating_mma_is_near_but_not_equal():
    """The models of tensor-core rounding give what a tolerance must bear."""
    a, b = random(16, 8), random(8, 8, seed=1)
    results = []
    for mode in range(4):
        c = buffer((16, 8), FLOAT)
        compiled("mma.cu").kernel("mma_tf32").launch(1, 32, [buffer(a), buffer(b), c], mma_mode=mode).check()
        results.append(c.array.copy())
    assert all(0 < np.abs(result - results[0]).max() < 1e-5 for result in results[1:3])


def test_ldmatrix_and_stmatrix_transpose():
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    for arch in ("sm_80", "sm_90"):
        y = buffer((4, 8, 8), np.uint16)
        compiled("mma.cu", arch).kernel("transpose").launch(1, 32, [buffer(x), y]).check(written=[y])
        assert (y.array == x.transpose(0, 2, 1)).all()


# The front end
