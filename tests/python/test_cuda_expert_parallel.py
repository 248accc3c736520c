# SPDX-License-Identifier: Apache-2.0
"""Experts spread over GPUs: NCCL, and memory that GPUs write for each other."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel_cases import (
    EXCHANGES,
    HIDDEN,
    MAX_TOKENS,
    NUM_EXPERTS,
    NUM_TOKENS,
    assert_as_one_process,
    assert_slices_as_one_process,
    make_inputs,
    make_layer,
    make_parallel,
    results,
    runner_of,
)
from testing import assert_equal
from zexpert import FusedMoE

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")

RANKS = [
    pytest.param(n, marks=pytest.mark.skipif(torch.cuda.device_count() < n, reason=f"fewer than {n} CUDA devices"))
    for n in (2, 4)
]
FAILURE_TIMEOUT = 8  # seconds


def start(rank: int, num_ranks: int, folder: str, timeout: int = 60) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout),
        device_id=torch.device("cuda", rank),
    )


def run_rank(rank: int, num_ranks: int, folder: str, body: Callable[[int], None]) -> None:
    start(rank, num_ranks, folder)
    body(rank)
    # A graph that captured NCCL work and still exists would make destroy_process_group wait for ever.
    gc.collect()
    torch.cuda.synchronize()
    dist.destroy_process_group()


def run(body: Callable[[int], None], num_ranks: int, folder: Path) -> None:
    torch.multiprocessing.spawn(run_rank, args=(num_ranks, str(folder), body), nprocs=num_ranks)


def compare(rank: int) -> None:
    """Rank 1 has no token."""
    for exchange in EXCHANGES:
        for dtype in (torch.float32, torch.bfloat16):
            for kind, case in (
                ("identity", "random"),
                ("mixed", "random"),
                ("identity", "one expert"),
                ("identity", "only zero experts"),
            ):
                assert_as_one_process(dist.group.WORLD, kind, exchange, dtype, case, device="cuda")


@pytest.mark.parametrize("num_ranks", RANKS)
def test_as_one_process(num_ranks: int, tmp_path: Path) -> None:
    run(compare, num_ranks, tmp_path)


def repeat(rank: int) -> None:
    inputs = make_inputs("mixed", NUM_TOKENS[rank])
    for exchange, times in (
        ("ragged", 3),
        ("ragged in chunks", 3),
        ("fixed", 3),
        ("symmetric", 200),
        ("symmetric in chunks", 50),
    ):
        layer = make_parallel("mixed", exchange, dist.group.WORLD, torch.bfloat16).cuda()
        first = results(layer, *inputs)
        for _ in range(times):
            for name, value in results(layer, *inputs).items():
                assert_equal(value, first[name], f"{exchange}: {name}")


@pytest.mark.parametrize("num_ranks", RANKS)
def test_repeatable(num_ranks: int, tmp_path: Path) -> None:
    run(repeat, num_ranks, tmp_path)


def large_layer(max_tokens: int, chunk_size: int | None) -> FusedMoE:
    """Sizes at which Hopper's kernels run, and rows that several blocks write."""
    torch.manual_seed(0)
    layer = FusedMoE(
        64,
        6,
        2048,
        512,
        zero_expert_type="identity",
        zero_expert_num=32,
        params_dtype=torch.bfloat16,
        device="cuda",
        expert_parallel_group=dist.group.WORLD,
        chunk_size=chunk_size,
        shared_experts=torch.nn.Linear(2048, 2048, dtype=torch.bfloat16, device="cuda"),
    )
    runner_of(layer).use_exchange("symmetric", max_tokens)
    return layer


