# SPDX-License-Identifier: Apache-2.0
"""multi_lora_linear against the fp64 reference and against adapted_linear, row by row; gradients, layouts, errors."""

import pytest
import torch
from conftest import DEVICES, assert_close
from multi_samples import MULTI_SAMPLES, MultiSample
from samples import BF16, F32
from torch.library import opcheck

import peftkern
from peftkern import NF4Weight, reference
from peftkern.ops.library import ops
from peftkern.ops.multi_lora import make_plan

samples = pytest.mark.parametrize("sample", MULTI_SAMPLES, ids=str)


def backward(call):
    """y, and the gradient of y that was passed back."""
    y = call.run()
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype).to(y.device)
    y.backward(gradient)
    return y, gradient


@samples
def test_equals_reference(sample, device, isa):
    call = sample.make().to(device)
    y, gradient = backward(call)
    assert y.dtype == sample.x
    expected, leaves = call.reference()
    expected.backward(gradient.cpu().double())
    assert_close(y, expected, sample.x, "y")
    with torch.no_grad():
        assert torch.equal(call.run(), y), "without gradients another value"
    for name, t in call.inputs().items():
        assert t.grad is not None and t.grad.dtype == t.dtype, name
        coarser = max(sample.x, t.dtype, key=lambda d: torch.finfo(d).eps)
        dtype = t.dtype if name == "bias" else coarser  # a plain sum: rounded once, to the dtype of bias
        assert_close(t.grad, leaves[name].grad, dtype, f"d{name}", slack=2.0)


@samples
def test_every_row_has_the_bits_of_adapted_linear(sample, isa):
    """Forward and dx: the whole batch through one adapter, of which the rows that have it count. dA and dB: without
    dropout, its rows alone."""
    ops.set_product("forward", "library")  # a way that fuses the low-rank part may sum in another order
    ops.set_product("gradient", "library")
    call = sample.make()
    y, gradient = backward(call)
    index = call.row_index().reshape(y.shape[:-1])
    for a in range(-1, sample.adapters):
        rank = sample.r if call.ranks is None else int(call.ranks[a])
        terms = {"A": call.trainable["A"][a, :rank], "B": call.trainable["B"][a, :, :rank]} if a >= 0 else {}
        terms |= {"bias": call.trainable["bias"]} if sample.bias else {}
        options = {"scaling": float(call.scaling[a]) if sample.scalings else 0.7, "seed": call.seed}
        rows = index == a

        def one(x, p, terms=terms, options=options):
            leaves = {k: t.detach().clone().requires_grad_() for k, t in {"x": x, **terms}.items()}
            rest = {k: t for k, t in leaves.items() if k != "x"}
            return peftkern.adapted_linear(leaves["x"], call.weight, dropout_p=p, **options, **rest), leaves

        expected, leaves = one(call.x, sample.dropout)
        expected.backward(gradient)
        assert torch.equal(y[rows], expected[rows]), f"y of adapter {a}"
        assert torch.equal(call.x.grad[rows], leaves["x"].grad[rows]), f"dx of adapter {a}"
        if a >= 0 and not sample.dropout and call.x.dim() > 1:
            expected, leaves = one(call.x[rows], 0.0)
            expected.backward(gradient[rows])
            assert torch.equal(call.trainable["A"].grad[a, :rank], leaves["A"].grad), f"dA of adapter {a}"
            got, alone = call.trainable["B"].grad[a, :, :rank], leaves["B"].grad
            if len(call.x[rows]) <= 8 < rows.numel():  # h = x A^T of so few rows is summed in another order
                torch.testing.assert_close(got, alone)
            else:
                assert torch.equal(got, alone), f"dB of adapter {a}"


@samples
def test_every_isa_equals_scalar(sample):
    """They may differ by the order of sums only."""
    results = {}
    for name in ops.cpu_isas():
        peftkern.set_cpu_isa(name)
        call = sample.make()
        y, _ = backward(call)
        results[name] = {"y": y.detach(), **{f"d{k}": t.grad for k, t in call.inputs().items()}}
    for name, got in results.items():
        for key, t in got.items():
            assert_close(t, results["scalar"][key], t.dtype, f"{key} of {name}")


