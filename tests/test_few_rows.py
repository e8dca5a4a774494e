# SPDX-License-Identifier: Apache-2.0
"""The CPU's product of a few rows with a dense weight, low-rank terms in the same sums (csrc/cpu/few_rows.h)."""

import pytest
import torch
from conftest import assert_close
from multi_samples import MultiSample
from samples import BF16, F16, F32, Sample

import peftkern
from peftkern.ops.library import ops

# (rows, in, out, rank): every tile of rows, more than a tile; tails of every width; ranks of more than a vector
SHAPES = [(1, 64, 37, 4), (2, 33, 1, 16), (3, 576, 192, 16), (5, 100, 50, 1), (8, 576, 130, 40), (9, 31, 9, 17)]
SHAPES += [(20, 257, 70, 33), (32, 1100, 24, 8)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("adapter", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("rows, fan_in, fan_out, rank", SHAPES)
def test_equals_reference(rows, fan_in, fan_out, rank, adapter, dtype, isa, threads):
    ops.set_product("forward", "few_rows")
    call = Sample((rows,), fan_in, fan_out, rank, dtype, dtype, adapter, bias=True).make()
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append(call.run())
    assert all(torch.equal(results[0], y) for y in results), "another number of threads, other bits"
    assert_close(results[0], call.reference()[0], dtype, "y")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_row_has_the_same_bits_among_any_others(dtype, isa):
    """Up to 8 rows, whose x A^T is made in one way too: alone, among others, and in a batch where each chooses."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 300, generator=g).to(dtype)
    w, A, B = (torch.randn(*shape, generator=g) for shape in ((70, 300), (3, 20, 300), (3, 70, 20)))
    w, bias = w.to(dtype), torch.randn(70, generator=g)
    index = torch.tensor([2, -1, 0, 2, 1, 0, 0, -1])
    y = peftkern.multi_lora_linear(x, w, A, B, index, scaling=0.7, bias=bias)
    for rows in ([0], [3, 0], [7, 1, 2], [2, 3, 4, 5, 6], list(range(8))):
        got = peftkern.multi_lora_linear(x[rows], w, A, B, index[rows], scaling=0.7, bias=bias)
        assert torch.equal(got, y[rows]), rows
        for i in rows:
            terms = (A[index[i]], B[index[i]]) if index[i] >= 0 else ()
            alone = peftkern.adapted_linear(x[rows], w, *terms, scaling=0.7, bias=bias)
            assert torch.equal(alone[rows.index(i)], y[i]), (rows, i)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 30])
def test_rows_that_choose(rows, dtype, isa):
    ops.set_product("forward", "few_rows")
    call = MultiSample((rows,), 130, 45, 5, 19, dtype, dtype, ranks=True, scalings=True, bias=True).make()
    with torch.no_grad():
        assert_close(call.run(), call.reference()[0], dtype)


def test_what_it_is_not_for():
    ops.set_product("forward", "few_rows")
    x, w = torch.randn(8, 64), torch.randn(32, 64)
    for refused in (
        lambda: peftkern.adapted_linear(torch.randn(33, 64), w),
        lambda: peftkern.adapted_linear(x, w.to(BF16)),  # F.linear would round the weight, or refuse
        lambda: peftkern.adapted_linear(x, w, out_scale=torch.ones(32)),
        lambda: peftkern.nf4_linear(x, peftkern.quantize_nf4(w)),
    ):
        with pytest.raises(RuntimeError, match='"few_rows" is forced and takes no'):
            refused()
