# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's ops against reference.py in fp64: importance, rank mask, orthogonality, for every instruction set."""

import copy
import gc
import math
import pickle
import weakref
from itertools import chain

import pytest
import torch
from conftest import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peftkern import reference
from peftkern.ops import mask_ranks, orthogonality_penalty, rank_mask, update_importance
from peftkern.ops.library import ops
from peftkern.ops.rank_allocation import TripletTable, state_layout

# (r, in, out) of the layers of one call: the usual, ragged, rank 0, single elements, ranks above every register tile
SHAPES = [(12, 64, 160), (3, 33, 37), (0, 8, 8), (1, 1, 1), (17, 515, 70), (100, 48, 72), (8, 2100, 1100), (5, 7, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_layers(dtype=torch.float32, device="cpu", shapes=SHAPES, seed=0, grads=True):
    """A, E, B of every layer, with gradients."""
    g = torch.Generator().manual_seed(seed)

    def parameter(*shape):
        t = torch.randn(shape, generator=g).to(dtype).to(device).requires_grad_()
        if grads:
            t.grad = torch.randn(shape, generator=g).to(dtype).to(device)
        return t

    A = [parameter(r, i) for r, i, _ in shapes]
    E = [parameter(r, 1) for r, _, _ in shapes]
    return A, E, [parameter(o, r) for r, _, o in shapes]


class Expected:
    """The averages in fp64, and the scores they give."""

    def __init__(self, layers):
        self.averages = {}
        self.layers = layers

    def update(self, beta1=0.85, beta2=0.7, scale=1.0):
        scores = []
        for i, parameters in enumerate(zip(*self.layers, strict=True)):
            elements = []
            for k, p in enumerate(parameters):
                old = self.averages.get((i, k), (torch.zeros(p.shape, dtype=torch.float64),) * 2)
                grad = None if p.grad is None else p.grad.cpu().double() / scale
                new = reference.update_importance(p.detach().cpu().double(), grad, *old, beta1, beta2)
                self.averages[i, k] = new
                elements.append(new[0] * new[1])
            scores.append(reference.triplet_scores(*elements))
        return torch.cat(scores)


def new_state(layers, device="cpu"):
    slices, size = state_layout([(a.shape[0], a.shape[1], b.shape[0]) for a, _, b in zip(*layers, strict=True)])
    return slices, torch.zeros(size, device=device), torch.zeros(size, device=device)


def replace_gradients(layers, seed):
    g = torch.Generator().manual_seed(seed)
    for t in (t for group in layers for t in group):
        t.grad = torch.randn(t.shape, generator=g).to(t.dtype).to(t.device)


# ---- importance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_importance_matches_the_reference(device, isa, dtype):
    layers = make_layers(dtype, device)
    expected, (slices, sensitivity, uncertainty) = Expected(layers), new_state(layers, device)
    for step in range(4):
        replace_gradients(layers, step)
        if step == 2:
            layers[0][1].grad = layers[2][4].grad = layers[1][0].grad = None
        scores = update_importance(*layers, sensitivity, uncertainty, 0.85, 0.7)
        assert scores.dtype == torch.float32
        assert_close(scores, expected.update(), torch.float32, f"scores of step {step}")
    for i, pieces in enumerate(slices):
        for k, piece in enumerate(pieces):
            for got, want in zip((sensitivity, uncertainty), expected.averages[i, k], strict=True):
                assert_close(got[piece], want.flatten(), torch.float32, f"average of parameter {k} of layer {i}")


def test_averages_are_those_of_torch_bit_for_bit(isa):
    layers = make_layers()
    slices, sensitivity, uncertainty = new_state(layers)
    averages = {}
    for step in range(3):
        replace_gradients(layers, step)
        update_importance(*layers, sensitivity, uncertainty, 0.85, 0.85)
        for i, parameters in enumerate(zip(*layers, strict=True)):
            for k, p in enumerate(parameters):
                old = averages.get((i, k), (torch.zeros_like(p),) * 2)
                averages[i, k] = reference.update_importance(p.detach(), p.grad, *old, 0.85, 0.85)
                for got, want in zip((sensitivity, uncertainty), averages[i, k], strict=True):
                    assert torch.equal(got[slices[i][k]], want.flatten())


def test_importance_is_the_same_for_any_number_of_threads(isa, threads):
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        layers = make_layers()
        _, sensitivity, uncertainty = new_state(layers)
        scores = [update_importance(*layers, sensitivity, uncertainty, 0.85, 0.85) for _ in range(2)]
        results.append((*scores, sensitivity, uncertainty))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_are_unscaled(device):
    layers = make_layers(device=device)
    expected, (_, sensitivity, uncertainty) = Expected(layers), new_state(layers, device)
    scale = torch.full((1,), 1024.0, device=device)
    scores = update_importance(*layers, sensitivity, uncertainty, 0.85, 0.7, scale)
    assert_close(scores, expected.update(scale=1024.0), torch.float32)


def test_views_that_are_not_contiguous(isa):
    layers = make_layers()
    _, *state = new_state(layers)
    plain = update_importance(*layers, *state, 0.85, 0.85)

    def strided(t):
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)
        view = wide[..., : 2 * t.shape[-1] : 2]
        view.copy_(t)
        return view

    views = [[strided(t.detach()).requires_grad_() for t in group] for group in layers]
    for view, t in zip(chain(*views), chain(*layers), strict=True):
        view.grad = t.grad.t().contiguous().t()
    assert not views[0][0].is_contiguous() and not views[0][0].grad.is_contiguous()
    _, *state = new_state(layers)
    assert torch.equal(update_importance(*views, *state, 0.85, 0.85), plain)


def as_parameters(layers):
    """The same, as nn.Parameter."""
    result = [[nn.Parameter(t.detach().clone()) for t in group] for group in layers]
    for p, t in zip(chain(*result), chain(*layers), strict=True):
        p.grad = t.grad
    return result


def no_gradient(layers):
    layers[0][1].grad = layers[1][4].grad = None


def gradient_of_columns(layers):
    layers[0][4].grad = layers[0][4].grad.t().contiguous().t()


def moved(layers):
    layers[2][0].data = layers[2][0].detach() * 2


def other_rank(layers):
    for group, axis in zip(layers, (0, 0, 1), strict=True):
        p = group[4]
        grad, p.grad = p.grad.narrow(axis, 0, 9).contiguous(), None
        p.data = p.detach().narrow(axis, 0, 9).contiguous()
        p.grad = grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [no_gradient, gradient_of_columns, moved, other_rank])