@samples
def test_repeats_to_the_bit(sample, device, isa, threads):
    def bits(n: int) -> list[torch.Tensor]:
        threads(n)
        call = sample.make().to(device)
        y, _ = backward(call)
        return [y, *(t.grad for t in call.inputs().values())]

    first = bits(1)
    for n in (1, 2, 3):
        for a, b in zip(first, bits(n), strict=True):
            assert torch.equal(a, b), f"{n} threads"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_large_shapes_repeat_and_equal_reference(dtype, threads):
    """Enough rows and columns that every split and tail is used."""
    sample = MultiSample((900,), 1100, 1300, 3, 24, dtype, dtype, dropout=0.1, ranks=True, scalings=True, bias=True)
    results = []
    for n in (1, 2):
        threads(n)
        call = sample.make()
        y, gradient = backward(call)
        results.append([y, *(t.grad for t in call.inputs().values())])
    expected, leaves = call.reference()
    expected.backward(gradient.double())
    assert_close(y, expected, dtype, "y")
    for name, t in call.inputs().items():
        assert_close(t.grad, leaves[name].grad, dtype, f"d{name}", slack=3.0)
    # y and dx include the library's product, which may depend on the threads
    for a, b, name in zip(*results, ["y", *call.inputs()], strict=True):
        if name in ("A", "B", "bias"):
            assert torch.equal(a, b), f"d{name} depends on the number of threads"


def test_gradcheck_with_dropout(device):
    """torch's own checker, every entry of every Jacobian."""
    call = MultiSample((5,), 9, 6, 3, 3, dropout=0.4, ranks=True, scalings=True, bias=True).make().to(device)
    names = list(call.inputs())

    def f(*inputs):
        terms = dict(zip(names, inputs, strict=True))
        x, A, B = terms.pop("x"), terms.pop("A"), terms.pop("B")
        return peftkern.multi_lora_linear(x, call.weight, A, B, call.index, **call.options(), **terms)

    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(f, tuple(call.inputs().values()), eps=0.5, atol=1e-4, rtol=1e-4)


def test_sequences_of_mixed_ranks(device):
    """As many adapted_linear calls, value and gradient; each factor gets a gradient of its own shape."""
    ranks = (3, 16, 1, 0)
    x, w = torch.randn(12, 40, device=device, requires_grad=True), torch.randn(24, 40, device=device)
    A = [torch.randn(r, 40, device=device, requires_grad=True) for r in ranks]
    B = [torch.randn(24, r, device=device, requires_grad=True) for r in ranks]
    index = torch.arange(12, device=device) % 5 - 1
    y = peftkern.multi_lora_linear(x, w, A, B, index, scaling=0.5)
    gradient = torch.randn_like(y)
    leaves = [x, *A, *B]
    got = torch.autograd.grad(y, leaves, gradient)
    rows = []
    for i, a in enumerate(index.tolist()):
        terms = (A[a], B[a]) if a >= 0 else ()
        rows.append(peftkern.adapted_linear(x[i : i + 1], w, *terms, scaling=0.5))
    expected = torch.cat(rows)
    assert_close(y, expected, F32)
    for t, g, e in zip(leaves, got, torch.autograd.grad(expected, leaves, gradient, allow_unused=True), strict=True):
        assert g.shape == t.shape
        assert_close(g, torch.zeros_like(t) if e is None else e, F32, slack=2.0)


def test_what_lies_past_the_rank_does_not_count(device, isa):
    call = MultiSample((20,), 70, 45, 4, 9, dropout=0.2, ranks=True, scalings=True).make().to(device)
    plain = call.copy()
    with torch.no_grad():
        for a, r in enumerate(call.ranks.tolist()):
            call.trainable["A"][a, r:] = float("nan")
            call.trainable["B"][a, :, r:] = float("inf")
    assert torch.equal(backward(call)[0], backward(plain)[0])
    for name, t in call.inputs().items():
        assert torch.equal(t.grad, plain.inputs()[name].grad), name
    for a, r in enumerate(call.ranks.tolist()):
        assert not call.trainable["A"].grad[a, r:].any() and not call.trainable["B"].grad[a, :, r:].any()


