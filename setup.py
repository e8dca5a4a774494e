# SPDX-License-Identifier: Apache-2.0
"""Builds peftkern/_C.abi3.so: the CPU kernels always, the CUDA kernels when they can be built.

PEFTKERN_CUDA=0|1     leave CUDA out, or insist on it; otherwise it is built where nvcc is found, with or without a GPU
TORCH_CUDA_ARCH_LIST  GPU architectures (default: 8.0;9.0;10.0;12.0+PTX)
MAX_JOBS              parallel compilations
DEBUG=1               -O1 -g -Werror
PEFTKERN_NO_EXTENSION=1  only the Python files: for the Makefile's editable install, which builds in place by itself
"""

import os
import shutil
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from torch.utils import cpp_extension

DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
# Loads in torch 2.11 and later: the stable ABI of that release, the first whose from_blob takes a deleter, is all the
# extension uses.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def find_cuda() -> Path | None:
    """The CUDA toolkit folder. The nvcc on PATH may be a wrapper, so only a folder with headers counts."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    for folder in (Path(c) for c in candidates if c):
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
            return folder
    return None


def cuda_home() -> Path | None:
    wanted = os.environ.get("PEFTKERN_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"PEFTKERN_CUDA: expected 0, 1 or auto, got {wanted!r}")
    home = None if wanted == "0" else find_cuda()
    if wanted == "1" and home is None:
        raise SystemExit(
            "PEFTKERN_CUDA=1, but no CUDA toolkit was found; set CUDA_HOME to the folder that holds bin/nvcc"
        )
    print(f"peftkern: CUDA kernels {'from ' + str(home) if home else 'left out'}")
    return home


def extension() -> Extension:
    debug = os.environ.get("DEBUG") == "1"
    optimise = ["-O1", "-g", "-Werror"] if debug else ["-O3", "-g0"]
    # No contraction: a * b + c rounds twice unless the source says fma, so that all ISAs and both devices agree.
    cxx = [*optimise, "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", TARGET]
    # gcc 12 warns about its own avx512fintrin.h, and "#pragma GCC target" is unknown to no compiler we support
    cxx += [
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        "-Wno-unused-function",
        "-Wno-ignored-attributes",
        "-Wno-unused-parameter",
    ]
    nvcc = ["-O3", "-std=c++20", "-lineinfo", "-Xfatbin=-compress-all", "--fmad=false", "-DUSE_CUDA", TARGET]
    sources = [*sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))]
    include_dirs, library_dirs = cpp_extension.include_paths(), cpp_extension.library_paths()
    libraries = ["torch_cpu"]  # libtorch_cpu alone: the same file loads with and without a GPU
    home = cuda_home()
    if home:
        cpp_extension.CUDA_HOME = str(home)  # a CPU build of torch leaves it unset
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
        cxx += ["-DUSE_CUDA", f'-DPEFTKERN_CUDA_ARCHS="{archs}"']
        sources += sorted(glob("csrc/cuda/*.cpp")) + sorted(glob("csrc/cuda/*.cu"))
        include_dirs.append(str(home / "include"))
        library_dirs.append(str(home / "lib64"))
        libraries += ["cudart_static", "dl", "rt", "pthread"]
    return Extension(
        "peftkern._C",
        sources,
        language="c++",
        py_limited_api=True,
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        libraries=libraries,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=["-Wl,--as-needed"],
        depends=glob("csrc/**/*", recursive=True),
    )


setup(
    ext_modules=[] if os.environ.get("PEFTKERN_NO_EXTENSION") == "1" else [extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
