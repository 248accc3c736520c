# SPDX-License-Identifier: Apache-2.0
"""The base of routers that choose by the operator biased_topk."""

from collections.abc import Callable
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

    __jit_ignored_attributes__ = ["_capture_fn", "_choice_taps", "_keywords", "spec"]  # noqa: RUF012

    def __init__(self, spec: RoutingSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        self._keywords = self.arguments.keywords()
        # Called with this router, the logits and the choices so far; see zexpert.choices.
        self._choice_taps: tuple[Callable[[Any, Tensor, Tensor | None], Tensor | None], ...] = ()
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
            choices = self._tapped_choices(router_logits)
            if indices_dtype is None and choices is None:
                return self._choose_and_plan_with_few_keywords(router_logits, bias)
            return choose_experts_and_plan(router_logits, bias, self.arguments, indices_dtype, choices)
        return choose_experts_and_plan(router_logits, bias, self.arguments, indices_dtype)

    @torch.jit.unused
    def _choose_and_plan_with_few_keywords(
        self, router_logits: Tensor, bias: Tensor | None
    ) -> tuple[RoutingResult, DispatchPlan]:
        results = torch.ops.zexpert.biased_topk_and_plan(router_logits, bias, self.top_k, **self._keywords)
        return RoutingResult(*results[:4]), DispatchPlan(*results[4:])

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        bias, indices_dtype = self.e_score_correction_bias, self._operator_indices_dtype()
        if not torch.jit.is_scripting():
            choices = self._tapped_choices(router_logits)
            return choose_experts(router_logits, bias, self.arguments, indices_dtype, choices)
        return choose_experts(router_logits, bias, self.arguments, indices_dtype)

    @torch.jit.unused
    def _tapped_choices(self, router_logits: Tensor) -> Tensor | None:
        """The choices that replay_choices gives or record_choices sees; None outside of them."""
        choices: Tensor | None = None
        for tap in self._choice_taps:
            choices = tap(self, router_logits, choices)
        return choices

    def _operator_indices_dtype(self) -> torch.dtype | None:
        """The indices_dtype to pass to the operators; None for int32."""
        if self.indices_dtype == torch.int32:
            return None
        if not torch.jit.is_scripting():
            # Before PyTorch 2.12, AOTInductor replaces a dtype by another one: exported programs convert the ids.
            if torch.compiler.is_exporting():
                return None
        return self.indices_dtype

    def __prepare_scriptable__(self) -> "BiasedTopKRouter":
        if len(self._choice_taps) > 0:
            raise RuntimeError("a router cannot be scripted inside record_choices or replay_choices")
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a saved router is not recorded.
        return {**self.__dict__, "_choice_taps": ()}