def test_adapters_do_not_leak_into_each_other(device, isa):
    """A NaN adapter or a NaN row stays where it is, in the forward pass and in the gradients."""
    call = MultiSample((20,), 70, 45, 4, 9, index="items").make().to(device)
    index = call.row_index()
    with torch.no_grad():
        call.trainable["A"][2] = float("nan")
        call.x[(index == 1).nonzero()[0]] = float("nan")
    y, _ = backward(call)
    bad_rows = index == 2
    bad_rows[(index == 1).nonzero()[0]] = True
    assert torch.equal(y.isnan().any(-1), bad_rows)
    assert torch.equal(call.trainable["A"].grad.isnan().flatten(1).any(1).cpu(), torch.tensor([0, 1, 0, 0]).bool())
    assert torch.equal(call.trainable["B"].grad.isnan().flatten(1).any(1).cpu(), torch.tensor([0, 1, 1, 0]).bool())


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "expanded_grad"])
def test_layouts(layout, device):
    """Non-contiguous and expanded arguments give the bits of their contiguous copies."""
    sample = MultiSample((6, 10), 32, 24, 3, 5, BF16, BF16, dropout=0.2, bias=True, ranks=True, scalings=True)
    call = sample.make().to(device)

    def bent(t: torch.Tensor) -> torch.Tensor:
        if layout == "transposed" and t.dim() > 1:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "strided":
            return torch.stack([t, t], dim=-1)[..., 0]
        if layout == "expanded" and t.dim() == 3:
            return t[:1].expand_as(t)
        return t

    def run(bend):
        leaves = {k: t.detach().clone() for k, t in call.inputs().items()}
        if layout == "expanded":
            for t in leaves.values():
                if t.dim() == 3:
                    t[:] = t[:1]
        leaves = {k: bend(t).detach().requires_grad_() for k, t in leaves.items()}
        options = {k: bend(v) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in call.options().items()}
        y = peftkern.multi_lora_linear(
            leaves["x"], bend(call.weight), leaves["A"], leaves["B"], bend(call.index), bias=leaves["bias"], **options
        )
        grad = torch.ones(1, 1, 1, dtype=y.dtype, device=device).expand_as(y) if bend is bent else torch.ones_like(y)
        y.backward(grad)
        return [y, *(t.grad for t in leaves.values())]

    for a, b in zip(run(bent), run(lambda t: t), strict=True):
        assert torch.equal(a, b)


def test_only_what_is_asked_is_computed_and_kept(device):
    call = MultiSample((8,), 32, 24, 3, 4, dropout=0.5).make().to(device)
    call.trainable["A"].requires_grad_(False)
    y = call.run()
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert not any(t.shape == call.x.shape for t in saved)
    y.sum().backward()
    assert call.trainable["A"].grad is None and call.trainable["B"].grad is not None
    call = MultiSample((8,), 32, 24, 3, 4, dropout=0.5).make().to(device)
    call.x.requires_grad_(False)
    call.trainable["B"].requires_grad_(False)
    y = call.run()
    assert not any(t is not None and t.shape == (8, 4) for t in y.grad_fn.saved_tensors)
    y.sum().backward()
    assert call.x.grad is None and call.trainable["B"].grad is None and call.trainable["A"].grad is not None


def test_the_seed_follows_torch_and_evaluation_has_no_dropout(device):
    call = MultiSample((16,), 32, 24, 3, 4).make().to(device)
    terms = (call.x, call.weight, call.trainable["A"], call.trainable["B"], call.index)

    def run(**kwargs):
        return peftkern.multi_lora_linear(*terms, dropout_p=0.5, **kwargs)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(first, run()) and not torch.equal(first, second)
    assert torch.equal(run(training=False), peftkern.multi_lora_linear(*terms))


def test_autocast_casts_x_first(device):
    call = MultiSample((16,), 32, 24, 3, 4).make().to(device)
    with torch.autocast(device, BF16):
        y = call.run()
    call.x = call.x.bfloat16()
    assert y.dtype == BF16 and torch.equal(y, call.run())


@pytest.mark.parametrize("rows", [(4,), (2, 3), ()], ids=str)
def test_results_may_be_modified_in_place(rows):
    call = MultiSample(rows, 24, 24, 3, 4, dropout=0.2, bias=True).make()
    plain = call.copy()
    y = call.run()
    y += call.x
    y.relu_()
    y.sum().backward()
    torch.relu(plain.run() + plain.x).sum().backward()
    assert torch.equal(call.x.grad, plain.x.grad)


