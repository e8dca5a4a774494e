# SPDX-License-Identifier: Apache-2.0
"""compress(): discarded energy and result against the SVD of the dense update, memory, and adapters of all kinds."""

import copy
import itertools
import json

import mpmath
import pytest
import torch
from safetensors.torch import load_file
from samples import BF16, F16, F32
from test_adapt import TOKENS, adapted, snapshot, tiny_llama, unchanged
from test_adapter_io import randomize_trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import LoraConfig, LoRALinear, NF4Linear, compress, reference
from peftkern.adapter_io import CONFIG_NAME, WEIGHTS_NAME
from peftkern.modules import AdaptedLinear

F64 = torch.float64


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=F64)).Q


def one_layer(A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"layer.lora_A.weight": A, "layer.lora_B.weight": B}


def tails(S: torch.Tensor) -> torch.Tensor:
    """Discarded energy of every rank."""
    return torch.stack([S[k:].flip(0).square().sum() for k in range(len(S) + 1)])


def delta(tensors: dict[str, torch.Tensor], layer: str = "layer") -> torch.Tensor:
    A, B = (tensors[f"{layer}.lora_{part}.weight"].double() for part in "AB")
    return B @ A


# ---- the decomposition -----------------------------------------------------------------------------------------------

SHAPES = [  # in, out, r
    *((280, 300, r) for r in (1, 2, 3, 8, 16, 33, 64, 128, 256)),
    (40, 300, 64), (300, 40, 64), (30, 20, 64), (20, 30, 64), (1, 50, 4), (50, 1, 4), (1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("fan_in", "fan_out", "r"), SHAPES, ids=str)
def test_discarded_energy_is_that_of_the_exact_svd(fan_in, fan_out, r, device):
    """To 1e-5 relative (it is 1e-10), at every rank."""
    decay = torch.logspace(0, -4, r)[:, None]  # what a trained adapter looks like
    adapter = one_layer(decay * torch.randn(r, fan_in), torch.randn(fan_out, r))
    exact = torch.linalg.svdvals(delta(adapter))[: min(r, fan_in, fan_out)]
    report = compress({k: t.to(device) for k, t in adapter.items()}, energy=1.0).layers["layer"]
    assert report.rank_before == r and report.singular_values.dtype == F64
    got, expected = tails(report.singular_values)[:-1], tails(exact)[:-1]
    assert ((got - expected).abs() <= 1e-10 * expected).all()
    assert report.rank == len(exact) and report.energy == pytest.approx(expected[0].item(), rel=1e-10)
    for k in {1, max(1, r // 2)}:
        report = compress({k: t.to(device) for k, t in adapter.items()}, rank=k).layers["layer"]
        assert report.rank == min(k, len(exact))
        assert report.discarded_energy == pytest.approx(tails(exact)[report.rank].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("k", [1, 5, 12])
def test_the_result_is_the_nearest_of_its_rank(k, dtype, device):
    adapter = one_layer(torch.randn(12, 70).to(dtype), torch.randn(50, 12).to(dtype))
    before = {k: t.clone() for k, t in adapter.items()}
    result = compress({name: t.to(device) for name, t in adapter.items()}, rank=k)
    new = {name: t.cpu() for name, t in result.state_dict.items()}
    assert all(torch.equal(adapter[name], t) for name, t in before.items()), "the argument is not changed"
    A, B = new["layer.lora_A.weight"], new["layer.lora_B.weight"]
    assert A.shape == (k, 70) and B.shape == (50, k) and A.dtype == B.dtype == dtype
    nearest, S = reference.truncated_svd(delta(adapter), k)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-12)  # float64: LAPACK's and our own rounding
    assert (delta(new) - nearest).abs().max() <= tolerance * S[0]
    if dtype == F64:
        error = (delta(adapter) - delta(new)).square().sum().item()
        assert error == pytest.approx(result.discarded_energy, rel=1e-9, abs=1e-20)
    # balanced: neither factor can overflow a 16-bit dtype before the other
    assert torch.allclose(A.double().norm(dim=1), B.double().norm(dim=0), rtol=2e-2)


def exact_tails(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Discarded energies of B A in 60 digits."""
    with mpmath.workdps(60):
        product = mpmath.matrix(B.double().tolist()) * mpmath.matrix(A.double().tolist())
        squares = [s**2 for s in mpmath.svd_r(product, compute_uv=False)][: A.shape[0]]
        return torch.tensor([float(sum(squares[k:])) for k in range(len(squares))], dtype=F64)


ILL_CONDITIONED = {  # singular values of the factors, each of the largest and the smallest
    "B": ((0, -12), (0, 0)), "A": ((0, 0), (0, -12)), "both": ((0, -6), (0, -6)), "opposed": ((0, -12), (-12, 0)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("spread", ILL_CONDITIONED.values(), ids=ILL_CONDITIONED)
def test_ill_conditioned(spread, dtype, device):
    """Condition 1e12, against 60 digits: the last singular value is 1e-12 of the first, its square 1e-24."""
    r = 6
    b, a = (torch.logspace(*ends, r, dtype=F64) for ends in spread)
    A, B = (a[:, None] * torch.randn(r, 9, dtype=F64)).to(dtype), (torch.randn(11, r, dtype=F64) * b).to(dtype)
    expected = exact_tails(A, B)
    report = compress(one_layer(A.to(device), B.to(device)), energy=1.0).layers["layer"]
    assert report.rank == r
    assert ((tails(report.singular_values)[:-1] - expected).abs() <= 1e-10 * expected).all()


@pytest.mark.parametrize("r", [16, 64, 256])
def test_ill_conditioned_of_high_rank(r, device):
    """Singular values from 1 to 1e-12, known by construction, in both factors."""
    expected = torch.logspace(0, -12, r, dtype=F64)
    A, B = expected.sqrt()[:, None] * orthonormal(300, r).mT, orthonormal(280, r) * expected.sqrt()
    mixed = torch.randperm(r)  # in no order
    report = compress(one_layer(A[mixed].to(device), B[:, mixed].to(device)), energy=1.0).layers["layer"]
    got = tails(report.singular_values)[:-1]
    assert ((got - tails(expected)[:-1]).abs() <= 1e-9 * tails(expected)[:-1]).all()


@pytest.mark.parametrize("r", [1, 16, 256])
def test_equal_singular_values(r, device):
    A, B = orthonormal(300, r).mT.contiguous(), 3 * orthonormal(280, r)
    result = compress(one_layer(A.to(device), B.to(device)), rank=max(1, r // 2))
    report = result.layers["layer"]
    assert (report.singular_values - 3).abs().max() < 1e-12
    assert report.discarded_energy == pytest.approx(9 * (r - report.rank), rel=1e-12)
    new = {k: t.cpu() for k, t in result.state_dict.items()}
    assert (delta(one_layer(A, B)) - delta(new)).square().sum() == pytest.approx(report.discarded_energy, rel=1e-9)


def test_dependent_ranks_are_not_kept(device):
    """The true rank is 3 of 8: repeated rows of A, columns of B that are zero."""
    A, B = torch.randn(8, 40), torch.randn(50, 8)
    A[3], A[4] = A[0], 2 * A[1]
    B[:, 5:] = 0
    result = compress(one_layer(A.to(device), B.to(device)), rank=8)
    assert result.rank == 3 and result.discarded_energy < 1e-24 * result.energy
    new = {k: t.cpu() for k, t in result.state_dict.items()}
    torch.testing.assert_close(delta(new), delta(one_layer(A, B)), rtol=1e-5, atol=1e-5)


def test_non_contiguous_factors():
    A, B = torch.randn(60, 8).T, torch.randn(8, 50).T[:, :]
    B_expanded = torch.randn(50, 1).expand(50, 8)
    for b in (B, B_expanded):
        expected = compress(one_layer(A.contiguous(), b.contiguous()), rank=2)
        got = compress(one_layer(A, b), rank=2)
        assert all(torch.equal(got.state_dict[k], expected.state_dict[k]) for k in expected.state_dict)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an op returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("goal", [{"rank": 2}, {"energy": 0.9}, {"budget": 3}], ids=str)
def test_out_by_in_is_never_formed(goal):
    """65,536 x 65,536 in float32 would take 16 GiB; nothing larger than a factor is made."""
    size, r = 2**16, 4
    adapter = one_layer(torch.randn(r, size), torch.randn(size, r))
    with LargestTensor() as largest:
        compress(adapter, **goal)
    assert r * size <= largest.elements <= 2 * r * size


# ---- how many ranks --------------------------------------------------------------------------------------------------


def three_layers(*spectra) -> dict[str, torch.Tensor]:
    tensors = {}
    for i, spectrum in enumerate(spectra):
        S = torch.tensor(spectrum, dtype=F64)
        tensors[f"l{i}.lora_A.weight"] = orthonormal(20 + i, len(S)).mT.contiguous()
        tensors[f"l{i}.lora_B.weight"] = orthonormal(30, len(S)) * S
    return tensors


SPECTRA = ([9.0, 4.0, 1.0, 0.1], [5.0, 3.0], [0.5, 0.2, 0.1])


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        ({"rank": 1}, [1, 1, 1]),
        ({"rank": 3}, [3, 2, 3]),
        ({"energy": 0.9}, [2, 2, 2]),  # 81 of 98.01 are less, 97 more; 25 of 34; 0.25 and 0.29 of 0.3
        ({"energy": 0.8}, [1, 2, 1]),
        ({"energy": 1e-9}, [1, 1, 1]),
        ({"energy": 1.0}, [4, 2, 3]),
        ({"budget": 1}, [1, 0, 0]),
        ({"budget": 4}, [2, 2, 0]),
        ({"budget": 6}, [3, 2, 1]),
        ({"budget": 100}, [4, 2, 3]),
    ],
    ids=str,
)
def test_ranks(goal, expected):
    result = compress(three_layers(*SPECTRA), **goal)
    assert [layer.rank for layer in result.layers.values()] == expected
    assert result.rank == sum(expected) and result.rank_before == 9
    gone = [s**2 for S, k in zip(SPECTRA, expected, strict=True) for s in S[k:]]
    assert result.discarded_energy == pytest.approx(sum(gone), rel=1e-10, abs=1e-20)
    assert set(result.state_dict) == {f"l{i}.lora_{p}.weight" for i in range(3) if expected[i] for p in "AB"}
    assert str(result).count("\n") == 3 and f"rank     9 -> {sum(expected):5}" in str(result)


@pytest.mark.parametrize("budget", range(1, 10))
def test_a_budget_is_spent_in_the_best_way(budget):
    result = compress(three_layers(*SPECTRA), budget=budget)
    choices = itertools.product(*(range(len(S) + 1) for S in SPECTRA))
    best = min(
        sum(s**2 for S, k in zip(SPECTRA, ranks, strict=True) for s in S[k:])
        for ranks in choices
        if sum(ranks) == budget
    )
    assert result.rank == budget and result.discarded_energy == pytest.approx(best, rel=1e-9, abs=1e-20)


def test_a_budget_counts_the_scalings():
    """Layer l2 is scaled by 40, so that its 0.5 and 0.2 are 20 and 8."""
    config = LoraConfig(
        r=4, lora_alpha=4, rank_pattern={"l1": 2, "l2": 3}, alpha_pattern={"l1": 2, "l2": 120}, target_modules=["l0"]
    )
    result = compress(three_layers(*SPECTRA), budget=3, config=config)
    assert [layer.rank for layer in result.layers.values()] == [1, 0, 2]
    torch.testing.assert_close(result.layers["l2"].singular_values, torch.tensor([20.0, 8.0, 4.0], dtype=F64))


def test_equal_singular_values_leave_the_budget_to_the_first():
    tensors = three_layers([2.0, 2.0], [2.0, 2.0])
    for name in ("lora_A.weight", "lora_B.weight"):
        tensors[f"l1.{name}"] = tensors[f"l0.{name}"].clone()  # the same bits
    assert [layer.rank for layer in compress(tensors, budget=3).layers.values()] == [2, 1]


# ---- a model ---------------------------------------------------------------------------------------------------------

CONFIG = {
    "r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 4},
    "alpha_pattern": {r"layers\.1\.mlp\..*": 3},
}  # fmt: skip
GOALS = [{"rank": 2}, {"energy": 0.7}, {"budget": 9}]
goals = pytest.mark.parametrize("goal", GOALS, ids=str)
models = pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])


def trained(**options) -> nn.Module:
    """Its layers differ in size, so that a budget drops some."""
    model = peftkern.adapt(tiny_llama(), LoraConfig(**CONFIG | options)).eval()
    randomize_trained(model)
    with torch.no_grad():
        for i, layer in enumerate(adapted(model).values()):
            layer.lora_B.mul_(4.0**-i)
    return model


def with_deltas(deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the base model with these added to its weights."""
    model = tiny_llama().eval()
    with torch.no_grad():
        for name, d in deltas.items():
            model.get_submodule(name).weight.add_(d.float())
        return model(TOKENS).logits


@goals
@models
def test_a_model(options, goal):
    model = trained(**options)
    before = {name: layer.delta_weight().double() for name, layer in adapted(model).items()}
    scalings = {name: layer.scaling for name, layer in adapted(model).items()}
    report = compress(model, **goal)
    layers = adapted(model)
    assert report.layers.keys() == before.keys()
    assert layers.keys() == {name for name, layer in report.layers.items() if layer.rank}
    if "budget" in goal:
        assert report.rank == 9 and len(layers) < len(before), "this case is to drop layers"
    nearest = {}
    for name, layer in report.layers.items():
        nearest[name], S = reference.truncated_svd(before[name], layer.rank)
        n = len(layer.singular_values)
        torch.testing.assert_close(layer.singular_values, S[:n], rtol=1e-5, atol=1e-7 * S[0].item())
        if layer.rank:
            new = layers[name]
            assert new.lora_A.shape[0] == new.lora_B.shape[1] == new.r == layer.rank
            assert new.scaling == pytest.approx(scalings[name], rel=1e-15)
            assert new.lora_A.requires_grad and new.lora_B.requires_grad
            torch.testing.assert_close(new.delta_weight().double(), nearest[name], rtol=1e-5, atol=1e-6)
        else:
            assert type(model.get_submodule(name)) is nn.Linear
    torch.testing.assert_close(model(TOKENS).logits, with_deltas(nearest), rtol=1e-4, atol=1e-5)
    model(TOKENS).logits.sum().backward()
    assert all(layer.lora_A.grad is not None for layer in layers.values())


@goals
@models
def test_a_compressed_model_in_files(peft, options, goal, tmp_path):
    """What was compressed in memory, saved and loaded; a folder compressed; and both as HF PEFT reads them."""
    model = trained(**options)
    peftkern.save_adapter(model, tmp_path / "full")
    report = compress(model, **goal)
    peftkern.save_adapter(model, tmp_path / "saved")
    again = compress(tmp_path / "full", **goal, output=tmp_path / "folder")
    assert again.state_dict is None and again.config == report.config
    assert {n: layer.rank for n, layer in again.layers.items()} == {n: layer.rank for n, layer in report.layers.items()}
    saved, written = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("saved", "folder"))
    assert saved.keys() == written.keys() and all(torch.equal(saved[name], written[name]) for name in saved)
    expected = model(TOKENS).logits
    for name in ("saved", "folder"):
        ours = peftkern.load_adapter(tiny_llama(), tmp_path / name).eval()
        assert torch.equal(ours(TOKENS).logits, expected)
        assert {n: layer.scaling for n, layer in adapted(ours).items()} == {
            n: layer.scaling for n, layer in adapted(model).items()
        }
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / name).eval()
        assert {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)} == {
            f"base_model.model.{n}" for n in adapted(model)
        }
        torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_hf_peft_takes_no_rank_0(peft, tmp_path):
    """Why dropped layers are excluded, and not listed with rank 0."""
    peftkern.save_adapter(trained(), tmp_path)
    values = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values | {"rank_pattern": {"q_proj": 0}}))
    with pytest.raises(ValueError, match="positive integer"):
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_folder_that_peft_wrote(peft, tmp_path):
    """Everything else in its config stays; a regular expression in exclude_modules goes on."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj"], exclude_modules=r".*\.1\..*o_proj")
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    randomize_trained(theirs)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "layers.0.self_attn.k_proj.lora_B" in name:
                p.zero_()
    theirs.save_pretrained(tmp_path / "a")
    report = compress(str(tmp_path / "a"), energy=1.0, output=str(tmp_path / "b"))
    assert report.layers["model.layers.0.self_attn.k_proj"].rank == 0 and report.rank == 4 * 4
    old, new = (json.loads((tmp_path / name / CONFIG_NAME).read_text()) for name in "ab")
    assert {key for key in old if old[key] != new[key]} == {"exclude_modules"}
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    torch.testing.assert_close(loaded(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(m, peft.tuners.lora.Linear) for m in loaded.modules()) == 4


def test_excluded_names_do_not_reach_a_kept_layer():
    """Layer "b" goes and "a.b", whose name ends alike, stays."""
    model = nn.Sequential()
    model.add_module("b", LoRALinear(8, 8, r=2))
    model.add_module("a", nn.ModuleDict({"b": LoRALinear(8, 8, r=2, init_lora_weights=False)}))
    report = compress(model, energy=1.0)
    assert isinstance(report.config.exclude_modules, str)
    base = nn.Sequential()
    base.add_module("b", nn.Linear(8, 8))
    base.add_module("a", nn.ModuleDict({"b": nn.Linear(8, 8)}))
    assert list(adapted(peftkern.adapt(base, report.config))) == ["a.b"]


def test_nothing_is_lost_at_full_rank():
    model = trained()
    expected = model(TOKENS).logits
    report = compress(model, energy=1.0)
    assert report.rank == report.rank_before and report.discarded_energy == 0.0
    assert report.config.r == 6 and report.config.lora_alpha == 9
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_zeros(peft, tmp_path):
    """B = 0 everywhere: HF PEFT refuses an adapter without layers, so one of rank 1 is left."""
    for goal in GOALS:
        model = peftkern.adapt(tiny_llama(), LoraConfig(**CONFIG))
        expected = tiny_llama()(TOKENS).logits
        report = compress(model, **goal)
        assert report.rank == 1 and report.energy == report.discarded_energy == 0.0
        assert torch.equal(model(TOKENS).logits, expected)
        peftkern.save_adapter(model, tmp_path)
        assert torch.equal(peftkern.load_adapter(tiny_llama(), tmp_path)(TOKENS).logits, expected)
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        torch.testing.assert_close(theirs(TOKENS).logits, expected)


def test_biases_that_train_keep_their_layer(tmp_path):
    options = {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}
    model = trained(**options)
    with torch.no_grad():
        for layer in adapted(model).values():
            layer.lora_B.zero_()
        adapted(model)["model.layers.0.self_attn.q_proj"].lora_B.normal_()
    expected = model(TOKENS).logits
    peftkern.save_adapter(model, tmp_path / "a")
    folder = compress(tmp_path / "a", budget=5, output=tmp_path / "b")
    report = compress(model, budget=5)
    for r in (folder, report):
        assert [layer.rank for layer in r.layers.values()] == [2, 1, 1, 1]
    assert {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    compress(model, energy=1.0)
    torch.testing.assert_close(peftkern.load_adapter(tiny_llama(), tmp_path / "b")(TOKENS).logits, model(TOKENS).logits)
    with pytest.raises(ValueError, match="budget: expected >= 4, a rank for each layer that needs one, got 3"):
        compress(model, budget=3)
    full = compress(trained(**options), energy=1.0)
    assert full.rank == full.rank_before and expected.shape == model(TOKENS).logits.shape


def test_quantized_layers():
    model = peftkern.adapt(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), quantize="nf4").eval()
    randomize_trained(model)
    dropped = "model.layers.1.self_attn.v_proj"
    adapted(model)[dropped].lora_B.data.zero_()
    packed, expected = adapted(model)[dropped].base_weight().packed, model(TOKENS).logits
    report = compress(model, energy=1.0)
    plain = model.get_submodule(dropped)
    assert (
        report.layers[dropped].rank == 0
        and type(plain) is NF4Linear
        and plain.base_weight().packed.data_ptr() == packed.data_ptr()
    )
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_single_layer():
    layer = LoRALinear(40, 30, r=8, init_lora_weights=False)
    nearest, S = reference.truncated_svd(layer.delta_weight().double(), 3)
    report = compress(layer, rank=3)
    assert report.layers[""].rank == layer.r == 3
    assert report.discarded_energy == pytest.approx(S[3:].square().sum().item(), rel=1e-5)
    torch.testing.assert_close(layer.delta_weight().double(), nearest, rtol=1e-5, atol=1e-6)
    zero = LoRALinear(40, 30, r=8)
    assert compress(zero, rank=3).rank == zero.r == 1, "there is no parent to put a plain layer into"


class Scaled(AdaptedLinear):
    """A method with lam, s * B diag(lam) A, as AdaLoRA's."""

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.set_base_weight(linear.weight)
        self.bias = linear.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, linear.in_features))
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, r))
        self.lora_E = nn.Parameter(torch.randn(r, 1))
        self.lora_alpha, self.lora_dropout, self.use_rslora, self.r = 3, 0.1, False, r
        self.extra = {}

    def terms(self):
        return {
            "A": self.lora_A, "B": self.lora_B, "lam": self.lora_E.view(-1), "scaling": 0.3, "dropout_p": 0.1,
            **self.extra,
        }  # fmt: skip

    @torch.no_grad()
    def delta_weight(self):
        return 0.3 * (self.lora_B * self.lora_E.view(-1)) @ self.lora_A


