# SPDX-License-Identifier: Apache-2.0
"""Experts on zexpert's own CPU kernels."""

import torch
from torch import Tensor

from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import DispatchPlan, RoutingResult


class CpuExperts(MoEExperts):
    """Runs each expert over its tokens with grouped_mlp, which gathers them.

    Where experts or tokens are to have gradients, fused_moe does it all: its backward keeps the least.
    """

    def __init__(self) -> None:
        super().__init__("cpu", reduces=False)

    def fuses_epilogue_for(self, hidden_states: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> bool:
        # A trace keeps one way for all its calls, with and without gradients.
        wants_gradients = hidden_states.requires_grad or w13_weight.requires_grad or w2_weight.requires_grad
        return wants_gradients and torch.is_grad_enabled() and not torch.jit.is_tracing()

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, w13_weight: Tensor, w2_weight: Tensor
    ) -> Tensor:
        """[T * K, H] in the plan's order; rows past the last offset are unspecified."""
        top_k = routing.topk_ids.size(1)
        if self.fuses_epilogue_for(hidden_states, w13_weight, w2_weight):
            # The backward reads gate_up instead of computing it again.
            rows = torch.ops.zexpert.moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, top_k)
            trained = torch.ops.zexpert.grouped_mlp_with_gate_up(rows, plan.expert_offsets, w13_weight, w2_weight)
            first: Tensor = trained[0]
            return first
        output: Tensor = torch.ops.zexpert.grouped_mlp(
            hidden_states, plan.expert_offsets, w13_weight, w2_weight, plan.row_slots, top_k
        )
        return output