# ---- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("shape", "leading", "adapters"), [((40,), (40,), 3), ((4,), (4, 25), 7), ((0,), (0, 3), 2)])
def test_plan(shape, leading, adapters, dtype, device):
    """The rows in the order of a stable sort, and every entry in one tile of at most 32 of one adapter."""
    index = torch.randint(-1, adapters, shape, dtype=dtype)
    plan = make_plan(index.to(device), torch.empty(*leading, 8, device=device), adapters).cpu()
    rows = torch.Size(leading).numel()
    of_row = index.long().repeat_interleave(rows // max(index.numel(), 1))
    key = torch.where(of_row < 0, adapters, of_row)
    offsets, order, tiles, ends = plan.split(
        [adapters + 2, rows, 2 * (rows // 32 + adapters + 1), adapters + 1]
    )  # fmt: skip
    assert torch.equal(order, key.sort(stable=True).indices)
    assert torch.equal(offsets.diff(), torch.bincount(key, minlength=adapters + 1)) and offsets[0] == 0
    assert torch.equal(ends, offsets[1:])
    covered = [(a, e) for a, e in tiles.reshape(-1, 2).tolist() if a >= 0]
    expected = [(a, e) for a in range(adapters + 1) for e in range(int(offsets[a]), int(offsets[a + 1]), 32)]
    assert covered == expected and tiles.reshape(-1, 2)[len(covered) :].tolist() == [[-1, 0]] * (
        len(tiles) // 2 - len(covered)
    )


# ---- errors ----------------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 3, 32), torch.zeros(24, 32)
A, B, INDEX = torch.zeros(5, 4, 32), torch.zeros(5, 24, 4), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 31)}, r"x: expected shape \[\.\.\., 32\] for weight \[24, 32\], got \[2, 3, 31\]"),
        ({"x": X.double()}, "x: expected dtype float32, bfloat16 or float16, got Double"),
        ({"x": torch.zeros(())}, r"x: expected shape \[\.\.\., in_features\]"),
        ({"weight": torch.zeros(24)}, r"weight: expected shape \[out, in\], got \[24\]"),
        ({"A": torch.zeros(4, 32)}, r"A: expected shape \[adapters, r, 32\] with at least one adapter, got \[4, 32\]"),
        ({"A": torch.zeros(5, 4, 31)}, r"A: expected shape \[5, 4, 32\], got \[5, 4, 31\]"),
        ({"A": torch.zeros(0, 4, 32)}, "adapters: expected >= 1, got 0"),
        ({"A": torch.zeros(())}, "adapters: expected >= 1, got 0"),
        ({"A": torch.zeros(5, 4, 32, dtype=torch.int8)}, "A: expected dtype float32, bfloat16 or float16, got Char"),
        ({"B": torch.zeros(5, 24, 3)}, r"B: expected shape \[5, 24, 4\], got \[5, 24, 3\]"),
        ({"adapter_index": torch.zeros(3).long()}, r"adapter_index: expected shape \[2, 3\] or \[2\] .* got \[3\]"),
        ({"adapter_index": torch.zeros(2)}, "adapter_index: expected dtype int32 or int64, got Float"),
        ({"adapter_index": INDEX + 5}, r"adapter_index: expected -1 \(no adapter\) to 4, got 5 at position 0"),
        ({"adapter_index": INDEX - 2}, r"adapter_index: expected -1 \(no adapter\) to 4, got -2 at position 0"),
        ({"adapter_index": INDEX.to("meta")}, "adapter_index: expected the device of x"),
        ({"scaling": torch.zeros(4)}, r"scaling: expected shape \[5\], got \[4\]"),
        ({"scaling": torch.zeros(5).double()}, "scaling: expected dtype Float, got Double"),
        ({"ranks": torch.zeros(5).long()}, "ranks: expected dtype Int, got Long"),
        ({"ranks": torch.zeros(4).int()}, r"ranks: expected shape \[5\], got \[4\]"),
        ({"ranks": torch.full((5,), 5).int()}, r"ranks: expected 0 to 4, got 5 for adapter 0"),
        ({"bias": torch.zeros(25)}, r"bias: expected shape \[24\], got \[25\]"),
        ({"dropout_p": 1.0}, "dropout_p: expected 0 <= p < 1, got 1"),
        ({"dropout_p": 0.1, "seed": torch.zeros(())}, "seed: expected dtype Long, got Float"),
        ({"A": [A[0]], "B": []}, "A and B: expected as many factors each, at least one, got 1 and 0"),
        ({"A": [A[0]], "B": [B[0, :, :3]]}, r"A\[0\] and B\[0\]: expected shapes \[r, in\] and \[out, r\], got"),
        ({"A": [A[0], A[1, :, :9]], "B": [B[0]] * 2}, r"A\[1\]: expected the width, dtype and device of A\[0\]"),
        ({"A": [A[0]], "B": [B[0]], "ranks": torch.zeros(1).int()}, "ranks: expected None with A and B as sequences"),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v),
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": X, "weight": W, "A": A, "B": B, "adapter_index": INDEX}
    with pytest.raises(RuntimeError, match=message):
        peftkern.multi_lora_linear(**{**arguments, **change})


def test_what_has_no_gradient_is_refused():
    with pytest.raises(NotImplementedError, match="weight: expected requires_grad=False"):
        peftkern.multi_lora_linear(X, torch.zeros(24, 32, requires_grad=True), A, B, INDEX)
    with pytest.raises(NotImplementedError, match="scaling: expected requires_grad=False"):
        peftkern.multi_lora_linear(X, W, A, B, INDEX, scaling=torch.ones(5, requires_grad=True))