def test_a_table_is_followed_or_left_out(device, dtype, change):
    """Addresses instead of tensors give the same to the bit, and what has changed between two calls is noticed."""
    results = []
    for tabled in (False, True):
        layers = as_parameters(make_layers(dtype, device))
        table = TripletTable(*layers) if tabled else None
        scores = []
        for _ in range(2):
            _, *state = new_state(layers, device)
            scores += [update_importance(*layers, *state, 0.85, 0.7, None, table and table()) for _ in range(2)] + state
            if tabled:
                expected_none = bool(scores[4:]) and change in (no_gradient, gradient_of_columns)
                assert (table() is None) == expected_none
            change(layers)
        results.append(scores)
    first, second = results[0][0], results[0][4]
    assert torch.equal(first, second) == (change is gradient_of_columns)  # which changes the layout alone
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_copied_table_reads_its_own_tensors():
    """By hand, by copy.deepcopy and by pickle; and the original is none the wiser."""
    layers = as_parameters(make_layers())
    table = TripletTable(*layers)
    expected = [t.data_ptr() for t in (*chain(*layers), *(p.grad for p in chain(*layers)))]
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        for p, original in zip(other._parameters, chain(*layers), strict=True):
            p.grad = original.grad.clone()
        got = other()[:6].flatten().tolist()
        assert got == [t.data_ptr() for t in (*other._parameters, *(p.grad for p in other._parameters))]
        assert not (set(got) & set(expected)) - {0}  # where a layer has rank 0
        del other
    gc.collect()
    assert table()[:6].flatten().tolist() == expected


def test_a_table_lets_go_of_its_tensors():
    layers = as_parameters(make_layers())
    table, alive = TripletTable(*layers), weakref.ref(layers[0][0])
    del layers
    gc.collect()
    assert alive() is not None
    del table
    gc.collect()
    assert alive() is None


def test_bad_arguments_of_held_tensors():
    held = ops.hold_tensors([torch.zeros(2), torch.zeros(3)])
    for bad in (torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)[::2], torch.zeros(2)):
        with pytest.raises(RuntimeError, match="addresses: expected"):
            ops.held_have_moved(held, bad)
    assert ops.held_have_moved(held, torch.zeros(2, dtype=torch.int64))
    ops.release_tensors(held)


