# SPDX-License-Identifier: Apache-2.0
"""Experts spread over two GPUs, with NCCL."""

from __future__ import annotations

import copy
import gc
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel_cases import (
    EXCHANGES,
    MAX_TOKENS,
    NUM_EXPERTS,
    NUM_TOKENS,
    assert_as_one_process,
    make_inputs,
    make_parallel,
    results,
    runner_of,
)
from testing import assert_equal

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


def start(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
        device_id=torch.device("cuda", rank),
    )


def compare(rank: int, folder: str) -> None:
    start(rank, folder)
    for exchange in EXCHANGES:
        for dtype in (torch.float32, torch.bfloat16):
            for kind, case in (
                ("identity", "random"),
                ("mixed", "random"),
                ("identity", "one expert"),
                ("identity", "only zero experts"),
            ):
                assert_as_one_process(dist.group.WORLD, kind, exchange, dtype, case, device="cuda")
    dist.destroy_process_group()


def test_as_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare, args=(str(tmp_path),), nprocs=2)


def repeat(rank: int, folder: str) -> None:
    start(rank, folder)
    inputs = make_inputs("mixed", NUM_TOKENS[rank])
    for exchange in ("ragged", "ragged in chunks"):
        layer = make_parallel("mixed", exchange, dist.group.WORLD, torch.bfloat16).cuda()
        first = results(layer, *inputs)
        for name, value in results(layer, *inputs).items():
            assert_equal(value, first[name], f"{exchange}: {name}")
    dist.destroy_process_group()


def test_repeatable(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(repeat, args=(str(tmp_path),), nprocs=2)


def replay_captured(rank: int, exchange: str) -> None:
    """Captures the layer, and replays the graph with tokens that it has not seen. The graph ends with this function."""
    num_tokens = MAX_TOKENS - 2 * rank
    hidden_states, logits, _ = make_inputs("identity", 2 * num_tokens)
    first, second = (
        (hidden_states[half].cuda().bfloat16(), logits[half].cuda().float())
        for half in (slice(0, num_tokens), slice(num_tokens, None))
    )
    layer = make_parallel("identity", exchange, dist.group.WORLD, torch.bfloat16).cuda()
    given = copy.deepcopy(first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = layer(*given)
    for inputs in (first, second):
        for target, source in zip(given, inputs, strict=True):
            target.copy_(source)
        graph.replay()
        assert_equal(out.cpu(), layer(*inputs).cpu(), exchange)
    runner_of(layer).check_overflow()


def capture(rank: int, folder: str) -> None:
    """Graphs of the exchanges for which the host does not wait."""
    start(rank, folder)
    with torch.no_grad():
        for exchange in ("fixed", "all_gather"):
            replay_captured(rank, exchange)
    # A graph that captured NCCL work and still exists would make destroy_process_group wait for ever.
    gc.collect()
    torch.cuda.synchronize()
    dist.destroy_process_group()


def test_graphs(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(capture, args=(str(tmp_path),), nprocs=2)


def overflow(rank: int, folder: str) -> None:
    """Nobody waits to know: rows without room make NaN, and check_overflow tells."""
    start(rank, folder)
    layer = make_parallel("identity", "fixed", dist.group.WORLD, torch.bfloat16).cuda()
    runner_of(layer).use_exchange("fixed", max_tokens=8, capacity=3)
    hidden_states, logits, _ = make_inputs("identity", 5 if rank == 0 else 3)
    logits[:, : NUM_EXPERTS // 2] = logits[:, NUM_EXPERTS:] = -torch.inf
    with torch.no_grad():
        out = layer(hidden_states.cuda().bfloat16(), logits.cuda().float())
    assert out.isnan().all(dim=1).tolist() == [False] * 3 + [True] * (len(out) - 3)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"^capacity is too small: rank 0 dropped 2 rows"):
            runner_of(layer).check_overflow()
    runner_of(layer).check_overflow()
    dist.destroy_process_group()


def test_rows_beyond_the_capacity(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(overflow, args=(str(tmp_path),), nprocs=2)
