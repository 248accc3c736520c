# SPDX-License-Identifier: Apache-2.0
"""The order of the slots that do work, expert by expert."""

import torch
from torch import Tensor

from zexpert.ops._library import register_fake
from zexpert.ops.types import DispatchPlan


def moe_plan(topk_ids: Tensor, num_experts: int) -> DispatchPlan:
    """Stable counting sort by expert of the slots with an id other than -1. Slots of one expert stay in slot order.

    Shapes depend on T, K and R alone, so nothing waits for the device.

    Args:
        topk_ids: [T, K] int32 or int64, every id in [-1, R); T * K below 2**31 - 1.
        num_experts: R, the real experts.

    Returns:
        DispatchPlan: expert_offsets [R + 1], row_slots [T * K], slot_rows [T, K], all int32.

    Raises:
        RuntimeError: an argument has a wrong dtype, shape or value; on the CPU, an id is out of range.

    Source: the grouped computation of MegaBlocks, arXiv 2211.15841, without its padding.
    """
    expert_offsets, row_slots, slot_rows = torch.ops.zexpert.moe_plan(topk_ids, num_experts)
    return DispatchPlan(expert_offsets, row_slots, slot_rows)


@register_fake("moe_plan")
def moe_plan_fake(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = topk_ids.shape
    return (
        topk_ids.new_empty((num_experts + 1,), dtype=torch.int32),
        topk_ids.new_empty((num_tokens * top_k,), dtype=torch.int32),
        topk_ids.new_empty((num_tokens, top_k), dtype=torch.int32),
    )