def test_a_table_has_to_fit_the_state():
    layers = as_parameters(make_layers())
    _, sensitivity, uncertainty = new_state(layers)
    table = TripletTable(*layers)
    with pytest.raises(RuntimeError, match=r"uncertainty: expected shape \[\d+\], got"):
        update_importance(*layers, sensitivity, uncertainty[:-1], 0.85, 0.85, None, table())
    with pytest.raises(RuntimeError, match=r"keep: expected shape \[\d+\], got \[3\]"):
        mask_ranks(layers[1], torch.ones(3) > 0, table())
    for bad, message in (
        (table().int(), "table: expected dtype Long"),
        (table()[:9], r"table: expected shape \[10, layers\], got \[9, 8\]"),
        (table().t().contiguous().t(), "table: expected a contiguous tensor"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.update_importance_table_(bad, sensitivity, uncertainty, 0.85, 0.85, None)
        with pytest.raises(RuntimeError, match=message):
            mask_ranks(layers[1], torch.ones(3) > 0, bad)


def test_padding_of_the_state_is_never_touched(isa):
    layers = make_layers()
    slices, sensitivity, uncertainty = new_state(layers)
    used = torch.zeros(sensitivity.numel(), dtype=torch.bool)
    for pieces in slices:
        for piece in pieces:
            assert piece.start % 16 == 0
            used[piece] = True
    sensitivity[~used] = uncertainty[~used] = math.nan
    scores = update_importance(*layers, sensitivity, uncertainty, 0.85, 0.85)
    assert torch.isfinite(scores).all()
    assert torch.isnan(sensitivity[~used]).all() and torch.isfinite(sensitivity[used]).all()


def test_no_layers():
    assert update_importance([], [], [], torch.zeros(0), torch.zeros(0), 0.85, 0.85).shape == (0,)


def bad_importance():
    A, E, B = make_layers(shapes=[(2, 4, 3), (3, 4, 5)])
    _, s, u = new_state((A, E, B))
    none = [None, None]

    def call(A=A, E=E, B=B, s=s, u=u, beta1=0.5, beta2=0.5, scale=None, gA=none, gE=none, gB=none):
        return ops.update_importance_(A, E, B, gA, gE, gB, s, u, beta1, beta2, scale)

    wrong = [torch.zeros(2, 5), None]
    return [
        (lambda: call(E=E[:1]), r"E: expected 2 tensors, one a layer, got 1"),
        (lambda: call(B=[B[0], B[0]]), r"B\[1\]: expected 3 columns, the rank of A, got 2"),
        (lambda: call(E=[E[0], E[0]]), r"E\[1\]: expected 3 elements, the rank of A, got shape \[2, 1\]"),
        (lambda: call(A=[A[0], A[1][0]]), r"A\[1\]: expected a matrix, got shape \[4\]"),
        (lambda: call(A=[a.double() for a in A]), r"A\[0\]: expected dtype float32, bfloat16 or float16, got Double"),
        (lambda: call(B=[B[0], B[1].half()]), r"B\[1\]: expected dtype Float, got Half"),
        (lambda: call(gA=none[:1]), r"grad_A: expected 2 tensors, one a layer, got 1"),
        (lambda: call(gA=wrong), r"grad_A\[0\]: expected shape \[2, 4\], got \[2, 5\]"),
        (lambda: call(gB=[None, B[1].bfloat16()]), r"grad_B\[1\]: expected dtype Float, got BFloat16"),
        (lambda: call(s=s[:-1]), r"sensitivity: expected shape \[96\], got \[95\]"),
        (lambda: call(u=u.half()), r"uncertainty: expected dtype Float, got Half"),
        (lambda: call(s=torch.zeros(192)[::2]), r"sensitivity: expected a contiguous tensor"),
        (lambda: call(beta1=1.0), r"beta1: expected 0 <= beta1 < 1, got 1"),
        (lambda: call(beta2=-0.1), r"beta2: expected 0 <= beta2 < 1, got -0.1"),
        (lambda: call(scale=torch.ones(2)), r"grad_scale: expected one element, got 2"),
    ]


@pytest.mark.parametrize("case", range(len(bad_importance())))
def test_bad_arguments_of_importance(case):
    call, message = bad_importance()[case]
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- rank mask -------------------------------------------------------------------------------------------------------

SCORES = {
    "distinct": torch.linspace(0, 1, 97)[torch.randperm(97, generator=torch.Generator().manual_seed(0))],
    "ties": torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 2.0, 1.0]),
    "all equal": torch.full((9,), 0.25),
    "all zero": torch.zeros(5),
    "signs": torch.tensor([-1.0, 0.0, -0.0, 2.0, -math.inf, math.inf, 1e-45, -1e-45, 0.0]),
    "nan": torch.tensor([math.nan, 1.0, math.inf, -math.nan, 0.5, 0.0]),
    "one": torch.tensor([0.5]),
    "none": torch.zeros(0),
}


