# SPDX-License-Identifier: Apache-2.0
"""Top-k within the best groups of experts."""

import torch
from torch import Tensor

from zexpert._C import RoutingSpec, ScoringFunc
from zexpert.router.biased_topk_router import BiasedTopKRouter
from zexpert.router.routing_method_type import RoutingMethodType


class GroupedTopKRouter(BiasedTopKRouter):
    """Chooses among the experts of the best groups: a group's score is the sum of its two largest keys, and only the
    topk_group best groups are eligible. DeepSeek-V3 (arXiv 2412.19437) routes this way. There are no zero experts.

    Args:
        top_k: experts per token.
        num_real_experts: experts, in equal groups of neighbours.
        num_expert_group: number of groups; divides num_real_experts.
        topk_group: number of eligible groups per token.
        e_score_correction_bias: [N], for selection only, by reference; None for none.
        scoring_func, renormalize, routed_scaling_factor: as in zexpert.ops.biased_topk.
        indices_dtype: torch.int32 or torch.int64.

    Raises:
        ValueError: if an argument is out of range or contradicts another.
    """

    routing_method_type = RoutingMethodType.GROUPED_TOPK

    def __init__(
        self,
        top_k: int,
        num_real_experts: int,
        num_expert_group: int,
        topk_group: int,
        *,
        e_score_correction_bias: Tensor | None = None,
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
            num_expert_group=num_expert_group,
            topk_group=topk_group,
        )
        super().__init__(spec, e_score_correction_bias=e_score_correction_bias, indices_dtype=indices_dtype)
