# SPDX-License-Identifier: Apache-2.0
"""Experts for a routing that another library computed."""

from __future__ import annotations

import torch
from torch import Tensor

from zexpert.experts.factory import create_experts
from zexpert.ops.moe_plan import moe_plan
from zexpert.ops.types import ExpertWeights, RoutingResult
from zexpert.router.fused_moe_router import FusedMoERouter
from zexpert.runner.moe_runner_base import MoERunnerBase


class GivenRoutingRunner(MoERunnerBase):
    """A runner that starts at the plan."""

    def run(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        w13_weight: Tensor,
        w2_weight: Tensor,
        w13_scale_inv: Tensor | None = None,
        w2_scale_inv: Tensor | None = None,
    ) -> Tensor:
        """[T, H], the weighted sum of each token's experts. Slots with id -1 are skipped.

        Args:
            hidden_states: [T, H], of the weights' dtype; any floating dtype with scales.
            topk_weights: [T, K], any floating dtype.
            topk_ids: [T, K], integers.
            w13_weight: [R, 2F, H], gate rows first.
            w2_weight: [R, H, F].
            w13_scale_inv, w2_scale_inv: the scales of float8 weights, see ExpertWeights.
        """
        weights = topk_weights.to(torch.float64 if hidden_states.dtype == torch.float64 else torch.float32)
        num_tokens = hidden_states.size(0)
        routing = RoutingResult(weights, topk_ids, weights.new_zeros(num_tokens), weights.new_zeros(num_tokens, 0))
        plan = moe_plan(topk_ids, w13_weight.size(0))
        return self._run(
            hidden_states, routing, plan, ExpertWeights(w13_weight, w2_weight, w13_scale_inv, w2_scale_inv)
        )


RUNNER = GivenRoutingRunner(FusedMoERouter(), create_experts())
