"""Settings of all tests."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# No deadline: the first example pays for lazy loading. The same examples every time: a failure can be repeated.
hypothesis.settings.register_profile("zexpert", deadline=None, max_examples=100, derandomize=True, database=None)
hypothesis.settings.load_profile("zexpert")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_paths: run once more for each instruction set the kernels are compiled for")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20250923)
