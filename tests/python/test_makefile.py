# SPDX-License-Identifier: Apache-2.0
"""The Makefile: how many compilers run at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({"MAX_JOBS": "3"}, [], "3 3"),
        ({"JOBS": "5"}, [], "5 5"),
        ({"MAX_JOBS": "3"}, ["JOBS=2"], "2 2"),
        ({}, ["MAX_JOBS=7"], "7 7"),
        ({}, [], None),
    ],
)
def test_jobs(environment: dict[str, str], arguments: list[str], expected: str | None) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("JOBS", "MAX_JOBS", "MAKEFLAGS")}
    command = ["make", "--silent", "--eval", 'show: ; @echo "$(JOBS) $$MAX_JOBS"', "show", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=True)
    jobs, max_jobs = done.stdout.split()
    assert jobs == max_jobs
    assert int(jobs) >= 1
    assert expected is None or done.stdout.strip() == expected
