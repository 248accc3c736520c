"""Each expert's feed-forward network over its segment of rows."""

import torch
from torch import Tensor

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