def test_a_plan_of_another_batch_is_refused():
    plan = make_plan(INDEX, X, 5)
    with pytest.raises(RuntimeError, match=r"plan: expected shape \[31\], got \[30\]"):
        ops.multi_lora_linear(X, W, None, None, None, 64, 24, A, B, plan[:-1], None, None, None, 1.0, 0.0, None, False)


# ---- torch.compile and opcheck ---------------------------------------------------------------------------------------

OPCHECK = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")


@samples
def test_opcheck(sample):
    call = sample.make()
    q = call.weight if isinstance(call.weight, NF4Weight) else None
    base = (q.packed, q.absmax, q.nested_absmax, q.offset, q.block_size) if q else (call.weight, None, None, None, 64)
    x, terms = call.x.detach(), {k: t.detach() for k, t in call.trainable.items()}
    rows = torch.Size(sample.rows).numel()
    opcheck(ops.multi_lora_plan.default, (call.index, rows, sample.adapters), test_utils=OPCHECK)
    plan = ops.multi_lora_plan(call.index, rows, sample.adapters)
    scaling, scalings = (1.0, call.scaling) if sample.scalings else (0.7, None)
    bank = (terms["A"], terms["B"], plan, call.ranks, scalings)
    rest = (scaling, call.dropout_p, call.seed)
    arguments = (x, *base, sample.fan_out, *bank, terms.get("bias"), *rest, True)
    opcheck(ops.multi_lora_linear.default, arguments, test_utils=OPCHECK)
    opcheck(ops.multi_lora_linear.default, (*arguments[:-1], False), test_utils=OPCHECK)
    y, h = ops.multi_lora_linear(*arguments)
    for needs in (1 | 2 | 4 | 32, 1, 0):
        opcheck(
            ops.multi_lora_linear_backward.default,
            (torch.randn_like(y), x, *base, sample.fan_in, h, *bank, *rest, needs), test_utils=OPCHECK,
        )  # fmt: skip


COMPILED = [
    MultiSample((4, 6), 32, 24, 3, 4, dropout=0.2, ranks=True, scalings=True, bias=True, index="items"),
    MultiSample((4, 6), 32, 24, 3, 4, BF16, peftkern.NF4Config(32, True), dropout=0.2, bias=True),
]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sample", COMPILED, ids=str)
def test_compiled_equals_eager(sample, backend):
    torch._dynamo.reset()
    call = sample.make()

    def f(x, weight, index, options, A, B, bias):
        return peftkern.multi_lora_linear(x, weight, A, B, index, bias=bias, **options) * 2

    def run(function):
        fresh = call.copy()
        y = function(fresh.x, fresh.weight, fresh.index, fresh.options(), **fresh.trainable)
        y.sum().backward()
        return [y.detach(), *(t.grad for t in fresh.inputs().values())]

    for eager, compiled in zip(run(f), run(torch.compile(f, fullgraph=True, backend=backend)), strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compiled_with_dynamic_rows_and_sequences():
    torch._dynamo.reset()
    w, A, B = torch.randn(24, 32), [torch.randn(r, 32) for r in (2, 5)], [torch.randn(24, r) for r in (2, 5)]
    f = torch.compile(
        lambda x, index: peftkern.multi_lora_linear(x, w, A, B, index), fullgraph=True, backend="aot_eager",
        dynamic=True,
    )  # fmt: skip
    for rows in (3, 4, 9):
        x, index = torch.randn(rows, 32), torch.arange(rows) % 3 - 1
        torch.testing.assert_close(f(x, index), peftkern.multi_lora_linear(x, w, A, B, index))


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_cuda_graph():
    """A captured call follows new indices, factors and a new seed."""
    call = MultiSample((40,), 64, 48, 4, 8, dropout=0.2, ranks=True, scalings=True).make().to("cuda")
    with torch.no_grad():
        call.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call.run()
        call.index.copy_(torch.randint(-1, 4, (40,)))
        call.trainable["A"].normal_()
        call.seed.fill_(99)
        graph.replay()
        assert torch.equal(y, call.run())


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_cuda_takes_bad_indices_as_none():
    x, w = torch.randn(3, 32, device="cuda"), torch.randn(24, 32, device="cuda")
    A, B = torch.randn(2, 4, 32, device="cuda"), torch.randn(2, 24, 4, device="cuda")
    y = peftkern.multi_lora_linear(x, w, A, B, torch.tensor([2, -7, 1], device="cuda"))
    assert_close(y, reference.multi_lora_linear(x.cpu(), w.cpu(), A.cpu(), B.cpu(), torch.tensor([-1, -1, 1])), F32)
