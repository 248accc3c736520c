# SPDX-License-Identifier: Apache-2.0
"""Exchanges that are too small, ranks that fail, bad calls, and other ways to run the layer."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from layer_cases import HIDDEN
from parallel_cases import (
    EXCHANGES,
    NUM_EXPERTS,
    NUM_TOKENS,
    make_inputs,
    make_layer,
    make_parallel,
    runner_of,
)
from ranks import Ranks, start_rank
from testing import assert_equal
from zexpert import FusedMoE

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


def overflow(group: Any) -> str:
    """Rank 0's tokens all go to rank 1, of which 3 have room."""
    layer = make_parallel("identity", "fixed", group)
    runner = runner_of(layer)
    runner.use_exchange("fixed", max_tokens=8, capacity=3)
    num_tokens = 5 if dist.get_rank(group) == 0 else 3
    hidden_states, logits, _ = make_inputs("identity", num_tokens)
    logits[:, :6] = -torch.inf
    logits[:, NUM_EXPERTS:] = -torch.inf
    inputs = hidden_states.float(), logits.float()
    with torch.no_grad():
        if dist.get_rank(group) == 1:
            for _ in range(2):
                torch.testing.assert_close(layer(*inputs), make_layer("identity")(*inputs))
            return "as one process"
        with pytest.raises(RuntimeError) as error:
            layer(*inputs)
        # As on a GPU, where the host does not check in between.
        runner.check_overflow = lambda: None  # type: ignore[method-assign]
        out = layer(*inputs)
        del runner.check_overflow
        expected = make_layer("identity")(*inputs)
        torch.testing.assert_close(out[:3], expected[:3])
        assert bool(out[3:].isnan().all())
        with pytest.raises(RuntimeError, match="rank 0 dropped 2 rows"):
            runner.check_overflow()
        runner.check_overflow()
    return str(error.value)


def test_rows_beyond_the_capacity_are_an_error(ranks: Ranks) -> None:
    message, fine = ranks.run(overflow, 2)
    assert message == ("capacity is too small: rank 0 dropped 2 rows and their outputs are NaN; increase capacity")
    assert fine == "as one process"


def bad_calls(group: Any) -> None:
    layer = make_parallel("plain", "fixed", group)
    runner = runner_of(layer)
    with pytest.raises(
        ValueError, match=r"^hidden_states must have at most the exchange's max_tokens \(61\) .* got 62$"
    ):
        layer(torch.zeros(62, HIDDEN), torch.zeros(62, NUM_EXPERTS))
    for arguments, message in (
        (([],), r'^name must be "ragged", "fixed", "all_gather" or "symmetric", got \[\]$'),
        (("ring",), r'^name must be "ragged", "fixed", "all_gather" or "symmetric", got \'ring\'$'),
        (("ragged", 3), r'^max_tokens must be None with the exchange "ragged", got 3$'),
        (("fixed",), r'^max_tokens is required with the exchange "fixed"$'),
        (("fixed", 3, 4), r"^capacity must be at most max_tokens \(3\), got 4$"),
        (("fixed", 0), r"^max_tokens must be an integer of at least 1, got 0$"),
        (("symmetric",), r'^max_tokens is required with the exchange "symmetric"$'),
        (("symmetric", 3, 3), r'^capacity must be None with the exchange "symmetric", got 3$'),
        (("all_gather", 3, 3), r'^capacity must be None with the exchange "all_gather", got 3$'),
    ):
        with pytest.raises(ValueError, match=message):
            runner.use_exchange(*arguments)
    assert runner.exchange_name == "fixed"
    with (
        mock.patch.object(runner.group, "size", 65),
        pytest.raises(ValueError, match=r'^the ranks must be at most 64 with the exchange "symmetric", got 65$'),
    ):
        runner.use_exchange("symmetric", 3)
    chunked = runner_of(make_parallel("plain", "ragged in chunks", group))
    with pytest.raises(ValueError, match=r'^chunk_size must be None with the exchange "fixed", got 20$'):
        chunked.use_exchange("fixed", 3)

    once = torch.arange(NUM_EXPERTS)[:, None]
    for wrong, message in (
        ({"expert_parallel_group": 3}, r"^expert_parallel_group must be a process group .* or a DeviceMesh, got 3$"),
        ({"chunk_size": 0}, r"^chunk_size must be an integer of at least 1, got 0$"),
        ({"logical_to_physical_map": [[1]]}, "^logical_to_physical_map must be a tensor, got list$"),
        (
            {"logical_to_physical_map": once, "device": "meta"},
            '^logical_to_physical_map needs a device that holds its values, got "meta"$',
        ),
        ({"logical_to_physical_map": once * 2}, r"^logical_to_physical_map must name every physical .* got 12 entries"),
        ({"logical_to_physical_map": once.repeat(1, 2)}, r"^logical_to_physical_map must name every physical expert"),
        ({"logical_to_physical_map": once, "expert_parallel_group": None}, "^logical_to_physical_map needs an expert_"),
    ):
        with pytest.raises(ValueError, match=message):
            make_layer("plain", **{"expert_parallel_group": group, **wrong})


