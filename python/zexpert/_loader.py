# SPDX-License-Identifier: Apache-2.0
"""Loads zexpert's libraries into PyTorch, or says why that is impossible."""

from __future__ import annotations

import ctypes
import functools
import struct
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from zexpert._C import _BuildInfo

PACKAGE = Path(__file__).resolve().parent
CORE_LIBRARY = PACKAGE / "lib" / "libzexpert.so"
CUDA_LIBRARY = PACKAGE / "lib" / "libzexpert_cuda.so"

_HOW_TO_BUILD = (
    "install a wheel, or build in the source tree with: pip install -e . --no-build-isolation "
    "(which needs torch>=2.10, pybind11>=3.0, ninja, setuptools and wheel)"
)


class LoadedLibraries(NamedTuple):
    """Which libraries serve this process."""

    cuda_loaded: bool
    cuda_state: str
    """ "loaded", "not built", or "not loaded: ..." with the reason."""


@functools.cache
def load_libraries() -> LoadedLibraries:
    """Loads ``libzexpert.so``, and ``libzexpert_cuda.so`` where it exists and PyTorch has CUDA. Repeats do nothing.

    Raises:
        ImportError: a library is missing, or does not load; the message says what was built against what.
    """
    info = _module_build_info()
    if not CORE_LIBRARY.exists():
        raise ImportError(f"{CORE_LIBRARY} is missing, so this copy of zexpert is not built: {_HOW_TO_BUILD}")
    _load(CORE_LIBRARY, info)
    if not CUDA_LIBRARY.exists():
        return LoadedLibraries(False, "not built")
    if torch.version.cuda is None:
        # The library needs libtorch_cuda.so. A wheel with CUDA serves a PyTorch without it all the same.
        return LoadedLibraries(False, f"not loaded: PyTorch {torch.__version__} has no CUDA")
    _load(CUDA_LIBRARY, info)
    return LoadedLibraries(True, "loaded")


@functools.cache
def cuda_library_info() -> tuple[str, list[str]]:
    """Toolkit version and architectures as the loaded CUDA library states them."""
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    library.zexpert_cuda_toolkit_version.restype = ctypes.c_int
    library.zexpert_cuda_architectures.restype = ctypes.c_char_p
    version: int = library.zexpert_cuda_toolkit_version()  # 1000 * major + 10 * minor
    architectures: bytes = library.zexpert_cuda_architectures()
    return f"{version // 1000}.{version % 1000 // 10}", architectures.decode().replace(";", " ").split()


def _module_build_info() -> _BuildInfo:
    try:
        for path in PACKAGE.glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
            _check_whole(path)
        from zexpert import _C
    except (ImportError, OSError) as error:
        wanted = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        found = sorted(path.name for path in PACKAGE.glob("_C.*.so"))
        if wanted in found:
            raise ImportError(f"{PACKAGE / wanted} does not load ({error}): {_HOW_TO_BUILD}") from error
        others = f"; built for other Pythons: {', '.join(found)}" if found else ""
        raise ImportError(
            f"{PACKAGE / wanted} is missing, so zexpert is not built for this Python{others}: {_HOW_TO_BUILD}"
        ) from error
    return _C.build_info()


def _load(library: Path, info: _BuildInfo) -> None:
    try:
        _check_whole(library)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        # What the loader said stands behind PyTorch's own error.
        reason = error.__cause__ or error
        raise ImportError(
            f"{library} does not load under PyTorch {torch.__version__}: {reason}. It was built with PyTorch "
            f"{info['torch_build_version']} and runs under PyTorch {info['torch_abi_target']} or later. "
            f"To get one that fits, {_HOW_TO_BUILD}"
        ) from error


def _check_whole(library: Path) -> None:
    """Raises OSError for an ELF file that ends before its table of sections does: loading it would end the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) == 64 and header[:5] == b"\x7fELF\x02":
        (begin,) = struct.unpack_from("<Q", header, 0x28)
        entry_size, num_entries = struct.unpack_from("<HH", header, 0x3A)
        size = library.stat().st_size
        if begin + entry_size * num_entries > size:
            raise OSError(f"the file is cut off after {size} bytes")
