# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's importance, rank mask and orthogonality term (Zhang et al. 2023, arXiv 2303.10512), all layers in one call.

Formulas: reference.py; the C++ side: csrc/rank_allocation.h. A layer has A [r, in], E [r, 1] and B [out, r]; triplet j
is row j of A, E[j] and column j of B. Triplets are numbered through all layers.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .library import ops

_update_importance = ops.update_importance_.default
_update_importance_table = ops.update_importance_table_.default
_rank_mask = ops.rank_mask.default
_mask_ranks = ops.mask_ranks_.default
_mask_ranks_table = ops.mask_ranks_table_.default
_held_have_moved = ops.held_have_moved.default
_orthogonality = ops.orthogonality.default
_orthogonality_backward = ops.orthogonality_backward.default

STATE_ALIGNMENT = 16  # kStateAlignment of csrc/rank_allocation.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/dtypes.h


def state_layout(shapes: Sequence[tuple[int, int, int]]) -> tuple[list[tuple[slice, slice, slice]], int]:
    """Where the averages of A, E and B lie in the state of layers of the given (r, in, out), and the size of the state.

    >>> state_layout([(2, 3, 5)])
    ([(slice(0, 6, None), slice(16, 18, None), slice(32, 42, None))], 48)
    """
    slices, at = [], 0
    for r, in_features, out_features in shapes:
        pieces = []
        for n in (r * in_features, r, out_features * r):
            pieces.append(slice(at, at + n))
            at += -(-n // STATE_ALIGNMENT) * STATE_ALIGNMENT
        slices.append((pieces[0], pieces[1], pieces[2]))
    return slices, at


class TripletTable:
    """The addresses of A, E and B of all layers and of their gradients, kept between steps.

    To hand 1,260 tensors to an op takes as long as the update of 3.7 M elements itself. This reads their addresses
    instead, and asks of each what can have changed since. What is unusual goes the other way.
    """

    def __init__(self, A: Sequence[Tensor], E: Sequence[Tensor], B: Sequence[Tensor]) -> None:
        self._layers = list(zip(A, E, B, strict=True))
        self._parameters = [*A, *E, *B]
        self._held: int | None = None
        self._describe()

    def __reduce__(self):
        """A copy, and what is unpickled, holds tensors of its own."""
        return TripletTable, tuple(zip(*self._layers, strict=True))

    def _describe(self) -> None:
        """Checks what the op believes, and takes down what __call__ compares."""
        parameters, device = self._parameters, self._layers[0][0].device
        self._fits = all(
            type(p) is nn.Parameter and p.is_contiguous() and p.dtype in _DTYPES and p.device == device
            for p in parameters
        ) and all(
            a.dtype == e.dtype == b.dtype and a.dim() == b.dim() == 2 and e.numel() == b.shape[1] == a.shape[0]
            for a, e, b in self._layers
        )  # fmt: skip
        if self._fits:
            n = len(parameters)
            if self._held is None:
                self._held = ops.hold_tensors(parameters)
                weakref.finalize(self, ops.release_tensors, self._held)
            self._numels, self._types = [p.numel() for p in parameters], [Tensor] * n
            self._dtypes = [p.dtype for p in parameters]
            rows = [(_DTYPES[a.dtype], a.shape[1], b.shape[0], a.shape[0]) for a, _, b in self._layers]
            fixed = [value for row in zip(*rows, strict=True) for value in row]
            self._values = array("q", [p.data_ptr() for p in parameters] + [0] * n + fixed)
            self._table = torch.frombuffer(self._values, dtype=torch.int64).view(10, -1)

    def __call__(self) -> Tensor | None:
        """int64 [10, layers], as csrc/rank_allocation_ops.h has it, good until a tensor changes. None if some tensor is
        not plain: a subclass, or a gradient that is missing, not contiguous or of another dtype."""
        if self._fits and _held_have_moved(self._held, self._table):
            self._describe()
        grads = [p.grad for p in self._parameters]
        fits = (
            self._fits
            and list(map(type, grads)) == self._types
            and list(map(Tensor.numel, grads)) == self._numels
            and [g.dtype for g in grads] == self._dtypes
            and all(map(Tensor.is_contiguous, grads))
        )
        if not fits:
            return None
        n = len(grads)
        self._values[n : 2 * n] = array("q", list(map(Tensor.data_ptr, grads)))
        return self._table


def update_importance(
    A: Sequence[Tensor],
    E: Sequence[Tensor],
    B: Sequence[Tensor],
    sensitivity: Tensor,
    uncertainty: Tensor,
    beta1: float,
    beta2: float,
    grad_scale: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Takes the gradients (``.grad``) of all layers into the averages and returns the score of every triplet.

    A, E, B: of every layer, float32, bfloat16 or float16. sensitivity, uncertainty: float32, flat, laid out by
    ``state_layout``; updated in place. grad_scale: float32, one element, that the gradients are to be divided by. A
    parameter without a gradient counts as one with zero. table: what a TripletTable of A, E and B gives now, which
    costs less than the tensors. Returns float32 [triplets].
    Raises RuntimeError naming the argument for shapes, dtypes and devices that do not fit.
    """
    if table is not None:
        return _update_importance_table(table, sensitivity, uncertainty, beta1, beta2, grad_scale)
    grads = [[t.grad for t in tensors] for tensors in (A, E, B)]
    return _update_importance(A, E, B, *grads, sensitivity, uncertainty, beta1, beta2, grad_scale)


def rank_mask(scores: Tensor, budget: int, exact: bool = False) -> Tensor:
    """Bool [triplets]: which triplets to keep of float32 scores [triplets].

    exact False: those above the ``triplets - budget`` smallest, as HF PEFT, which may be fewer than budget where scores
    are equal; True: budget of them, of a tie the first. A budget of all triplets or more keeps all.

    >>> rank_mask(torch.tensor([3.0, 1.0, 2.0, 2.0]), 2).tolist()
    [True, False, False, False]
    >>> rank_mask(torch.tensor([3.0, 1.0, 2.0, 2.0]), 2, exact=True).tolist()
    [True, False, True, False]
    """
    return _rank_mask(scores, budget, exact)


def mask_ranks(E: Sequence[Tensor], keep: Tensor, table: Tensor | None = None) -> None:
    """Zeroes, in place, the elements of E, [r, 1] of every layer, for which keep, bool [triplets], is False.

    table: as in update_importance.
    """
    if table is None:
        _mask_ranks(E, keep)
    else:
        _mask_ranks_table(table, keep)
    torch.autograd.graph.increment_version(E)  # no op of an extension does; autograd and TensorCache go by it


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(ctx, squared, layers, *factors):
        value, deviations, norms = _orthogonality(factors[:layers], factors[layers:], squared)
        ctx.save_for_backward(deviations, norms, *factors)
        ctx.squared, ctx.layers = squared, layers
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        deviations, norms, *factors = ctx.saved_tensors
        A, B = factors[: ctx.layers], factors[ctx.layers :]
        dA, dB = _orthogonality_backward(grad, A, B, deviations, norms, ctx.squared)
        grads = (g if wanted else None for g, wanted in zip((*dA, *dB), ctx.needs_input_grad[2:], strict=True))
        return None, None, *grads


def orthogonality_penalty(A: Sequence[Tensor], B: Sequence[Tensor], squared: bool = False) -> Tensor:
    """How far the rows of A, [r, in] each, and the columns of B, [out, r] each, are from orthonormal: float32 [].

    False: the mean of ``||A A^T - I||_F`` and ``||B^T B - I||_F`` over all of them, as HF PEFT; True: the sum of their
    squares, equation 4 of the paper. Differentiable; the gradient at a norm of 0 is 0.

    >>> round(orthogonality_penalty([torch.zeros(4, 8)], [torch.eye(8, 4)]).item(), 3)
    1.0
    """
    if not A and not B:  # the dispatcher would not know which device's kernel to call
        raise RuntimeError("A and B: expected at least one tensor")
    return _Orthogonality.apply(squared, len(A), *A, *B)


@torch.library.register_fake("peftkern::update_importance_")
def _(A, E, B, grad_A, grad_E, grad_B, sensitivity, uncertainty, beta1, beta2, grad_scale):
    return sensitivity.new_empty((sum(a.shape[0] for a in A),))


@torch.library.register_fake("peftkern::update_importance_table_")
def _(table, sensitivity, uncertainty, beta1, beta2, grad_scale):
    # how many triplets there are stands in the table
    return sensitivity.new_empty((torch.library.get_ctx().new_dynamic_size(),))


@torch.library.register_fake("peftkern::rank_mask")
def _(scores, budget, exact):
    return scores.new_empty(scores.shape, dtype=torch.bool)


@torch.library.register_fake("peftkern::mask_ranks_")
def _(E, keep):
    return None


@torch.library.register_fake("peftkern::mask_ranks_table_")
def _(table, keep):
    return None


@torch.library.register_fake("peftkern::orthogonality")
def _(A, B, squared):
    like = A[0] if A else B[0]
    size = sum(a.shape[0] ** 2 for a in A) + sum(b.shape[1] ** 2 for b in B)
    shapes = ((), (size,), (len(A) + len(B),))
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.register_fake("peftkern::orthogonality_backward")
def _(grad, A, B, deviations, norms, squared):
    return [torch.empty_like(a) for a in A], [torch.empty_like(b) for b in B]
