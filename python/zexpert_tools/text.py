# SPDX-License-Identifier: Apache-2.0
"""Text to train on: a file, or the documentation strings of Python's own standard library."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def documentation_strings(max_bytes: int = 2_000_000) -> bytes:
    """Documentation strings of the standard library's modules, classes and functions, in the order of the file
    names, a blank line between two; at most `max_bytes` of UTF-8. The same for one Python installation every time."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    parts: list[bytes] = []
    size = 0
    for path in sorted(library.rglob("*.py")):
        if skipped.intersection(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                documentation = ast.get_docstring(node)
                if documentation and len(documentation) >= 80:
                    parts.append(documentation.encode("utf-8", errors="ignore") + b"\n\n")
                    size += len(parts[-1])
        if size >= max_bytes:
            break
    return b"".join(parts)[:max_bytes]


def load_text(path: Path | None, *, min_bytes: int) -> Tensor:
    """The bytes of `path`, or of the documentation strings if it is None, as a uint8 tensor.

    Raises ValueError, in one sentence, if the file cannot be read or is shorter than `min_bytes`.
    """
    if path is None:
        data = documentation_strings()
    else:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if len(data) < min_bytes:
        source = path if path is not None else "the standard library's documentation"
        raise ValueError(f"the text must be at least {min_bytes} bytes long, {source} has {len(data)}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def printable_bytes(text: Sequence[int]) -> list[str]:
    """A character for each byte: itself, a line end, or a dot for what cannot be printed."""
    return [chr(byte) if 32 <= byte <= 126 else ("\n" if byte == 10 else ".") for byte in text]
