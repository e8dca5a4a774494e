# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there: atomic writes, and checkpoint folders that can be checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..files import sync, write_whole
from .errors import FinetuneError

CHECKSUMS = "checksums.json"
PARTIAL = ".partial"


def write_atomic(path: Path, write: Callable[[Path], object] | str) -> None:
    """Write text, or let `write(temporary_path)` write, then rename: `path` is old or new, never a part."""
    text = write if isinstance(write, str) else None
    try:
        write_whole({path: write if text is None else lambda temporary: temporary.write_text(text, encoding="utf-8")})
    except OSError as error:
        raise FinetuneError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def read_json(path: Path) -> dict:
    """Read a JSON object; a damaged file is an error that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FinetuneError(
            f"{str(path)!r}: expected a JSON object, got an unreadable or damaged file ({error})"
        ) from error
    if not isinstance(value, dict):
        raise FinetuneError(f"{str(path)!r}: expected a JSON object, got {type(value).__name__}")
    return value


def make_output(folder: Path) -> None:
    """Create `--output` and make sure that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FinetuneError(
            f"--output: expected a folder that can be written, got {str(folder)!r} ({error.strerror or error})"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """All complete-looking checkpoint folders, newest (most steps) first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps a checkpoint folder was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def seal(partial: Path, final: Path) -> None:
    """Note the size and SHA-256 of every file in the folder, force it to disk, and give it its final name."""
    sums = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            sync(path)
            sums[path.relative_to(partial).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_atomic(partial / CHECKSUMS, json.dumps(sums, indent=1))
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)


def verify(checkpoint: Path) -> None:
    """Raise FinetuneError, naming the file, if anything in a checkpoint folder is missing, truncated or changed."""
    if not (checkpoint / CHECKSUMS).is_file():
        raise FinetuneError(
            f"{str(checkpoint / CHECKSUMS)!r}: expected the checkpoint's list of checksums, got no such file"
        )
    for name, expected in read_json(checkpoint / CHECKSUMS).items():
        path = checkpoint / name
        if not path.is_file():
            raise FinetuneError(f"{str(path)!r}: expected a file of {expected['bytes']} bytes, got no such file")
        if path.stat().st_size != expected["bytes"]:
            raise FinetuneError(
                f"{str(path)!r}: expected {expected['bytes']} bytes, got {path.stat().st_size}; it is truncated"
            )
        if _sha256(path) != expected["sha256"]:
            raise FinetuneError(f"{str(path)!r}: its SHA-256 is not the one noted when it was written; it was changed")


def newest_intact(folder: Path, warn: Callable[[str], None]) -> Path:
    """The newest checkpoint that passes `verify`; `warn` is told about every damaged one that is passed over."""
    damage = None
    for checkpoint in checkpoints(folder):
        try:
            verify(checkpoint)
        except FinetuneError as error:
            damage = error
            warn(f"damaged checkpoint passed over: {error}")
            continue
        return checkpoint
    if damage is not None:
        raise FinetuneError(f"--resume: no intact checkpoint left in {str(folder)!r}; the last one looked at: {damage}")
    raise FinetuneError(f"--resume: expected a checkpoint to resume from in {str(folder)!r}, got none")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
