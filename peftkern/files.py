# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError


def write_whole(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Lets each function write its file under a temporary name of the same ending, then renames them all. A failure on
    the way leaves the old files whole, all of them; only a crash between two renames can mix old and new. Raises
    OSError, with the folder and the reason."""

    def beside(path: Path, kind: str) -> Path:
        return path.with_name(f".{path.stem}.{os.getpid()}.{kind}{path.suffix}")

    temporary = {path: beside(path, "tmp") for path in files}
    old = {path: beside(path, "old") for path in files if path.exists()}
    try:
        for path, write in files.items():
            write(temporary[path])
            sync(temporary[path])
        for path, kept in old.items():
            kept.unlink(missing_ok=True)
            try:
                os.link(path, kept)
            except OSError:  # a file system without links
                shutil.copy2(path, kept)
        try:
            for path, written in temporary.items():
                os.replace(written, path)
        except OSError:
            for path in files:
                if path in old:
                    os.rename(old[path], path)
                else:
                    path.unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
        folder, code = str(next(iter(files)).parent), getattr(error, "errno", None) or errno.EIO
        raise OSError(code, f"could not write, what was there before is kept: {error}", folder) from error
    finally:
        for leftover in (*temporary.values(), *old.values()):
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when the file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
