# SPDX-License-Identifier: Apache-2.0
"""The interface of every experts backend."""

from torch import Tensor, nn

from zexpert.ops.types import DispatchPlan, ExpertWeights, RoutingResult


class MoEExperts(nn.Module):
    """Runs the feed-forward networks of the chosen experts over the tokens that chose them.

    A backend has no weights: the layer passes them. It must script and trace without a break. Derive from this class
    for a backend of your own; FusedExperts is zexpert's.

    Attributes:
        name: what forces this backend, as in FusedMoE(experts_backend=name).
        reduces: what forward returns. False: one row per slot that does work, [T * K, H], in the plan's order;
            moe_finalize sums them and adds everything else. True: the weighted sum of each token's rows, [T, H]; the
            runner adds everything else.
        fuses_epilogue: True if the runner must call with_epilogue instead of forward.
    """

    def __init__(self, name: str, reduces: bool = False) -> None:
        super().__init__()
        self.name = name
        self.reduces = reduces
        self.fuses_epilogue = False

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, weights: ExpertWeights
    ) -> Tensor:
        """FFN_e(x) = (silu(x @ gate_e.T) * (x @ up_e.T)) @ down_e.T for the tokens x of every expert e.

        Args:
            hidden_states: [T, H].
            routing: the tokens' experts, as indices into the weights, and weights in float32 (float64 for float64
                hidden_states).
            plan: moe_plan of routing.topk_ids. row_slots may end after the last row that does work.
            weights: of the dtype of hidden_states.

        Returns:
            [T * K, H] (or as many rows as row_slots has) or [T, H], see `reduces`; dtype of hidden_states.
        """
        raise NotImplementedError

    def with_epilogue(
        self,
        hidden_states: Tensor,
        routing: RoutingResult,
        plan: DispatchPlan,
        weights: ExpertWeights,
        residual: Tensor | None,
        keep_gate_up: bool,
    ) -> Tensor:
        """The layer's output [T, H]: the experts' weighted sums, the zero part, the constants and `residual`.

        Args:
            residual: [T, H] to add, or None.
            keep_gate_up: keep the experts' gate and up for the backward, which computes them again otherwise.
        """
        raise NotImplementedError

    def backend_for(self, hidden_states: Tensor, w2_weight: Tensor) -> str:
        """Name of the backend that computes these tokens with these weights."""
        return self.name
