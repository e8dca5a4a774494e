# SPDX-License-Identifier: Apache-2.0
"""One command for a machine with a GPU: are the CUDA kernels right there, and how fast are they?

    python benchmarks/gpu.py --json runs/gpu.json --plot runs/gpu

1. The tests' samples: every op, forward and gradient, against the float64 reference; NF4 bit for bit.
2. `peftkern bench` on the GPU: every op and every peer that is installed, timed between events of the stream, in turn,
   on rotating buffers larger than L2; ratios to each peer, and to the roofline of a copy and of the library's products
   measured in the same run.

Exit codes: 0 done, 1 a check failed (then nothing is timed), 2 there is no GPU or no CUDA kernel in this build.
`--device cpu` does all of it on the CPU, with the clock instead of events, and says so: it shows that this file works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

import peftkern
from peftkern import reference
from peftkern.bench import plots, report
from peftkern.bench.cases import SUITES, select
from peftkern.bench.cli import run_case
from peftkern.bench.measure import ceilings
from peftkern.ops.library import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
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


def check_nf4(sample, device: str) -> None:
    w = sample.make(device)
    q = peftkern.quantize_nf4(w, sample.block_size, sample.double_quant)
    packed, absmax = reference.quantize_nf4(w.cpu(), sample.block_size)
    assert torch.equal(q.packed.reshape(-1).cpu(), packed), "packed"
    if not sample.double_quant:
        assert torch.equal(q.absmax.cpu(), absmax), "absmax"
    expected = reference.dequantize_nf4(packed, q.float_absmax().cpu(), sample.block_size, w.shape, w.dtype)
    assert torch.equal(peftkern.dequantize_nf4(q).cpu(), expected), "dequantized"


def checks(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for sample in (*SAMPLES, *MULTI_SAMPLES):
        yield str(sample), lambda sample=sample: check_call(sample, device)
    for sample in NF4_SAMPLES:
        yield str(sample), lambda sample=sample: check_nf4(sample, device)


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

    cases = [replace(case, device=args.device) for case in select(args.suite or ["targets"], args.only)]
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
    parser.add_argument("--suite", action="append", choices=SUITES, help="which cases (default: targets)")
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
