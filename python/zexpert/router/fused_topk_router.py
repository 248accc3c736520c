# SPDX-License-Identifier: Apache-2.0
"""Plain top-k."""

import torch

from zexpert._C import RoutingSpec, ScoringFunc
from zexpert.router.biased_topk_router import BiasedTopKRouter
from zexpert.router.routing_method_type import RoutingMethodType


class FusedTopKRouter(BiasedTopKRouter):
    """Chooses the experts of the largest scores: no bias, no groups, no zero experts.

    Args:
        top_k: experts per token.
        num_real_experts: experts.
        scoring_func, renormalize, routed_scaling_factor: as in zexpert.ops.biased_topk.
        indices_dtype: torch.int32 or torch.int64.

    Raises:
        ValueError: if an argument is out of range.
    """

    routing_method_type = RoutingMethodType.TOPK

    def __init__(
        self,
        top_k: int,
        num_real_experts: int,
        *,
        scoring_func: str | ScoringFunc = "softmax",
        renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        indices_dtype: torch.dtype = torch.int32,
    ) -> None:
        spec = RoutingSpec(
            top_k=top_k,
            num_real_experts=num_real_experts,
            num_logits=num_real_experts,
            num_identity_experts=0,
            scoring_func=scoring_func,
            renormalize=renormalize,
            routed_scaling_factor=routed_scaling_factor,
        )
        super().__init__(spec, indices_dtype=indices_dtype)
