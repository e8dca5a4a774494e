# SPDX-License-Identifier: Apache-2.0
"""Runs the package's CUDA host code without a GPU: its launchers, compiled by nvcc and linked to the runtime in
cudart.cpp, whose every kernel launch goes to the simulator.

>>> device = Device("sm_80")
>>> device.buffers = [x := buffer(array, name="x"), out := buffer.empty(4 * columns, name="out")]
>>> device.run("column_sums", ColumnSums(g=x.address, ..., out=out.address))
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from . import Module, buffer
from .build import cache_dir, core, cuda_home, missing_tool, nvcc, write_whole
from .module import NVCC_FLAGS
from .ops import OPS, READ, STREAM, WORKSPACE, WRITE, Operand, wrappers

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CUDA_SOURCES = ROOT / "csrc" / "cuda"
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure


def require() -> None:
    """For tests: skips where nothing can run, or fails there if PEFTKERN_REQUIRE_SIMULATOR=1."""
    import pytest

    if reason := missing_tool():
        (pytest.fail if os.environ.get("PEFTKERN_REQUIRE_SIMULATOR") == "1" else pytest.skip)(reason)


# ---- building the host code ------------------------------------------------------------------------------------------


def cuda_files() -> list[Path]:
    return sorted(CUDA_SOURCES.glob("*.cu"))


def with_headers(path: Path) -> set[Path]:
    """A source file and all of the package's headers that it includes, directly or not."""
    found, todo = set(), [path.resolve()]
    while todo:
        file = todo.pop()
        found.add(file)
        text = "" if file.suffix in (".o", ".so") else file.read_text()
        for name in re.findall(r'#include "([^"]+)"', text):
            places = ((folder / name).resolve() for folder in (file.parent, CUDA_SOURCES))
            todo += [place for place in places if place.exists() and place not in found]
    return found


def build(command: list[str], sources: list[Path], suffix: str, options: tuple[str, ...] = (), name: str = "") -> Path:
    """Runs `command sources -o result options` unless a result of the same command and file contents exists."""
    key = hashlib.sha256(" ".join([*command, *options]).encode())
    for path in sorted(set.union(*map(with_headers, sources))):
        key.update(path.read_bytes())
    result = cache_dir() / f"{name or sources[0].stem}-{key.hexdigest()[:16]}{suffix}"

    def run(target: Path) -> None:
        whole = [*command, *map(str, sources), "-o", str(target), *options]
        done = subprocess.run(whole, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(whole)}\n{done.stdout}{done.stderr}")

    if not result.exists():
        write_whole(result, run)
    return result


@functools.cache
def host_library_path() -> Path:
    """csrc/cuda/*.cu for the host, the C names of the launchers, and the runtime."""
    # The PTX inside is never used; compiling for a real architecture would only add ptxas.
    cuda = [nvcc(), *NVCC_FLAGS, "-gencode", "arch=compute_80,code=compute_80", "-Xcompiler", "-fPIC", "-c"]
    cxx = ["g++", "-std=c++20", "-O1", "-fPIC", f"-I{cuda_home() / 'include'}", f"-I{CUDA_SOURCES}", "-c"]
    generated = cache_dir() / "wrappers.cpp"
    write_whole(generated, lambda target: target.write_text(wrappers()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda path: build(cuda, [path], ".o"), cuda_files()))
    objects += [build(cxx, [path], ".o") for path in (generated, HERE / "cudart.cpp")]
    return build(["g++", "-shared"], objects, ".so", ("-Wl,-z,defs", "-Wl,-Bsymbolic"), "launchers")


@functools.cache
def faulty_launchers() -> ctypes.CDLL:
    """cudart_faults.cu, for tests of the runtime."""
    command = [nvcc(), "-std=c++20", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none"]
    command += ["-gencode", "arch=compute_80,code=compute_80"]
    return ctypes.CDLL(str(build(command, [HERE / "cudart_faults.cu"], ".so", (str(host_library_path()),))))


LaunchCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, ctypes.c_uint,
)  # fmt: skip
ParametersCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t))


@functools.cache
def host_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(host_library_path()))
    library.callbacks = LaunchCallback(_dispatch), ParametersCallback(_parameters)  # kept alive with the library
    library.cudart_set_callbacks(*library.callbacks)
    return library


class _Current(threading.local):
    """The devices that are active on this thread, the innermost last."""

    def __init__(self) -> None:
        self.devices: list[Device] = []


