# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to and moves that file to `path` at the end. An error leaves `path` as it was, and no
    other file."""
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # the error of a write
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def prepare_folder(folder: Path, num_bytes: int) -> None:
    """Makes the folder. Raises ValueError if no file can be written there, or `num_bytes` do not fit, and removes a
    folder that it made."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        free = shutil.disk_usage(folder).free
        problem = f"{folder} must have {num_bytes / 2**20:.0f} MiB free, got {free / 2**20:.0f}"
    except OSError as error:
        free = -1
        problem = f"cannot write to {folder}: {error.strerror or error}"
    if free < num_bytes:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise ValueError(problem)
