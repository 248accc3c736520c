# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of expert rows written into the memory of the ranks that own the tokens."""

import torch
from torch import Tensor

from zexpert.ops._library import check_devices, register_fake


def moe_combine(
    rows: Tensor,
    slot_rows: Tensor,
    topk_weights: Tensor | None,
    out: list[Tensor],
    rank: int,
    most_multiprocessors: int = 0,
) -> None:
    """``out[p][rank, i] = sum_k topk_weights[p * M + i, k] * rows[slot_rows[p * M + i, k]]`` for each of the P ranks
    and every i below M with a slot that has a row. Other rows of out are not written.

    It answers ``moe_dispatch``: p and i are the places where the tokens of rank p came, and ``out[p]`` is that rank's
    memory. Sums are formed as ``moe_finalize`` does, in float32 (float64 for float64 rows) and slot order, and rounded
    once. Nothing waits: ``rank_barrier`` says when all ranks have written.

    Args:
        rows: [rows, H], any floating dtype, any row stride.
        slot_rows: [P * M, K] int32, every entry in [-1, rows); -1 for a slot without a row.
        topk_weights: [P * M, K] float32, or float64 with float64 rows; None: every weight is 1.
        out: of each rank, [P, M, H], type of rows: memory of that rank which this process can write.
        rank: this process's, in [0, P).
        most_multiprocessors: of a GPU that the kernel may occupy, so that another one runs beside it; 0 for all.

    Raises:
        RuntimeError: an argument has a wrong device, dtype, shape or value; on the CPU, an index is out of range.
    """
    torch.ops.zexpert.moe_combine(rows, slot_rows, topk_weights, out, rank, most_multiprocessors=most_multiprocessors)


@register_fake("moe_combine")
def _moe_combine_fake(
    rows: Tensor,
    slot_rows: Tensor,
    topk_weights: Tensor | None,
    out: list[Tensor],
    rank: int,
    *,
    most_multiprocessors: int = 0,
) -> None:
    check_devices("rows", rows, slot_rows=slot_rows, topk_weights=topk_weights, out=out[0])
