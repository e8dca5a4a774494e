# SPDX-License-Identifier: Apache-2.0
"""A case in memory: device memory for its arguments, the values in it, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from peftkern import reference

from . import buffer
from .cudart import Device
from .ops import BF16, F16, F32, Dropout

DTYPES = (F32, BF16, F16)
TORCH_DTYPE = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16}
SEED = -0x6DCBA9876F543211  # both halves are used, and the sign bit is set

UPDATED_IN_PLACE = ("y", "vectors", "sensitivity", "uncertainty", "masked")
"""Writing another operand that a case places is reported."""

SUM_TOLERANCE = 2e-6
"""Error of an fp32 sum relative to the sum of its terms' magnitudes; 3e-7 is the largest these cases show."""


@dataclass
class Problem:
    """A case in memory: run it once on a device."""

    args: object = None
    buffers: dict = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)  # bytes before the first element
    inputs: dict[str, bytes] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None

    def place(self, name: str, values: torch.Tensor, misaligned: int = 0) -> int:
        """Device memory that holds values, `misaligned` elements after an aligned address. Returns the pointer."""
        data = as_bytes(values).numpy()
        lead = np.full(misaligned * values.element_size(), 0xFF, np.uint8)  # NaN in every dtype
        writable = name.split()[0] in UPDATED_IN_PLACE
        self.buffers[name] = buffer(np.concatenate([lead, data]), name=name, writable=writable)
        self.offsets[name] = lead.size
        self.inputs[name] = self.buffers[name].numpy(np.uint8).tobytes()
        return self.buffers[name].address + lead.size

    def reserve(self, name: str, count: int, dtype: torch.dtype = torch.float32, misaligned: int = 0) -> int:
        """Uninitialised device memory for `count` values."""
        lead = misaligned * dtype.itemsize
        self.buffers[name] = buffer.empty(lead + count * dtype.itemsize, name=name)
        self.offsets[name] = lead
        return self.buffers[name].address + lead

    def reserve_workspace(self, dtype: torch.dtype = torch.float32) -> None:
        """What the arguments ask for: uninitialised, and reading what was not written is reported."""
        if self.args.workspace_size():
            self.args.workspace = self.reserve("workspace", self.args.workspace_size(), dtype)

    def result(self, name: str, dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
        data = self.buffers[name].numpy(np.uint8)[self.offsets[name] :].copy()
        values = torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
        return values.reshape(shape or (-1,))

    def run(self, device: Device, op: str) -> dict[str, bytes]:
        """launch_<op>, with every check of the simulator; all outputs complete. Returns what was written."""
        device.buffers = list(self.buffers.values())
        device.run(op, self.args)
        outputs = {}
        for name, memory in self.buffers.items():
            content, lead = memory.numpy(np.uint8).tobytes(), self.offsets[name]
            if not memory.writable or name == "workspace":  # what is in it depends on the architecture
                continue
            if name in self.inputs:
                assert content[:lead] == self.inputs[name][:lead], f"{op}: written before the start of {name}"
            else:
                written = memory.initialised()
                missing = int((~written[lead:]).sum())
                assert not missing, f"{op}: {missing} of {written.size - lead} bytes of {name} were never written"
                assert not written[:lead].any(), f"{op}: written before the start of {name}"
            outputs[name] = content
        return outputs


# ---- values ----------------------------------------------------------------------------------------------------------


def random(*shape: int, dtype: int = F32) -> torch.Tensor:
    return torch.randn(shape).to(TORCH_DTYPE[dtype])


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else torch.empty(0, dtype=torch.uint8)


def threshold_of(p: float) -> int:
    return int(p * 32768 + 0.5)


def dropout_argument(problem: Problem, p: float) -> Dropout:
    threshold = threshold_of(p)
    if not threshold:
        return Dropout(None, 0, 1.0)
    seed = problem.place("seed", torch.tensor([SEED]))
    return Dropout(seed, threshold, 32768 / (32768 - threshold))


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """reference.dropout in float64; a dropped NaN is 0, as the definition in csrc/dropout.h says."""
    x = x.double()
    if not threshold_of(p) or not x.numel():
        return x
    keep = reference.dropout_mask(*x.shape, threshold_of(p), SEED)
    return torch.where(keep, reference.dropout(torch.where(keep, x, 0.0), p, SEED), 0.0)


def assert_sums(got: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, what: str) -> None:
    """Every value within SUM_TOLERANCE of its own sum of magnitudes, plus half a unit in its last place."""
    if not got.numel():
        return
    info = torch.finfo(got.dtype)
    unit = info.eps * torch.exp2((torch.frexp(expected).exponent - 1).double())
    rounding = 0.501 * unit.clamp(min=info.eps * info.tiny)
    error = (got.double() - expected).abs()
    excess = error - (SUM_TOLERANCE * magnitude + rounding + 1e-30)
    worst = torch.unravel_index(excess.argmax(), excess.shape)
    assert not (excess > 0).any() and not error.isnan().any(), (
        f"{what}: got {got[worst].item()}, expected {expected[worst].item()} at {tuple(map(int, worst))}; "
        f"error {error[worst].item():.2e} of magnitude {magnitude[worst].item():.3g}"
    )


def assert_bits(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert as_bytes(got).equal(as_bytes(expected)), (
        f"{what}: {int((got != expected).sum())} of {got.numel()} values differ"
    )