def test_methods_with_lam_become_lora():
    model = nn.Sequential(Scaled(nn.Linear(20, 30), 6), Scaled(nn.Linear(30, 10), 6)).eval()
    with torch.no_grad():
        model[0].lora_E[2:] = 0  # pruned triplets
    nearest, _ = reference.truncated_svd(model[0].delta_weight().double(), 4)
    weight, bias, x = model[0].weight, model[0].bias, torch.randn(5, 20)
    report = compress(model, rank=4)
    assert [layer.rank for layer in report.layers.values()] == [2, 4]
    assert all(type(layer) is LoRALinear and not layer.training for layer in model)
    assert model[0].weight is weight and model[0].bias is bias and model[0].lora_dropout == 0.1
    torch.testing.assert_close(model[0].delta_weight().double(), nearest, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0](x), x @ (weight + nearest.float()).T + bias, rtol=1e-4, atol=1e-4)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected exactly one of rank, energy and budget, got none"),
        ({"rank": 2, "energy": 0.9}, "expected exactly one of rank, energy and budget, got rank and energy"),
        ({"rank": 0}, "rank: expected an int >= 1, got 0"),
        ({"rank": True}, "rank: expected an int >= 1, got True"),
        ({"budget": 1.5}, "budget: expected an int >= 1, got 1.5"),
        ({"energy": 0.0}, "energy: expected 0 < energy <= 1, got 0.0"),
        ({"energy": 1.01}, "energy: expected 0 < energy <= 1, got 1.01"),
        ({"energy": float("nan")}, "energy: expected 0 < energy <= 1, got nan"),
        ({"rank": 1, "output": "x"}, "output: expected None unless adapter is a folder"),
        ({"rank": 1, "config": LoraConfig()}, "config: expected None unless adapter is a state dict"),
    ],
)
def test_bad_arguments(arguments, message):
    model = trained()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        compress(model, **arguments)
    assert unchanged(model, before)


