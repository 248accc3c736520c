# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel under compute-sanitizer: no bad access, no race, no read of memory that nothing wrote."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not in PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_kernels(tool: str) -> None:
    program = Path(__file__).with_name("sanitize_cuda.py")
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "1", sys.executable, str(program), tool]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