def other_errors(group: Any) -> None:
    """What is nobody else's doing stays as it is."""
    exchanging = runner_of(make_parallel("plain", "ragged", group)).group.exchanging
    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"), exchanging():
        raise torch.OutOfMemoryError("no memory")
    for error in (RuntimeError("Connection closed"), dist.DistBackendError("Connection closed")):
        with pytest.raises(RuntimeError, match=f"{CANNOT_EXCHANGE}: Connection closed$"), exchanging():
            raise error


def uneven(group: Any) -> None:
    with pytest.raises(ValueError, match=r"^num_experts must be a multiple .* expert_parallel_group \(2\), got 7$"):
        FusedMoE(7, 2, 8, 4, expert_parallel_group=group)


def test_bad_calls(ranks: Ranks) -> None:
    ranks.run(bad_calls, 1)
    ranks.run(other_errors, 1)
    ranks.run(uneven, 2)


def without_room(group: Any) -> str:
    """Rank 1 has no room for the memory, and nobody uses it."""
    layer = make_parallel("plain", "symmetric", group)
    runner_of(layer).use_exchange("symmetric", max_tokens=7)
    has_room = dist.get_rank(group) == 0
    full = contextlib.nullcontext() if has_room else mock.patch("os.posix_fallocate", side_effect=OSError("it is full"))
    inputs = torch.zeros(3, HIDDEN), torch.zeros(3, NUM_EXPERTS)
    with full, pytest.raises(RuntimeError) as error:
        layer(*inputs)
    assert layer(*inputs).shape == (3, HIDDEN), "the next call makes it"
    return str(error.value)


def test_every_rank_says_that_memory_cannot_be_shared(ranks: Ranks) -> None:
    for message in ranks.run(without_room, 2):
        assert message.startswith('the exchange "symmetric" needs CPUs of one host that share memory: /')
        assert message.endswith("bytes: it is full")


# --- Ranks that were set up differently


def call_with(group: Any, case: str) -> str:
    """The error of a layer that differs on rank 1, and after it a call of equal layers."""
    is_other = dist.get_rank(group) == 1
    dtype, arguments = torch.float32, {}
    if case == "dtype":
        dtype = torch.float16 if is_other else torch.bfloat16
    elif case == "hidden_size":
        arguments = {"hidden_size": 16 if is_other else 8}
    elif case == "top_k":
        arguments = {"top_k": 3 if is_other else 2}
    elif case == "num_experts":
        arguments = {"num_experts": 16 if is_other else 8}
    elif case == "intermediate_size":
        arguments = {"intermediate_size": 6 if is_other else 4}
    elif case == "num_logits":
        arguments = {"zero_expert_type": "drop", "zero_expert_num": 3 if is_other else 2}
    elif case == "num_identity_experts":
        arguments = {"zero_expert_type": "drop" if is_other else "identity", "zero_expert_num": 2}
    elif case == "renormalize":
        arguments = {"renormalize": is_other}
    sizes = {"num_experts": 8, "top_k": 2, "hidden_size": 8, "intermediate_size": 4, **arguments}
    layer = FusedMoE(**sizes, params_dtype=dtype, expert_parallel_group=group)  # type: ignore[arg-type]
    if case == "exchange" and is_other:
        runner_of(layer).use_exchange("fixed", max_tokens=5)
    elif case == "capacity":
        runner_of(layer).use_exchange("fixed", max_tokens=5, capacity=4 if is_other else 5)
    width = sizes["num_experts"] + sizes.get("zero_expert_num", 0)
    inputs = torch.randn(3, sizes["hidden_size"], dtype=dtype), torch.randn(3, width)
    grad_mode = case != "torch.is_grad_enabled()" or not is_other
    with torch.set_grad_enabled(grad_mode), pytest.raises(ValueError, match="same on all ranks") as error:
        layer(*inputs)
    if case == "exchange":
        runner_of(layer).use_exchange("fixed", max_tokens=5)
        assert layer(*inputs).shape == (3, 8)
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "values"),
    [
        ("dtype", "torch.bfloat16 on rank 0 and torch.float16 on rank 1"),
        ("hidden_size", "8 on rank 0 and 16 on rank 1"),
        ("top_k", "2 on rank 0 and 3 on rank 1"),
        ("num_experts", "8 on rank 0 and 16 on rank 1"),
        ("intermediate_size", "4 on rank 0 and 6 on rank 1"),
        ("num_logits", "10 on rank 0 and 11 on rank 1"),
        ("num_identity_experts", "2 on rank 0 and 0 on rank 1"),
        ("renormalize", "False on rank 0 and True on rank 1"),
        ("torch.is_grad_enabled()", "True on rank 0 and False on rank 1"),
        ("exchange", "ragged on rank 0 and fixed on rank 1"),
        ("capacity", "5 on rank 0 and 4 on rank 1"),
    ],
)
def test_every_rank_names_what_differs(case: str, values: str, ranks: Ranks) -> None:
    message = f"{case} must be the same on all ranks of expert_parallel_group, got {values}"
    assert ranks.run(call_with, 2, case) == [message] * 2


