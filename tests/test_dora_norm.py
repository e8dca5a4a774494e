# SPDX-License-Identifier: Apache-2.0
"""dora_norm against the float64 norms of the matrix that it never makes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern.ops.dora_norm import dora_norm
from peftkern.ops.library import ops
from peftkern.ops.tensor_cache import TensorCache


def exact(weight, A, B, scaling):
    dense = peftkern.dequantize_nf4(weight, torch.float32) if isinstance(weight, peftkern.NF4Weight) else weight
    return (dense.double() + scaling * B.double() @ A.double()).norm(dim=1)


SHAPES = [(300, 192, 8), (17, 96, 1), (64, 64, 128), (5, 7, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "columns", "r"), SHAPES)
def test_equals_the_norm_of_the_whole_matrix(out, columns, r, dtype, nf4, device, isa):
    W = torch.randn(out, columns).to(device, dtype)
    A, B = (torch.randn(shape).to(device, dtype) for shape in ((r, columns), (out, r)))
    weight = peftkern.quantize_nf4(W) if nf4 else W
    norm = dora_norm(weight, A, B, 0.7)
    assert norm.dtype == torch.float32 and not norm.requires_grad
    torch.testing.assert_close(norm.double(), exact(weight, A, B, 0.7), rtol=2e-6, atol=0)


@pytest.mark.parametrize("left", [1e-2, 1e-4, 0.0])
def test_where_the_adapter_cancels_the_weight(left):
    """What is left of each row is a fraction of the two that are added: the bounds that dora_norm documents, which hold
    for fp32 sums in any order, and half a unit of the result."""
    A, B = torch.randn(4, 256), torch.randn(96, 4)
    W = -(B @ A) + left * torch.randn(96, 256)
    norm, expected = dora_norm(W, A, B).double(), exact(W, A, B, 1.0)
    adapter = B.double().abs() @ A.double().abs()
    of_squares = 256 * 2**-24 * 2 * (W.double().abs() * adapter).sum(1) + 2**-23 * expected**2
    assert ((norm**2 - expected**2).abs() <= of_squares).all()
    size = W.double().norm(dim=1) + adapter.norm(dim=1)
    assert ((norm - expected).abs() <= 256**0.5 * 2**-12.5 * size + 2**-24 * expected).all()


@pytest.mark.parametrize("nf4", [False, True])
def test_all_but_one_product_is_exact(nf4, isa):
    """Integers for which P = A Wᵀ is exact in fp32, and the squares that cancel are not: only the result rounds."""
    A = torch.randint(2, (4, 64)) * 2.0 - 1
    B = torch.randint(-(2**12), 2**12, (24, 4)).float()
    if nf4:  # rows of A times an absmax, as the codes 0 and 15 are -1 and 1; one less is taken away
        row, absmax = torch.randint(4, (24,)), torch.randint(2**13, 2**14, (24,)).float()
        codes = (15 * (A[row] > 0)).to(torch.uint8)
        packed = codes[:, ::2] << 4 | codes[:, 1::2]
        weight = peftkern.NF4Weight(packed, absmax, 64, (24, 64), torch.float32)
        B = torch.zeros(24, 4).index_put((torch.arange(24), row), 1 - absmax)
    else:
        weight = torch.randint(-1, 2, (24, 64)) - B @ A
    expected = exact(weight, A, B, 1.0)
    torch.testing.assert_close(dora_norm(weight, A, B).double(), expected, rtol=6e-8, atol=0)


def test_never_makes_the_adapted_weight():
    """Nothing that torch makes around the op is larger than B, where the weight's own norms are in the cache."""
    W, A, B = torch.randn(512, 512).bfloat16(), torch.randn(4, 512).bfloat16(), torch.randn(512, 4).bfloat16()
    cache = TensorCache()
    dora_norm(W, A, B, cache=cache)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        dora_norm(W, A, B, cache=cache)
    assert 0 < largest <= 512 * 4


