# SPDX-License-Identifier: Apache-2.0
"""docs/distributed.md and the example run as shown, with torchrun on CPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import zexpert
from ranks import Ranks
from testing import assert_equal, fenced_blocks
from zexpert_tools.cluster_plan import plan_layer

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "distributed.md"
NUM_EXPERTS = 12


def torchrun(num_ranks: int, script: Path, *arguments: object) -> str:
    """What `torchrun` prints, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks, script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def recipes() -> dict[str, Any]:
    """The page's functions."""
    names: dict[str, Any] = {}
    for block in fenced_blocks(PAGE.read_text(), "python"):
        if "\ndef " in f"\n{block}":
            exec(block, names)
    return names


def test_block_runs_as_shown(tmp_path: Path) -> None:
    text = PAGE.read_text()
    program = fenced_blocks(text, "python")[0]
    (shown,) = fenced_blocks(text, "text")
    script = tmp_path / "two_ranks.py"
    script.write_text(program)
    assert torchrun(2, script) == shown


def test_table_is_the_plans() -> None:
    pytest.importorskip("rich")
    from zexpert_tools.cli.plan import DEFAULT_GPUS, times_row

    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    plans = [plan_layer(gpus, 4096) for gpus in DEFAULT_GPUS]
    assert rows == [[*times_row(plan), f"{plan.weight_bytes / 1e9:.2f} GB"] for plan in plans]


class Model(nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Linear(8, NUM_EXPERTS)
        self.moe = zexpert.FusedMoE(NUM_EXPERTS, 4, 8, 4, expert_parallel_group=group)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.moe(hidden_states, self.classifier(hidden_states))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train_beside(group: Any, kind: str) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    model, one, page = Model(group), Model(None), recipes()
    one.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    if kind == "DDP":
        wrapped = page["data_parallel"](model, group)
    else:
        wrapped = page["fully_sharded"](model, DeviceMesh.from_group(group, "cpu"))
    tokens = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1))
    rank = dist.get_rank(group)
    wrapped(tokens[rank]).square().mean().backward()
    page["mean_over_ranks"](model, group)
    norm = page["clip_grad_norm"](model, 0.01, group)
    one(tokens.flatten(0, 1)).square().mean().backward()
    expected_norm = nn.utils.clip_grad_norm_(one.parameters(), 0.01)
    assert expected_norm > 0.02
    torch.testing.assert_close(norm, expected_norm)
    for name, parameter in model.named_parameters():
        expected = one.get_parameter(name).grad
        assert expected is not None
        own = expected.chunk(2)[rank] if name.endswith(("w13_weight", "w2_weight")) else expected
        torch.testing.assert_close(whole(parameter.grad), own)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["DDP", "FSDP"])
def test_data_parallel_beside_experts(kind: str, ranks: Ranks) -> None:
    """Gradients and their norm are one process's."""
    ranks.run(train_beside, 2, kind)


def trained_state(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments of all experts."""
    found = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    for name in ("w13_weight", "w2_weight"):
        moment = optimizer.state[model.moe.get_parameter(name)]["exp_avg"]
        sharded = getattr(model.moe.runner, "sharded", lambda _, tensor: tensor)
        found[f"moment of {name}"] = whole(sharded(name, moment)).clone()
    return {**found, "lr": torch.tensor(optimizer.param_groups[0]["lr"])}


def train_and_save(group: Any, folder: str) -> dict[str, Tensor]:
    model = Model(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.randn(9, 8)).square().mean().backward()
    optimizer.step()
    recipes()["save"](model, optimizer, folder, group)
    return trained_state(model, optimizer)


def resume(group: Any, folder: str) -> dict[str, Tensor]:
    model = Model(group)
    optimizer = torch.optim.AdamW(model.parameters())
    recipes()["load"](model, optimizer, folder, group)
    return trained_state(model, optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_training_resumes_under_any_number_of_ranks(tmp_path: Path, ranks: Ranks) -> None:
    expected = ranks.run(train_and_save, 2, str(tmp_path))[0]
    halves = expected["moment of w13_weight"].chunk(2)
    assert not torch.equal(*halves)
    for found in (
        ranks.run(resume, 2, str(tmp_path))[1],
        ranks.run(resume, 4, str(tmp_path))[0],
        resume(None, str(tmp_path)),
    ):
        for name, tensor in expected.items():
            assert_equal(found[name], tensor, name)


class Killed(BaseException):
    pass


def save_twice(group: Any, folder: str) -> dict[str, Tensor]:
    """A step that is saved, and one that is stopped while it is saved."""
    from torch.distributed.checkpoint import FileSystemWriter

    page, model = recipes(), Model(group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    saved: dict[str, Tensor] = {}
    write = FileSystemWriter.write_data

    def stop(*_: Any) -> Any:
        raise Killed

    for step in (1, 2):
        model(torch.randn(9, 8)).square().mean().backward()
        optimizer.step()
        saved = saved or trained_state(model, optimizer)
        if step == 2 and dist.get_rank(group) == 1:
            FileSystemWriter.write_data = stop  # type: ignore[method-assign]
        try:
            page["save_step"](model, optimizer, folder, step, group)
        except BaseException:
            assert step == 2
        finally:
            FileSystemWriter.write_data = write  # type: ignore[method-assign]
    return saved


def resume_latest(group: Any, folder: str) -> dict[str, Tensor]:
    model = Model(group)
    optimizer = torch.optim.AdamW(model.parameters())
    recipes()["load_latest"](model, optimizer, folder, group)
    return trained_state(model, optimizer)


def test_an_interrupted_save_leaves_the_one_before(tmp_path: Path, ranks: Ranks) -> None:
    expected = ranks.run(save_twice, 2, str(tmp_path))[0]
    assert (tmp_path / "step-2").exists()
    found = ranks.run(resume_latest, 2, str(tmp_path))[0]
    for name, tensor in expected.items():
        assert_equal(found[name], tensor, name)


def save_slices(group: Any, folder: str) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    state = zexpert.FusedMoE(NUM_EXPERTS, 4, 8, 4, tensor_parallel_group=group).state_dict()
    dcp.save(state, checkpoint_id=folder, process_group=group)
    return {name: whole(tensor) for name, tensor in state.items()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_slices_come_together_in_one_process(tmp_path: Path, ranks: Ranks) -> None:
    import torch.distributed.checkpoint as dcp

    expected = ranks.run(save_slices, 2, str(tmp_path))[0]
    layer = zexpert.FusedMoE(NUM_EXPERTS, 4, 8, 4)
    (block,) = [block for block in fenced_blocks(PAGE.read_text(), "python") if block.startswith("state = ")]
    exec(block, {"layer": layer, "dcp": dcp, "folder": tmp_path})
    assert_equal(layer.w13_weight.detach(), expected["w13_weight"].flatten(1, 2))
    assert_equal(layer.w2_weight.detach(), expected["w2_weight"])


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
