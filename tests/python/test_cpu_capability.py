# SPDX-License-Identifier: Apache-2.0
"""The tests marked cpu_paths, run once for each instruction set below the one in use.

ZEXPERT_CPU_CAPABILITY is read when the library first needs it, so each run is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zexpert

CAPABILITIES = ("default", "avx2", "avx512")  # ascending


def capability_in_use() -> str:
    return str(zexpert.build_info()["cpu_capability"]).lower()


@pytest.mark.cpu_paths
def test_the_environment_lowers_the_instruction_set() -> None:
    asked_for = os.environ.get("ZEXPERT_CPU_CAPABILITY", "avx512")
    assert CAPABILITIES.index(capability_in_use()) <= CAPABILITIES.index(asked_for)


def test_the_environment_may_use_capitals() -> None:
    show = "import zexpert; print(zexpert.build_info()['cpu_capability'])"
    environment = {**os.environ, "ZEXPERT_CPU_CAPABILITY": "DEFAULT"}
    done = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "DEFAULT\n"


@pytest.mark.parametrize("capability", CAPABILITIES[:-1])
def test_kernels_of_other_instruction_sets(capability: str) -> None:
    if CAPABILITIES.index(capability) >= CAPABILITIES.index(capability_in_use()):
        pytest.skip(f"the other tests already run the kernels for {capability_in_use()}")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            "cpu_paths",
            "-p",
            "no:cacheprovider",
            Path(__file__).parent,
        ],
        env={**os.environ, "ZEXPERT_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
