# SPDX-License-Identifier: Apache-2.0
"""Tools and caches: where nvcc is, and the machine (core/*.cpp), compiled on first use."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).parent
CORE = HERE / "core"
DEFAULT_CUDA_HOME = "/usr/local/cuda"
# -fwrapv: PTX integers wrap. -ffp-contract=off: a multiply and an add stay two roundings.
CXXFLAGS = ["-std=c++17", "-O3", "-march=native", "-fwrapv", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]


class ToolMissing(RuntimeError):
    """nvcc, g++ or pybind11 is not installed; tests skip with this text."""


def cache_dir() -> pathlib.Path:
    """Everything compiled lives here, keyed by content; `build/` is ignored by git."""
    path = pathlib.Path(os.environ.get("PTXSIM_CACHE") or HERE.parents[1] / "build" / "ptxsim")
    path.mkdir(parents=True, exist_ok=True)
    return path


def cuda_home() -> pathlib.Path:
    """$CUDA_HOME, then /usr/local/cuda. The nvcc on PATH comes last: it may be a wrapper without headers beside it."""
    on_path = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        DEFAULT_CUDA_HOME,
        on_path and pathlib.Path(on_path).resolve().parents[1],
    ]
    for candidate in candidates:
        if candidate and (pathlib.Path(candidate) / "bin" / "nvcc").exists():
            return pathlib.Path(candidate)
    raise ToolMissing(f"nvcc not found: set CUDA_HOME, or install a CUDA toolkit in {DEFAULT_CUDA_HOME}")


def nvcc() -> str:
    return str(cuda_home() / "bin" / "nvcc")


def missing_tool() -> str | None:
    """Why the simulator cannot run here, or None: `pytest.mark.skipif(missing_tool(), reason=...)`."""
    try:
        nvcc()
        _compiler()
    except ToolMissing as error:
        return str(error)
    return None


def write_whole(path: pathlib.Path, write) -> None:
    """write(temporary path), then a rename: two test processes may build the same thing at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(path)


def _compiler() -> tuple[str, list[str]]:
    gxx = shutil.which(os.environ.get("CXX", "g++"))
    if not gxx:
        raise ToolMissing("g++ not found: the PTX simulator's core is compiled on first use")
    if importlib.util.find_spec("pybind11") is None:
        raise ToolMissing("pybind11 not found: pip install pybind11 (headers of the PTX simulator's core)")
    import pybind11

    return gxx, [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


@functools.cache
def core():
    """The compiled machine. Its name holds the hash of its sources, flags, compiler, Python and CPU."""
    gxx, includes = _compiler()
    sources = sorted(CORE.glob("*.cpp"))
    key = hashlib.sha256()
    for part in [gxx, *CXXFLAGS, *includes, sys.version, _cpu()]:
        key.update(part.encode() + b"\0")
    for path in [*sources, *sorted(CORE.glob("*.h"))]:
        key.update(path.name.encode() + path.read_bytes())
    folder = cache_dir() / f"core-{key.hexdigest()[:16]}"
    library = folder / "ptxsim_core.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        write_whole(library, lambda target: _compile(gxx, includes, sources, target))
    spec = importlib.util.spec_from_file_location("ptxsim_core", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(gxx: str, includes: list[str], sources: list[pathlib.Path], target: pathlib.Path) -> None:
    def run(command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"building the PTX simulator failed: {' '.join(command)}\n{done.stderr}")

    def compile_one(source):
        object_file = target.with_name(f"{source.stem}.{os.getpid()}.o")
        run([gxx, *CXXFLAGS, *includes, "-c", str(source), "-o", str(object_file)])
        return object_file

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    run([gxx, "-shared", "-o", str(target), *map(str, objects)])
    for object_file in objects:
        object_file.unlink()
