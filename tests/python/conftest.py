# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from ranks import Ranks
from testing import on_device

# No deadline: the first example pays for lazy loading. The same examples every time: a failure can be repeated.
hypothesis.settings.register_profile("zexpert", deadline=None, max_examples=100, derandomize=True, database=None)
hypothesis.settings.load_profile("zexpert")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_paths: run once more for each instruction set the kernels are compiled for")
    config.addinivalue_line("markers", "every_device(op): run with the file's `op` on the CPU and on a CUDA device")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("every_device"):
        metafunc.parametrize("device", ["cpu", "cuda"], indirect=True)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device a test's op runs on. Tests keep their tensors on the CPU; a stand-in for the op takes them there and
    the results back."""
    name = getattr(request, "param", "cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: torch.cuda.is_available() is False")
        op = request.node.get_closest_marker("every_device").args[0]
        monkeypatch.setattr(request.module, op, on_device(getattr(request.module, op), name))
    return name


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20250923)


@pytest.fixture(scope="session")
def shares_libstdcxx(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether the compiler that AOTInductor calls links the C++ library that PyTorch has loaded."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds to import

    library = tmp_path_factory.mktemp("probe") / "probe.so"
    source = "#include <string>\nstd::string probe(int number) { return std::to_string(number); }\n"
    command = [get_cpp_compiler(), "-shared", "-fPIC", "-x", "c++", "-", "-o", library]
    subprocess.run(command, input=source, text=True, check=True)
    return b"libstdc++.so" in library.read_bytes()


@pytest.fixture
def compiled_ahead_of_time(shares_libstdcxx: bool, tmp_path: Path) -> Callable[[torch.export.ExportedProgram], Any]:
    """What AOTInductor makes of a program, loaded."""
    if not shares_libstdcxx:
        pytest.skip("the C++ compiler links libstdc++ statically: loading AOTInductor's package of any model crashes")

    def compiled(program: torch.export.ExportedProgram) -> Any:
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
        return torch._inductor.aoti_load_package(package)

    return compiled


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes that run functions as ranks."""
    pool = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()
