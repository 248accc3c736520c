"""Token rows copied into the plan's order."""

import torch
from torch import Tensor

from zexpert.ops._library import check_devices, register_fake


def moe_permute(hidden_states: Tensor, row_slots: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    """``rows[r] = hidden_states[row_slots[r] // top_k]`` for every row below the last offset.

    Args:
        hidden_states: [T, H], any floating dtype, any strides.
        row_slots: [T * K] int32, of the DispatchPlan.
        expert_offsets: [R + 1] int32, of the DispatchPlan.
        top_k: K.

    Returns:
        [T * K, H], type of hidden_states. Rows past the last offset hold anything; no op reads them.

    Raises:
        RuntimeError: an argument has a wrong device, dtype or shape; on the CPU, an index is out of range.
    """
    rows: Tensor = torch.ops.zexpert.moe_permute(hidden_states, row_slots, expert_offsets, top_k)
    return rows


@register_fake("moe_permute")
def _moe_permute_fake(hidden_states: Tensor, row_slots: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    check_devices("hidden_states", hidden_states, row_slots=row_slots, expert_offsets=expert_offsets)
    return hidden_states.new_empty((row_slots.shape[0], hidden_states.shape[1]))
