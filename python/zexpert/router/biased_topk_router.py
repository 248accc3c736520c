# SPDX-License-Identifier: Apache-2.0
"""What routers that choose by biased_topk have in common."""

import torch
from torch import Tensor

from zexpert._C import RoutingSpec
from zexpert.ops.moe_plan import moe_plan
from zexpert.ops.types import DispatchPlan, RoutingResult
from zexpert.router.base_router import BaseRouter


class BiasedTopKRouter(BaseRouter):
    """A router whose choice is biased_topk's, so that one operator makes it and the plan of its slots.

    Args:
        See BaseRouter.
    """

    def __init__(
        self,
        spec: RoutingSpec,
        *,
        e_score_correction_bias: Tensor | None = None,
        indices_dtype: torch.dtype = torch.int32,
    ) -> None:
        super().__init__(spec, e_score_correction_bias=e_score_correction_bias, indices_dtype=indices_dtype)
        self._is_biased_topk = self._chooses_by_biased_topk()  # what a script knows

    def select_experts_and_plan(
        self, hidden_states: Tensor, router_logits: Tensor, num_experts: int
    ) -> tuple[RoutingResult, DispatchPlan]:
        """See BaseRouter.select_experts_and_plan."""
        self._check_num_experts(num_experts)
        is_biased_topk = self._is_biased_topk
        if not torch.jit.is_scripting():
            is_biased_topk = self._chooses_by_biased_topk()
        has_map = self.logical_to_physical_map is not None
        if not is_biased_topk or has_map or num_experts != self.num_real_experts:
            routing = self.select_experts(hidden_states, router_logits)
            return routing, moe_plan(routing.topk_ids, num_experts)
        self._check_inputs(hidden_states, router_logits)
        topk_weights, topk_ids, zero_weight, constant_weight, expert_offsets, row_slots, slot_rows = (
            torch.ops.zexpert.biased_topk_and_plan(
                router_logits,
                self.e_score_correction_bias,
                self.top_k,
                num_real_experts=self.num_real_experts,
                num_identity_experts=self.num_identity_experts,
                num_constant_experts=self.num_constant_experts,
                scoring_func=self.scoring_func,
                renormalize=self.renormalize,
                drop_before_renormalize=self.drop_before_renormalize,
                routed_scaling_factor=self.routed_scaling_factor,
                num_expert_group=self.num_expert_group,
                topk_group=self.topk_group,
                indices_dtype=self._operator_indices_dtype(),
            )
        )
        if topk_ids.dtype != self.indices_dtype:
            topk_ids = topk_ids.to(self.indices_dtype)
        routing = RoutingResult(topk_weights, topk_ids, zero_weight, constant_weight)
        self._observe(hidden_states, routing)
        return routing, DispatchPlan(expert_offsets, row_slots, slot_rows)

    @torch.jit.unused
    def _chooses_by_biased_topk(self) -> bool:
        """Not where a subclass, or somebody for this router alone, gave it another way to choose."""
        of_class, own = type(self), self.__dict__
        return (
            of_class.select_experts is BaseRouter.select_experts
            and of_class._compute_routing is BiasedTopKRouter._compute_routing
            and "select_experts" not in own
            and "_compute_routing" not in own
        )

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        topk_weights, topk_ids, zero_weight, constant_weight = torch.ops.zexpert.biased_topk(
            router_logits,
            self.e_score_correction_bias,
            self.top_k,
            num_real_experts=self.num_real_experts,
            num_identity_experts=self.num_identity_experts,
            num_constant_experts=self.num_constant_experts,
            scoring_func=self.scoring_func,
            renormalize=self.renormalize,
            drop_before_renormalize=self.drop_before_renormalize,
            routed_scaling_factor=self.routed_scaling_factor,
            num_expert_group=self.num_expert_group,
            topk_group=self.topk_group,
            indices_dtype=self._operator_indices_dtype(),
        )
        return RoutingResult(topk_weights, topk_ids, zero_weight, constant_weight)

    def _operator_indices_dtype(self) -> torch.dtype | None:
        """What the operators are asked for; None: int32."""
        if self.indices_dtype == torch.int32:
            return None
        if not torch.jit.is_scripting():
            # Before PyTorch 2.12, AOTInductor hands over a dtype as another one: exported programs convert the indices.
            if torch.compiler.is_exporting():
                return None
        return self.indices_dtype
