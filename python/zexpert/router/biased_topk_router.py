# SPDX-License-Identifier: Apache-2.0
"""The base of routers that choose by the operator biased_topk."""

from typing import Any

import torch
from torch import Tensor

from zexpert._C import RoutingSpec
from zexpert.ops.biased_topk import choose_experts
from zexpert.ops.biased_topk_and_plan import choose_experts_and_plan
from zexpert.ops.moe_plan import moe_plan
from zexpert.ops.types import DispatchPlan, RoutingResult
from zexpert.router.base_router import BaseRouter


class BiasedTopKRouter(BaseRouter):
    """A router that chooses by biased_topk, so that one operator makes the choice and its plan.

    If a subclass or an instance replaces `select_experts` or `_compute_routing`, that choice is used, and moe_plan
    makes the plan.

    Args:
        See BaseRouter.
    """

    def __init__(self, spec: RoutingSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        self._keywords = self.arguments.keywords()
        own = type(self)
        self._is_biased_topk: bool = (
            own.select_experts is BaseRouter.select_experts
            and own._compute_routing is BiasedTopKRouter._compute_routing
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("select_experts", "_compute_routing"):
            self._is_biased_topk = False

    def select_experts_and_plan(
        self, hidden_states: Tensor, router_logits: Tensor, num_experts: int
    ) -> tuple[RoutingResult, DispatchPlan]:
        """See BaseRouter.select_experts_and_plan."""
        has_map = self._num_mapped_experts > 0
        if has_map or num_experts != self.num_real_experts or not self._is_biased_topk:
            self._check_num_experts(num_experts)
            routing = self.select_experts(hidden_states, router_logits)
            return routing, moe_plan(routing.topk_ids, num_experts)
        self._check_inputs(hidden_states, router_logits)
        routing, plan = self._choose_and_plan(router_logits)
        if routing.topk_ids.dtype != self.indices_dtype:
            routing = self._with_indices_dtype(routing)
        self._observe(hidden_states, routing)
        return routing, plan

    def _choose_and_plan(self, router_logits: Tensor) -> tuple[RoutingResult, DispatchPlan]:
        bias, indices_dtype = self.e_score_correction_bias, self._operator_indices_dtype()
        if not torch.jit.is_scripting():
            if indices_dtype is None:
                return self._choose_and_plan_with_few_keywords(router_logits, bias)
        return choose_experts_and_plan(router_logits, bias, self.arguments, indices_dtype)

    @torch.jit.unused
    def _choose_and_plan_with_few_keywords(
        self, router_logits: Tensor, bias: Tensor | None
    ) -> tuple[RoutingResult, DispatchPlan]:
        results = torch.ops.zexpert.biased_topk_and_plan(router_logits, bias, self.top_k, **self._keywords)
        return RoutingResult(*results[:4]), DispatchPlan(*results[4:])

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        return choose_experts(
            router_logits, self.e_score_correction_bias, self.arguments, self._operator_indices_dtype()
        )

    def _operator_indices_dtype(self) -> torch.dtype | None:
        """The indices_dtype to pass to the operators; None for int32."""
        if self.indices_dtype == torch.int32:
            return None
        if not torch.jit.is_scripting():
            # Before PyTorch 2.12, AOTInductor replaces a dtype by another one: exported programs convert the ids.
            if torch.compiler.is_exporting():
                return None
        return self.indices_dtype
