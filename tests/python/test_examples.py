"""The short examples run as commands and say what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_decode_loop(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    # More requests than places, and not a multiple of them: places are taken over, and empty at the end.
    out = run("decode_loop.py", "--device", device, "--requests", "7", "--places", "3", "--new-tokens", "9")
    assert re.search(r"^same bytes +yes$", out, flags=re.MULTILINE), out


def test_add_drop_experts() -> None:
    out = run("add_drop_experts.py", "--steps", "150", "--target", "3")
    before, after = re.findall(r"^(?:injected|adapted) +([\d.]+) networks per token, output off by (\d+)%$", out, re.M)
    assert abs(float(after[0]) - 3.0) < 0.25
    assert int(after[1]) < 0.5 * int(before[1])