_current = _Current()


def _dispatch(name, grid, block, shared_memory, stream, arguments, overlaps, cluster) -> int:
    return _current.devices[-1]._launch(
        name.decode(), tuple(grid[:3]), tuple(block[:3]), shared_memory, stream, arguments, bool(overlaps), cluster
    )


def _parameters(name, sizes) -> int:
    try:
        parameters = _current.devices[-1].kernel(name.decode()).parameters
    except Exception as error:  # as in Device._launch
        _current.devices[-1].failure = error
        return -1
    for i, parameter in enumerate(parameters):
        sizes[i] = parameter.size
    return len(parameters)


# ---- the simulated device --------------------------------------------------------------------------------------------


@functools.cache
def modules(arch: str) -> dict[str, Module]:
    """The PTX of every csrc/cuda/*.cu, by the name of the file."""
    files = cuda_files()
    core()  # loaded once, before the threads would each do it
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = pool.map(lambda path: Module.from_cuda(path, arch), files)
        return {path.name: module for path, module in zip(files, loaded, strict=True)}


class Device:
    """Where the launchers of the package send their kernels.

    buffers: the device memory whose addresses are in the arguments. results: what every launch returned.
    host_memory: pointers are real ones, of CPU tensors; `HostMemory` says what is checked then.
    """

    def __init__(self, arch: str, seed: int = 0, schedule: str = "default", host_memory: bool = False):
        self.arch, self.seed, self.schedule = arch, seed, schedule
        self.buffers: list = []
        self.results: list = []
        self.launched: list[tuple[str, tuple, tuple, int]] = []
        self.overlapping: list[str] = []  # those of the launched that may overlap with the launch before
        self.cluster_room = 2**20  # how many clusters run at once
        self.clusters: list[int] = []  # of each of the launched, the blocks that run together
        self.host_memory = HostMemory() if host_memory else None
        self.failure: Exception | None = None

    def kernel(self, name: str):
        """The kernel to run for a mangled name."""
        return find_kernel(self.arch, name)

    def options(self, name: str) -> dict:
        """More arguments for Kernel.launch."""
        return {}

    @contextmanager
    def active(self) -> Iterator[Device]:
        """Launches go to this device; at the end its failures are raised and all its reports are checked."""
        library = host_library()
        library.cudart_clear_error()
        library.cudart_set_device(int(self.arch.removeprefix("sm_")), self.cluster_room)
        _current.devices.append(self)
        try:
            yield self
        finally:
            _current.devices.pop()
            failure, self.failure = self.failure, None
            if failure is not None:
                raise failure
        pending = library.cudart_pending_error()
        library.cudart_clear_error()
        assert pending == 0, f"a launcher left CUDA error {pending} behind unreported"
        for result in self.results:
            result.check()
        if self.host_memory:
            self.host_memory.close()

    def run(self, op: str, args: ctypes.Structure) -> list:
        """launch_<op>(args). Returns the results of its kernels; raises for every report of the simulator."""
        self.results = []
        with self.active():
            error = getattr(host_library(), f"ptxsim_{op}")(ctypes.byref(args))
            assert error == 0 or self.failure, f"launch_{op} returned CUDA error {error}"
        return self.results

    def _launch(
        self, name: str, grid: tuple, block: tuple, shared_memory: int, stream: int | None, arguments, overlaps: bool,
        cluster: int,
    ) -> int:  # fmt: skip
        try:
            assert stream == STREAM, f"{name}: launched on another stream than the launcher was given"
            self.launched.append((name, grid, block, shared_memory))
            self.overlapping += [name] if overlaps else []
            self.clusters.append(cluster)
            self._simulate(name, grid, block, shared_memory, arguments, overlaps, cluster)
        except Exception as error:  # no exception may pass through the C++ of the launcher
            self.failure = self.failure or error
            return LAUNCH_FAILURE
        return 0

    def _simulate(
        self, name: str, grid: tuple, block: tuple, shared_memory: int, arguments, overlaps: bool, cluster: int
    ) -> None:
        kernel = self.kernel(name)
        raw = [ctypes.string_at(arguments[i], p.size) for i, p in enumerate(kernel.parameters)]
        buffers = self.host_memory.enter(kernel, raw[0]) if self.host_memory else self.buffers
        self.results.append(
            kernel.launch(
                grid,
                block,
                args=raw,
                smem=shared_memory,
                seed=self.seed,
                schedule=self.schedule,
                buffers=buffers,
                overlaps=self.results[-1] if overlaps and self.results else None,
                cluster=cluster,
                **self.options(name),
            )
        )


