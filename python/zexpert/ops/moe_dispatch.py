# SPDX-License-Identifier: Apache-2.0
"""Token rows written into the memory of the ranks that own their experts."""

import torch
from torch import Tensor

from zexpert.ops._library import check_devices, register_fake


def moe_dispatch(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    rows: list[Tensor],
    ids: list[Tensor],
    weights: list[Tensor],
    rank: int,
    num_local_experts: int,
    most_multiprocessors: int = 0,
) -> tuple[Tensor, Tensor]:
    """Writes every token once to each of the P ranks that own one of its experts, with its ids and weights there. Rank
    p owns the experts from p * num_local_experts on.

    The i-th token, in ascending order, that this rank sends to rank p is written to ``rows[p][rank, i]``,
    ``ids[p][rank, i]`` and ``weights[p][rank, i]``. The ids there count from 0 on, with -1 for slots of other ranks and
    for all slots of places without a token. Nothing waits: ``rank_barrier`` says when all ranks have written.

    Args:
        hidden_states: [T, H], any floating dtype, any strides; T at most M.
        topk_ids: [T, K] int32 or int64, every id in [-1, P * num_local_experts).
        topk_weights: [T, K] float32, or float64 with float64 hidden_states.
        rows: of each rank, [P, M, H], type of hidden_states: memory of that rank which this process can write.
        ids: of each rank, [P, M, K] int32.
        weights: of each rank, [P, M, K], type of topk_weights.
        rank: this process's, in [0, P).
        num_local_experts: experts of a rank.
        most_multiprocessors: of a GPU that the kernel may occupy, so that another one runs beside it; 0 for all.

    Returns:
        slot_rows: [T, P] int32, p * M + i where the token is sent to rank p, else -1.
        row_tokens: [P, M] int32, its inverse: the token that is i-th of those for rank p, -1 where there is none.

    Raises:
        RuntimeError: an argument has a wrong device, dtype, shape or value; on the CPU, an id is out of range.

    Source: the dispatch of expert parallelism in GShard, arXiv 2006.16668, with one row per token and rank.
    """
    slot_rows, row_tokens = torch.ops.zexpert.moe_dispatch(
        hidden_states,
        topk_ids,
        topk_weights,
        rows,
        ids,
        weights,
        rank,
        num_local_experts,
        most_multiprocessors=most_multiprocessors,
    )
    return slot_rows, row_tokens


@register_fake("moe_dispatch")
def _moe_dispatch_fake(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    rows: list[Tensor],
    ids: list[Tensor],
    weights: list[Tensor],
    rank: int,
    num_local_experts: int,
    *,
    most_multiprocessors: int = 0,
) -> tuple[Tensor, Tensor]:
    check_devices("hidden_states", hidden_states, topk_ids=topk_ids, topk_weights=topk_weights, rows=rows[0])
    num_ranks, max_tokens = rows[0].shape[:2]
    return (
        hidden_states.new_empty((hidden_states.shape[0], num_ranks), dtype=torch.int32),
        hidden_states.new_empty((num_ranks, max_tokens), dtype=torch.int32),
    )
