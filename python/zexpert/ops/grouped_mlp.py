# SPDX-License-Identifier: Apache-2.0
"""Each expert's feed-forward network over its segment of rows."""

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, register_autograd, register_not_differentiable
from zexpert.ops._library import check_devices, register_fake


def grouped_mlp(rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> Tensor:
    """``(silu(x @ gate.T) * (x @ up.T)) @ down.T`` for every row x, with the weights of the row's expert.

    On the CPU an expert with few rows streams its weights through zexpert's own kernel; one with many goes through
    torch's matrix product, which rounds gate, up and activation to the data's type in between.

    Args:
        rows: [M, H], any floating dtype, any strides; in the order of a DispatchPlan.
        expert_offsets: [R + 1] int32, of the DispatchPlan: from 0, ascending, at most M.
        w13_weight: [R, 2F, H], type of rows: gate rows first, then up. May be a slice of more experts.
        w2_weight: [R, H, F], type of rows: down. May be a slice of more experts.

    Returns:
        [M, H], type of rows. Rows past the last offset hold anything.

    Raises:
        RuntimeError: an argument has a wrong device, dtype or shape; on the CPU, the offsets do not ascend from 0.

    Source: SwiGLU experts, arXiv 2002.05202; grouped computation, MegaBlocks, arXiv 2211.15841.
    """
    out: Tensor = torch.ops.zexpert.grouped_mlp(rows, expert_offsets, w13_weight, w2_weight)
    return out


@register_fake("grouped_mlp")
def _grouped_mlp_fake(rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> Tensor:
    check_devices("rows", rows, expert_offsets=expert_offsets, w13_weight=w13_weight, w2_weight=w2_weight)
    return rows.new_empty(rows.shape)


def grouped_mlp_with_gate_up(
    rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """grouped_mlp for training: its backward finds what the activation is taken of, which the backward of grouped_mlp
    computes again.

    Arguments and errors are grouped_mlp's.

    Returns:
        The result of grouped_mlp, [M, H], and gate_up [M, 2F], through which no gradient flows; both of the type of
        rows. Rows past the last offset hold anything.
    """
    out, gate_up = torch.ops.zexpert.grouped_mlp_with_gate_up(rows, expert_offsets, w13_weight, w2_weight)
    return out, gate_up


@register_fake("grouped_mlp_with_gate_up")
def _grouped_mlp_with_gate_up_fake(
    rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor
) -> tuple[Tensor, Tensor]:
    check_devices("rows", rows, expert_offsets=expert_offsets, w13_weight=w13_weight, w2_weight=w2_weight)
    return rows.new_empty(rows.shape), rows.new_empty((rows.shape[0], w13_weight.shape[1]))


def _setup_context(ctx: Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, None)


def _setup_context_with_gate_up(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    gate_up = output[1]
    ctx.mark_non_differentiable(gate_up)
    ctx.save_for_backward(*inputs, gate_up)


def _backward(
    ctx: Context, grad_out: Tensor | None, _grad_gate_up: None = None
) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    if grad_out is None:
        return None, None, None, None
    needs_rows, _, needs_w13_weight, needs_w2_weight = ctx.needs_input_grad
    grad_rows, grad_w13_weight, grad_w2_weight = torch.ops.zexpert.grouped_mlp_backward(
        grad_out,
        *ctx.saved_tensors,
        needs_rows=needs_rows,
        needs_w13_weight=needs_w13_weight,
        needs_w2_weight=needs_w2_weight,
    )
    return (
        grad_rows if needs_rows else None,
        None,
        grad_w13_weight if needs_w13_weight else None,
        grad_w2_weight if needs_w2_weight else None,
    )


@register_fake("grouped_mlp_backward")
def _grouped_mlp_backward_fake(
    grad_out: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
    gate_up: Tensor | None,
    *,
    needs_rows: bool = True,
    needs_w13_weight: bool = True,
    needs_w2_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(
        "rows",
        rows,
        grad_out=grad_out,
        expert_offsets=expert_offsets,
        w13_weight=w13_weight,
        w2_weight=w2_weight,
        gate_up=gate_up,
    )
    return (
        rows.new_empty(rows.shape if needs_rows else (0,)),
        rows.new_empty(w13_weight.shape if needs_w13_weight else (0,)),
        rows.new_empty(w2_weight.shape if needs_w2_weight else (0,)),
    )


register_autograd("grouped_mlp", _setup_context, _backward)
register_autograd("grouped_mlp_with_gate_up", _setup_context_with_gate_up, _backward)
register_not_differentiable("grouped_mlp_backward")
