# SPDX-License-Identifier: Apache-2.0
"""The interface of every experts backend."""

from torch import Tensor, nn

from zexpert.ops.types import DispatchPlan, RoutingResult


class MoEExperts(nn.Module):
    """Runs the chosen experts' feed-forward networks over the tokens that chose them.

    A backend holds no weights: the layer owns them. It is scriptable and traces without a break.

    Attributes:
        name: what forces this backend, as in FusedMoE(experts_backend=name).
        reduces: whether forward sums the rows of each token. False: it returns [T * K, H], one row per slot that does
            work, in the plan's order, and moe_finalize sums them while it adds everything else. True: it returns the
            weighted sum [T, H], and the runner adds the rest to that.
    """

    def __init__(self, name: str, reduces: bool) -> None:
        super().__init__()
        self.name = name
        self.reduces = reduces

    def reduces_for(self, hidden_states: Tensor, w2_weight: Tensor) -> bool:
        """`reduces` for these tokens and weights; a backend that chooses among others answers for the chosen one."""
        return self.reduces

    def fuses_epilogue_for(self, hidden_states: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> bool:
        """Whether torch.ops.zexpert.fused_moe is to take these tokens through the experts and the epilogue, in the
        place of forward."""
        return False

    def backend_for(self, hidden_states: Tensor, w2_weight: Tensor) -> str:
        """Name of the backend that computes these tokens with these weights."""
        return self.name

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, w13_weight: Tensor, w2_weight: Tensor
    ) -> Tensor:
        """FFN_e(x) = (silu(x @ gate_e.T) * (x @ up_e.T)) @ down_e.T for the tokens x of every expert e.

        Args:
            hidden_states: [T, H].
            routing: the tokens' experts, as indices into the weights, and weights in float32 (float64 for float64
                hidden_states).
            plan: moe_plan of routing.topk_ids.
            w13_weight: [R, 2F, H], gate rows first; dtype of hidden_states.
            w2_weight: [R, H, F]; dtype of hidden_states.

        Returns:
            [T * K, H] or [T, H], see `reduces`; dtype of hidden_states.
        """
        raise NotImplementedError
