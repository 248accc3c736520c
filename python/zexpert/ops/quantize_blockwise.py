# SPDX-License-Identifier: Apache-2.0
"""Weights as float8 with a scale for each block of 128 x 128."""

import torch
from torch import Tensor

from zexpert.ops._autograd import register_not_differentiable
from zexpert.ops._library import register_fake

SCALE_BLOCK = 128
"""Rows and columns of a weight that share a scale."""


def num_scale_blocks(size: int) -> int:
    """Blocks that ``size`` rows or columns are cut into; the last one may be smaller."""
    return (size + SCALE_BLOCK - 1) // SCALE_BLOCK


def quantize_blockwise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn weights and their scales: for each block of 128 rows and 128 columns,
    ``scale_inv = max |weight| / 448`` and ``weight / scale_inv``, rounded to nearest, ties to even.

    In float32. A block of zeros has scale 1; no other scale is below 2^-126. Gate and up are two matrices: pass
    ``w13.unflatten(1, (2, F))``, so that no block has rows of both.

    Args:
        weight: [..., rows, columns], any floating dtype, any strides; float64 is rounded to float32 first.

    Returns:
        The weight, [..., rows, columns] float8_e4m3fn, and ``scale_inv``,
        [..., ceil(rows / 128), ceil(columns / 128)] float32. Not differentiable.

    Raises:
        RuntimeError: weight has a wrong dtype or fewer than two dimensions; on the CPU, it has NaN or infinity. On CUDA
            a block with one of these becomes NaN, and so does its scale.

    Source: the format of DeepSeek-V3, arXiv 2412.19437, section 3.3.
    """
    if weight.dim() < 2:
        raise RuntimeError(
            f"weight must have at least 2 dimensions [..., rows, columns], got shape {list(weight.shape)}"
        )
    matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight.flatten(0, -3)
    quantised, scale_inv = torch.ops.zexpert.quantize_blockwise(matrices)
    return quantised.reshape(weight.shape), scale_inv.reshape(weight.shape[:-2] + scale_inv.shape[-2:])


@register_fake("quantize_blockwise")
def _quantize_blockwise_fake(weight: Tensor) -> tuple[Tensor, Tensor]:
    matrices, rows, columns = weight.shape
    return (
        weight.new_empty(weight.shape, dtype=torch.float8_e4m3fn),
        weight.new_empty((matrices, num_scale_blocks(rows), num_scale_blocks(columns)), dtype=torch.float32),
    )


register_not_differentiable("quantize_blockwise")
