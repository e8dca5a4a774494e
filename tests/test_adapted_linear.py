# SPDX-License-Identifier: Apache-2.0
"""adapted_linear against the fp64 reference: values, gradients, finite differences, layouts, repeatability, errors."""

import itertools

import pytest
import torch
from conftest import assert_close
from samples import ALL, BF16, F16, F32, SAMPLES, SMALL, Sample

import peftkern
from peftkern import NF4Config, reference
from peftkern.ops.library import ops

samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)


@samples
def test_value_equals_reference(sample, device, isa):
    call = sample.make(device)
    y = call.run()
    assert y.dtype == sample.x
    assert_close(y, call.reference()[0], sample.x, "y")
    with torch.no_grad():
        assert torch.equal(call.run(), y), "without gradients another value"


@samples
def test_gradients_equal_reference(sample, device, isa):
    call = sample.make(device)
    y = call.run()
    grad = torch.randn(y.shape).to(y.dtype)
    y.backward(grad.to(device))
    expected, leaves = call.reference()
    expected.backward(grad.double())
    for name, t in call.inputs().items():
        assert t.grad is not None and t.grad.dtype == t.dtype, name
        coarser = max(sample.x, t.dtype, key=lambda d: torch.finfo(d).eps)
        dtype = t.dtype if name == "bias" else coarser  # a plain sum: rounded once, to the dtype of bias
        assert_close(t.grad, leaves[name].grad, dtype, f"d{name}", slack=2.0)


@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_gradients_by_finite_differences(sample, device):
    """The output is linear in each argument, so a large step has no truncation error and fp32 is enough."""
    call = sample.make(device)
    weights = torch.randn(call.run().shape, device=device)

    def loss() -> float:
        with torch.no_grad():
            return (call.run().double() * weights).sum().item()

    (call.run() * weights).sum().backward()
    for name, t in call.inputs().items():
        if not t.numel():
            continue
        direction = torch.randn_like(t)
        with torch.no_grad():
            t += direction
            above = loss()
            t -= 2 * direction
            below = loss()
            t += direction
        expected = (above - below) / 2
        got = (t.grad.double() * direction).sum().item()
        scale = (t.grad.double().abs() * direction.abs()).sum().item() + 1e-3
        assert abs(got - expected) <= 1e-5 * scale, f"d{name}: {got} against {expected} by finite differences"


def test_gradcheck_with_dropout(device):
    """torch's own checker, every entry of every Jacobian."""
    call = Sample((4,), 9, 6, 3, dropout=0.4, lam=True, out_scale=True, bias=True).make(device)
    names = list(call.inputs())

    def f(*inputs):
        terms = dict(zip(names, inputs, strict=True))
        x = terms.pop("x")
        return peftkern.adapted_linear(x, call.weight, scaling=0.7, dropout_p=0.4, seed=call.seed, **terms)

    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(f, tuple(call.inputs().values()), eps=0.5, atol=1e-4, rtol=1e-4)


@samples
def test_every_isa_equals_scalar(sample):
    """They may differ by the order of sums only."""
    results = {}
    for name in ops.cpu_isas():
        peftkern.set_cpu_isa(name)
        call = sample.make()
        y = call.run()
        y.sum().backward()
        results[name] = {"y": y.detach(), **{f"d{k}": t.grad for k, t in call.inputs().items()}}
    for name, got in results.items():
        for key, t in got.items():
            assert_close(t, results["scalar"][key], t.dtype, f"{key} of {name}")


