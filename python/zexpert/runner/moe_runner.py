# SPDX-License-Identifier: Apache-2.0
"""The interface of every runner."""

from torch import Tensor, nn

from zexpert.experts.interface import MoEExperts
from zexpert.router.fused_moe_router import FusedMoERouter


class MoERunner(nn.Module):
    """Takes tokens through a mixture of experts: routing, experts, epilogue.

    A runner owns the router, the experts backend and the shared experts; the layer owns the weights and hands them in.
    The name is vLLM's.

    Args:
        router: chooses the experts.
        experts: computes them.
        shared_experts: a module called on hidden_states [T, H] that returns [T, H], or None.

    Attributes:
        routing_stats: a zexpert.telemetry.RoutingStats that is called with every routing plan, or None.
        recompute: keep nothing of the experts for the backward, but compute them again there. Scripted and traced
            runners keep what they need. False unless set.
    """

    def __init__(self, router: FusedMoERouter, experts: MoEExperts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.routing_stats: nn.Module | None = None
        self.recompute = False

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        w13_weight: Tensor,
        w2_weight: Tensor,
        constant_gate_weight: Tensor | None = None,
        constant_vectors: Tensor | None = None,
    ) -> Tensor:
        """[T, H], the layer's output in the dtype of hidden_states:

            out[t] = sum_k topk_weights[t, k] * FFN_{topk_ids[t, k]}(x[t]) + zero_weight[t] * x[t] + constants[t]
                   + shared_experts(x)[t]

        Args:
            hidden_states: x, [T, H].
            router_logits: [T, N].
            w13_weight: [R, 2F, H], gate rows first; dtype of hidden_states.
            w2_weight: [R, H, F]; dtype of hidden_states.
            constant_gate_weight: [C, 2, H], needed with constant experts (MoE++, arXiv 2410.07348).
            constant_vectors: [C, H], needed with constant experts.
        """
        raise NotImplementedError
