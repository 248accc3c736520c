# SPDX-License-Identifier: Apache-2.0
"""Experts on torch's grouped matrix product."""

import torch
from torch import Tensor

from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import DispatchPlan, RoutingResult


class GroupedMMExperts(MoEExperts):
    """Gathers the tokens into one segment of rows per expert and multiplies all segments by their experts' weights at
    once, with torch's grouped_mm. Slots of zero experts are in no segment. On GPUs of compute capability 9 and 10
    nothing waits for the host, so a CUDA graph captures it; for others torch multiplies segment by segment.
    Differentiable in hidden_states, the weights and topk_weights.

    Takes bfloat16, with hidden and intermediate sizes that are multiples of 8, as torch's grouped_mm asks.
    """

    def __init__(self) -> None:
        super().__init__("grouped_mm", reduces=False)

    def supports(self, hidden_states: Tensor, w2_weight: Tensor) -> bool:
        """Whether torch's grouped_mm takes these tokens and weights."""
        return hidden_states.dtype == torch.bfloat16 and w2_weight.size(1) % 8 == 0 and w2_weight.size(2) % 8 == 0

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, w13_weight: Tensor, w2_weight: Tensor
    ) -> Tensor:
        """[T * K, H] in the plan's order; rows past the last offset are unspecified."""
        if not self.supports(hidden_states, w2_weight):
            raise ValueError(
                f"hidden_states must be bfloat16, of a hidden and an intermediate size that are multiples of 8, for "
                f'experts_backend "grouped_mm", got {hidden_states.dtype}, {w2_weight.size(1)} and {w2_weight.size(2)}'
            )
        top_k = routing.topk_ids.size(1)
        rows = torch.ops.zexpert.moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, top_k, plan.slot_rows)
        segment_ends = plan.expert_offsets[1:]
        gate_up = torch._grouped_mm(rows, w13_weight.transpose(1, 2), segment_ends)
        activation = torch.ops.zexpert.silu_and_mul(gate_up, plan.expert_offsets)
        return torch._grouped_mm(activation, w2_weight.transpose(1, 2), segment_ends)