class Recorder(Device):
    """Notes which kernels the launchers ask for, and runs none. fails: the index of a launch that reports an error."""

    def __init__(self, fails: int | None = None, arch: str = "sm_80"):
        super().__init__(arch)
        self.fails = fails

    def _launch(self, name: str, grid: tuple, block: tuple, shared_memory: int, *_) -> int:
        self.launched.append((name, grid, block, shared_memory))
        return LAUNCH_FAILURE if self.fails == len(self.launched) - 1 else 0


@functools.cache
def find_kernel(arch: str, name: str):
    for module in modules(arch).values():
        if name in module.demangled:
            return module.kernel(name)
    raise KeyError(f"no PTX holds the kernel {name}")


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


class Graph:
    """What the launchers gave their stream while it was captured, and the memory that torch gave meanwhile."""

    def __init__(self, device: Device) -> None:
        self.device, self.library, self.executable = device, host_library(), ctypes.c_void_p()

    def replay(self) -> None:
        if self.device.host_memory:
            self.device.host_memory.close()
        _check(self.library.cudaGraphLaunch(self.executable, _STREAM))


@contextmanager
def capture(device: Device) -> Iterator[Graph]:
    """Launches of the package on `device`, which is active, become a graph and do not run. torch's own operations are
    those of CPU tensors and run at once."""
    library, captured, graph = host_library(), ctypes.c_void_p(), Graph(device)
    _check(library.cudaStreamBeginCapture(_STREAM, 0))
    pool = _pools().private_pool_begin() if device.host_memory else None
    try:
        yield graph
    finally:
        error = library.cudaStreamEndCapture(_STREAM, ctypes.byref(captured))
        if pool:
            _pools().private_pool_end()
            weakref.finalize(graph, _pools().private_pool_delete, ctypes.c_void_p(pool))
    _check(error)
    _check(library.cudaGraphInstantiate(ctypes.byref(graph.executable), captured, ctypes.c_ulonglong(0)))
    library.cudaGraphDestroy(captured)
    weakref.finalize(graph, library.cudaGraphExecDestroy, graph.executable)


_STREAM = ctypes.c_void_p(STREAM)


def _check(error: int) -> None:
    if error:
        raise CudaError(error)


class CudaError(RuntimeError):
    """The number of a cudaError_t."""


@functools.cache
def _pools() -> ctypes.CDLL:
    from torch.utils import cpp_extension

    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", *_torch_includes()]
    folders = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    library = ctypes.CDLL(str(build(command, [HERE / "private_pool.cpp"], ".so", (*folders, "-lc10", "-Wl,-z,defs"))))
    library.private_pool_begin.restype = ctypes.c_void_p
    return library


# ---- real memory -----------------------------------------------------------------------------------------------------


class HostMemory:
    """Buffers over the memory of CPU tensors, for kernels whose struct points there.

    The bounds of a buffer are those the struct implies (ops.py), and the memory must be at least that large: inside one
    of `tensors`, or else a heap block of malloc (a tensor the glue made for itself), whose size malloc knows, up to 63
    bytes too large. What a kernel only reads must not be written; what it only writes starts out uninitialised and must
    be complete when the launcher returns.

    Off, as against buffers of their own: what a kernel only reads counts as initialised, so a temporary that no kernel
    filled is noticed by the values alone; and races between two launches are not looked for (they share one stream).
    """

    def __init__(self) -> None:
        self.tensors: list = []
        self.raw: bytes = b""
        self.buffers: dict[str, tuple[Operand, buffer]] = {}

    def enter(self, kernel, raw: bytes) -> list:
        """The buffers for a launch with the struct in `raw`."""
        struct = next((s for s in OPS.values() if re.search(rf"\b{s.__name__}\b", kernel.signature)), None)
        assert struct is not None, f"{kernel.signature}: its first parameter is no struct of ptxsim/ops.py"
        if raw == self.raw:  # the second kernel of one launcher: it may read what the first one wrote
            return [memory for _, memory in self.buffers.values()]
        self.close()
        self.raw, args = raw, struct.from_buffer_copy(raw)
        for operand in args.operands():
            address = operand.address(args)
            if address and operand.nbytes:
                self._check_extent(struct.__name__, operand, address, args)
                memory = buffer.at(
                    address, operand.nbytes, operand.path,
                    initialised=operand.access not in (WRITE, WORKSPACE), writable=operand.access != READ,
                )  # fmt: skip
                self.buffers[operand.path] = (operand, memory)
        return [memory for _, memory in self.buffers.values()]

    def close(self) -> None:
        """After the last launch of a launcher: all outputs are complete."""
        for operand, memory in self.buffers.values():
            if operand.access == WORKSPACE:
                continue
            missing = int((~memory.initialised()).sum())
            assert not missing, f"{operand.path}: {missing} of {operand.nbytes} bytes were never written"
        self.raw, self.buffers = b"", {}

    def _check_extent(self, struct: str, operand: Operand, address: int, args: ctypes.Structure) -> None:
        for tensor in self.tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                room = storage.data_ptr() + storage.nbytes() - address
                break
        else:
            start = operand.start(args)
            room = start + ctypes.CDLL(None).malloc_usable_size(ctypes.c_void_p(start)) - address
        assert room >= operand.nbytes, f"{struct}.{operand.path}: {operand.nbytes} bytes in memory that holds {room}"


