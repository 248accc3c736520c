# SPDX-License-Identifier: Apache-2.0
"""The values of float8 weights that have a scale for each block of 128 x 128."""

import torch
from torch import Tensor

from zexpert.ops._autograd import register_not_differentiable
from zexpert.ops._library import check_devices, register_fake


def dequantize_blockwise(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``weight * scale_inv`` of the weight's block of 128 rows and 128 columns, in float32 (float64 for float64) and
    rounded once. The inverse of ``quantize_blockwise``, to the rounding of both.

    Args:
        weight: [..., rows, columns] float8_e4m3fn, any strides.
        scale_inv: [..., ceil(rows / 128), ceil(columns / 128)] float32, any strides.
        dtype: of the result: float32, float64, bfloat16 or float16.

    Returns:
        [..., rows, columns]. Not differentiable.

    Raises:
        RuntimeError: an argument has a wrong device, dtype or shape.
    """
    if weight.dim() < 2:
        raise RuntimeError(
            f"weight must have at least 2 dimensions [..., rows, columns], got shape {list(weight.shape)}"
        )
    if scale_inv.dim() != weight.dim() or scale_inv.shape[:-2] != weight.shape[:-2]:
        raise RuntimeError(
            f"scale_inv must have the leading dimensions of weight ({list(weight.shape[:-2])}) and two more, "
            f"got shape {list(scale_inv.shape)}"
        )
    shape = weight.shape
    if weight.dim() == 2:
        weight, scale_inv = weight.unsqueeze(0), scale_inv.unsqueeze(0)
    else:
        weight, scale_inv = weight.flatten(0, -3), scale_inv.flatten(0, -3)
    values: Tensor = torch.ops.zexpert.dequantize_blockwise(weight, scale_inv, dtype=dtype)
    return values.reshape(shape)


@register_fake("dequantize_blockwise")
def _dequantize_blockwise_fake(weight: Tensor, scale_inv: Tensor, *, dtype: torch.dtype) -> Tensor:
    check_devices("weight", weight, scale_inv=scale_inv)
    return weight.new_empty(weight.shape, dtype=dtype)


register_not_differentiable("dequantize_blockwise")