def slices_with(group: Any, case: str) -> str:
    """The error of a layer whose ranks differ; in the number of tokens also at a later call, and then a right one."""
    is_other = dist.get_rank(group) == 1
    dtype = torch.float16 if case == "dtype" and is_other else torch.bfloat16
    size = 6 if case == "intermediate_size" and is_other else 4
    layer = FusedMoE(4, 2, 8, size, params_dtype=dtype, tensor_parallel_group=group)
    num_tokens = 5 if case.startswith("num_tokens") and is_other else 3
    inputs = torch.randn(num_tokens, 8, dtype=dtype), torch.randn(num_tokens, 4)
    if case == "num_tokens later":
        layer(inputs[0][:2], inputs[1][:2])
    with pytest.raises(ValueError, match="same on all ranks") as error:
        layer(*inputs)
    if case == "num_tokens later":
        assert layer(inputs[0][:3], inputs[1][:3]).shape == (3, 8)
    return str(error.value)


@pytest.mark.parametrize(
    ("case", "values"),
    [
        ("dtype", "torch.bfloat16 on rank 0 and torch.float16 on rank 1"),
        ("intermediate_size", "4 on rank 0 and 6 on rank 1"),
        ("num_tokens", "3 on rank 0 and 5 on rank 1"),
        ("num_tokens later", "3 on rank 0 and 5 on rank 1"),
    ],
)
def test_every_rank_of_slices_names_what_differs(case: str, values: str, ranks: Ranks) -> None:
    message = f"{case.split()[0]} must be the same on all ranks of tensor_parallel_group, got {values}"
    assert ranks.run(slices_with, 2, case) == [message] * 2


# --- Failures


TIMEOUT = 3  # seconds
CANNOT_EXCHANGE = (
    "could not exchange rows with the others: one of them raised an error, ended, or came later than the process "
    "group's timeout"
)


def one_rank_fails(rank: int, folder: str, how: str, exchange: str) -> None:
    torch.set_num_threads(1)
    start_rank(rank, 3, f"{folder}/rendezvous", timedelta(seconds=TIMEOUT))
    layer = make_parallel("identity", exchange, dist.group.WORLD)
    hidden_states, logits = (tensor.float() for tensor in make_inputs("identity", 4)[:2])
    layer(hidden_states, logits)
    dist.barrier()
    started = time.monotonic()
    if rank == 1 and how == "ends":
        os._exit(0)
    elif rank == 1:
        with pytest.raises(ValueError, match="router_logits must have one column per expert"):
            layer(hidden_states, logits[:, 1:])
        Path(folder, "told1").touch()
        time.sleep(TIMEOUT + 1)  # busy with something else
    else:
        with pytest.raises(RuntimeError, match=f"^rank {rank} of the 3 that share the experts {CANNOT_EXCHANGE}: .+"):
            layer(hidden_states, logits)
        assert time.monotonic() - started < 5 * TIMEOUT
        if exchange == "symmetric":
            for call in (lambda: layer(hidden_states, logits), runner_of(layer).check_overflow):
                with pytest.raises(RuntimeError, match=f"{CANNOT_EXCHANGE}: rank [0-2] did not come within 3000 ms"):
                    call()
        Path(folder, f"told{rank}").touch()
    os._exit(0)  # threads of a group that failed must not meet the end of Python


@pytest.mark.parametrize("exchange", ["ragged", "symmetric"])
@pytest.mark.parametrize("how", ["ends", "raises"])
def test_others_learn_of_a_rank_that_fails(how: str, exchange: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_rank_fails, args=(str(tmp_path), how, exchange), nprocs=3)
    told = sorted(path.name for path in tmp_path.glob("told*"))
    assert told == (["told0", "told2"] if how == "ends" else ["told0", "told1", "told2"])


# --- Scripts, graphs, copies


def other_ways_to_run(group: Any) -> None:
    layer = make_parallel("identity", "ragged", group)
    with pytest.raises(RuntimeError, match=r"^torch.jit.script cannot compile a layer with experts spread over ranks$"):
        torch.jit.script(nn.Sequential(layer))
    inputs = [tensor.float() for tensor in make_inputs("identity", NUM_TOKENS[dist.get_rank(group)])[:2]]
    with torch.no_grad():
        expected = layer(*inputs)
        assert_equal(torch.compile(layer, backend="aot_eager")(*inputs), expected, "compiled")
        assert_equal(copy.deepcopy(layer)(*inputs), expected, "copy")
        for exchange in EXCHANGES:
            other = make_parallel("identity", exchange, group)
            with torch.inference_mode():
                first = other(*inputs).clone()
            assert_equal(other(*inputs), first, f"{exchange} after inference mode")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(*inputs).dtype == torch.bfloat16
    assert "rank" in repr(layer)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_other_ways_to_run(ranks: Ranks) -> None:
    ranks.run(other_ways_to_run, 2)
