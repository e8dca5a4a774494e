# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError


def write_whole(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Lets each function write its file under a temporary name of the same ending, then renames them all: a failure on
    the way leaves the old files whole. Raises OSError, with the folder and the reason."""
    temporary = {path: path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}") for path in files}
    try:
        for path, write in files.items():
            write(temporary[path])
            sync(temporary[path])
        for path, written in temporary.items():
            os.replace(written, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
        folder, code = str(next(iter(files)).parent), getattr(error, "errno", None) or errno.EIO
        raise OSError(code, f"could not write, what was there before is kept: {error}", folder) from error
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when the file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
