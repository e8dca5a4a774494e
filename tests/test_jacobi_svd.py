# SPDX-License-Identifier: Apache-2.0
"""The Jacobi SVD against LAPACK, against 60-digit arithmetic where small singular values are the question, and on
matrices with a known answer."""

import mpmath
import pytest
import torch
from torch.library import opcheck

from peftkern.ops import jacobi_svd
from peftkern.ops.library import ops

F64 = torch.float64
EPS = torch.finfo(F64).eps


def orthogonal(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q


def exact_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """In 60 digits, rounded once."""
    with mpmath.workdps(60):
        S = mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False)
        return torch.tensor([float(s) for s in S], dtype=F64)


def check(matrix: torch.Tensor, U: torch.Tensor, S: torch.Tensor) -> None:
    """U has orthonormal columns, S falls, and U^T M = S V^T with orthonormal V: that is the SVD."""
    n = matrix.shape[-1]
    assert (S[..., :-1] >= S[..., 1:]).all() and (S >= 0).all()
    positive = (S > 0).to(F64)
    gram = U.mT @ U
    assert (gram - torch.diag_embed(positive)).abs().max() < 4 * n * EPS
    rows = U.mT @ matrix
    assert (rows @ rows.mT - torch.diag_embed(S**2)).abs().max() <= 20 * n * EPS * S.amax() ** 2
    assert (U @ rows - matrix).abs().max() <= 8 * n * EPS * S.amax()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33, 64, 100])
def test_agrees_with_lapack(n, device, isa):
    matrices = torch.randn(3, n, n, dtype=F64, device=device)
    U, S = jacobi_svd(matrices)
    check(matrices, U, S)
    expected = torch.linalg.svdvals(matrices)
    assert (S - expected).abs().max() <= 4 * n * EPS * expected.max()


@pytest.mark.parametrize("n", [129, 256, 300])
def test_large(n, device):
    matrix = torch.randn(n, n, dtype=F64, device=device)
    U, S = jacobi_svd(matrix)
    check(matrix, U, S)
    assert (S - torch.linalg.svdvals(matrix)).abs().max() <= 4 * n * EPS * S[0]


@pytest.mark.parametrize("smallest", [1e-6, 1e-12, 1e-40])
def test_small_singular_values_of_graded_columns_are_relatively_accurate(smallest, device, isa):
    n = 7
    matrix = torch.randn(n, n, dtype=F64) * torch.logspace(0, torch.tensor(smallest).log10().item(), n, dtype=F64)
    expected = exact_singular_values(matrix)
    for order in (torch.arange(n), torch.randperm(n)):
        S = jacobi_svd(matrix[:, order].to(device))[1].cpu()
        assert ((S - expected).abs() / expected).max() < 1e-13


@pytest.mark.parametrize("n", [16, 64, 256])
def test_known_singular_values(n, device):
    """Condition 1e12 over the whole range."""
    expected = torch.logspace(0, -12, n, dtype=F64)
    matrix = (orthogonal(n) * expected).to(device)
    U, S = jacobi_svd(matrix)
    check(matrix, U, S)
    assert ((S.cpu() - expected).abs() / expected).max() < 1e-12


