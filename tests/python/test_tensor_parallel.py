# SPDX-License-Identifier: Apache-2.0
"""A slice of every expert on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from layer_cases import HIDDEN
from parallel_cases import (
    INTERMEDIATE,
    NUM_EXPERTS,
    TOP_K,
    assert_slices_as_one_process,
    make_inputs,
    make_layer,
)
from ranks import Ranks
from testing import assert_equal
from zexpert import FusedMoE

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


@pytest.mark.parametrize("num_tokens", [0, 60])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_tensor_parallel(num_ranks: int, num_tokens: int, ranks: Ranks) -> None:
    """The zero part, constants and shared experts count once however many ranks there are."""
    ranks.run(assert_slices_as_one_process, num_ranks, num_tokens)


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
