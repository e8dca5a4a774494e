# SPDX-License-Identifier: Apache-2.0
"""One command for a machine with a GPU: are the CUDA kernels right there, and how fast are they?

    python benchmarks/gpu.py --json runs/gpu.json --plot runs/gpu

1. The tests' samples: every op, and its gradient where it has one, against the float64 reference; NF4 and masks bit
   for bit.
2. `peftkern bench` on the GPU, suites `targets` and `ops`: every op and every peer that is installed, timed between
   events of the stream, in turn; ratios to each peer, and to the roofline of a copy and of the library's products
   measured in the same run. Weights of which a call is a pass rotate over more than L2.

Exit codes: 0 done, 1 a check failed (then nothing is timed), 2 there is no GPU or no CUDA kernel in this build.
`--device cpu` does all of it on the CPU, with the clock instead of events, and says so: it shows that this file works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path

import torch

from peftkern.bench import plots, report
from peftkern.bench.cases import SUITES, select
from peftkern.bench.cli import run_case
from peftkern.bench.measure import ceilings
from peftkern.ops.library import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import test_dora_norm as dora
import test_jacobi_svd as svd
import test_nf4 as nf4
import test_rank_allocation as allocation
from conftest import assert_close
from multi_samples import MULTI_SAMPLES
from samples import NF4_SAMPLES, SAMPLES


def why_not(device: str) -> str | None:
    """Why nothing can run on the device, if so."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False; --device cpu runs the same checks and cases on the CPU"
    if not ops.cuda_archs():
        return "this build has no CUDA kernels: build with PEFTKERN_CUDA=1 and a CUDA toolkit"
    return None


# ---- 1. is it right?


def check_call(sample, device: str) -> None:
    """A call of adapted_linear or multi_lora_linear, and its gradients."""
    call = sample.make().to(device)
    y = call.run()
    grad = torch.randn(y.shape).to(y.dtype)
    y.backward(grad.to(device))
    expected, leaves = call.reference()
    expected.backward(grad.double())
    assert_close(y, expected, y.dtype, "y")
    for name, t in call.inputs().items():
        coarser = max(y.dtype, t.dtype, key=lambda d: torch.finfo(d).eps)
        assert_close(t.grad, leaves[name].grad, coarser, f"d{name}", slack=2.0)


def checks(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The samples of the layers by check_call, those of the other ops by the tests themselves."""
    for sample in (*SAMPLES, *MULTI_SAMPLES):
        yield str(sample), partial(check_call, sample, device)

    def test(function: Callable[..., None], *values: object, **options: object) -> tuple[str, Callable[[], object]]:
        said = ", ".join(map(str, (*values, *options.values())))
        fixtures = {"device": device, "isa": None}  # None: the one that this machine takes
        options |= {name: value for name, value in fixtures.items() if name in signature(function).parameters}
        return f"{function.__name__}({said})", partial(function, *values, **options)

    for sample in NF4_SAMPLES:
        yield test(nf4.test_quantize_equals_definition, sample)
        yield test(nf4.test_dequantize_equals_definition, sample, sample.dtype)
    for quantized in (False, True):
        for dtype in dora.DTYPES:
            for shape in dora.SHAPES:
                yield test(dora.test_equals_the_norm_of_the_whole_matrix, *shape, dtype, quantized)
    for double_quant in (None, False, True):
        yield test(dora.test_squared_row_norms, 37, double_quant)
    for dtype in allocation.DTYPES:
        yield test(allocation.test_importance_matches_the_reference, dtype=dtype)
        for tabled in (False, True):
            yield test(allocation.test_mask_ranks, dtype=dtype, tabled=tabled)
        for squared in (False, True):
            yield test(allocation.test_orthogonality_matches_the_reference, dtype=dtype, squared=squared)
    for name in allocation.SCORES:
        for exact in (False, True):
            yield test(allocation.test_rank_mask_matches_the_reference, name=name, exact=exact)
    for n in (1, 9, 33, 64, 100):
        yield test(svd.test_agrees_with_lapack, n)


def failures(device: str) -> tuple[int, dict[str, str]]:
    """How many checks there are, and those that fail, with the reason."""
    torch.manual_seed(0)
    count, failed = 0, {}
    for name, check in checks(device):
        count += 1
        try:
            check()
        except (AssertionError, RuntimeError) as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return count, failed


# ---- 2. how fast is it?


def run(args: argparse.Namespace) -> int:
    if args.device == "cpu":
        print("CPU: no figure below is of a GPU")
    count, failed = failures(args.device)
    print(f"{count - len(failed)} of {count} checks passed on {report.device_name(args.device)}")
    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}")
    if failed:
        return 1
    if args.checks_only:
        return 0

    cases = [replace(case, device=args.device) for case in select(args.suite or ["targets", "ops"], args.only)]
    limits = ceilings(tuple(dict.fromkeys(case.dtype for case in cases)), device=args.device)
    env = report.environment(limits, args.device)
    peaks = ", ".join(f"{dtype} {peak / 1e12:.2f} TFLOP/s" for dtype, peak in limits.flops_per_second.items())
    print(f"{env['date']}, {env['device']}, torch {torch.__version__}")
    print(f"roofline, measured: copy {limits.bytes_per_second / 1e9:.0f} GB/s, {peaks}")
    print("ratio: the provider's median time over ours, above 1 we are faster; times in ms\n")
    results = []
    for case in cases:
        results.append(run_case(case, limits, args.seconds))
        print(report.table(results[-1:]), flush=True)
    print(report.left_out(results))
    if args.json:
        report.write_json(args.json, env, results)
    if args.plot:
        for path in plots.write(args.plot, env, limits, results, report.table(results)):
            print(f"wrote {path}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--suite", action="append", choices=SUITES, help="which cases (default: targets and ops)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases whose name or 'model layer' matches")
    parser.add_argument("--seconds", type=float, default=2.0, help="to spend on each case (default: %(default)s)")
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all readings there")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write PNG files and bench.html there")
    args = parser.parse_args()
    if reason := why_not(args.device):
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
