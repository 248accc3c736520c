# SPDX-License-Identifier: Apache-2.0
"""Blocks of published models whose experts are shared out over ranks, against one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model_cases import BLOCKS, HIDDEN, as_module_list, make_blocks
from parallel_cases import NUM_TOKENS, share_of
from ranks import Ranks
from testing import assert_equal
from zexpert.models import MoEPlusPlusBlock
from zexpert.runner.placement import EXPERT_WEIGHTS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")

GROUPS = ("expert_parallel_group", "tensor_parallel_group")


def checkpoint_of(blocks: nn.ModuleList) -> dict[str, Tensor]:
    return {
        f"{i}.{key}": tensor for i, block in enumerate(blocks) for key, tensor in block.checkpoint_state_dict().items()
    }


def results(blocks: nn.ModuleList, hidden_states: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The output of one block after the other, and all gradients. MoE++'s hand on their logits, too."""
    x = hidden_states.clone().requires_grad_()
    out, logits = x, None
    for block in blocks:
        if isinstance(block, MoEPlusPlusBlock):
            out, logits = block(out, logits)
        else:
            out = block(out)
    out.backward(gradient)
    wanted = {"hidden_states": x, **dict(blocks.named_parameters())}
    gradients = {
        name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in wanted.items()
    }
    return {"out": out.detach(), **gradients}


@pytest.mark.parametrize("name", BLOCKS)
def test_recompute(name: str) -> None:
    torch.manual_seed(1)
    hidden_states, gradient = torch.randn(2, 30, HIDDEN, dtype=torch.float64)
    expected = results(make_blocks(name), hidden_states, gradient)
    blocks = make_blocks(name, recompute=True)
    assert "recompute=True" in repr(blocks)
    for key, value in results(blocks, hidden_states, gradient).items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )


class Stack(nn.Module):
    """MoE++ blocks, the first without a gating residual, as docs/models.md makes them."""

    def __init__(self) -> None:
        super().__init__()
        config = BLOCKS["moe++"][1]
        self.blocks = nn.ModuleList(MoEPlusPlusBlock(replace(config, gating_residual=layer > 0)) for layer in range(3))

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = None
        for block in self.blocks:
            out, logits = block(hidden_states, logits)
            hidden_states = hidden_states + out
        return hidden_states


def train_replicated(group: Any) -> None:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Stack(), process_group=group, broadcast_buffers=False)
    for _ in range(2):  # a parameter without a gradient stops the second forward
        model(torch.randn(40, HIDDEN)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_a_stack_with_gating_residuals_trains_replicated(ranks: Ranks) -> None:
    ranks.run(train_replicated, 2)


def as_one_process(group: Any, name: str, kind: str) -> None:
    num_ranks = dist.get_world_size(group)
    one = make_blocks(name)
    blocks = make_blocks(name, **{kind: group})
    checkpoint = checkpoint_of(one)
    blocks.load_state_dict(checkpoint)
    hidden_states, gradient = torch.randn(2, sum(NUM_TOKENS[:num_ranks]), HIDDEN, dtype=torch.float64)
    expected = results(one, hidden_states, gradient)
    by_tokens = kind == "expert_parallel_group"  # each rank has its own; else all have all
    share = share_of(dist.get_rank(group)) if by_tokens else slice(None)
    actual = results(blocks, hidden_states[share], gradient[share])
    # All collectives come before any comparison: a rank that fails leaves nobody waiting.
    for key, value in actual.items():
        prefix, _, weight = key.rpartition(".")
        if key in ("out", "hidden_states"):
            expected[key] = expected[key][share]
        elif weight in EXPERT_WEIGHTS:
            assert value.numel() * num_ranks == expected[key].numel()
            shard = blocks.get_submodule(prefix).runner.sharded(weight, value)
            actual[key] = shard.full_tensor().flatten(1, -2)
        elif by_tokens:
            dist.all_reduce(value, group=group)
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_one_processes(name: str, kind: str, ranks: Ranks) -> None:
    """What zero experts, constants and shared experts add counts once, and a gating residual stays with its tokens."""
    ranks.run(as_one_process, 3, name, kind)


def through_checkpoints(group: Any, name: str, kind: str) -> None:
    block, config = BLOCKS[name]
    checkpoint = make_blocks(name)[1].checkpoint_state_dict()
    layouts = [checkpoint]
    if "experts.gate_up_proj" in checkpoint:
        layouts.append(as_module_list(checkpoint))
    for layout in layouts:
        for assign in (False, True):
            prefixed = {f"mlp.{key}": tensor for key, tensor in layout.items()}
            options: dict[str, Any] = {"params_dtype": torch.float64, kind: group}
            shared = block.from_state_dict(config, prefixed, prefix="mlp.", assign=assign, **options)
            gathered = shared.checkpoint_state_dict()
            assert gathered.keys() == checkpoint.keys()
            for key, tensor in checkpoint.items():
                assert_equal(gathered[key], tensor, key)
    with pytest.raises(ValueError, match=rf"^{kind} must be a process group .*, got 3$"):
        block(config, **{kind: 3})
    with pytest.raises(ValueError, match=r"^tensor_parallel_group must be None with an expert_parallel_group$"):
        block(config, expert_parallel_group=group, tensor_parallel_group=group)


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", BLOCKS)
def test_whole_checkpoints(name: str, kind: str, ranks: Ranks) -> None:
    ranks.run(through_checkpoints, 2, name, kind)