def test_bad_models():
    with pytest.raises(TypeError, match="adapter: expected a model, a folder or a state dict, got int"):
        compress(3, rank=1)
    with pytest.raises(RuntimeError, match="adapter: expected a model with adapters, got one without"):
        compress(nn.Linear(3, 3), rank=1)
    merged, broken, other = trained(), trained(), nn.Sequential(Scaled(nn.Linear(8, 8), 2))
    peftkern.merge(merged)
    with torch.no_grad():
        next(iter(adapted(broken).values())).lora_A[0, 0] = float("nan")
    other[0].extra = {"out_scale": torch.ones(8)}
    for model, error, message in (
        (merged, RuntimeError, "q_proj: expected an unmerged layer, got a merged one"),
        (broken, ValueError, "q_proj: expected a finite adapter, got NaN or infinity in A"),
        (other, ValueError, "0: expected a layer that adds s B A to its weight, got a Scaled"),
    ):
        before = snapshot(model)
        with pytest.raises(error, match=message):
            compress(model, rank=1)
        assert unchanged(model, before)


A, B = torch.randn(2, 5), torch.randn(6, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected lora_A and lora_B of at least one layer"),
        ({"x.lora_A.weight": A}, r"x.lora_A.weight: expected shapes \[r, in\] .*, got nothing"),
        ({"x.lora_B.weight": B}, "x.lora_B.weight: expected lora_A and lora_B of linear layers, in pairs"),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B.T}, r"got \[2, 5\] and \[2, 6\]"),
        ({"x.lora_A.weight": A[..., None], "x.lora_B.weight": B}, r"got \[2, 5, 1\] and \[6, 2\]"),
        ({"x.lora_A.weight": A[:0], "x.lora_B.weight": B[:, :0]}, r"got \[0, 5\] and \[6, 0\]"),
        (
            {"x.lora_A.weight": A.int(), "x.lora_B.weight": B},
            "x.lora_A.weight: expected finite floats, got torch.int32",
        ),
        ({"x.lora_A.weight": A, "x.lora_B.weight": B / 0}, "x.lora_B.weight: expected finite floats"),
        (
            {"x.lora_embedding_A": A, "x.lora_embedding_B": B},
            "x.lora_embedding_A: expected lora_A and lora_B of linear",
        ),
        (
            {"x.lora_A": A, "x.lora_E": A[:1, :1], "x.lora_B": B},
            r"x.lora_E: expected shape \[2, 1\], the rank of x.lora",
        ),
        ({"x.lora_A": A, "x.lora_E": A[:, :1] / 0, "x.lora_B": B}, "x.lora_E: expected finite floats"),
        ({"x.lora_E": A[:, :1]}, "x.lora_E: expected lora_A and lora_B of linear"),
    ],
)
def test_bad_tensors(tensors, message):
    with pytest.raises(ValueError, match=f"state dict: .*{message}"):
        compress(tensors, rank=1)


