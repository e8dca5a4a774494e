# SPDX-License-Identifier: Apache-2.0
"""Runs CUDA kernels on the CPU, from the PTX that nvcc makes of them, and checks every access. See README.md.

module = Module.from_cuda("kernel.cu", arch="sm_80")
y = buffer((4, 100), np.float32, name="y")
result = module.kernel("scale<float>").launch(grid=4, block=128, args=[buffer(x, name="x"), y, 100])
result.check(written=[y])
"""

from .build import ToolMissing, cuda_home, missing_tool
from .launch import Kernel, Parameter
from .memory import Buffer, Pointer, buffer
from .module import Module
from .ptx import PtxError
from .report import KernelFault, Report, Result

__all__ = [
    "Buffer",
    "Kernel",
    "KernelFault",
    "Module",
    "Parameter",
    "Pointer",
    "PtxError",
    "Report",
    "Result",
    "ToolMissing",
    "buffer",
    "cuda_home",
    "missing_tool",
]
