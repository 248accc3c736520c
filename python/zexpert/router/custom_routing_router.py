# SPDX-License-Identifier: Apache-2.0
"""Routing by a user's function."""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from zexpert._C import RoutingSpec, ScoringFunc
from zexpert.ops.types import RoutingResult
from zexpert.router.base_router import BaseRouter
from zexpert.router.routing_method_type import RoutingMethodType

#: Called with the keywords hidden_states [T, H], gating_output [T, N], topk and renormalize; returns topk_weights
#: [T, K] and topk_ids [T, K].
CustomRoutingFunction = Callable[..., tuple[Tensor, Tensor]]


class CustomRoutingRouter(BaseRouter):
    """Leaves the choice to `custom_routing_function`. Its signature is vLLM's:

        custom_routing_function(hidden_states=..., gating_output=..., topk=..., renormalize=...)
            -> (topk_weights, topk_ids)

    The ids are experts in [0, num_real_experts), or -1 for a slot that does no work. The weights are multiplied by
    routed_scaling_factor and given in float32 (float64 for float64 logits). torch.compile traces the function like
    any code; torch.jit.script cannot compile this router.

    Args:
        top_k: experts per token.
        num_real_experts: experts.
        custom_routing_function: see above.
        renormalize: passed to the function.
        scoring_func, e_score_correction_bias: kept for the function to read from the router; not used here.
        routed_scaling_factor: factor on every weight.
        indices_dtype: torch.int32 or torch.int64.

    Raises:
        ValueError: if an argument is out of range or custom_routing_function is not callable; from select_experts, if
            the function returns anything but a floating and an integer tensor of shape [T, top_k].
    """

    routing_method_type = RoutingMethodType.CUSTOM

    def __init__(
        self,
        top_k: int,
        num_real_experts: int,
        custom_routing_function: CustomRoutingFunction,
        *,
        e_score_correction_bias: Tensor | None = None,
        scoring_func: str | ScoringFunc = "softmax",
        renormalize: bool = False,
        routed_scaling_factor: float = 1.0,
        indices_dtype: torch.dtype = torch.int32,
    ) -> None:
        if not callable(custom_routing_function):
            raise ValueError(f"custom_routing_function must be callable, got {type(custom_routing_function).__name__}")
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
        self.custom_routing_function = custom_routing_function

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        choice = self.custom_routing_function(
            hidden_states=hidden_states,
            gating_output=router_logits,
            topk=self.top_k,
            renormalize=self.renormalize,
        )
        if not isinstance(choice, tuple | list) or [isinstance(part, Tensor) for part in choice] != [True, True]:
            given = type(choice).__name__
            raise ValueError(f"custom_routing_function must return the tensors topk_weights and topk_ids, got {given}")
        topk_weights, topk_ids = choice
        num_tokens = router_logits.size(0)
        if topk_weights.shape != (num_tokens, self.top_k) or not topk_weights.is_floating_point():
            raise ValueError(
                f"custom_routing_function must return floating-point topk_weights of shape "
                f"[{num_tokens}, {self.top_k}], got {list(topk_weights.shape)} of {topk_weights.dtype}"
            )
        if topk_ids.shape != topk_weights.shape or topk_ids.is_floating_point() or topk_ids.dtype == torch.bool:
            raise ValueError(
                f"custom_routing_function must return integer topk_ids of shape [{num_tokens}, {self.top_k}], "
                f"got {list(topk_ids.shape)} of {topk_ids.dtype}"
            )
        dtype = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
        return RoutingResult(
            topk_weights.to(dtype) * self.routed_scaling_factor,
            topk_ids,
            torch.zeros(num_tokens, dtype=dtype, device=router_logits.device),
            torch.zeros(num_tokens, 0, dtype=dtype, device=router_logits.device),
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("CustomRoutingRouter cannot be scripted: custom_routing_function is a Python function")
