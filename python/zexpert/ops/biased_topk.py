# SPDX-License-Identifier: Apache-2.0
"""Top-k choice of experts with a selection bias, groups and zero experts."""

from typing import Any, cast

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, register_autograd, register_not_differentiable
from zexpert.ops._library import check_devices, register_fake, weight_dtype
from zexpert.ops.types import RoutingArguments, RoutingResult


def biased_topk(
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
) -> RoutingResult:
    """Chooses K of N experts for each of T tokens; experts are ordered [real | identity | constant | drop].

    Computed in float32, in float64 for float64 logits::

        score  = scoring_func(logits)            # softmax over all N
        key    = score + bias                    # decides the choice and nothing else
        chosen = the K largest keys, descending, lower index first among equals
        weight = score[chosen]  (/ its sum, if renormalize)  * routed_scaling_factor

    With ``num_expert_group`` > 1 the real experts are split evenly into groups. A group scores the sum of its two
    largest keys, and only the best ``topk_group`` groups stay eligible; zero experts always are. A logit that is NaN or
    infinite, and a key that is NaN, is never chosen, and counts 0 in the softmax; a row that runs out of experts fills
    up with id -1 and weight 0.

    Args:
        logits: [T, N], any floating dtype; the router's output.
        bias: [N], any floating dtype, or None; e_score_correction_bias.
        top_k: K, 1 to 64, at most N.
        num_real_experts: R, experts with a feed-forward network.
        num_identity_experts: experts that return the token; None: all that are not real or constant.
        num_constant_experts: C, experts that add a learned vector. What is left of N are drop experts.
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus" (sqrt(log(1 + exp(logit)))).
        renormalize: divide by the sum over the K chosen, zero experts included; a sum of 0 gives weights 0.
        drop_before_renormalize: the drop experts' weights become 0 before that sum is taken (MoE++); needs both.
        routed_scaling_factor: applied last, to slots of every kind.
        num_expert_group: groups the real experts are split into; divides R.
        topk_group: groups that stay eligible.
        indices_dtype: torch.int32 or torch.int64, the type of the ids.
        choices: [T, K] int32, as biased_topk_choices returns them: the expert of each slot, of all N, or -1 for an
            empty slot. The weights follow from the logits as above; bias and groups are not used. None: choose.

    Returns:
        RoutingResult: topk_weights [T, K], topk_ids [T, K], zero_weight [T], constant_weight [T, C].

    Raises:
        RuntimeError: an argument has a wrong device, dtype, shape or value. On CUDA the values of choices are not
            checked, because the host would wait: a slot with a number that is not an expert's, or an expert that an
            earlier slot of its row has, stays empty.

    Gradients flow to the logits, through topk_weights, zero_weight and constant_weight: the choice is a constant of the
    differentiation. The bias has none, and may change between forward and backward.

    Sources: selection bias, arXiv 2408.15664; groups, DeepSeek-V3, arXiv 2412.19437; zero experts, MoE++,
    arXiv 2410.07348, and LongCat-Flash, arXiv 2509.01322.
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
    return choose_experts(logits, bias, arguments, indices_dtype, choices)


def choose_experts(
    logits: Tensor,
    bias: Tensor | None,
    arguments: RoutingArguments,
    indices_dtype: torch.dtype | None,
    choices: Tensor | None = None,
) -> RoutingResult:
    """biased_topk with its routing arguments in one tuple; scriptable. No indices_dtype: int32."""
    topk_weights, topk_ids, zero_weight, constant_weight = torch.ops.zexpert.biased_topk(
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
    return RoutingResult(topk_weights, topk_ids, zero_weight, constant_weight)


def check_indices_dtype(indices_dtype: torch.dtype) -> None:
    """Raises RuntimeError for anything but a dtype. PyTorch reads a number as the dtype with that number in its list,
    and a number past the list's end ends the process.
    """
    if not isinstance(cast(object, indices_dtype), torch.dtype):
        raise RuntimeError(f"indices_dtype must be int32 or int64, got {indices_dtype!r}")


@register_fake("biased_topk")
def biased_topk_fake(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    choices: Tensor | None = None,
    *,
    num_constant_experts: int = 0,
    indices_dtype: torch.dtype | None = None,
    **_others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_devices("logits", logits, bias=bias, choices=choices)
    num_tokens = logits.shape[0]
    weights = weight_dtype(logits.dtype)
    return (
        logits.new_empty((num_tokens, top_k), dtype=weights),
        logits.new_empty((num_tokens, top_k), dtype=indices_dtype or torch.int32),
        logits.new_empty((num_tokens,), dtype=weights),
        logits.new_empty((num_tokens, num_constant_experts), dtype=weights),
    )


def setup_context(
    ctx: Context, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    logits, bias, ctx.top_k, choices = inputs
    if choices is not None:
        bias = None
    # The backward chooses again, and by then a controller may have written to the bias.
    ctx.save_for_backward(logits, None if bias is None else bias.clone(), choices)
    ctx.keywords = {name: value for name, value in keyword_only_inputs.items() if name != "indices_dtype"}


def backward(
    ctx: Context,
    grad_topk_weights: Tensor | None,
    _grad_topk_ids: None,
    grad_zero_weight: Tensor | None,
    grad_constant_weight: Tensor | None,
    *_grad_plan: None,
) -> tuple[Tensor | None, None, None, None]:
    """The backward of biased_topk and of biased_topk_and_plan. The plan is integers and has no gradient."""
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    logits, bias, choices = ctx.saved_tensors
    gradients = (grad_topk_weights, grad_zero_weight, grad_constant_weight)
    return logits_gradient(gradients, logits, bias, choices, ctx.top_k, ctx.keywords), None, None, None


def logits_gradient(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    logits: Tensor,
    bias: Tensor | None,
    choices: Tensor | None,
    top_k: int,
    keywords: dict[str, Any],
) -> Tensor:
    """The gradient of the logits from those of topk_weights, zero_weight and constant_weight; None stands for zeros."""
    num_tokens, dtype = logits.shape[0], weight_dtype(logits.dtype)
    shapes = ((num_tokens, top_k), (num_tokens,), (num_tokens, keywords["num_constant_experts"]))
    given = [
        logits.new_zeros(shape, dtype=dtype) if gradient is None else gradient
        for gradient, shape in zip(gradients, shapes, strict=True)
    ]
    grad_logits: Tensor = torch.ops.zexpert.biased_topk_backward(*given, logits, bias, top_k, choices, **keywords)
    return grad_logits


@register_fake("biased_topk_backward")
def _biased_topk_backward_fake(
    grad_topk_weights: Tensor,
    grad_zero_weight: Tensor,
    grad_constant_weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    choices: Tensor | None = None,
    **_keywords: Any,
) -> Tensor:
    check_devices(
        "logits",
        logits,
        grad_topk_weights=grad_topk_weights,
        grad_zero_weight=grad_zero_weight,
        grad_constant_weight=grad_constant_weight,
        bias=bias,
        choices=choices,
    )
    return logits.new_empty(logits.shape)


register_autograd("biased_topk", setup_context, backward)
register_not_differentiable("biased_topk_backward")