@pytest.mark.parametrize("exact", [False, True], ids=["peft", "exact"])
@pytest.mark.parametrize("name", SCORES)
def test_rank_mask_matches_the_reference(device, name, exact):
    scores = SCORES[name]
    n = scores.numel()
    for budget in (-3, 0, 1, 2, n // 2, n - 2, n - 1, n, n + 4, 2**40):
        keep = rank_mask(scores.to(device), budget, exact)
        assert keep.dtype == torch.bool and torch.equal(keep.cpu(), reference.rank_mask(scores, budget, exact)), budget
        if exact:
            assert int(keep.sum()) == min(max(budget, 0), n)


@given(
    scores=st.lists(st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, 1.0, -1.0]), max_size=40),
    budget=st.integers(-2, 42),
    exact=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_rank_mask_of_any_scores(scores, budget, exact):
    t = torch.tensor(scores, dtype=torch.float32)
    assert torch.equal(rank_mask(t, budget, exact), reference.rank_mask(t, budget, exact))


def test_rank_mask_is_that_of_kthvalue():
    """HF PEFT's rule, in its words."""
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(3)).round(decimals=2)  # with ties
    for budget in (1, 250, 999):
        threshold = torch.kthvalue(scores, k=scores.numel() - budget)[0].item()
        assert torch.equal(rank_mask(scores, budget), ~(scores <= threshold))


