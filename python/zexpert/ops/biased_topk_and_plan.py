# SPDX-License-Identifier: Apache-2.0
"""The choice of experts and the order of its slots, together."""

from typing import Any

import torch
from torch import Tensor

from zexpert.ops._autograd import register_autograd
from zexpert.ops._library import register_fake
from zexpert.ops.biased_topk import backward, biased_topk_fake, check_indices_dtype, setup_context
from zexpert.ops.moe_plan import moe_plan_fake
from zexpert.ops.types import DispatchPlan, RoutingArguments, RoutingResult


def biased_topk_and_plan(
    logits: Tensor,
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
    choices: Tensor | None = None,
) -> tuple[RoutingResult, DispatchPlan]:
    """biased_topk, and moe_plan of its ids over the real experts: the same results bit for bit.

    Up to 256 tokens need one launch instead of two on a GPU of compute capability 9 or 10, for at most 1024 experts, 32
    choices per token and 4096 in all.

    Args:
        As in biased_topk.

    Returns:
        RoutingResult: topk_weights [T, K], topk_ids [T, K], zero_weight [T], constant_weight [T, C].
        DispatchPlan: expert_offsets [R + 1], row_slots [T * K], slot_rows [T, K], all int32.

    Raises:
        RuntimeError: an argument has a wrong device, dtype, shape or value.

    Gradients flow as those of biased_topk do.
    """
    check_indices_dtype(indices_dtype)
    arguments = RoutingArguments(
        top_k,
        num_real_experts,
        num_identity_experts,
        num_constant_experts,
        scoring_func,
        renormalize,
        drop_before_renormalize,
        routed_scaling_factor,
        num_expert_group,
        topk_group,
    )
    return choose_experts_and_plan(logits, bias, arguments, indices_dtype, choices)


def choose_experts_and_plan(
    logits: Tensor,
    bias: Tensor | None,
    arguments: RoutingArguments,
    indices_dtype: torch.dtype | None,
    choices: Tensor | None = None,
) -> tuple[RoutingResult, DispatchPlan]:
    """biased_topk_and_plan with its routing arguments in one tuple; scriptable. No indices_dtype: int32."""
    topk_weights, topk_ids, zero_weight, constant_weight, expert_offsets, row_slots, slot_rows = (
        torch.ops.zexpert.biased_topk_and_plan(
            logits,
            bias,
            arguments.top_k,
            choices,
            num_real_experts=arguments.num_real_experts,
            num_identity_experts=arguments.num_identity_experts,
            num_constant_experts=arguments.num_constant_experts,
            scoring_func=arguments.scoring_func,
            renormalize=arguments.renormalize,
            drop_before_renormalize=arguments.drop_before_renormalize,
            routed_scaling_factor=arguments.routed_scaling_factor,
            num_expert_group=arguments.num_expert_group,
            topk_group=arguments.topk_group,
            indices_dtype=indices_dtype,
        )
    )
    return (
        RoutingResult(topk_weights, topk_ids, zero_weight, constant_weight),
        DispatchPlan(expert_offsets, row_slots, slot_rows),
    )


@register_fake("biased_topk_and_plan")
def _biased_topk_and_plan_fake(*arguments: Any, num_real_experts: int, **keywords: Any) -> tuple[Tensor, ...]:
    routing = biased_topk_fake(*arguments, num_real_experts=num_real_experts, **keywords)
    return *routing, *moe_plan_fake(routing[1], num_real_experts)


register_autograd("biased_topk_and_plan", setup_context, backward)
