# SPDX-License-Identifier: Apache-2.0
"""A slice of every expert on each rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import DispatchPlan, RoutingResult
from zexpert.router.fused_moe_router import FusedMoERouter
from zexpert.runner.collectives import Works, all_reduce, replicated, wait
from zexpert.runner.expert_group import ExpertGroup
from zexpert.runner.sharded_moe_runner import ShardedMoERunner

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class TensorParallelMoERunner(ShardedMoERunner):
    """Every rank has all tokens, the same on each, and F / P rows of every expert's gate and up and columns of its
    down. The experts' weighted sums are parts of the output; an all-reduce in the dtype of hidden_states adds them up.
    The epilogue after it adds the zero part, constants and shared experts, once, on every rank alike.

    Gradients, too, are the same on every rank but for the slices' own, given the same gradient of the output. Shared
    experts are whole on every rank and run during the all-reduce. torch.compile leaves this runner to eager mode and
    torch.jit.script refuses it.

    Args:
        intermediate_size: F, of whole experts.
        group: the ranks: a torch.distributed.ProcessGroup, or a DeviceMesh of one dimension.
        The others are MoERunner's.

    Raises:
        ValueError: if F is no multiple of the ranks, or the group is none that this process is in.
        RuntimeError: from forward, if another rank failed or did not come in time.
    """

    def __init__(
        self,
        router: FusedMoERouter,
        experts: MoEExperts,
        shared_experts: nn.Module | None = None,
        *,
        intermediate_size: int,
        group: dist.ProcessGroup | DeviceMesh,
    ) -> None:
        super().__init__(router, experts, shared_experts)
        self.group = ExpertGroup("tensor_parallel_group", group)
        if intermediate_size % self.group.size != 0:
            raise ValueError(
                f"intermediate_size must be a multiple of the ranks of tensor_parallel_group ({self.group.size}), "
                f"got {intermediate_size}"
            )
        self.local_intermediate_size = intermediate_size // self.group.size

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        w13_weight: Tensor,
        w2_weight: Tensor,
        constant_gate_weight: Tensor | None = None,
        constant_vectors: Tensor | None = None,
    ) -> Tensor:
        routing = self._route(hidden_states, router_logits, w13_weight)
        routing = self._mix_constants(hidden_states, routing, constant_gate_weight, constant_vectors)
        plan = DispatchPlan(*torch.ops.zexpert.moe_plan(routing.topk_ids, w13_weight.size(0)))
        if self.routing_stats is not None:
            self.routing_stats(routing.topk_ids, plan.expert_offsets)

        tokens, weights = replicated(self.group, hidden_states, routing.topk_weights)
        num_tokens = tokens.size(0)
        experts_only = RoutingResult(
            weights, routing.topk_ids, weights.new_zeros(num_tokens), weights.new_zeros(num_tokens, 0)
        )
        part = self._experts_and_epilogue(tokens, experts_only, plan, w13_weight, w2_weight, None, None)
        works: Works = []
        summed = all_reduce(self.group, works, part)
        residual = self._shared_experts_output(hidden_states)
        wait(self.group, works)
        slot_rows = torch.arange(num_tokens, dtype=torch.int32, device=tokens.device).unsqueeze(1)
        ones = torch.ones_like(slot_rows, dtype=weights.dtype)
        return self._finalize(summed, slot_rows, ones, hidden_states, routing, residual, constant_vectors)

    def own_experts(self) -> Tensor:
        return torch.arange(int(self.router.num_real_experts))  # type: ignore[arg-type]

    def own_slice(self, name: str, experts: Tensor) -> Tensor:
        begin = self.group.rank * self.local_intermediate_size
        if name == "w2_weight":
            return experts.narrow(-1, begin, self.local_intermediate_size)
        gate_up = experts.unflatten(-2, (2, -1)).narrow(-2, begin, self.local_intermediate_size)
        own: Tensor = gate_up.flatten(-3, -2)
        return own

    def saved_shape(self, name: str, shard: Tensor) -> list[int]:
        num_experts, _, last = shard.shape
        if name == "w2_weight":
            return [num_experts, shard.size(1), last * self.group.size]
        return [num_experts, 2, self.local_intermediate_size * self.group.size, last]

    def sharded(self, name: str, shard: Tensor) -> DTensor:
        """w2_weight as [R, H, F], w13_weight as [R, 2, F, H], gate and up: what is cut is whole in these."""
        if name == "w2_weight":
            return self.group.as_sharded(shard, dim=2)
        return self.group.as_sharded(shard.unflatten(1, (2, -1)), dim=2)

    def extra_repr(self) -> str:
        return f"{self.group}, intermediate size {self.local_intermediate_size} here"
