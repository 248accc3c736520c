# SPDX-License-Identifier: Apache-2.0
"""Permutation, experts and epilogue in one."""

from typing import Any

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, register_autograd, register_not_differentiable
from zexpert.ops._library import check_devices, register_fake
from zexpert.ops.grouped_mlp import check_frozen, check_has_gradients
from zexpert.ops.moe_finalize import constant_gradients


def fused_moe(
    hidden_states: Tensor,
    topk_weights: Tensor,
    zero_weight: Tensor,
    expert_offsets: Tensor,
    row_slots: Tensor,
    slot_rows: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
    residual: Tensor | None = None,
    constant_weight: Tensor | None = None,
    constant_vectors: Tensor | None = None,
    keep_gate_up: bool = True,
    implementation: str = "auto",
    w13_scale_inv: Tensor | None = None,
    w2_scale_inv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer after routing and plan: ``moe_finalize`` of what ``grouped_mlp`` computes from the tokens, in one
    operator.

    Only hidden_states and gate_up are kept for the backward, not the token rows and the experts' results, [T * K, H]
    each. The backward gathers the tokens again. It computes the gradient of a slot's weight, <grad_out, row>, inside
    the expert, as <grad_out @ w2, activation>.

    Args:
        hidden_states: [T, H], any floating dtype, any strides: the layer's input.
        topk_weights: [T, K] float32, or float64 with float64 hidden_states, of the RoutingResult.
        zero_weight: [T], type of topk_weights, of the RoutingResult.
        expert_offsets: [R + 1] int32, of the DispatchPlan.
        row_slots: [T * K] int32, of the DispatchPlan, or cut behind its last offset.
        slot_rows: [T, K] int32, of the DispatchPlan.
        w13_weight: [R, 2F, H], type of hidden_states, or float8_e4m3fn with scales: gate rows first, then up.
        w2_weight: [R, H, F], likewise: down.
        residual: [T, H], type of hidden_states, or None.
        constant_weight: [T, C], type of topk_weights; with constant_vectors, or C = 0, or None.
        constant_vectors: [C, H], type of hidden_states, or None.
        keep_gate_up: True for training: the backward reads gate_up. False for inference, which then allocates less and
            may run faster kernels; gradients still work, and the backward computes gate_up again.
        implementation: which kernels run the experts; see ``grouped_mlp``. "hopper" needs keep_gate_up=False and has no
            gradients.
        w13_scale_inv: [R, 2 * ceil(F / 128), ceil(H / 128)] float32 with float8_e4m3fn weights, else None; see
            ``grouped_mlp``.
        w2_scale_inv: [R, ceil(H / 128), ceil(F / 128)] float32, likewise.

    Returns:
        The layer's output, [T, H], and gate_up, through which no gradient flows: [T * K, 2F], or [0, 2F] without
        keep_gate_up; both of the type of hidden_states. Rows of gate_up past the last offset hold anything.

    Raises:
        RuntimeError: an argument has a wrong device, dtype or shape; the implementation cannot serve; on the CPU, an
            index is out of range.
    """
    out, gate_up = torch.ops.zexpert.fused_moe(
        hidden_states,
        topk_weights,
        zero_weight,
        expert_offsets,
        row_slots,
        slot_rows,
        w13_weight,
        w2_weight,
        residual,
        constant_weight,
        constant_vectors,
        w13_scale_inv,
        w2_scale_inv,
        keep_gate_up=keep_gate_up,
        implementation=implementation,
    )
    return out, gate_up


@register_fake("fused_moe")
def _fused_moe_fake(
    hidden_states: Tensor,
    topk_weights: Tensor,
    zero_weight: Tensor,
    expert_offsets: Tensor,
    row_slots: Tensor,
    slot_rows: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
    residual: Tensor | None = None,
    constant_weight: Tensor | None = None,
    constant_vectors: Tensor | None = None,
    w13_scale_inv: Tensor | None = None,
    w2_scale_inv: Tensor | None = None,
    *,
    keep_gate_up: bool = True,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    check_devices(
        "hidden_states",
        hidden_states,
        topk_weights=topk_weights,
        zero_weight=zero_weight,
        expert_offsets=expert_offsets,
        row_slots=row_slots,
        slot_rows=slot_rows,
        w13_weight=w13_weight,
        w2_weight=w2_weight,
        residual=residual,
        constant_weight=constant_weight,
        constant_vectors=constant_vectors,
        w13_scale_inv=w13_scale_inv,
        w2_scale_inv=w2_scale_inv,
    )
    return (
        hidden_states.new_empty(hidden_states.shape),
        hidden_states.new_empty((row_slots.shape[0] if keep_gate_up else 0, w13_weight.shape[1])),
    )


def _setup_context(
    ctx: Context, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    ctx.implementation = keyword_only_inputs["implementation"]
    check_has_gradients(ctx.implementation)
    *kept, _residual, constant_weight, constant_vectors, w13_scale_inv, w2_scale_inv = inputs
    check_frozen(inputs[6], inputs[7], w13_scale_inv)
    gate_up = output[1]
    ctx.mark_non_differentiable(gate_up)
    ctx.save_for_backward(*kept, gate_up, w13_scale_inv, w2_scale_inv, constant_weight, constant_vectors)


def _backward(ctx: Context, grad_out: Tensor | None, _grad_gate_up: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 13
    *kept, constant_weight, constant_vectors = ctx.saved_tensors
    needs = (*ctx.needs_input_grad, False, False, False)  # no entries for omitted arguments
    grad_hidden_states, grad_topk_weights, grad_zero_weight, grad_w13_weight, grad_w2_weight = (
        torch.ops.zexpert.fused_moe_backward(
            grad_out,
            *kept,
            needs_hidden_states=needs[0],
            needs_w13_weight=needs[6],
            needs_w2_weight=needs[7],
            implementation=ctx.implementation,
        )
    )
    grad_constant_weight, grad_constant_vectors = constant_gradients(
        grad_out, constant_weight, constant_vectors, needs[9], needs[10]
    )
    return (
        grad_hidden_states if needs[0] else None,
        grad_topk_weights,
        grad_zero_weight,
        None,
        None,
        None,
        grad_w13_weight if needs[6] else None,
        grad_w2_weight if needs[7] else None,
        grad_out if needs[8] else None,
        grad_constant_weight,
        grad_constant_vectors,
        None,
        None,
    )


@register_fake("fused_moe_backward")
def _fused_moe_backward_fake(
    grad_out: Tensor,
    hidden_states: Tensor,
    topk_weights: Tensor,
    zero_weight: Tensor,
    expert_offsets: Tensor,
    row_slots: Tensor,
    slot_rows: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
    gate_up: Tensor,
    w13_scale_inv: Tensor | None = None,
    w2_scale_inv: Tensor | None = None,
    *,
    needs_hidden_states: bool = True,
    needs_w13_weight: bool = True,
    needs_w2_weight: bool = True,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_devices(
        "hidden_states",
        hidden_states,
        grad_out=grad_out,
        topk_weights=topk_weights,
        zero_weight=zero_weight,
        expert_offsets=expert_offsets,
        row_slots=row_slots,
        slot_rows=slot_rows,
        w13_weight=w13_weight,
        w2_weight=w2_weight,
        gate_up=gate_up,
        w13_scale_inv=w13_scale_inv,
        w2_scale_inv=w2_scale_inv,
    )
    return (
        hidden_states.new_empty(hidden_states.shape if needs_hidden_states else (0,)),
        topk_weights.new_empty(topk_weights.shape),
        zero_weight.new_empty(zero_weight.shape),
        hidden_states.new_empty(w13_weight.shape if needs_w13_weight else (0,)),
        hidden_states.new_empty(w2_weight.shape if needs_w2_weight else (0,)),
    )


register_autograd("fused_moe", _setup_context, _backward)
register_not_differentiable("fused_moe_backward")
