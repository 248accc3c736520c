# SPDX-License-Identifier: Apache-2.0
"""No rank goes on before all have come."""

import torch
from torch import Tensor

from zexpert.ops._library import check_devices, register_fake


def rank_barrier(
    signals: list[Tensor], epoch: Tensor, validity: Tensor, absent_rank: Tensor, rank: int, timeout_ms: int
) -> None:
    """Waits for all P ranks: on a GPU the stream, not the host. What a rank wrote into any rank's memory before its
    barrier, every rank can read after its own.

    This rank's n-th barrier writes n to ``signals[p][rank]`` of every rank p, and waits until all of ``signals[rank]``
    are at least n. Nothing is ever reset, so a CUDA graph replays it. After a barrier that failed no other waits, and
    the other ranks learn of it.

    Args:
        signals: of each rank, [P] int64, 0 at first: memory of that rank which this process can write.
        epoch: [1] int64, n; 0 at first.
        validity: [1] float32, 1 at first; NaN once a barrier has failed: a factor for what depends on other ranks.
        absent_rank: [1] int32 on the CPU, pinned if the others are on CUDA; -1 at first, a rank that did not come once
            a barrier has failed.
        rank: this process's, in [0, P).
        timeout_ms: how long to wait, at least 1.

    Raises:
        RuntimeError: an argument has a wrong device, dtype, shape or value; on the CPU, a rank did not come in time or
            gave up.
    """
    torch.ops.zexpert.rank_barrier(signals, epoch, validity, absent_rank, rank, timeout_ms)


@register_fake("rank_barrier")
def _rank_barrier_fake(
    signals: list[Tensor], epoch: Tensor, validity: Tensor, absent_rank: Tensor, rank: int, timeout_ms: int
) -> None:
    check_devices("signals", signals[0], epoch=epoch, validity=validity)