def test_cache_follows_the_weight():
    W, A, B, cache = torch.randn(16, 32), torch.randn(2, 32), torch.randn(16, 2), TensorCache()
    first = dora_norm(W, A, B, cache=cache)
    assert torch.equal(dora_norm(W, A, B, cache=cache), first)
    W.mul_(2)
    torch.testing.assert_close(dora_norm(W, A, B, cache=cache).double(), exact(W, A, B, 1.0), rtol=2e-6, atol=0)


def test_wrong_shapes():
    with pytest.raises(
        ValueError, match=r"A, B: expected \[r, in\] and \[out, r\] for a weight \[16, 32\], got \[2, 16\]"
    ):
        dora_norm(torch.randn(16, 32), torch.randn(2, 16), torch.randn(16, 2))


def test_autocast_changes_nothing():
    W, A, B = torch.randn(16, 64), torch.randn(4, 64), torch.randn(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = dora_norm(W, A, B)
    assert torch.equal(got, dora_norm(W, A, B))


@pytest.mark.parametrize("columns", [64, 37, 96])
@pytest.mark.parametrize("double_quant", [None, False, True])
def test_squared_row_norms(columns, double_quant, device, isa):
    """NF4 rows that begin inside of a block and of a byte, an odd number of weights; dense, None; empty weights."""
    for rows in (9, 0):
        W = torch.randn(rows, columns).to(device)
        arguments, dense = (W, None, None, None, 32, rows, columns), W
        if double_quant is not None:
            q = peftkern.quantize_nf4(W, 32, double_quant)
            arguments = (q.packed, q.absmax, q.nested_absmax, q.offset, q.block_size, *q.shape)
            dense = peftkern.dequantize_nf4(q, torch.float32)
        expected = dense.double().square().sum(1)
        torch.testing.assert_close(ops.squared_row_norms(*arguments), expected, rtol=1e-6, atol=0)
    assert not ops.squared_row_norms(torch.empty(3, 0, device=device), None, None, None, 64, 3, 0).any()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [9, 0])
def test_opcheck_squared_row_norms(rows, double_quant):
    q = peftkern.quantize_nf4(torch.randn(rows, 37), 32, double_quant)
    arguments = (q.packed, q.absmax, q.nested_absmax, q.offset, q.block_size, *q.shape)
    torch.library.opcheck(ops.squared_row_norms, arguments)


def test_opcheck():
    W, A, B = torch.randn(16, 64), torch.randn(4, 64), torch.randn(16, 4)
    base = (W, None, None, None, 64)
    w2 = ops.squared_row_norms(*base, 16, 64)
    torch.library.opcheck(ops.dora_norm, (*base, A, B, w2, 0.5, torch.float32))
    assert not torch.isnan(ops.dora_norm(*base, A[:0], B[:, :0], w2, 0.5, torch.float32)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w2": torch.zeros(15).double()}, r"w2: expected shape \[16\], got \[15\]"),
        ({"w2": torch.zeros(16)}, "w2: expected dtype Double, got Float"),
        ({"B": torch.zeros(16, 5)}, r"B: expected shape \[16, 4\], got \[16, 5\]"),
        ({"A": torch.zeros(4)}, r"A and B: expected shapes \[r, in\] and \[out, r\], got \[4\] and \[16, 4\]"),
        ({"weight": torch.zeros(16, 63)}, r"weight: expected shape \[16, 64\], got \[16, 63\]"),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v),
)
def test_bad_arguments_are_named(change, message):
    tensors = {"weight": torch.zeros(16, 64), "A": torch.zeros(4, 64), "B": torch.zeros(16, 4), "w2": torch.zeros(16)}
    t = {**tensors, "w2": tensors["w2"].double(), **change}
    with pytest.raises(RuntimeError, match=message):
        ops.dora_norm(t["weight"], None, None, None, 64, t["A"], t["B"], t["w2"], 1.0, torch.float32)
