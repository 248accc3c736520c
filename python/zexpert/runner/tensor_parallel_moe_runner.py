# SPDX-License-Identifier: Apache-2.0
"""A slice of every expert on each rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import ExpertWeights, RoutingResult
from zexpert.router.fused_moe_router import FusedMoERouter
from zexpert.runner.collectives import Collectives, Works, wait
from zexpert.runner.expert_group import ExpertGroup
from zexpert.runner.placement import TensorParallelPlacement
from zexpert.runner.sharded_moe_runner import ShardedMoERunner

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class TensorParallelMoERunner(ShardedMoERunner):
    """Every rank has all tokens, the same on each, and F / P rows of every expert's gate and up and columns of its
    down. The experts' weighted sums are parts of the output; an all-reduce in the dtype of hidden_states adds them up.
    The epilogue after it adds the zero part, constants and shared experts, once, on every rank alike.

    Gradients are the same on every rank, given the same gradient of the output, except those of the slices. In grad
    mode the output requires gradients on every rank, so that all ranks run the same backward. Shared experts are whole
    on every rank and run during the all-reduce. torch.compile runs this runner eagerly and torch.jit.script refuses it.

    Args:
        intermediate_size: F, of whole experts.
        group: the ranks: a torch.distributed.ProcessGroup, or a DeviceMesh of one dimension.
        The others are MoERunner's.

    Raises:
        ValueError: if F is not a multiple of the ranks, or this process is not in the group; from the first forward, if
            ranks disagree on dtype, sizes, number of tokens, routing or grad mode; on the CPU from every forward, if
            they disagree on the number of tokens.
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
        self.placement = TensorParallelPlacement(self.group, self.local_intermediate_size)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, router_logits: Tensor, weights: ExpertWeights) -> Tensor:
        routing, plan = self._route_and_plan(hidden_states, router_logits, weights)
        routing = self._mix_constants(hidden_states, routing, weights.constants)
        num_tokens = hidden_states.size(0)
        self._require_agreement(
            hidden_states,
            router_logits,
            routing,
            num_tokens=num_tokens,
            num_experts=weights.w13.size(0),
            intermediate_size=self.group.size * weights.w2.size(2),
        )
        if hidden_states.device.type == "cpu":
            # Gloo would end the process for different sizes, and the host waits for it anyway. A GPU must not wait.
            bounds = torch.tensor([num_tokens, -num_tokens])
            with self.group.exchanging():
                dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.group.process_group)
            if int(bounds.sum()) != 0:
                self.group.require_agreement(num_tokens=num_tokens)

        works: Works = []
        collectives = Collectives(self.group, hidden_states.device)
        tokens, topk_weights = collectives.replicate(works, hidden_states, routing.topk_weights)
        experts_only = RoutingResult(
            topk_weights, routing.topk_ids, topk_weights.new_zeros(num_tokens), topk_weights.new_zeros(num_tokens, 0)
        )
        part = self._experts_and_epilogue(tokens, experts_only, plan, weights._replace(constants=None), None)
        summed = collectives.all_reduce(works, part)
        residual = self._shared_experts_output(hidden_states)
        wait(self.group, works)
        slot_rows = torch.arange(num_tokens, dtype=torch.int32, device=tokens.device).unsqueeze(1)
        ones = torch.ones_like(slot_rows, dtype=topk_weights.dtype)
        return self._finalize(summed, slot_rows, ones, hidden_states, routing, residual, weights.constants)

    def extra_repr(self) -> str:
        return f"{self.group}, intermediate size {self.local_intermediate_size} here"
