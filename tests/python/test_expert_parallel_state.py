# SPDX-License-Identifier: Apache-2.0
"""The experts of several ranks on meshes, in checkpoints and in state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from layer_cases import HIDDEN
from parallel_cases import (
    INTERMEDIATE,
    NUM_EXPERTS,
    make_inputs,
    make_layer,
)
from ranks import Ranks
from testing import assert_equal

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


def two_dimensions(group: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    with pytest.raises(
        ValueError, match=r"^expert_parallel_group must be .* one dimension of a DeviceMesh, .* got a mesh of 2"
    ):
        make_layer("plain", expert_parallel_group=mesh)
    layer = make_layer("identity", expert_parallel_group=mesh["expert"])
    assert layer.w13_weight.size(0) == NUM_EXPERTS // 2
    inputs = [tensor.float() for tensor in make_inputs("identity", 11)[:2]]
    with torch.no_grad():
        torch.testing.assert_close(layer(*inputs), make_layer("identity")(*inputs))


def test_dimension_of_a_mesh(ranks: Ranks) -> None:
    ranks.run(two_dimensions, 4)


def save(group: Any, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    layer = make_layer("mixed", expert_parallel_group=group)
    state = layer.state_dict()
    assert state["w13_weight"].shape == (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    assert state["w13_weight"].to_local().data_ptr() == layer.w13_weight.data_ptr()
    dcp.save({"layer": state}, checkpoint_id=folder, process_group=group)


def load(group: Any, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    expected = make_layer("mixed", expert_parallel_group=group)
    layer = make_layer("mixed", expert_parallel_group=group)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    state = {"layer": layer.state_dict()}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    layer.load_state_dict(state["layer"])
    for name, parameter in layer.named_parameters():
        assert_equal(parameter.detach(), expected.get_parameter(name).detach(), name)


def test_checkpoint_of_four_ranks_under_two(tmp_path: Path, ranks: Ranks) -> None:
    import torch.distributed.checkpoint as dcp

    ranks.run(save, 4, str(tmp_path))
    ranks.run(load, 2, str(tmp_path))
    state = {"layer": {name: torch.zeros_like(tensor) for name, tensor in make_layer("mixed").state_dict().items()}}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    for name, tensor in make_layer("mixed").state_dict().items():
        assert_equal(state["layer"][name], tensor, name)


def load_whole(group: Any) -> None:
    whole = make_layer("plain").state_dict()
    layer = make_layer("plain", expert_parallel_group=group)
    rank, num_local = dist.get_rank(group), layer.w13_weight.size(0)
    assert_equal(layer.w13_weight.detach(), whole["w13_weight"][rank * num_local : (rank + 1) * num_local])
    own = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    nn.Sequential(layer).load_state_dict({f"0.{name}": tensor for name, tensor in {**whole, **own}.items()})
    before = layer.w13_weight.detach().clone()
    message = rf"^w2_weight must have shape \[{num_local}, 24, 24\] or \[12, 24, 24\], got \[5, 24, 24\]$"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({**whole, "w13_weight": whole["w13_weight"] + 1, "w2_weight": torch.zeros(5, 24, 24)})
    assert_equal(layer.w13_weight.detach(), before, "weights after a bad state dict")


def test_state_dict_of_one_process(ranks: Ranks) -> None:
    ranks.run(load_whole, 3)
