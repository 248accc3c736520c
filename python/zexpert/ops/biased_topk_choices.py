# SPDX-License-Identifier: Apache-2.0
"""The choice of experts alone, zero experts by their own number."""

from typing import Any

import torch
from torch import Tensor

from zexpert.ops._library import check_devices, register_fake
from zexpert.ops.types import RoutingArguments


def biased_topk_choices(
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
) -> Tensor:
    """The experts that biased_topk chooses, in slot order. biased_topk(..., choices=) gives them their weights again,
    from these logits or from others.

    Args:
        As in biased_topk. The choice depends on logits, bias, top_k, num_real_experts, scoring_func and the groups.

    Returns:
        choices: [T, K] int32, experts of all N (real, identity, constant and drop experts by their own number), -1 for
        a slot that stays empty.

    Raises:
        RuntimeError: an argument has a wrong device, dtype, shape or value.

    Integers have no gradient.
    """
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
    return choices_of(logits, bias, arguments)


def choices_of(logits: Tensor, bias: Tensor | None, arguments: RoutingArguments) -> Tensor:
    """biased_topk_choices with its routing arguments in one tuple; scriptable."""
    choices: Tensor = torch.ops.zexpert.biased_topk_choices(
        logits,
        bias,
        arguments.top_k,
        num_real_experts=arguments.num_real_experts,
        num_identity_experts=arguments.num_identity_experts,
        num_constant_experts=arguments.num_constant_experts,
        scoring_func=arguments.scoring_func,
        renormalize=arguments.renormalize,
        drop_before_renormalize=arguments.drop_before_renormalize,
        routed_scaling_factor=arguments.routed_scaling_factor,
        num_expert_group=arguments.num_expert_group,
        topk_group=arguments.topk_group,
    )
    return choices


@register_fake("biased_topk_choices")
def _biased_topk_choices_fake(logits: Tensor, bias: Tensor | None, top_k: int, **_others: Any) -> Tensor:
    check_devices("logits", logits, bias=bias)
    return logits.new_empty((logits.shape[0], top_k), dtype=torch.int32)
