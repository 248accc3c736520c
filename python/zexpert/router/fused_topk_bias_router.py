# SPDX-License-Identifier: Apache-2.0
"""Top-k with a selection bias."""

import torch
from torch import Tensor

from zexpert._C import RoutingSpec, ScoringFunc
from zexpert.router.biased_topk_router import BiasedTopKRouter
from zexpert.router.routing_method_type import RoutingMethodType


class FusedTopKBiasRouter(BiasedTopKRouter):
    """Chooses the experts of the largest score + bias; the weights are the scores, without the bias.
    The bias balances load without a loss term (arXiv 2408.15664). There are no zero experts.

    Args:
        top_k: experts per token.
        num_real_experts: experts.
        e_score_correction_bias: [N], by reference.
        scoring_func, renormalize, routed_scaling_factor: as in zexpert.ops.biased_topk.
        indices_dtype: torch.int32 or torch.int64.

    Raises:
        ValueError: if an argument is out of range or the bias is missing or of another length.
    """

    routing_method_type = RoutingMethodType.TOPK_BIAS

    def __init__(
        self,
        top_k: int,
        num_real_experts: int,
        e_score_correction_bias: Tensor,
        *,
        scoring_func: str | ScoringFunc = "softmax",
        renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        indices_dtype: torch.dtype = torch.int32,
    ) -> None:
        if e_score_correction_bias is None:
            raise ValueError("e_score_correction_bias must be a tensor, got None")
        spec = RoutingSpec(
            top_k=top_k,
            num_real_experts=num_real_experts,
            num_logits=num_real_experts,
            num_identity_experts=0,
            scoring_func=scoring_func,
            renormalize=renormalize,
            routed_scaling_factor=routed_scaling_factor,
        )
        super().__init__(spec, e_score_correction_bias=e_score_correction_bias, indices_dtype=indices_dtype)
