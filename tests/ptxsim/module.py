# SPDX-License-Identifier: Apache-2.0
"""A compiled .cu file: its kernels and variables. PTX is cached by the contents of every file that it came from."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping

import numpy as np

from .build import cache_dir, nvcc, write_whole
from .launch import Kernel
from .memory import Buffer
from .ptx import PtxError, align_up, parse_file

NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "--fmad=false"]  # as setup.py compiles the package


class Module:
    def __init__(self, text: str, source: str | None = None):
        self.text, self.source, self.ptx = text, source, parse_file(text)
        self.demangled = dict(zip(self.ptx.entries, _demangle(list(self.ptx.entries)), strict=True))
        self.data = self._place_variables()

    @classmethod
    def from_cuda(
        cls, path, arch: str = "sm_80", defines: Mapping | Iterable[str] = (), flags: Iterable[str] = ()
    ) -> Module:
        return cls(compile_to_ptx(path, arch, defines, flags), str(path))

    @classmethod
    def from_ptx(cls, text: str) -> Module:
        return cls(text)

    def kernels(self) -> list[str]:
        """Demangled names of all kernels."""
        return list(self.demangled.values())

    def kernel(self, name: str) -> Kernel:
        """By mangled name, full signature, or `name<arguments>`; spaces do not count."""

        def normal(text):
            return re.sub(r"\s+", "", text)

        hits = []
        for mangled, signature in self.demangled.items():
            short = name_of(signature)
            base, bracket, arguments = short.partition("<")
            unqualified = base.split("::")[-1]
            names = {mangled, signature, short, base, unqualified, unqualified + bracket + arguments}
            if normal(name) in map(normal, names):
                hits.append(mangled)
        if len(hits) != 1:
            known = "\n  ".join(self.kernels())
            raise PtxError(f"{len(hits)} kernels named {name!r} among\n  {known}")
        return self._kernel(hits[0])

    @functools.cache  # noqa: B019  (a module and its kernels live for the test session)
    def _kernel(self, mangled: str) -> Kernel:
        return Kernel(self, mangled)

    def _place_variables(self) -> Buffer:
        """__device__ and __constant__ variables share one buffer. It lives as long as the module: launches see it."""
        placed = [v for v in self.ptx.variables.values() if v.space in ("global", "const")]
        offsets, end = [], 0
        for variable in placed:
            offsets.append(align_up(end, max(variable.align, 16)))
            end = offsets[-1] + variable.size
        image = np.zeros(max(end, 1), np.uint8)
        for variable, offset in zip(placed, offsets, strict=True):
            image[offset : offset + len(variable.initial)] = np.frombuffer(variable.initial, np.uint8)
        data = Buffer(image, name="module variables")
        for variable, offset in zip(placed, offsets, strict=True):
            variable.address = data.address + offset
        return data


def name_of(signature: str) -> str:
    """`void ns::kernel<float>(float const*)` -> `ns::kernel<float>`"""
    depth = 0
    for index, character in enumerate(signature):
        if character == "(" and not depth and not signature[index:].startswith("(anonymous namespace)"):
            signature = signature[:index]
            break
        depth += {"<": 1, ">": -1}.get(character, 0)
    return signature.removeprefix("void ")


def _demangle(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        raise PtxError("c++filt (binutils) is needed to read kernel names")
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[: len(names)] if names else []


# The compile cache


def compile_to_ptx(path, arch: str, defines: Mapping | Iterable[str] = (), flags: Iterable[str] = ()) -> str:
    """The PTX of a .cu file. A manifest lists every header that went into it, with the hash of its contents (as ccache
    does); a change in any of them, in the flags, or of the compiler compiles again."""
    path = pathlib.Path(path).resolve()
    if isinstance(defines, Mapping):
        defines = [name if value in (None, True) else f"{name}={value}" for name, value in defines.items()]
    command = [nvcc(), *NVCC_FLAGS, f"-arch={arch}", *(f"-D{define}" for define in defines), *flags]
    key = hashlib.sha256(json.dumps([command, str(path), _compiler_version()]).encode()).hexdigest()[:16]
    folder = cache_dir() / "ptx"
    folder.mkdir(exist_ok=True)
    manifest = folder / f"{path.stem}-{arch}-{key}.json"
    if manifest.exists():
        recorded = json.loads(manifest.read_text())
        if all(_file_hash(file) == digest for file, digest in recorded["files"].items()):
            return (folder / recorded["ptx"]).read_text()
    return _compile(path, command, manifest)


def _compile(path: pathlib.Path, command: list[str], manifest: pathlib.Path) -> str:
    scratch = manifest.with_name(f"{manifest.stem}.{os.getpid()}")
    ptx, dependencies = scratch.with_suffix(".ptx"), scratch.with_suffix(".d")
    command = [*command, "-ptx", "-MD", "-MF", str(dependencies), str(path), "-o", str(ptx)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PtxError(f"{' '.join(command)}\n{done.stderr}")
    text = ptx.read_text()
    names = shlex.split(dependencies.read_text().replace("\\\n", " ").split(":", 1)[1])
    files = {str(pathlib.Path(name).resolve()): None for name in names}
    recorded = {
        "files": {name: _file_hash(name) for name in files},
        "ptx": f"{manifest.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.ptx",
    }
    ptx.replace(manifest.with_name(recorded["ptx"]))
    dependencies.unlink()
    write_whole(manifest, lambda target: target.write_text(json.dumps(recorded)))
    return text


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def _file_hash(name: str) -> str | None:
    try:
        stat = os.stat(name)
    except OSError:
        return None
    return _hash_of_version(name, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _hash_of_version(name: str, _mtime_ns: int, _size: int) -> str:
    return hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest()
