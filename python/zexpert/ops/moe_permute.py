# SPDX-License-Identifier: Apache-2.0
"""Token rows copied into the plan's order."""

from typing import Any

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, register_autograd, register_not_differentiable
from zexpert.ops._library import check_devices, register_fake


def moe_permute(
    hidden_states: Tensor, row_slots: Tensor, expert_offsets: Tensor, top_k: int, slot_rows: Tensor | None = None
) -> Tensor:
    """``rows[r] = hidden_states[row_slots[r] // top_k]`` for every row below the last offset.

    Args:
        hidden_states: [T, H], any floating dtype, any strides.
        row_slots: [T * K] int32, of the DispatchPlan, or cut somewhere behind its last offset.
        expert_offsets: [R + 1] int32, of the DispatchPlan.
        top_k: K.
        slot_rows: [T, K] int32, of the same DispatchPlan, or None. With it a GPU reads every token once instead of once
            for each of its rows, and the backward does not invert row_slots.

    Returns:
        [T * K, H], or as many rows as row_slots has; type of hidden_states. Rows past the last offset are not written;
        no op reads them.

    Raises:
        RuntimeError: an argument has a wrong device, dtype or shape; on the CPU, an index is out of range.
    """
    rows: Tensor = torch.ops.zexpert.moe_permute(hidden_states, row_slots, expert_offsets, top_k, slot_rows)
    return rows


@register_fake("moe_permute")
def _moe_permute_fake(
    hidden_states: Tensor, row_slots: Tensor, expert_offsets: Tensor, top_k: int, slot_rows: Tensor | None = None
) -> Tensor:
    check_devices(
        "hidden_states", hidden_states, row_slots=row_slots, expert_offsets=expert_offsets, slot_rows=slot_rows
    )
    return hidden_states.new_empty((row_slots.shape[0], hidden_states.shape[1]))


def _setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden_states, row_slots, expert_offsets, ctx.top_k, slot_rows = inputs
    ctx.num_tokens = hidden_states.shape[0]
    ctx.save_for_backward(row_slots, expert_offsets, slot_rows)


def _backward(ctx: Context, grad_rows: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
    if grad_rows is None:
        return None, None, None, None, None
    row_slots, expert_offsets, slot_rows = ctx.saved_tensors
    grad_hidden_states = torch.ops.zexpert.moe_permute_backward(
        grad_rows, row_slots, expert_offsets, ctx.num_tokens, ctx.top_k, slot_rows
    )
    return grad_hidden_states, None, None, None, None


@register_fake("moe_permute_backward")
def _moe_permute_backward_fake(
    grad_rows: Tensor,
    row_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    top_k: int,
    slot_rows: Tensor | None = None,
) -> Tensor:
    check_devices("grad_rows", grad_rows, row_slots=row_slots, expert_offsets=expert_offsets, slot_rows=slot_rows)
    return grad_rows.new_empty((num_tokens, grad_rows.shape[1]))


register_autograd("moe_permute", _setup_context, _backward)
register_not_differentiable("moe_permute_backward")
