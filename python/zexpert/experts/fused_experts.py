# SPDX-License-Identifier: Apache-2.0
"""zexpert's experts."""

import torch
from torch import Tensor

from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import DispatchPlan, ExpertWeights, RoutingResult


class FusedExperts(MoEExperts):
    """Experts and epilogue by the operator fused_moe, differentiable in hidden states, weights and routing weights.

    A subclass that replaces `forward` gives the rows; moe_finalize then is the epilogue.

    Args:
        name: the operator's implementation. "auto" chooses by device, GPU, dtype and shape. "cpu", "hopper",
            "grouped_mm" and "torch" force one; the operator raises RuntimeError for what it cannot compute.
    """

    def __init__(self, name: str = "auto") -> None:
        super().__init__(name)
        self.fuses_epilogue = type(self).forward is FusedExperts.forward

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, weights: ExpertWeights
    ) -> Tensor:
        """[T * K, H], or as many rows as plan.row_slots has; rows past the last offset are unspecified."""
        top_k = routing.topk_ids.size(1)
        row_slots: Tensor | None = plan.row_slots
        if hidden_states.is_cuda and weights.w13_scale_inv is None:
            # Every implementation there permutes the tokens. With slot_rows that reads a token once, not once per row.
            # Quantised weights have their tokens quantised in the same pass.
            hidden_states = torch.ops.zexpert.moe_permute(
                hidden_states, plan.row_slots, plan.expert_offsets, top_k, plan.slot_rows
            )
            row_slots, top_k = None, 1
        rows: Tensor = torch.ops.zexpert.grouped_mlp(
            hidden_states,
            plan.expert_offsets,
            weights.w13,
            weights.w2,
            row_slots,
            top_k,
            weights.w13_scale_inv,
            weights.w2_scale_inv,
            implementation=self.name,
        )
        return rows

    def with_epilogue(
        self,
        hidden_states: Tensor,
        routing: RoutingResult,
        plan: DispatchPlan,
        weights: ExpertWeights,
        residual: Tensor | None,
        keep_gate_up: bool,
    ) -> Tensor:
        """See MoEExperts.with_epilogue."""
        constants = weights.constants
        out: Tensor = torch.ops.zexpert.fused_moe(
            hidden_states,
            routing.topk_weights,
            routing.zero_weight,
            plan.expert_offsets,
            plan.row_slots,
            plan.slot_rows,
            weights.w13,
            weights.w2,
            residual,
            None if constants is None else routing.constant_weight,
            None if constants is None else constants.vectors,
            weights.w13_scale_inv,
            weights.w2_scale_inv,
            keep_gate_up=keep_gate_up,
            implementation=self.name,
        )[0]
        return out

    def backend_for(self, hidden_states: Tensor, w2_weight: Tensor) -> str:
        """See MoEExperts.backend_for."""
        if self.name != "auto":
            return self.name
        if not hidden_states.is_cuda:
            return "cpu"
        from zexpert._info import kernel_plan  # not above: that module needs the libraries to be loaded

        num_experts, hidden_size, intermediate_size = w2_weight.shape
        plan = kernel_plan(
            "fused_moe",
            device="cuda",
            dtype=hidden_states.dtype,
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            weight_dtype=w2_weight.dtype if w2_weight.element_size() == 1 else None,
            keep_gate_up=torch.is_grad_enabled() and (hidden_states.requires_grad or w2_weight.requires_grad),
        )
        return plan.implementation