def test_equal_singular_values(device, isa):
    for n in (2, 9, 32):
        two_groups = (orthogonal(n) * torch.tensor([3.0] * (n // 2) + [2.0] * (n - n // 2))) @ orthogonal(n)
        for matrix, expected in ((5 * orthogonal(n), [5.0] * n), (torch.eye(n, dtype=F64), [1.0] * n),
                                 (two_groups, [3.0] * (n // 2) + [2.0] * (n - n // 2))):  # fmt: skip
            U, S = jacobi_svd(matrix.to(device))
            check(matrix.to(device), U, S)
            assert (S.cpu() - torch.tensor(expected, dtype=F64)).abs().max() < 1e-13


def test_singular_matrices(device, isa):
    n = 12
    zero, one_row, repeated = torch.zeros(n, n, dtype=F64), torch.zeros(n, n, dtype=F64), torch.zeros(n, n, dtype=F64)
    one_row[3] = torch.randn(n)
    repeated[:] = torch.randn(n, 1)
    low_rank = torch.randn(n, 4, dtype=F64) @ torch.randn(4, n, dtype=F64)
    for matrix, rank in ((zero, 0), (one_row, 1), (repeated, 1), (low_rank, 4)):
        U, S = jacobi_svd(matrix.to(device))
        S, U = S.cpu(), U.cpu()
        assert (S[:rank] > 1e-3).all() and (S[rank:] < 1e-13).all()
        assert not U[:, S == 0].any()
        kept = U[:, :rank]
        assert (kept.mT @ kept - torch.eye(rank, dtype=F64)).abs().sum() < 1e-13
        assert (kept @ (kept.mT @ matrix) - matrix).abs().max() < 1e-12
    assert not jacobi_svd(zero.to(device))[1].any()


@pytest.mark.parametrize("exponent", [-900, -300, 300, 900])
def test_any_magnitude(exponent, device):
    """A power of two changes no bit."""
    matrix = torch.randn(2, 9, 9, dtype=F64, device=device)
    U, S = jacobi_svd(matrix)
    scaled_U, scaled_S = jacobi_svd(torch.ldexp(matrix, torch.tensor(exponent, device=device)))
    assert torch.equal(scaled_U, U) and torch.equal(scaled_S, torch.ldexp(S, torch.tensor(exponent, device=device)))


def test_batches_and_layouts(device):
    source = torch.randn(2, 3, 6, 6, dtype=F64, device=device)
    before = source.clone()
    U, S = jacobi_svd(source)
    assert U.shape == (2, 3, 6, 6) and S.shape == (2, 3, 6)
    for i in range(2):
        for j in range(3):
            u, s = jacobi_svd(source[i, j])
            assert torch.equal(u, U[i, j]) and torch.equal(s, S[i, j])
    assert torch.equal(jacobi_svd(source.mT.contiguous().mT)[0], U)
    expanded = source[0, 0].expand(4, 6, 6)
    assert torch.equal(jacobi_svd(expanded)[1][3], S[0, 0])
    assert torch.equal(source, before), "the argument is not written"
    for shape in ((0, 5, 5), (3, 0, 0), (0, 0)):
        U, S = jacobi_svd(torch.empty(shape, dtype=F64, device=device))
        assert U.shape == shape and S.shape == shape[:-1]


def test_same_bits_for_any_number_of_threads(isa, threads):
    matrices, results = torch.randn(40, 20, 20, dtype=F64), []
    for count in (1, 2, 3):
        threads(count)
        results.append(jacobi_svd(matrices))
    assert all(torch.equal(U, results[0][0]) and torch.equal(S, results[0][1]) for U, S in results)


def test_errors():
    with pytest.raises(RuntimeError, match="matrices: expected dtype Double, got Float"):
        jacobi_svd(torch.randn(3, 3))
    for shape in ((3, 4), (2, 3, 4)):
        with pytest.raises(RuntimeError, match=r"matrices: expected shape \[batch, n, n\], got"):
            jacobi_svd(torch.randn(shape, dtype=F64))
    with pytest.raises(RuntimeError, match=r"matrices: expected shape \[..., n, n\], got \[3\]"):
        jacobi_svd(torch.randn(3, dtype=F64))
    with pytest.raises(RuntimeError, match="matrices: expected n <= 1024"):
        jacobi_svd(torch.zeros(1025, 1025, dtype=F64))
    for n in (1, 2, 9):
        for value in (float("nan"), float("inf")):
            matrix = torch.randn(n, n, dtype=F64)
            matrix[0, 0] = value
            with pytest.raises(
                RuntimeError, match=f"matrices: expected finite values, got 1 NaN or infinite of {n * n}"
            ):
                jacobi_svd(matrix)


def test_opcheck():
    for shape in ((3, 5, 5), (1, 1, 1), (0, 4, 4)):
        arguments = (torch.rand(shape, dtype=F64),)
        opcheck(
            ops.jacobi_svd.default, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
        )
    matrices = torch.randn(2, 5, 5, dtype=F64)
    compiled = torch.compile(jacobi_svd, fullgraph=True, backend="aot_eager")(matrices)
    assert torch.equal(compiled[1], jacobi_svd(matrices)[1])
