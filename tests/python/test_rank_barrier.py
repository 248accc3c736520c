# SPDX-License-Identifier: Apache-2.0
"""rank_barrier between threads that stand for ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from testing import unchanged
from zexpert.ops import rank_barrier

NUM_RANKS = 3


def own_state() -> tuple[Tensor, Tensor, Tensor]:
    """epoch, validity and absent_rank."""
    return torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.full((1,), -1, dtype=torch.int32)


def run_ranks(body: Callable[[int], Any]) -> list[Any]:
    """What each rank returns, or the error it raises."""
    outcomes: list[Any] = [None] * NUM_RANKS

    def run(rank: int) -> None:
        try:
            outcomes[rank] = body(rank)
        except RuntimeError as error:
            outcomes[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(NUM_RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_nobody_goes_on_before_all_have_come() -> None:
    signals = [torch.zeros(NUM_RANKS, dtype=torch.int64) for _ in range(NUM_RANKS)]
    written = torch.zeros(NUM_RANKS, dtype=torch.int64)
    steps = 50

    def body(rank: int) -> list[list[int]]:
        state = own_state()
        seen = []
        for step in range(1, steps + 1):
            if step % NUM_RANKS == rank:
                time.sleep(0.002)
            written[rank] = step
            rank_barrier(signals, *state, rank, 30_000)
            seen.append(written.tolist())
            rank_barrier(signals, *state, rank, 30_000)
        assert state[0].item() == 2 * steps
        assert (state[1].item(), state[2].item()) == (1.0, -1)
        return seen

    assert run_ranks(body) == [[[step] * NUM_RANKS for step in range(1, steps + 1)]] * NUM_RANKS


def test_all_learn_of_a_rank_that_does_not_come() -> None:
    """Also those that could wait much longer, and at once at the next barrier."""
    signals = [torch.zeros(NUM_RANKS, dtype=torch.int64) for _ in range(NUM_RANKS)]
    states = [own_state() for _ in range(NUM_RANKS)]

    def body(rank: int) -> str | None:
        if rank == 1:
            return None
        rank_barrier(signals, *states[rank], rank, 200 if rank == 0 else 60_000)
        return "came"

    begin = time.monotonic()
    outcomes = run_ranks(body)
    assert outcomes[0] == "rank 1 did not come within 200 ms, or gave up"
    absent = [int(state[2]) for state in states]
    assert absent[0] == 1
    assert absent[2] in (0, 1)
    assert outcomes[2] in [f"rank {rank} did not come within 60000 ms, or gave up" for rank in (0, 1)]
    again = run_ranks(lambda rank: rank_barrier(signals, *states[rank], rank, 60_000) if rank != 1 else None)
    sentences = [f"rank {other} did not come within 60000 ms, or gave up" for other in absent]
    assert again == [sentences[0], None, sentences[2]]
    assert time.monotonic() - begin < 30
    for rank in (0, 2):
        assert bool(states[rank][1].isnan())
        assert states[rank][2].item() != -1


def arguments(**changes: object) -> dict[str, object]:
    epoch, validity, absent_rank = own_state()
    return {
        "signals": [torch.zeros(1, dtype=torch.int64)],
        "epoch": epoch,
        "validity": validity,
        "absent_rank": absent_rank,
        "rank": 0,
        "timeout_ms": 100,
        **changes,
    }


BAD_INPUT = {
    "no ranks": ({"signals": []}, r"^signals must have a tensor for each of 1 to 64 ranks, got 0$"),
    "no such rank": ({"rank": 1}, r"^rank must be between 0 and 0, got 1$"),
    "narrow signals": ({"signals": [torch.zeros(1).int()]}, r"^signals must be int64, got int32$"),
    "signals of another size": (
        {"signals": [torch.zeros(2).long()]},
        r"^signals must have shape \[1\] \[ranks\], got \[2\]$",
    ),
    "narrow epoch": ({"epoch": torch.zeros(1).int()}, r"^epoch must be int64, got int32$"),
    "wide validity": ({"validity": torch.ones(1).double()}, r"^validity must be float32, got float64$"),
    "wide absent_rank": ({"absent_rank": torch.zeros(1).long()}, r"^absent_rank must be int32, got int64$"),
    "epoch of another shape": ({"epoch": torch.zeros(2).long()}, r"^epoch must have shape \[1\] \[1\], got \[2\]$"),
    "no time": ({"timeout_ms": 0}, r"^timeout_ms must be at least 1, got 0$"),
    "elsewhere": ({"epoch": torch.zeros(1, device="meta").long()}, r"^epoch must be on cpu like signals, .*$"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    changes, sentence = BAD_INPUT[case]
    given = arguments(**changes)
    with unchanged(*given["signals"]), pytest.raises(RuntimeError, match=sentence):  # type: ignore[misc]
        rank_barrier(**given)  # type: ignore[arg-type]


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.zexpert.rank_barrier.default, tuple(arguments().values()))


def test_scripted() -> None:
    given = arguments()
    torch.jit.script(rank_barrier)(*given.values())
    assert given["epoch"].item() == 1  # type: ignore[attr-defined]
    assert given["signals"][0].item() == 1  # type: ignore[index]