@samples
def test_repeats_to_the_bit(sample, device, isa, threads):
    def bits(n: int) -> list[torch.Tensor]:
        threads(n)
        call = sample.make(device)
        y = call.run()
        y.backward(torch.ones_like(y))
        return [y, *(t.grad for t in call.inputs().values())]

    first = bits(1)
    for n in (1, 2, 3):
        for a, b in zip(first, bits(n), strict=True):
            assert torch.equal(a, b), f"{n} threads"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_large_shapes_repeat_and_equal_reference(dtype, threads):
    """Enough rows and columns that every split, tile and tail is used."""
    sample = Sample((600,), 1100, 700, 24, dtype, dtype, dropout=0.1, lam=True, bias=True)
    results = []
    for n in (1, 2):
        threads(n)
        call = sample.make()
        y = call.run()
        y.backward(torch.ones_like(y))
        results.append([y, *(t.grad for t in call.inputs().values())])
    expected, leaves = call.reference()
    expected.backward(torch.ones_like(expected))
    assert_close(y, expected, dtype, "y")
    for name, t in call.inputs().items():
        assert_close(t.grad, leaves[name].grad, dtype, f"d{name}", slack=3.0)
    # the low-rank gradients are ours and must not depend on the threads; y and dx include the library's product
    for a, b, name in zip(*results, ["y", *call.inputs()], strict=True):
        if name in ("A", "B", "lam", "bias"):
            assert torch.equal(a, b), f"d{name} depends on the number of threads"


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "expanded_grad"])
def test_layouts(layout, device):
    """Non-contiguous and expanded arguments give the bits of their contiguous copies."""
    call = Sample((6, 10), 32, 24, 5, BF16, BF16, dropout=0.2, **ALL).make(device)

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
            leaves["x"][:] = leaves["x"][:1]
        leaves = {k: bend(t).detach().requires_grad_() for k, t in leaves.items()}
        terms = {k: t for k, t in leaves.items() if k != "x"}
        y = peftkern.adapted_linear(leaves["x"], bend(call.weight), scaling=0.7, dropout_p=0.2, seed=call.seed, **terms)
        values = torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape).to(y.dtype)
        grad = {"expanded": values[:1], "expanded_grad": values[:1, :1, :1]}.get(layout, values).expand_as(y)
        y.backward(bend(grad) if bend is bent else grad.contiguous())
        return [y, *(t.grad for t in leaves.values())]

    for a, b in zip(run(bent), run(lambda t: t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_gradient_alone_has_the_bits_it_has_among_all(dtype, device, isa):
    """Those that one pass over grad makes: each subset of them, with and without the others."""
    call = Sample((70,), 24, 37, 3, dtype, dtype, dropout=0.1, **ALL).make(device)
    expected = {}
    for wanted in itertools.product((True, False), repeat=6):  # first all
        for t, is_wanted in zip(call.inputs().values(), wanted, strict=True):
            t.requires_grad_(is_wanted).grad = None
        if any(wanted):
            y = call.run()
            y.backward(torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape).to(dtype))
        for (name, t), is_wanted in zip(call.inputs().items(), wanted, strict=True):
            assert not is_wanted or torch.equal(t.grad, expected.setdefault(name, t.grad)), (name, wanted)


def test_only_what_is_asked_is_computed_and_kept(device):
    """LoRA-FA (A frozen) keeps no x; a frozen x gets no gradient; no mask is kept."""
    call = Sample((8,), 32, 24, 4, dropout=0.5).make(device)
    call.trainable["A"].requires_grad_(False)
    y = call.run()
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert not any(t.shape == call.x.shape for t in saved)
    y.sum().backward()
    assert call.trainable["A"].grad is None and call.trainable["B"].grad is not None
    call = Sample((8,), 32, 24, 4, dropout=0.5).make(device)
    call.x.requires_grad_(False)
    y = call.run()
    y.sum().backward()
    assert call.x.grad is None and call.trainable["A"].grad is not None


def test_dropout_is_the_reference_mask(device, isa):
    """With A = B = I and W = 0 the op returns drop(x)."""
    for columns in (1, 7, 8, 64, 300):
        x, eye = torch.randn(37, columns, device=device), torch.eye(columns, device=device)
        seed = torch.tensor(-(2**61) + 12345, device=device)
        y = peftkern.adapted_linear(x, torch.zeros_like(eye), eye, eye, dropout_p=0.3, seed=seed)
        expected = reference.dropout(x.cpu().double(), 0.3, int(seed))
        assert torch.equal(y.cpu() == 0, expected == 0)
        assert_close(y, expected, F32)


def test_bfloat16_results_round_to_the_nearest_even(device, isa):
    """With x = A = 1 and W = 0 the op returns B in bfloat16: as torch rounds it, subnormals, infinities and NaN too."""
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    bits[:1024] &= 0x807FFFFF - 2**32  # subnormal
    bits[1024:2048] = bits[1024:2048] & ~0xFFFF | 0x8000  # halfway between two
    bits[2048:2052] = torch.tensor([0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7F7FFFFF], dtype=torch.int32)
    B = bits.view(torch.float32)[:, None].to(device)
    one = torch.ones(1, 1, dtype=BF16, device=device)
    y = peftkern.adapted_linear(one, torch.zeros(4096, 1, dtype=BF16, device=device), one, B)
    torch.testing.assert_close(y[0], B[:, 0].to(BF16), rtol=0, atol=0, equal_nan=True)


def test_dropout_statistics():
    keep = reference.dropout_mask(512, 4096, int(0.05 * 32768 + 0.5), 7)
    p = 1 - keep.double().mean().item()
    assert abs(p - 0.05) < 6 * (0.05 * 0.95 / keep.numel()) ** 0.5
    rows, columns = (1 - keep.double()).mean(1), (1 - keep.double()).mean(0)
    assert rows.std() < 1.2 * (0.05 * 0.95 / 4096) ** 0.5 and columns.std() < 1.2 * (0.05 * 0.95 / 512) ** 0.5
    other = reference.dropout_mask(512, 4096, int(0.05 * 32768 + 0.5), 8)
    both = (~keep & ~other).double().mean().item()
    assert abs(both - 0.05**2) < 6 * (0.05**2 / keep.numel()) ** 0.5


def test_seed_follows_torch(device):
    x, w = torch.randn(16, 32, device=device), torch.zeros(8, 32, device=device)
    A, B = torch.randn(4, 32, device=device), torch.randn(8, 4, device=device)

    def run(**kwargs):
        return peftkern.adapted_linear(x, w, A, B, dropout_p=0.5, **kwargs)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(first, run()) and not torch.equal(first, second)
    assert torch.equal(run(training=False), peftkern.adapted_linear(x, w, A, B))


WAYS = [(direction, name) for direction in ("forward", "gradient") for name in ops.product_names(direction)]


@pytest.mark.parametrize("direction, name", WAYS)
def test_every_way_to_make_a_product_equals_the_reference(direction, name, isa):
    taken = 0
    for sample in SAMPLES:
        call = sample.make()
        ops.set_product(direction, name)
        try:
            y = call.run()
            grad = torch.randn(y.shape).to(y.dtype)
            y.backward(grad)
        except RuntimeError as error:
            assert f'"{name}" is forced and takes no' in str(error)
            continue
        expected, leaves = call.reference()
        assert_close(y, expected, sample.x, f"{sample}: y")
        if "x" in leaves:
            expected.backward(grad.double())
            assert_close(call.inputs()["x"].grad, leaves["x"].grad, sample.x, f"{sample}: dx", slack=2.0)
        taken += 1
    if (name == "nf4_tiles" and isa == "scalar") or name == "nf4_fused":
        assert not taken
        pytest.skip("scalar makes no products of tiles, and only CUDA fused ones")
    assert taken >= 3


@pytest.mark.parametrize("weight", [BF16, NF4Config(64)], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_library_accumulate_rounds_the_smaller_term_once_more(dtype, weight):
    """Each value within half a unit of the low-rank term and half a unit of the result, and fp32 sums."""
    ops.set_product("forward", "library_accumulate")
    ops.set_product("gradient", "library_accumulate")
    call = Sample((70,), 192, 130, 8, dtype, weight, dropout=0.2, bias=True).make()
    for t in (call.trainable["A"], call.trainable["bias"]):
        t.data *= 0.1
    y = call.run()
    y.backward(torch.ones_like(y))
    expected, leaves = call.reference()
    expected.backward(torch.ones_like(expected))
    base = call.dense_weight().double()
    terms = {"y": (y, expected, leaves["x"] @ base.T), "dx": (call.x.grad, leaves["x"].grad, base.sum(0))}
    for name, (got, value, product) in terms.items():
        low_rank, half = (value - product).abs(), 0.501 * torch.finfo(dtype).eps
        assert low_rank.mean() < 0.5 * value.abs().mean(), "not the smaller term"
        error = (got.double() - value).abs()
        assert (error <= half * (low_rank + value.abs()) + 1e-5).all(), name


# (rows, in, out): more than a block and a panel of rows each way, all ragged, the output also odd
TILE_SHAPES = [(3, 64, 37), (17, 96, 51), (33, 1056, 300), (130, 2080, 531), (1000, 96, 70), (70, 4128, 50)]


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("rows, fan_in, fan_out", TILE_SHAPES)
def test_products_of_tiles(rows, fan_in, fan_out, x_dtype, isa, threads):
    """The same bits for any number of threads, and the reference's values; weights that are not rows of blocks, too."""
    if isa == "scalar":
        pytest.skip("scalar makes no products of tiles")
    ops.set_product("forward", "nf4_tiles")
    ops.set_product("gradient", "nf4_tiles")
    call = Sample((rows,), fan_in, fan_out, 5, x_dtype, NF4Config(64), dropout=0.1, bias=True).make()
    results = []
    for n in (1, 2):
        threads(n)
        call.x.grad = None
        y = call.run()
        y.backward(torch.ones_like(y))
        results.append((y, call.x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    expected, leaves = call.reference()
    expected.backward(torch.ones_like(expected))
    assert_close(y, expected, x_dtype, "y")
    assert_close(call.x.grad, leaves["x"].grad, x_dtype, "dx", slack=2.0)


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("fan_in, fan_out", [(64, 3), (192, 51), (1088, 131), (33344, 4)])
def test_products_of_few_rows(fan_in, fan_out, x_dtype, isa, threads):
    """The same bits for any number of threads, which is any split of the columns, and the reference's values: every
    height of a panel, several panels, whole and half runs of 128 weights, more runs than tables are kept of, one block
    with values that are subnormal in bfloat16."""
    ops.set_product("forward", "nf4_few_rows")
    q = peftkern.quantize_nf4(torch.randn(fan_out, fan_in), 64)
    q.float_absmax()[fan_out // 2] = 1e-38
    weight, bias = peftkern.dequantize_nf4(q, F32).double(), torch.randn(fan_out)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 19):
        x = torch.randn(rows, fan_in).to(x_dtype)
        results = []
        for n in (1, 2):
            threads(n)
            results.append(peftkern.nf4_linear(x, q, bias))
        assert torch.equal(*results), rows
        exact = peftkern.dequantize_nf4(q, x_dtype).double()
        assert (exact - weight).abs().max() <= weight.abs().max() * torch.finfo(x_dtype).eps
        assert_close(results[0], x.double() @ exact.T + bias.double(), x_dtype, f"{rows} rows")


@pytest.mark.parametrize("way", ["nf4_tiles", "nf4_few_rows"])
@pytest.mark.parametrize("absmax", [3e-37, 1.0], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
def test_looked_up_weights_are_the_dequantized_ones(way, absmax, block_size, isa):
    """Scaled rows of the identity give the weight itself, to the bit, in blocks of any size, also where its table comes
    close to subnormal values, which vdpbf16ps takes for zero."""
    if way == "nf4_tiles" and isa == "scalar":
        pytest.skip("scalar makes no products of tiles")
    ops.set_product("forward", way)
    q = peftkern.quantize_nf4(torch.randn(7, 4096).clamp(-1, 1) * absmax, block_size)
    for dtype, rows in itertools.product((F32, BF16), (8, 16)):  # one panel, and two with the same tables
        weight = peftkern.dequantize_nf4(q, dtype)
        x = torch.zeros(rows, 4096, dtype=dtype)
        columns = torch.arange(rows) * 250 + 3
        x[torch.arange(rows), columns] = 2.0 if absmax == 1.0 else 2.0**20
        y = peftkern.nf4_linear(x, q)
        expected = weight.T[columns].double() * x.max().double()
        assert torch.equal(y.double(), expected), dtype


def test_a_forced_product_is_not_silently_replaced():
    ops.set_product("forward", "nf4_few_rows")
    with pytest.raises(RuntimeError, match='"nf4_few_rows" is forced and takes no 4 rows of this weight'):
        Sample((4,), 32, 24, None).make().run()
    with pytest.raises(RuntimeError, match='forward product: expected "nf4_few_rows", .* or "" for the best'):
        ops.set_product("forward", "fast")
    with pytest.raises(RuntimeError, match='direction: expected "forward" or "gradient", got "back"'):
        ops.set_product("back", "library")


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """Offsets past 2^31: an NF4 weight and an activation of 2^31 + 2^16 elements, checked at their far end."""
    rows, columns = 2**15 + 1, 2**16
    x = torch.zeros(rows, columns, dtype=BF16)
    x[-1] = torch.randn(columns).to(BF16)
    A, B = torch.randn(1, columns) / 256, torch.randn(2, 1)
    weight = torch.zeros(2, columns, dtype=BF16)
    y = peftkern.adapted_linear(x, weight, A, B)
    assert_close(y[-1], (x[-1].double() @ A.double().T) @ B.double().T, BF16)
    assert not y[:-1].any()
    q = peftkern.quantize_nf4(x)
    assert not q.absmax[:-1024].any()
    assert torch.equal(q.absmax[-1024:], x[-1].reshape(1024, 64).abs().amax(1).float())
    tail = peftkern.NF4Weight(q.packed[-1:], q.absmax[-1024:], 64, (1, columns), BF16)
    expected = peftkern.dequantize_nf4(tail)
    del x, y
    assert torch.equal(peftkern.dequantize_nf4(q)[-1:], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 31)}, r"x: expected shape \[..., 32\] for weight \[24, 32\], got \[4, 31\]"),
        ({"x": torch.zeros(4, 32, dtype=torch.float64)}, "x: expected dtype float32, bfloat16 or float16, got Double"),
        ({"x": torch.zeros(())}, r"x: expected shape \[\.\.\., in_features\]"),
        ({"x": torch.zeros(4, 32, dtype=torch.int64)}, "x: expected dtype float32, bfloat16 or float16, got Long"),
        ({"weight": torch.zeros(24)}, r"weight: expected shape \[out, in\], got \[24\]"),
        ({"A": torch.zeros(4, 31)}, r"A: expected shape \[4, 32\], got \[4, 31\]"),
        ({"A": torch.zeros(128)}, r"A: expected shape \[r, 32\], got \[128\]"),
        ({"A": None}, "A and B: expected both or neither"),
        ({"B": torch.zeros(24, 5)}, r"B: expected shape \[24, 4\], got \[24, 5\]"),
        ({"B": torch.zeros(24, 4, dtype=torch.int32)}, "B: expected dtype float32, bfloat16 or float16, got Int"),
        ({"lam": torch.zeros(5)}, r"lam: expected shape \[4\], got \[5\]"),
        ({"out_scale": torch.zeros(1)}, r"out_scale: expected shape \[24\], got \[1\]"),
        ({"bias": torch.zeros(25)}, r"bias: expected shape \[24\], got \[25\]"),
        ({"dropout_p": 1.0}, "dropout_p: expected 0 <= p < 1, got 1"),
        ({"dropout_p": -0.1}, "dropout_p: expected 0 <= p < 1, got -0.1"),
        ({"dropout_p": 0.1, "seed": torch.zeros(())}, "seed: expected dtype Long, got Float"),
        ({"A": torch.zeros(4, 32, device="meta")}, "A: expected the device of x"),
        ({"bias": torch.zeros(24, device="meta")}, "bias: expected the device of x"),
    ],
    ids=lambda v: v if isinstance(v, str) else ",".join(v),
)
def test_bad_arguments_are_named(change, message):
    shapes = {"x": (4, 32), "weight": (24, 32), "A": (4, 32), "B": (24, 4)}
    arguments = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(RuntimeError, match=message):
        peftkern.adapted_linear(**{**arguments, **change})


def test_bad_nf4_arguments_are_named():
    q = peftkern.quantize_nf4(torch.randn(24, 32))
    x, rest = torch.zeros(4, 32), (24, *[None] * 5, 1.0, 0.0, None, False, False)
    with pytest.raises(RuntimeError, match=r"x: expected shape \[\.\.\., 32\] for weight \[24, 32\], got \[4, 31\]"):
        peftkern.nf4_linear(torch.zeros(4, 31), q)
    with pytest.raises(RuntimeError, match="absmax: expected 12 values for 768 weights in blocks of 64, got 11"):
        ops.adapted_linear(x, q.packed, q.absmax[:11], None, None, 64, *rest)
    nested = peftkern.quantize_nf4(torch.randn(24, 32), double_quant=True)
    for change, message in (
        ((nested.absmax, None, None), "absmax: expected dtype Float, got Byte"),
        ((nested.absmax, nested.nested_absmax, None), "nested_absmax and offset: expected both or neither"),
        ((q.absmax, nested.nested_absmax, nested.offset), "absmax: expected dtype Byte, got Float"),
        (
            (nested.absmax, nested.nested_absmax.repeat(2), nested.offset),
            "nested_absmax: expected 1 values for 12 codes",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.adapted_linear(x, nested.packed, *change, 64, *rest)
    with pytest.raises(RuntimeError, match="absmax: expected it beside nested_absmax and offset, got None"):
        ops.adapted_linear(x, torch.zeros(24, 32), None, nested.nested_absmax, nested.offset, 64, *rest)
    with pytest.raises(RuntimeError, match="packed: expected 384 bytes for 768 weights, got 383"):
        ops.adapted_linear(x, q.packed.reshape(-1)[:383], q.absmax, None, None, 64, *rest)
    with pytest.raises(RuntimeError, match="block_size: expected a power of two from 32 to 4096, got 48"):
        ops.adapted_linear(x, q.packed, q.absmax, None, None, 48, *rest)


def test_a_trainable_weight_is_refused():
    w = torch.zeros(24, 32, requires_grad=True)
    with pytest.raises(NotImplementedError, match="weight: expected requires_grad=False"):
        peftkern.adapted_linear(torch.zeros(4, 32), w)


@pytest.mark.parametrize("rows", [(4,), (2, 3), ()], ids=str)
def test_results_may_be_modified_in_place(rows):
    """nn.ReLU(inplace=True) after a layer, and `y += x`: autograd forbids both on views."""
    call = Sample(rows, 24, 24, 4, dropout=0.2, bias=True).make()
    plain = call.copy()
    y = call.run()
    y += call.x
    y.relu_()
    y.sum().backward()
    torch.relu(plain.run() + plain.x).sum().backward()
    assert torch.equal(call.x.grad, plain.x.grad)
    (dx,) = torch.autograd.grad(plain.run().sum(), plain.x)
    dx += 1


def test_messages_hold_no_file_of_the_build_machine():
    with pytest.raises(RuntimeError) as error:
        peftkern.adapted_linear(torch.ones(2, 8).double(), torch.ones(4, 8))
    assert str(error.value).startswith("x: expected dtype")


def test_autocast_leaves_float64_to_the_check():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="x: expected dtype .* got Double"):
        peftkern.adapted_linear(torch.ones(2, 8).double(), torch.ones(4, 8))


def test_double_backward_is_refused():
    call = Sample((4,), 8, 8, 2).make()
    (dx,) = torch.autograd.grad(call.run().square().sum(), call.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_autocast_casts_x_as_linear_does():
    call = Sample((4,), 32, 24, 4, weight=NF4Config(64)).make()
    with torch.autocast("cpu", torch.bfloat16):
        y = call.run()
    assert y.dtype == BF16
    y.sum().backward()
    assert call.x.grad.dtype == F32 and call.trainable["A"].grad.dtype == F32