def test_names_of_tensors():
    """PEFT's files, PEFT's modules, ours; others are passed on."""
    other = {"x.bias": torch.ones(3)}
    for suffix in (".weight", ".default.weight", ""):
        tensors = {f"base_model.model.x.lora_{p}{suffix}": t for p, t in (("A", A), ("B", B))}
        result = compress(tensors | other, rank=1)
        assert list(result.layers) == ["x"] and result.state_dict.keys() == (tensors | other).keys()
        assert result.state_dict["x.bias"] is other["x.bias"] and result.config is None
    wrong = LoraConfig(r=3, target_modules=["x"])
    with pytest.raises(ValueError, match=r"expected rank 3 as in its config, got \[2, 5\]"):
        compress(tensors, rank=1, config=wrong)
    model = trained()
    state = copy.deepcopy(model.state_dict())
    assert {n: s.rank for n, s in compress(state, rank=2, config=LoraConfig(**CONFIG)).layers.items()} == {
        n: s.rank for n, s in compress(model, rank=2).layers.items()
    }


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="output: expected the folder to write the compressed adapter to, got None"):
        compress(tmp_path, rank=1)
    with pytest.raises(FileNotFoundError):
        compress(tmp_path / "nowhere", rank=1, output=tmp_path / "out")
    peftkern.save_adapter(trained(), tmp_path / "a")
    values = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    (tmp_path / "a" / CONFIG_NAME).write_text(json.dumps(values | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        compress(tmp_path / "a", rank=1, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_in_place(tmp_path):
    """output may be the folder itself."""
    peftkern.save_adapter(trained(), tmp_path / "a")
    compress(tmp_path / "a", rank=2, output=tmp_path / "b")
    compress(tmp_path / "a", rank=2, output=tmp_path / "a")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_of_adalora_becomes_lora():
    model = peftkern.adapt(
        nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16)),
        peftkern.AdaLoraConfig(init_r=5, target_r=2, total_step=10),
    ).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_E.copy_(torch.tensor([[1.5], [-0.5], [0.0], [2.0], [0.0]]))
    x = torch.randn(7, 24)
    expected = model(x)
    report = peftkern.compress(model, energy=1.0)
    assert {name: c.rank for name, c in report.layers.items()} == {"0": 3, "2": 3}
    assert type(model[0]) is peftkern.LoRALinear
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
