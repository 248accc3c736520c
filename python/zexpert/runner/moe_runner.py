# SPDX-License-Identifier: Apache-2.0
"""The interface of every runner."""

from torch import Tensor, nn

from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import ExpertWeights
from zexpert.router.fused_moe_router import FusedMoERouter
from zexpert.runner.placement import WholeExperts


class MoERunner(nn.Module):
    """Runs tokens through a mixture of experts: routing, experts, epilogue.

    A runner owns the router, the experts backend and the shared experts; the layer owns the weights and passes them.
    The name is vLLM's.

    Args:
        router: chooses the experts.
        experts: computes them.
        shared_experts: a module called on hidden_states [T, H] that returns [T, H], or None.

    Attributes:
        placement: which part of a layer's experts this process holds.
        routing_stats: a zexpert.telemetry.RoutingStats, called once per call of the runner, or None.
        recompute: train in less memory: keep nothing of the experts for the backward, which computes them again. False
            unless set. Experts backends that do not fuse the epilogue keep what their derivatives need.
    """

    # What torch.jit.script leaves out of a scripted runner.
    __jit_ignored_attributes__ = ["placement"]  # noqa: RUF012

    def __init__(self, router: FusedMoERouter, experts: MoEExperts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.placement = WholeExperts()
        self.routing_stats: nn.Module | None = None
        self.recompute = False

    def forward(self, hidden_states: Tensor, router_logits: Tensor, weights: ExpertWeights) -> Tensor:
        """[T, H], the layer's output in the dtype of hidden_states:

            out[t] = sum_k topk_weights[t, k] * FFN_{topk_ids[t, k]}(x[t]) + zero_weight[t] * x[t] + constants[t]
                   + shared_experts(x)[t]

        Args:
            hidden_states: x, [T, H].
            router_logits: [T, N].
            weights: of the dtype of hidden_states; with `constants` where the router has constant experts.
        """
        raise NotImplementedError
