# SPDX-License-Identifier: Apache-2.0
"""Experts as a loop of torch operators."""

import torch
from torch import Tensor
from torch.nn import functional as F

from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import DispatchPlan, RoutingResult


class TorchLoopExperts(MoEExperts):
    """Runs the experts one after another with torch's own operators: on any device, in any dtype, differentiable in
    hidden_states, the weights and topk_weights. Sums in float32 (float64 for float64), expert by expert, and rounds
    once.

    The loop reads the segments' bounds on the host, one synchronisation per call. A graph cannot hold that: under
    torch.compile and torch.jit.trace every expert runs over every token and the result is masked, the same values for
    R / K times the work.
    """

    def __init__(self) -> None:
        super().__init__("torch", reduces=True)

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, w13_weight: Tensor, w2_weight: Tensor
    ) -> Tensor:
        """[T, H]: sum_k topk_weights[t, k] * FFN_{topk_ids[t, k]}(hidden_states[t])."""
        if not torch.jit.is_scripting():
            if torch.compiler.is_compiling() or torch.jit.is_tracing():
                return self._every_expert(hidden_states, routing, w13_weight, w2_weight)

        top_k = routing.topk_ids.size(1)
        weights = routing.topk_weights.flatten()
        out = torch.zeros(hidden_states.size(), dtype=weights.dtype, device=hidden_states.device)
        bounds: list[int] = plan.expert_offsets.to(torch.int64).tolist()
        for expert in range(w13_weight.size(0)):
            begin, end = bounds[expert], bounds[expert + 1]
            if begin < end:
                slots = plan.row_slots[begin:end].to(torch.int64)
                tokens = torch.div(slots, top_k, rounding_mode="floor")
                rows = self._feed_forward(hidden_states[tokens], w13_weight[expert], w2_weight[expert])
                out.index_add_(0, tokens, rows.to(out.dtype) * weights[slots].unsqueeze(1))
        return out.to(hidden_states.dtype)

    def _every_expert(
        self, hidden_states: Tensor, routing: RoutingResult, w13_weight: Tensor, w2_weight: Tensor
    ) -> Tensor:
        out = torch.zeros(hidden_states.size(), dtype=routing.topk_weights.dtype, device=hidden_states.device)
        for expert in range(w13_weight.size(0)):
            chosen = routing.topk_ids == expert
            weight = torch.where(chosen, routing.topk_weights, 0.0).sum(dim=1, keepdim=True)
            rows = self._feed_forward(hidden_states, w13_weight[expert], w2_weight[expert])
            out = out + torch.where(chosen.any(dim=1, keepdim=True), rows.to(out.dtype) * weight, 0.0)
        return out.to(hidden_states.dtype)

    def _feed_forward(self, x: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> Tensor:
        gate, up = F.linear(x, w13_weight).chunk(2, dim=1)
        return F.linear(F.silu(gate) * up, w2_weight)
