# SPDX-License-Identifier: Apache-2.0
"""The interface of every router."""

from torch import Tensor, nn

from zexpert.ops.moe_plan import moe_plan
from zexpert.ops.types import DispatchPlan, RoutingResult
from zexpert.router.routing_method_type import RoutingMethodType


class FusedMoERouter(nn.Module):
    """Chooses experts for tokens.

    A router is an nn.Module that torch.jit.script compiles as it is, unless its class says otherwise, and that
    torch.compile traces without a break. Subclasses implement `select_experts`; most derive from BaseRouter instead.
    The name and the shape of the interface are vLLM's.

    Attributes:
        routing_method_type: which kind of router this is.
        has_zero_experts: False where zero_weight is known to be 0 always, so that a runner may skip the zero part.
    """

    routing_method_type: RoutingMethodType

    def __init__(self) -> None:
        super().__init__()
        self.has_zero_experts = True

    def select_experts(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        """Chooses the experts of each token.

        Args:
            hidden_states: [T, H], any floating dtype.
            router_logits: [T, N], any floating dtype; a column per expert, zero experts after the real ones.

        Returns:
            topk_weights [T, K] and zero_weight [T] and constant_weight [T, C] in float32 (float64 for float64
            logits), topk_ids [T, K] with -1 for every slot that does no work.
        """
        raise NotImplementedError

    def select_experts_and_plan(
        self, hidden_states: Tensor, router_logits: Tensor, num_experts: int
    ) -> tuple[RoutingResult, DispatchPlan]:
        """select_experts, and moe_plan of its topk_ids.

        Args:
            hidden_states, router_logits: as in select_experts.
            num_experts: R, the experts that have weights.

        Returns:
            What select_experts returns; expert_offsets [R + 1], row_slots [T * K] and slot_rows [T, K], all int32.
        """
        routing = self.select_experts(hidden_states, router_logits)
        return routing, moe_plan(routing.topk_ids, num_experts)

    def forget_routing(self) -> None:
        """Drops what a router keeps of its last choice: ZeroExpertRouter.zero_expert_output. A runner calls it, because
        it adds the zero part itself."""

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        """The same as select_experts."""
        return self.select_experts(hidden_states, router_logits)
