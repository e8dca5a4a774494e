# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as ptxas sees them: no spills, and the register table in docs/ptxas.md is the current one."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from ptxsim import cudart

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report():
    cudart.require()
    spec = importlib.util.spec_from_file_location("ptxas_report", cudart.ROOT / "tools" / "ptxas_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def usages(report):
    return report.usages()


def test_every_kernel_is_in_the_report(report, usages):
    found = {(u.kernel, u.arch) for u in usages}
    for module in cudart.modules("sm_80").values():
        for kernel in report.demangle(set(module.demangled)).values():
            assert all((kernel, arch) in found for arch in report.ARCHS), kernel


def test_no_spills_and_no_stack(usages):
    bad = [u for u in usages if u.spills or u.stack]
    assert not bad


def test_the_table_is_current(report, usages):
    committed = report.TABLE.read_text()
    if f"nvcc {report.nvcc_version()} " not in committed:
        pytest.skip(f"docs/ptxas.md was made by another nvcc than {report.nvcc_version()}, which allocates differently")
    assert report.table(usages) == committed, "run `python tools/ptxas_report.py`"
