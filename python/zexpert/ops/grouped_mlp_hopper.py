# SPDX-License-Identifier: Apache-2.0
"""An alias of grouped_mlp, for one release."""

import torch
from torch import Tensor

from zexpert.ops._autograd import register_not_differentiable
from zexpert.ops._library import check_devices, register_fake


def grouped_mlp_hopper(
    rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor, *, tile_rows: int = 0
) -> Tensor:
    """``grouped_mlp(..., implementation="hopper")`` without gradients.

    An alias, for one release. The host does not wait for the GPU. The same bits in every run; a row's bits may depend
    on how many rows there are.

    Args:
        rows: [M, H], bfloat16 or float16, H a multiple of 64; in the order of a DispatchPlan.
        expert_offsets: [R + 1] int32, of the DispatchPlan: from 0, ascending, at most M; R at most 1024.
        w13_weight: [R, 2F, H], type of rows, F a multiple of 64: gate rows first, then up. May be a slice of more
            experts.
        w2_weight: [R, H, F], type of rows: down. May be a slice of more experts.
        tile_rows: rows of an expert that are multiplied at a time at most, a multiple of 8 up to 288; 0 chooses.

    Returns:
        [M, H], type of rows. Rows past the last offset hold anything. The activation is rounded to that type in
        between; all sums are float32.

    Raises:
        RuntimeError: an argument has a wrong device, dtype, shape or range, or the GPU is another.
    """
    out: Tensor = torch.ops.zexpert.grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows)
    return out


@register_fake("grouped_mlp_hopper")
def _grouped_mlp_hopper_fake(
    rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor, *, tile_rows: int = 0
) -> Tensor:
    check_devices("rows", rows, expert_offsets=expert_offsets, w13_weight=w13_weight, w2_weight=w2_weight)
    return rows.new_empty(rows.shape)


register_not_differentiable("grouped_mlp_hopper")
