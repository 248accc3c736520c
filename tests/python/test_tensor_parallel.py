# SPDX-License-Identifier: Apache-2.0
"""A slice of every expert on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from layer_cases import HIDDEN, LAYERS
from parallel_cases import (
    INTERMEDIATE,
    NUM_EXPERTS,
    TOP_K,
    make_inputs,
    make_layer,
    results,
)
from ranks import Ranks
from testing import assert_equal, assert_error_rule
from zexpert import FusedMoE

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


def sliced(group: Any, num_tokens: int) -> None:
    rank = dist.get_rank(group)
    for kind, dtype in (*((kind, torch.float32) for kind in LAYERS), ("mixed", torch.bfloat16)):
        inputs = make_inputs(kind, num_tokens)
        layer = make_layer(kind, dtype, tensor_parallel_group=group, recompute=kind == "constant")
        size = INTERMEDIATE // dist.get_world_size(group)
        assert layer.w13_weight.shape == (NUM_EXPERTS, 2 * size, HIDDEN)
        actual = results(layer, *inputs)
        plain = results(make_layer(kind, dtype, experts_backend="torch"), *inputs)
        expected = results(make_layer(kind, torch.float64, experts_backend="torch"), *inputs)
        own = slice(rank * size, (rank + 1) * size)
        for each in (plain, expected):
            each["w2_weight"] = each["w2_weight"][:, :, own]
            each["w13_weight"] = each["w13_weight"].unflatten(1, (2, -1))[:, :, own].flatten(1, 2)
        for name, value in actual.items():
            assert_error_rule(value, plain[name], expected[name], f"{kind}, {dtype}: {name}")
            if name not in ("w13_weight", "w2_weight"):
                first = value.clone()
                dist.broadcast(first, 0, group=group)
                assert_equal(value, first, f"{kind}, {dtype}: {name} on another rank")


@pytest.mark.parametrize("num_tokens", [0, 60])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_tensor_parallel(num_ranks: int, num_tokens: int, ranks: Ranks) -> None:
    """The zero part, constants and shared experts count once however many ranks there are."""
    ranks.run(sliced, num_ranks, num_tokens)


def gradients_where_wanted(group: Any) -> None:
    layer = make_layer("identity", tensor_parallel_group=group)
    hidden_states, logits, _ = make_inputs("identity", 6)
    x, router_logits = hidden_states.float(), logits.float()
    if dist.get_rank(group) == 0:
        x.requires_grad_()
    else:
        layer.requires_grad_(False)
    layer(x, router_logits).square().sum().backward()
    dist.barrier(group=group)
    if dist.get_rank(group) == 0:
        expected = hidden_states.float().requires_grad_()
        make_layer("identity")(expected, router_logits).square().sum().backward()
        torch.testing.assert_close(x.grad, expected.grad)


def test_ranks_without_gradients_join_the_backward(ranks: Ranks) -> None:
    ranks.run(gradients_where_wanted, 2)


def save_slices(group: Any, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(3)
    layer = FusedMoE(NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, tensor_parallel_group=group)
    dcp.save(layer.state_dict(), checkpoint_id=folder, process_group=group)


def load_slices(group: Any, folder: str) -> None:
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(3)
    layer = FusedMoE(NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, tensor_parallel_group=group)
    drawn_weights = [layer.w13_weight.detach().clone(), layer.w2_weight.detach().clone()]
    layer.reset_parameters()
    assert not torch.equal(layer.w13_weight, drawn_weights[0])
    state = layer.state_dict()
    dcp.load(state, checkpoint_id=folder, process_group=group)
    layer.load_state_dict(state)
    assert_equal(layer.w13_weight.detach(), drawn_weights[0])
    assert_equal(layer.w2_weight.detach(), drawn_weights[1])
    with pytest.raises(
        ValueError, match=r"^intermediate_size must be a multiple .* tensor_parallel_group \(2\), got 5$"
    ):
        FusedMoE(4, 2, 8, 5, tensor_parallel_group=group)
    with pytest.raises(ValueError, match=r"^tensor_parallel_group must be None with an expert_parallel_group$"):
        FusedMoE(4, 2, 8, 6, tensor_parallel_group=group, expert_parallel_group=group)


def test_checkpoint_of_slices(tmp_path: Path, ranks: Ranks) -> None:
    """Seeded alike, four ranks and two draw the same layer."""
    ranks.run(save_slices, 4, str(tmp_path))
    ranks.run(load_slices, 2, str(tmp_path))