# ---- torch glue ------------------------------------------------------------------------------------------------------


def _device_ops() -> list[str]:
    """What csrc/cuda/*.cpp registers."""
    return sorted(set(re.findall(r'm\.impl\("(\w+)"', "".join(p.read_text() for p in CUDA_SOURCES.glob("*.cpp")))))


def _torch_includes() -> list[str]:
    import torch
    from torch.utils import cpp_extension

    version = re.sub(r"[^0-9A-Za-z]", "_", torch.__version__)  # another torch, another build
    return [*(f"-I{folder}" for folder in cpp_extension.include_paths()), f"-DPTXSIM_TORCH_{version}"]


@functools.cache
def simulated_ops():
    """torch.ops.peftkern_simulated: the CUDA implementations, csrc/cuda/*.cpp, registered for CPU tensors."""
    import torch
    from torch.utils import cpp_extension

    from peftkern.ops.library import ops

    host_library()  # the glue links to it, and it has to have its callback
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{cuda_home() / 'include'}", f"-I{CUDA_SOURCES}"]
    command += [
        *_torch_includes(),
        f"-DPTXSIM_STREAM={STREAM}",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-include",
        str(HERE / "glue.h"),
    ]
    path = host_library_path()
    options = [str(path), f"-Wl,-rpath,{path.parent}", *(f"-L{folder}" for folder in cpp_extension.library_paths())]
    # ops.cpp holds the schemas and the module; the rest beside it belongs to all devices.
    shared = [path for path in CUDA_SOURCES.parent.glob("*.cpp") if path.name != "ops.cpp"]
    sources = sorted([*CUDA_SOURCES.glob("*.cpp"), *shared])
    glue = build(command, sources, ".so", (*options, "-ltorch_cpu", "-Wl,-z,defs"), "glue")
    library = torch.library.Library("peftkern_simulated", "DEF")
    for name in _device_ops():
        library.define(str(getattr(ops, name).default._schema).removeprefix("peftkern::"))
    torch.ops.load_library(str(glue))
    simulated_ops.library = library  # its definitions live as long as it does
    simulated_ops.glue = ctypes.CDLL(str(glue))
    return torch.ops.peftkern_simulated


@contextmanager
def autotune_on() -> Iterator[None]:
    """The simulated ops time the ways to make their products."""
    simulated_ops()
    set_autotune = simulated_ops.glue._ZN8peftkern12set_autotuneEb
    set_autotune(ctypes.c_bool(True))
    try:
        yield
    finally:
        set_autotune(ctypes.c_bool(False))


@contextmanager
def package_on(device: Device, tensors: list) -> Iterator[Device]:
    """The Python package calls the simulated ops on `device` instead of the real ones. tensors: see `HostMemory`."""
    simulated, names, replaced = simulated_ops(), _device_ops(), []
    assert device.host_memory is not None
    device.host_memory.tensors = list(tensors)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("peftkern."):
            for name, value in list(vars(module).items()):
                schema = getattr(value, "_schema", None)
                op = schema.name.removeprefix("peftkern::") if schema else ""
                if op in names:
                    replaced.append((module, name, value))
                    setattr(module, name, getattr(simulated, op).default)
    assert replaced
    try:
        with device.active():
            yield device
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
