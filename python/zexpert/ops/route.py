# SPDX-License-Identifier: Apache-2.0
"""The router's projection, the choice of experts and the order of its slots, together."""

from typing import Any

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, register_autograd
from zexpert.ops._library import check_devices, register_fake
from zexpert.ops.biased_topk import biased_topk_fake, check_indices_dtype, logits_gradient
from zexpert.ops.moe_plan import moe_plan_fake
from zexpert.ops.router_logits import projection_gradients, router_logits_fake
from zexpert.ops.types import DispatchPlan, RoutingResult


def route(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    num_real_experts: int,
    num_identity_experts: int | None = None,
    num_constant_experts: int = 0,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    drop_before_renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
    indices_dtype: torch.dtype = torch.int32,
) -> tuple[RoutingResult, DispatchPlan]:
    """biased_topk_and_plan of router_logits(hidden_states, weight): the same results bit for bit.

    A token with NaN or infinite hidden states chooses nothing, and changes no other token's choice.

    Args:
        hidden_states: [T, H], any floating dtype (on CUDA not float64), any strides.
        weight: [N, H], the router's weight, as in router_logits.
        bias: [N], any floating dtype, or None; e_score_correction_bias.
        top_k and the others: as in biased_topk.

    Returns:
        RoutingResult: topk_weights [T, K], topk_ids [T, K], zero_weight [T], constant_weight [T, C].
        DispatchPlan: expert_offsets [R + 1], row_slots [T * K], slot_rows [T, K], all int32.

    Raises:
        RuntimeError: an argument has a wrong device, dtype, shape or value.

    Gradients flow to hidden_states and weight, through topk_weights, zero_weight and constant_weight.
    ``torch.ops.zexpert.route`` returns the logits too, before the other results, and differentiates them.
    """
    check_indices_dtype(indices_dtype)
    _, topk_weights, topk_ids, zero_weight, constant_weight, expert_offsets, row_slots, slot_rows = (
        torch.ops.zexpert.route(
            hidden_states,
            weight,
            bias,
            top_k,
            num_real_experts=num_real_experts,
            num_identity_experts=num_identity_experts,
            num_constant_experts=num_constant_experts,
            scoring_func=scoring_func,
            renormalize=renormalize,
            drop_before_renormalize=drop_before_renormalize,
            routed_scaling_factor=routed_scaling_factor,
            num_expert_group=num_expert_group,
            topk_group=topk_group,
            indices_dtype=indices_dtype,
        )
    )
    return (
        RoutingResult(topk_weights, topk_ids, zero_weight, constant_weight),
        DispatchPlan(expert_offsets, row_slots, slot_rows),
    )


@register_fake("route")
def _route_fake(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any, num_real_experts: int, **keywords: Any
) -> tuple[Tensor, ...]:
    check_devices("hidden_states", hidden_states, bias=bias)
    logits = router_logits_fake(hidden_states, weight)
    routing = biased_topk_fake(logits, bias, *arguments, num_real_experts=num_real_experts, **keywords)
    return logits, *routing, *moe_plan_fake(routing[1], num_real_experts)


def _setup_context(
    ctx: Context, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    hidden_states, weight, bias, ctx.top_k = inputs
    # The backward chooses again, and by then a controller may have written to the bias.
    ctx.save_for_backward(hidden_states, weight, None if bias is None else bias.clone(), output[0])
    ctx.keywords = {name: value for name, value in keyword_only_inputs.items() if name != "indices_dtype"}


def _backward(
    ctx: Context,
    grad_logits: Tensor | None,
    grad_topk_weights: Tensor | None,
    _grad_topk_ids: None,
    grad_zero_weight: Tensor | None,
    grad_constant_weight: Tensor | None,
    *_grad_plan: None,
) -> tuple[Tensor | None, Tensor | None, None, None]:
    hidden_states, weight, bias, logits = ctx.saved_tensors
    gradients = (grad_topk_weights, grad_zero_weight, grad_constant_weight)
    if any(gradient is not None for gradient in gradients):
        through_choice = logits_gradient(gradients, logits, bias, None, ctx.top_k, ctx.keywords)
        grad_logits = through_choice if grad_logits is None else grad_logits + through_choice
    if grad_logits is None:
        return None, None, None, None
    return *projection_gradients(grad_logits, hidden_states, weight, ctx.needs_input_grad), None, None


register_autograd("route", _setup_context, _backward)
