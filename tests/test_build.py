# SPDX-License-Identifier: Apache-2.0
"""What the build promises: the stable ABI alone, one file for all machines, instruction sets kept apart."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import peftkern
from peftkern.ops.library import ops

EXTENSION = Path(peftkern.__file__).parent / "_C.abi3.so"


def test_every_package_is_in_the_wheel():
    project = Path(__file__).parent.parent / "pyproject.toml"
    if not (project.parent / "peftkern").is_dir():
        pytest.skip("not a checkout")
    listed = re.search(r"^packages = \[(.*?)\]", project.read_text(), re.MULTILINE | re.DOTALL).group(1)
    folders = (p.parent.relative_to(project.parent) for p in (project.parent / "peftkern").rglob("__init__.py"))
    assert sorted(re.findall(r'"(.*?)"', listed)) == sorted(".".join(f.parts) for f in folders)


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def test_links_only_to_libtorch_cpu():
    needed = re.findall(r"NEEDED.*\[(.*?)\]", run("readelf", "-d", str(EXTENSION)).stdout)
    assert "libtorch_cpu.so" in needed
    foreign = [n for n in needed if re.match(r"lib(torch_python|torch_cuda|c10|cudart|python)", n)]
    assert not foreign, f"would tie the file to one build of torch or Python: {foreign}"


@pytest.mark.skipif(shutil.which("torch-abi-audit") is None, reason="torch-abi-audit is not installed")
def test_stable_abi():
    audit = run("torch-abi-audit", str(EXTENSION))
    text = audit.stdout + audit.stderr
    assert "STABLE" in text and "UNSTABLE" not in text and "unstable=0" in text, text


def test_baseline_code_has_no_avx():
    """Only functions in the namespaces of an ISA may hold its instructions, else older CPUs die of SIGILL."""
    listing = run("objdump", "-d", "-C", "--no-show-raw-insn", str(EXTENSION)).stdout
    assert listing
    function, found, vector = "", {}, {"avx2": 0, "avx512": 0, "avx512bf16": 0, "amx": 0}
    for line in listing.splitlines():
        header = re.match(r"^[0-9a-f]+ <(.*)>:$", line)
        if header:
            function = header.group(1)
        elif re.search(r"%(ymm|zmm|tmm)\d", line):
            home = re.search(r"peftkern::cpu::(avx2|avx512bf16|avx512|amx)\b", function)
            if home:
                vector[home.group(1)] += 1
            else:
                found[function] = line.strip()
    assert all(vector.values()), f"an instruction set without vector code: {vector}"
    assert not found, f"vector instructions outside the ISA namespaces: {list(found.items())[:3]}"


def test_isa_can_be_forced():
    for isa in ops.cpu_isas():
        out = run(sys.executable, "-c", "import peftkern; print(peftkern.cpu_isa())", PEFTKERN_CPU_ISA=isa)
        assert out.stdout.strip() == isa, out.stderr
    out = run(sys.executable, "-c", "import peftkern; peftkern.cpu_isa()", PEFTKERN_CPU_ISA="avx1024")
    assert out.returncode and "expected one of this machine's {" in out.stderr and '"avx1024"' in out.stderr


def test_info_command():
    out = run(sys.executable, "-m", "peftkern", "info")
    assert out.returncode == 0, out.stderr
    assert peftkern.cpu_isa() in out.stdout and "cuda kernels:" in out.stdout


def test_every_schema_has_an_implementation_and_a_fake():
    source = (Path(__file__).parent.parent / "csrc" / "ops.cpp").read_text()
    names = set(re.findall(r'm\.def\(\s*"(\w+)\(', source))
    assert len(names) >= 10
    import torch

    for name in names:
        implemented = {
            key for key in ("CPU", "CUDA", "CompositeExplicitAutograd", "Meta")
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"peftkern::{name}", key)
        }  # fmt: skip
        if "CompositeExplicitAutograd" in implemented:
            continue
        assert {"CPU", "Meta"} <= implemented, f"{name}: {implemented}"
        assert ("CUDA" in implemented) == bool(ops.cuda_archs()), f"{name}: {implemented}"