def large_inputs(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden_states = torch.randn(num_tokens, 2048, device="cuda", generator=generator).bfloat16()
    return hidden_states, torch.randn(num_tokens, 96, device="cuda", generator=generator)


def compare_exchanges(rank: int) -> None:
    """The same rows in the same places: every bit is that of the exchange "fixed", whatever the numbers of tokens; with
    chunks, where the products have other numbers of rows, of the chunks' own first results."""
    layer, in_chunks, fixed = large_layer(1000, None), large_layer(1000, 300), large_layer(1000, None)
    runner_of(fixed).use_exchange("fixed", 1000)
    with torch.no_grad():
        for step in range(300):
            num_tokens = (1000, 1, 0, 77, 512, 999)[(step + rank) % 6]
            inputs = large_inputs(num_tokens, 1000 * step + rank)
            out, chunked = layer(*inputs), in_chunks(*inputs)
            if step % 30 == 0:
                assert_equal(out, fixed(*inputs), f"step {step}")
                assert_equal(chunked, in_chunks(*inputs), f"step {step} in chunks")
                torch.testing.assert_close(chunked, out)
    runner_of(layer).check_overflow()


@pytest.mark.parametrize("num_ranks", RANKS)
def test_symmetric_is_fixed_bit_for_bit(num_ranks: int, tmp_path: Path) -> None:
    run(compare_exchanges, num_ranks, tmp_path)


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
        for _ in range(3):
            graph.replay()
        assert_equal(out.cpu(), layer(*inputs).cpu(), exchange)
    runner_of(layer).check_overflow()


def capture(rank: int) -> None:
    """Graphs of the exchanges for which the host does not wait."""
    with torch.no_grad():
        for exchange in ("fixed", "all_gather", "symmetric", "symmetric in chunks"):
            replay_captured(rank, exchange)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_graphs(num_ranks: int, tmp_path: Path) -> None:
    run(capture, num_ranks, tmp_path)


def slices(rank: int) -> None:
    for num_tokens in (0, 60):
        assert_slices_as_one_process(dist.group.WORLD, num_tokens, device="cuda")


@pytest.mark.parametrize("num_ranks", RANKS)
def test_tensor_parallel(num_ranks: int, tmp_path: Path) -> None:
    run(slices, num_ranks, tmp_path)


def checkpoints(rank: int) -> None:
    """What all ranks save, half of them load."""
    import torch.distributed.checkpoint as dcp

    num_ranks = dist.get_world_size()
    folders = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folders)
    dcp.save(make_layer("mixed", expert_parallel_group=dist.group.WORLD).cuda().state_dict(), checkpoint_id=folders[0])
    half = dist.new_group(list(range(num_ranks // 2)))
    if rank < num_ranks // 2:
        expected = make_layer("mixed", expert_parallel_group=half)
        layer = make_layer("mixed", expert_parallel_group=half).cuda()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
        state = layer.state_dict()
        dcp.load(state, checkpoint_id=folders[0], process_group=half)
        layer.load_state_dict(state)
        for name, parameter in layer.named_parameters():
            assert_equal(parameter.detach().cpu(), expected.get_parameter(name).detach(), name)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folders[0])


@pytest.mark.parametrize("num_ranks", RANKS)
def test_checkpoint_of_all_ranks_under_half(num_ranks: int, tmp_path: Path) -> None:
    run(checkpoints, num_ranks, tmp_path)


class Residual(torch.nn.Module):
    """x + MoE(x) after a linear layer."""

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN)
        self.classifier = torch.nn.Linear(HIDDEN, NUM_EXPERTS + 3)
        self.moe = make_layer("identity", expert_parallel_group=group)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.linear(hidden_states)
        out: Tensor = hidden_states + self.moe(hidden_states, self.classifier(hidden_states))
        return out


def train_sharded(rank: int) -> None:
    """FSDP2 over all ranks, experts over the ranks of a row of the mesh: the losses of one GPU, for 50 steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    num_ranks = dist.get_world_size()
    mesh = init_device_mesh("cuda", (num_ranks // 2, 2), mesh_dim_names=("data", "expert"))
    flat = init_device_mesh("cuda", (num_ranks,))
    for exchange in ("ragged", "symmetric"):
        model, alone = Residual(mesh["expert"]).cuda(), Residual(None).cuda()
        if exchange == "symmetric":
            runner_of(model.moe).use_exchange(exchange, MAX_TOKENS)
        experts = [model.moe.w13_weight, model.moe.w2_weight]
        fully_shard(model, mesh=flat, ignored_params=set(experts))
        optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, alone)]
        losses = []
        for step in range(50):
            generator = torch.Generator("cuda").manual_seed(step)
            inputs = torch.randn(num_ranks, MAX_TOKENS, HIDDEN, device="cuda", generator=generator)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = (model(inputs[rank]) - inputs[rank].tanh()).square().mean()
            loss.backward()
            for weight in experts:
                dist.all_reduce(weight.grad, group=mesh["data"].get_group())
                weight.grad /= num_ranks
            loss_alone = (alone(inputs.flatten(0, 1)) - inputs.flatten(0, 1).tanh()).square().mean()
            loss_alone.backward()
            for optimizer in optimizers:
                optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean, dist.ReduceOp.AVG)
            losses.append((float(mean), float(loss_alone.detach())))
        assert losses[-1][1] < 0.7 * losses[0][1], "it learns"
        torch.testing.assert_close(*torch.tensor(losses, dtype=torch.float64).unbind(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_training_on_a_mesh(num_ranks: int, tmp_path: Path) -> None:
    run(train_sharded, num_ranks, tmp_path)


def overflow(rank: int) -> None:
    """Nobody waits to know: rows without room make NaN, and check_overflow tells."""
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


def test_rows_beyond_the_capacity(tmp_path: Path) -> None:
    run(overflow, 2, tmp_path)


def one_rank_fails(rank: int, num_ranks: int, folder: str, how: str) -> None:
    start(rank, num_ranks, folder, FAILURE_TIMEOUT)
    layer = make_parallel("identity", "symmetric", dist.group.WORLD, torch.bfloat16).cuda()
    runner = runner_of(layer)
    hidden_states, logits, _ = make_inputs("identity", MAX_TOKENS)
    inputs = hidden_states.cuda().bfloat16(), logits.cuda().float()
    with torch.no_grad():
        good = layer(*inputs)
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        if rank == 1:
            if how == "raises":
                too_many = torch.zeros(MAX_TOKENS + 1, HIDDEN, dtype=torch.bfloat16, device="cuda")
                with pytest.raises(ValueError, match="hidden_states must have at most the exchange's max_tokens"):
                    layer(too_many, torch.zeros(MAX_TOKENS + 1, logits.size(1), device="cuda"))
            os._exit(0)
        begin = time.monotonic()
        out = layer(*inputs)  # the host does not wait
        torch.cuda.synchronize()
        assert time.monotonic() - begin < 4 * FAILURE_TIMEOUT
        has_rows = good.isfinite().all(dim=1) & out.isnan().all(dim=1)
        assert has_rows.float().mean() > 0.5, "tokens that other ranks had a part of must be NaN"
        for call in (lambda: layer(*inputs), runner.check_overflow):
            with pytest.raises(
                RuntimeError, match=f"^rank {rank} of the {num_ranks} that share the experts could not exchange rows"
            ):
                call()
    assert float((torch.ones(1000, device="cuda") + 1).sum()) == 2000.0, "the GPU is of use"
    Path(folder, f"told{rank}").touch()
    os._exit(0)  # threads of a group that failed must not meet the end of Python


@pytest.mark.parametrize("how", ["ends", "raises"])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_others_learn_of_a_rank_that_fails(num_ranks: int, how: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank_fails, args=(num_ranks, str(tmp_path), how), nprocs=num_ranks)
    assert len(list(tmp_path.glob("told*"))) == num_ranks - 1
