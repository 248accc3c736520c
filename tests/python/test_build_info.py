# SPDX-License-Identifier: Apache-2.0
"""What the build promises: its information, what its libraries link, and what the loader says when they fail."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zexpert
from zexpert import _C
from zexpert._loader import CORE_LIBRARY, CUDA_LIBRARY, load_libraries

PACKAGE = Path(zexpert.__file__).parent


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def needed_libraries(library: Path) -> list[str]:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """The package's Python files and binaries in a folder of their own, to be broken."""
    copy = tmp_path / "zexpert"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def import_error(package: Path) -> str:
    """What importing that copy says, on one line."""
    code = "try:\n    import zexpert\nexcept ImportError as error:\n    print(error)\nelse:\n    print('imported')"
    done = run_python(code, PYTHONPATH=str(package.parent))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_submodules_are_there_after_importing_zexpert() -> None:
    code = "import zexpert; zexpert.models.LongcatFlashMoE, zexpert.telemetry.track_routing, zexpert.training"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match=r"^module 'zexpert' has no attribute 'trainer'$"):
        zexpert.trainer  # noqa: B018


def test_build_info_says_what_was_built() -> None:
    info = zexpert.build_info()
    assert info["version"] == zexpert.__version__ == importlib.metadata.version("zexpert")
    assert re.fullmatch(r"unknown|[0-9a-f]{12}(-dirty)?", info["git_revision"])
    assert re.match(r"(GCC|Clang) \d+", info["compiler"])
    assert info["torch_abi_target"] == "2.10"
    assert info["torch_version"] == torch.__version__
    assert info["torch_build_version"].startswith("2.")
    assert info["cpu_capability"] in ("AVX512", "AVX2", "DEFAULT")
    assert all(re.fullmatch(r"\d+\.\d+a?(\+PTX)?", arch) for arch in info["cuda_archs"])


def test_build_info_says_whether_the_cuda_library_is_used() -> None:
    info = zexpert.build_info()
    if not CUDA_LIBRARY.exists():
        assert info["cuda_library"] == "not built"
    elif torch.version.cuda is None:
        assert info["cuda_library"] == f"not loaded: PyTorch {torch.__version__} has no CUDA"
    else:
        assert info["cuda_library"] == "loaded"
    assert (info["cuda_toolkit"] is not None) == (info["cuda_library"] == "loaded")
    assert info["libraries"] == [str(CORE_LIBRARY), *([str(CUDA_LIBRARY)] if info["cuda_library"] == "loaded" else [])]


def test_build_info_gives_a_dict_of_ones_own() -> None:
    zexpert.build_info()["cuda_archs"].append("changed")
    assert "changed" not in zexpert.build_info()["cuda_archs"]


@pytest.mark.parametrize(("cap", "allowed"), [("default", {"DEFAULT"}), ("avx2", {"DEFAULT", "AVX2"})])
def test_cpu_capability_can_be_lowered(cap: str, allowed: set[str]) -> None:
    done = run_python("import zexpert; print(zexpert.build_info()['cpu_capability'])", ZEXPERT_CPU_CAPABILITY=cap)
    assert done.stdout.strip() in allowed, done.stderr


def test_operator_library_needs_torch_and_no_python() -> None:
    needed = needed_libraries(CORE_LIBRARY)
    assert "libtorch_cpu.so" in needed  # or torch.ops.load_library could not resolve its symbols
    assert not [name for name in needed if "python" in name]


def test_module_needs_no_torch() -> None:
    needed = needed_libraries(Path(_C.__file__))
    assert not [name for name in needed if "torch" in name or "c10" in name]


def test_loading_again_does_nothing() -> None:
    assert load_libraries() is load_libraries()
    torch.ops.load_library(str(CORE_LIBRARY))


def test_missing_library_says_how_to_build(package_copy: Path) -> None:
    (package_copy / "lib" / "libzexpert.so").unlink()
    message = import_error(package_copy)
    assert message.startswith(
        f"{package_copy / 'lib' / 'libzexpert.so'} is missing, so this copy of zexpert is not built"
    )
    assert "pip install -e . --no-build-isolation" in message


def test_broken_library_says_what_was_built_against_what(package_copy: Path) -> None:
    library = package_copy / "lib" / "libzexpert.so"
    library.write_bytes(b"not a library")
    message = import_error(package_copy)
    assert message.startswith(f"{library} does not load under PyTorch {torch.__version__}: {library}: ")
    assert "file too short" in message or "invalid ELF header" in message
    assert f"It was built with PyTorch {_C.build_info()['torch_build_version']} and runs under PyTorch 2.10" in message


@pytest.mark.parametrize("size", [4096, 200_000])
@pytest.mark.parametrize("name", ["lib/libzexpert.so", Path(_C.__file__).name])
def test_truncated_library_ends_no_process(package_copy: Path, name: str, size: int) -> None:
    library = package_copy / name
    library.write_bytes(library.read_bytes()[:size])
    message = import_error(package_copy)
    assert message.startswith(f"{library} does not load")
    assert f"the file is cut off after {size} bytes" in message


def test_missing_module_names_the_pythons_it_was_built_for(package_copy: Path) -> None:
    module = package_copy / Path(_C.__file__).name
    module.rename(package_copy / "_C.cpython-39-x86_64-linux-gnu.so")
    message = import_error(package_copy)
    assert message.startswith(f"{module} is missing, so zexpert is not built for this Python")
    assert "built for other Pythons: _C.cpython-39-x86_64-linux-gnu.so" in message


def test_broken_module_says_why(package_copy: Path) -> None:
    module = package_copy / Path(_C.__file__).name
    module.write_bytes(b"not a library")
    assert import_error(package_copy).startswith(f"{module} does not load (")


def test_cuda_library_is_left_alone_under_a_torch_without_cuda(package_copy: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has CUDA")
    (package_copy / "lib" / "libzexpert_cuda.so").write_bytes(b"needs libtorch_cuda.so")
    code = "import zexpert; print(zexpert.build_info()['cuda_library'])"
    done = run_python(code, PYTHONPATH=str(package_copy.parent))
    assert done.stdout.strip() == f"not loaded: PyTorch {torch.__version__} has no CUDA", done.stderr
