"""docs/distributed.md and the example run as shown, with torchrun on CPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from zexpert.distributed_plan import plan_layer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "distributed.md"


def torchrun(num_ranks: int, script: Path, *arguments: object) -> str:
    """What `torchrun` prints, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks, script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_block_runs_as_shown(tmp_path: Path) -> None:
    text = PAGE.read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    script = tmp_path / "two_ranks.py"
    script.write_text(program)
    assert torchrun(2, script) == shown


def test_table_is_the_plans() -> None:
    pytest.importorskip("rich")
    from zexpert.cli.plan import DEFAULT_GPUS, times_row

    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    plans = [plan_layer(gpus, 4096) for gpus in DEFAULT_GPUS]
    assert rows == [[*times_row(plan), f"{plan.weight_bytes / 1e9:.2f} GB"] for plan in plans]


@pytest.mark.parametrize("data_ranks", [1, 2])
def test_example_does_what_one_process_does(data_ranks: int, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    out = torchrun(
        2,
        ROOT / "examples" / "expert_parallel.py",
        "--data-ranks",
        data_ranks,
        "--steps",
        6,
        "--checkpoint",
        checkpoint,
    )
    assert f"mesh of {data_ranks} x {2 // data_ranks} ranks, {8 * data_ranks} of 16 experts on each" in out
    losses = re.findall(r"^step \d+: loss (\S+), one process (\S+)$", out, flags=re.MULTILINE)
    assert float(losses[-1][0]) < float(losses[0][0])
    difference = re.search(r"^largest difference of a parameter from one process: (\S+)$", out, flags=re.MULTILINE)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    assert (checkpoint / ".metadata").exists()
