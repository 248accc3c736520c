# SPDX-License-Identifier: Apache-2.0
"""The runner for a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zexpert.experts.interface import MoEExperts
from zexpert.router.base_router import BaseRouter, check_tensor
from zexpert.runner.chunking_moe_runner import ChunkingMoERunner
from zexpert.runner.default_moe_runner import DefaultMoERunner
from zexpert.runner.expert_parallel_moe_runner import ExpertParallelMoERunner
from zexpert.runner.moe_runner import MoERunner
from zexpert.runner.tensor_parallel_moe_runner import TensorParallelMoERunner

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh


def create_moe_runner(
    router: BaseRouter,
    experts: MoEExperts,
    shared_experts: nn.Module | None = None,
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    chunk_size: int | None = None,
    expert_parallel_group: dist.ProcessGroup | DeviceMesh | None = None,
    logical_to_physical_map: Tensor | None = None,
    tensor_parallel_group: dist.ProcessGroup | DeviceMesh | None = None,
    device: torch.device | str | None = None,
) -> MoERunner:
    """Makes the runner for a layer's arguments, and places the layer's experts. See FusedMoE.

    Raises:
        ValueError: if an argument is out of range or contradicts another.
    """
    if logical_to_physical_map is not None and expert_parallel_group is None:
        raise ValueError("logical_to_physical_map needs an expert_parallel_group, got None")
    if tensor_parallel_group is not None and expert_parallel_group is not None:
        raise ValueError("tensor_parallel_group must be None with an expert_parallel_group")
    if tensor_parallel_group is not None and chunk_size is not None:
        raise ValueError(f"chunk_size must be None with a tensor_parallel_group, got {chunk_size}")
    runner: MoERunner
    if expert_parallel_group is not None:
        num_physical = num_experts
        if logical_to_physical_map is not None:
            num_physical = set_physical_experts(router, logical_to_physical_map, device)
        runner = ExpertParallelMoERunner(
            router,
            experts,
            shared_experts,
            num_experts=num_physical,
            group=expert_parallel_group,
            chunk_size=chunk_size,
        )
    elif tensor_parallel_group is not None:
        runner = TensorParallelMoERunner(
            router, experts, shared_experts, intermediate_size=intermediate_size, group=tensor_parallel_group
        )
    elif chunk_size is not None:
        runner = ChunkingMoERunner(router, experts, shared_experts, chunk_size=chunk_size)
    else:
        runner = DefaultMoERunner(router, experts, shared_experts)
    runner.placement.place(num_experts, hidden_size, intermediate_size)
    return runner


def set_physical_experts(router: BaseRouter, logical_to_physical_map: Tensor, device: torch.device | str | None) -> int:
    """Gives the router the map and a load record on `device`, and returns E, the number of physical experts.

    Raises:
        ValueError: if the map is not as BaseRouter.set_expert_map describes it, does not name every physical expert
            from 0 on once, or would have no values.
    """
    check_tensor("logical_to_physical_map", logical_to_physical_map)
    logical_to_physical_map = logical_to_physical_map.to(device)
    if logical_to_physical_map.is_meta:
        raise ValueError('logical_to_physical_map needs a device that holds its values, got "meta"')
    router.set_expert_map(logical_to_physical_map)
    named = logical_to_physical_map[logical_to_physical_map >= 0].sort().values
    num_physical = named.numel()
    if named.tolist() != list(range(num_physical)):
        router.set_expert_map(None)
        raise ValueError(
            "logical_to_physical_map must name every physical expert from 0 on exactly once, "
            f"got {num_physical} entries between {int(named[0])} and {int(named[-1])}"
        )
    router.set_expert_map(
        logical_to_physical_map, torch.zeros(num_physical, dtype=torch.int64, device=logical_to_physical_map.device)
    )
    return num_physical
