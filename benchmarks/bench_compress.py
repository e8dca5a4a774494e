# SPDX-License-Identifier: Apache-2.0
"""SVD compression: the batched Jacobi kernel against torch.linalg.svd on the same cores, and compress() against the way
it is usually done, an SVD of the dense update B A of each layer."""

import subprocess
import sys

import pytest
import torch

import peftkern
from peftkern.ops import jacobi_svd


@pytest.mark.parametrize(("batch", "n"), [(210, 8), (210, 16), (210, 32), (210, 64), (32, 128), (8, 256)])
def test_cores(compare, batch, n):
    """Cores as compress() makes them: the product of the triangular factors of a random A and B."""
    A, B = torch.randn(batch, 4 * n, n, dtype=torch.float64), torch.randn(batch, 4 * n, n, dtype=torch.float64)
    cores = torch.linalg.qr(B @ torch.linalg.qr(A).R.mT).R
    expected = torch.linalg.svd(cores).S
    assert ((jacobi_svd(cores)[1] - expected).abs() <= 1e-13 * expected[:, :1]).all()
    providers = {"peftkern": lambda: jacobi_svd(cores), "torch.linalg.svd": lambda: torch.linalg.svd(cores)}
    compare(f"SVD of {batch} cores {n}x{n}, fp64", providers, seconds=1.0, rounds=(3, 50))


@pytest.mark.parametrize(
    ("fan_out", "fan_in", "r", "layers"), [(576, 576, 16, 8), (1536, 576, 16, 4), (2048, 2048, 64, 1)]
)
def test_compress(compare, fan_out, fan_in, r, layers):
    tensors = {}
    for i in range(layers):
        tensors[f"{i}.lora_A.weight"] = torch.randn(r, fan_in)
        tensors[f"{i}.lora_B.weight"] = torch.randn(fan_out, r)

    def dense():
        """float32, as merging tools do it; twice the time in float64."""
        result = {}
        for i in range(layers):
            U, S, Vh = torch.linalg.svd(
                tensors[f"{i}.lora_B.weight"] @ tensors[f"{i}.lora_A.weight"], full_matrices=False
            )
            k = r // 2
            result[i] = (U[:, :k] * S[:k].sqrt(), S[:k, None].sqrt() * Vh[:k])
        return result

    new, others = peftkern.compress(tensors, rank=r // 2).state_dict, dense()
    for i, (B, A) in others.items():
        torch.testing.assert_close(new[f"{i}.lora_B.weight"] @ new[f"{i}.lora_A.weight"], B @ A, rtol=1e-3, atol=1e-3)
    providers = {"peftkern": lambda: peftkern.compress(tensors, rank=r // 2), "SVD of B A, fp32": dense}
    compare(f"compress {layers} layers {fan_out}x{fan_in}, r={r}", providers, seconds=1.0, rounds=(3, 30))


PEAK = """
import torch, peftkern
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1])
size, r = 32768, 16
adapter = {"x.lora_A.weight": torch.randn(r, size), "x.lora_B.weight": torch.randn(size, r)}
small = {"x.lora_A.weight": torch.randn(2, 64), "x.lora_B.weight": torch.randn(64, 2)}
peftkern.compress(small, rank=1)  # what libraries take once is not counted
open("/proc/self/clear_refs", "w").write("5")  # the peak so far, that of the imports, is forgotten
before = status("VmRSS")
peftkern.compress(adapter, rank=8)
print(status("VmHWM") - before, adapter["x.lora_A.weight"].nbytes * 2 // 1024)
"""


def test_peak_memory():
    """A layer of 32768 x 32768, whose dense update would take 4 GiB in float32, in a process of its own."""
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True).stdout
    peak, factors = (int(n) / 1024 for n in out.split()[-2:])
    print(f"\ncompress 32768x32768, r=16: {peak:.0f} MiB above the {factors:.0f} MiB of the factors; B A has 4096 MiB")
    assert 0 < peak < 20 * factors