@pytest.mark.parametrize("tabled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_ranks(device, dtype, tabled):
    layers = as_parameters(make_layers(dtype, device))
    E, table = layers[1], TripletTable(*layers)() if tabled else None
    keep = torch.rand(sum(e.numel() for e in E), generator=torch.Generator().manual_seed(1)).to(device) > 0.5
    expected = [torch.where(k[:, None], e, 0) for e, k in zip(E, keep.split([len(e) for e in E]), strict=True)]
    versions = [e._version for e in E]
    with torch.no_grad():
        mask_ranks(E, keep, table)
    assert all(torch.equal(e, x) for e, x in zip(E, expected, strict=True))
    assert all(e._version > v for e, v in zip(E, versions, strict=True))  # by which autograd and caches notice


def test_a_mask_removes_nan():
    E = [torch.tensor([[math.nan], [1.0], [math.inf]])]
    mask_ranks(E, torch.tensor([False, True, False]))
    assert E[0].tolist() == [[0.0], [1.0], [0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_mask(torch.zeros(2, 3), 1), r"scores: expected shape \[triplets\], got \[2, 3\]"),
        (lambda: rank_mask(torch.zeros(2).half(), 1), r"scores: expected dtype Float, got Half"),
        (lambda: mask_ranks([torch.zeros(2, 1)], torch.ones(3) > 0), r"keep: expected shape \[2\], got \[3\]"),
        (lambda: mask_ranks([torch.zeros(2, 1)], torch.ones(2)), r"keep: expected dtype Bool, got Float"),
        (lambda: mask_ranks([torch.zeros(4, 1)[::2]], torch.ones(2) > 0), r"E\[0\]: expected a contiguous tensor"),
        (lambda: mask_ranks([torch.zeros(2, 1).long()], torch.ones(2) > 0), r"E\[0\]: expected dtype float32"),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_masks(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- orthogonality ---------------------------------------------------------------------------------------------------


def near_orthonormal(dtype, device="cpu", shapes=SHAPES, seed=0):
    g = torch.Generator().manual_seed(seed)

    def factor(*shape):
        return (torch.randn(shape, generator=g) * 0.3 * max(shape) ** -0.5).to(dtype).to(device).requires_grad_()

    return [factor(r, i) for r, i, _ in shapes], [factor(o, r) for r, _, o in shapes]


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_orthogonality_matches_the_reference(device, isa, dtype, squared):
    A, B = near_orthonormal(dtype, device)
    value = orthogonality_penalty(A, B, squared)
    (3.0 * value).backward()
    exact = [[t.detach().cpu().double().requires_grad_() for t in group] for group in (A, B)]
    expected = reference.orthogonality(*exact, squared)
    (3.0 * expected).backward()
    assert value.dtype == torch.float32 and value.shape == ()
    assert_close(value, expected, torch.float32, "value")
    for i, (got, want) in enumerate(zip(A + B, exact[0] + exact[1], strict=True)):
        assert got.grad.dtype == dtype
        assert_close(got.grad, want.grad, dtype, f"gradient of factor {i}", slack=2.0)


def test_orthogonality_by_finite_differences():
    A, B = near_orthonormal(torch.float32, shapes=[(3, 7, 5), (2, 4, 4)])
    for squared in (False, True):
        for t in A + B:
            (grad,) = torch.autograd.grad(orthogonality_penalty(A, B, squared), t)
            direction = torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                step = 1e-3
                ahead = [u + step * direction if u is t else u for u in A + B]
                behind = [u - step * direction if u is t else u for u in A + B]
                n = len(A)
                slope = (
                    orthogonality_penalty(ahead[:n], ahead[n:], squared).double()
                    - orthogonality_penalty(behind[:n], behind[n:], squared).double()
                ) / (2 * step)
            assert slope.item() == pytest.approx((grad * direction).sum().item(), rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("squared", [False, True], ids=["peft", "paper"])
def test_no_gradient_at_an_orthonormal_start(squared):
    A, B = [torch.eye(4, 9).requires_grad_()], [torch.eye(7, 4).requires_grad_()]
    value = orthogonality_penalty(A, B, squared)
    value.backward()
    assert value.item() == 0.0 and not A[0].grad.any() and not B[0].grad.any()


def test_orthogonality_is_the_same_for_any_number_of_threads(isa, threads):
    results = []
    for n in (1, 2, 5):
        threads(n)
        A, B = near_orthonormal(torch.float32)
        value = orthogonality_penalty(A, B)
        value.backward()
        results.append([value, *(t.grad for t in A + B)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_orthogonality_of_views_and_of_frozen_factors():
    A, B = near_orthonormal(torch.float32)
    A[0].requires_grad_(False)
    transposed = [b.detach().t().contiguous().t().requires_grad_() for b in B]
    assert not transposed[0].is_contiguous()
    value, expected = orthogonality_penalty(A, transposed), orthogonality_penalty(A, B)
    value.backward()
    expected.backward()
    assert torch.equal(value, expected) and A[0].grad is None
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(transposed, B, strict=True))


def test_bad_arguments_of_orthogonality():
    with pytest.raises(RuntimeError, match=r"A and B: expected at least one tensor"):
        orthogonality_penalty([], [])
    with pytest.raises(RuntimeError, match=r"B\[1\]: expected a matrix, got shape \[3\]"):
        orthogonality_penalty([torch.zeros(2, 3)], [torch.zeros(3, 2), torch.zeros(3)])
    with pytest.raises(RuntimeError, match=r"A\[0\]: expected dtype float32, bfloat16 or float16, got Double"):
        orthogonality_penalty([torch.zeros(2, 3).double()], [])


# ---- as ops of torch -------------------------------------------------------------------------------------------------


def test_opcheck():
    layers = make_layers(shapes=[(2, 4, 3), (3, 4, 5)], grads=False)
    plain = [[t.detach() for t in group] for group in layers]
    _, s, u = new_state(layers)
    grads = [[torch.randn_like(t) for t in group] for group in plain]
    grads[0][1] = None
    torch.library.opcheck(ops.update_importance_.default, (*plain, *grads, s, u, 0.85, 0.85, None))
    torch.library.opcheck(ops.rank_mask.default, (torch.rand(7), 3, False))
    torch.library.opcheck(ops.mask_ranks_.default, (plain[1], torch.rand(5) > 0.5))
    torch.library.opcheck(ops.orthogonality.default, (plain[0], plain[2], True))
    _, deviations, norms = ops.orthogonality(plain[0], plain[2], True)
    torch.library.opcheck(
        ops.orthogonality_backward.default, (torch.ones(()), plain[0], plain[2], deviations, norms, True)
    )
