# SPDX-License-Identifier: Apache-2.0
"""The layer's epilogue, one pass over the experts' rows."""

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, register_autograd, register_not_differentiable
from zexpert.ops._library import check_devices, register_fake


def moe_finalize(
    rows: Tensor,
    slot_rows: Tensor,
    topk_weights: Tensor,
    hidden_states: Tensor,
    zero_weight: Tensor,
    *,
    residual: Tensor | None = None,
    constant_weight: Tensor | None = None,
    constant_vectors: Tensor | None = None,
) -> Tensor:
    """Each token's weighted rows, its zero part, its constants and the residual, summed::

        out[t] = sum_k topk_weights[t, k] * rows[slot_rows[t, k]]     # in slot order, slots with row -1 skipped
               + zero_weight[t] * hidden_states[t]
               + sum_c constant_weight[t, c] * constant_vectors[c]
               + residual[t]

    Accumulated in float32 (float64 for float64 data) in that order and rounded once: bitwise repeatable. Routing
    weights are float32, or float64 with float64 hidden_states.

    Args:
        rows: [M, H], type of hidden_states: the experts' results in the order of a DispatchPlan.
        slot_rows: [T, K] int32, of the DispatchPlan; every entry in [-1, M).
        topk_weights: [T, K], of the RoutingResult.
        hidden_states: [T, H], any floating dtype, any strides: the layer's input.
        zero_weight: [T], of the RoutingResult.
        residual: [T, H], type of hidden_states: the shared experts' output, or the decoder's residual.
        constant_weight: [T, C], of the RoutingResult; with constant_vectors, or C = 0.
        constant_vectors: [C, H], type of hidden_states.

    Returns:
        [T, H], type of hidden_states.

    Raises:
        RuntimeError: an argument has a wrong device, dtype or shape; on the CPU, an entry of slot_rows is out of range.

    Source: constant experts, MoE++, arXiv 2410.07348.
    """
    out: Tensor = torch.ops.zexpert.moe_finalize(
        rows,
        slot_rows,
        topk_weights,
        hidden_states,
        zero_weight,
        residual=residual,
        constant_weight=constant_weight,
        constant_vectors=constant_vectors,
    )
    return out


@register_fake("moe_finalize")
def _moe_finalize_fake(
    rows: Tensor,
    slot_rows: Tensor,
    topk_weights: Tensor,
    hidden_states: Tensor,
    zero_weight: Tensor,
    residual: Tensor | None = None,
    constant_weight: Tensor | None = None,
    constant_vectors: Tensor | None = None,
) -> Tensor:
    check_devices(
        "hidden_states",
        hidden_states,
        rows=rows,
        slot_rows=slot_rows,
        topk_weights=topk_weights,
        zero_weight=zero_weight,
        residual=residual,
        constant_weight=constant_weight,
        constant_vectors=constant_vectors,
    )
    return hidden_states.new_empty(hidden_states.shape)


def _setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows, slot_rows, topk_weights, hidden_states, zero_weight, _, constant_weight, constant_vectors = inputs
    ctx.save_for_backward(rows, slot_rows, topk_weights, hidden_states, zero_weight, constant_weight, constant_vectors)


def constant_gradients(
    grad_out: Tensor,
    constant_weight: Tensor | None,
    constant_vectors: Tensor | None,
    needs_weight: bool,
    needs_vectors: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of constant_weight @ constant_vectors, a part of the epilogue's sum."""
    grad_weight = grad_vectors = None
    if constant_weight is not None and constant_vectors is not None:
        wide_grad_out = grad_out.to(constant_weight.dtype)
        if needs_weight:
            grad_weight = wide_grad_out @ constant_vectors.to(constant_weight.dtype).T
        if needs_vectors:
            grad_vectors = (constant_weight.T @ wide_grad_out).to(constant_vectors.dtype)
    return grad_weight, grad_vectors


def _backward(ctx: Context, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    *tensors, constant_weight, constant_vectors = ctx.saved_tensors
    needs = (*ctx.needs_input_grad, False, False, False)  # without entries for arguments that were left out
    grad_rows = grad_topk_weights = grad_hidden_states = grad_zero_weight = None
    if needs[0] or needs[2] or needs[3] or needs[4]:
        grad_rows, grad_topk_weights, grad_hidden_states, grad_zero_weight = torch.ops.zexpert.moe_finalize_backward(
            grad_out, *tensors
        )
    grad_constant_weight, grad_constant_vectors = constant_gradients(
        grad_out, constant_weight, constant_vectors, needs[6], needs[7]
    )
    return (
        grad_rows,
        None,
        grad_topk_weights,
        grad_hidden_states,
        grad_zero_weight,
        grad_out if needs[5] else None,
        grad_constant_weight,
        grad_constant_vectors,
    )


@register_fake("moe_finalize_backward")
def _moe_finalize_backward_fake(
    grad_out: Tensor,
    rows: Tensor,
    slot_rows: Tensor,
    topk_weights: Tensor,
    hidden_states: Tensor,
    zero_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_devices(
        "hidden_states",
        hidden_states,
        grad_out=grad_out,
        rows=rows,
        slot_rows=slot_rows,
        topk_weights=topk_weights,
        zero_weight=zero_weight,
    )
    return (
        rows.new_empty(rows.shape),
        topk_weights.new_empty(topk_weights.shape),
        hidden_states.new_empty(hidden_states.shape),
        zero_weight.new_empty(zero_weight.shape),
    )


register_autograd("moe_finalize", _setup_context, _backward)
register_not_differentiable("moe_finalize_backward")
