# SPDX-License-Identifier: Apache-2.0
"""moe_dispatch against a plain loop: several ranks in one process, each with memory of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from testing import FLOAT_DTYPES, assert_equal, layouts, unchanged, weight_dtype
from zexpert.ops import moe_combine, moe_dispatch, moe_finalize, moe_plan

NUM_RANKS, MAX_TOKENS, TOP_K, NUM_LOCAL = 3, 9, 4, 5
UNWRITTEN = 99


def memory_of_ranks(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.full(shape, UNWRITTEN, dtype=dtype) for _ in range(NUM_RANKS)]


def shared_memory(hidden_size: int, dtype: torch.dtype, max_tokens: int = MAX_TOKENS) -> tuple[list[Tensor], ...]:
    """rows, ids and weights."""
    return (
        memory_of_ranks((NUM_RANKS, max_tokens, hidden_size), dtype),
        memory_of_ranks((NUM_RANKS, max_tokens, TOP_K), torch.int32),
        memory_of_ranks((NUM_RANKS, max_tokens, TOP_K), weight_dtype(dtype)),
    )


def random_tokens(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, topk_ids and topk_weights; some slots have no work, and so has every slot of token 1."""
    ids = torch.randint(-4, NUM_RANKS * NUM_LOCAL, (num_tokens, TOP_K)).clamp(min=-1)
    ids[1:2] = -1
    return torch.randn(num_tokens, hidden_size).to(dtype), ids, torch.rand(num_tokens, TOP_K, dtype=weight_dtype(dtype))


def expected_dispatch(
    tokens: tuple[Tensor, Tensor, Tensor], memory: tuple[list[Tensor], ...], rank: int
) -> tuple[Tensor, Tensor]:
    """Writes into `memory` as moe_dispatch must, and returns what it must."""
    hidden_states, topk_ids, topk_weights = tokens
    rows, ids, weights = memory
    max_tokens = rows[0].size(1)
    slot_rows = torch.full((hidden_states.size(0), NUM_RANKS), -1, dtype=torch.int32)
    row_tokens = torch.full((NUM_RANKS, max_tokens), -1, dtype=torch.int32)
    for peer in range(NUM_RANKS):
        ids[peer][rank] = -1
        position = 0
        for token, experts in enumerate(topk_ids.tolist()):
            local = [expert - peer * NUM_LOCAL for expert in experts]
            local = [expert if 0 <= expert < NUM_LOCAL else -1 for expert in local]
            if max(local) >= 0:
                slot_rows[token, peer] = peer * max_tokens + position
                row_tokens[peer, position] = token
                rows[peer][rank, position] = hidden_states[token]
                ids[peer][rank, position] = torch.tensor(local)
                weights[peer][rank, position] = topk_weights[token]
                position += 1
    return slot_rows, row_tokens


@pytest.mark.every_device("moe_dispatch")
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [0, 1, 257])
@pytest.mark.parametrize("num_tokens", [0, 1, MAX_TOKENS])
def test_against_a_loop(num_tokens: int, hidden_size: int, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    actual, expected = shared_memory(hidden_size, dtype), shared_memory(hidden_size, dtype)
    for rank in (2, 0, 1):
        hidden_states, topk_ids, topk_weights = random_tokens(num_tokens, hidden_size, dtype)
        with unchanged(hidden_states, topk_ids, topk_weights):
            places = moe_dispatch(hidden_states, topk_ids.to(ids_dtype), topk_weights, *actual, rank, NUM_LOCAL)
        wanted = expected_dispatch((hidden_states, topk_ids, topk_weights), expected, rank)
        for name, value, right in zip(("slot_rows", "row_tokens"), places, wanted, strict=True):
            assert_equal(value, right, name)
    for name, values, rights in zip(("rows", "ids", "weights"), actual, expected, strict=True):
        for peer in range(NUM_RANKS):
            assert_equal(values[peer], rights[peer], f"{name} of rank {peer}")


@pytest.mark.every_device("moe_dispatch")
def test_many_tokens() -> None:
    """Enough for several threads."""
    actual, expected = shared_memory(64, torch.float32, 3000), shared_memory(64, torch.float32, 3000)
    tokens = random_tokens(2900, 64, torch.float32)
    assert_equal(
        moe_dispatch(*tokens, *actual, 1, NUM_LOCAL)[0], expected_dispatch(tokens, expected, 1)[0], "slot_rows"
    )
    for peer in range(NUM_RANKS):
        assert_equal(actual[0][peer], expected[0][peer], f"rows of rank {peer}")


@pytest.mark.every_device("moe_dispatch")
def test_layouts() -> None:
    hidden_states, topk_ids, topk_weights = random_tokens(7, 57, torch.float32)
    expected = shared_memory(57, torch.float32)
    expected_dispatch((hidden_states, topk_ids, topk_weights), expected, 0)
    for name, given in layouts(hidden_states).items():
        memory = shared_memory(57, torch.float32)
        moe_dispatch(given, topk_ids.t().contiguous().t(), topk_weights.t().contiguous().t(), *memory, 0, NUM_LOCAL)
        for peer in range(NUM_RANKS):
            assert_equal(memory[0][peer], expected[0][peer], name)
            assert_equal(memory[2][peer], expected[2][peer], name)


@pytest.mark.every_device("moe_dispatch")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_there_and_back(dtype: torch.dtype) -> None:
    """Experts that double a row: combine and the sum over ranks give what one process computes, every weight a power of
    two so that nothing rounds."""
    tokens = [random_tokens(num_tokens, 8, dtype) for num_tokens in (9, 0, 5)]
    for hidden_states, _, weights in tokens:
        hidden_states.copy_(torch.randint(-8, 8, hidden_states.shape))
        weights.copy_(2.0 ** -torch.randint(0, 3, weights.shape))
    memory = shared_memory(8, dtype)
    sums = memory_of_ranks((NUM_RANKS, MAX_TOKENS, 8), dtype)
    places = [moe_dispatch(*tokens[rank], *memory, rank, NUM_LOCAL) for rank in range(NUM_RANKS)]
    for rank in range(NUM_RANKS):
        rows, ids, weights = (arrays[rank].flatten(0, 1) for arrays in memory)
        plan = moe_plan(ids, NUM_LOCAL)
        expert_rows = 2 * rows[plan.row_slots.clamp(min=0).long() // TOP_K]
        moe_combine(expert_rows, plan.slot_rows, weights, sums, rank)
    for rank, (hidden_states, topk_ids, topk_weights) in enumerate(tokens):
        slot_rows = places[rank][0]
        ones = torch.ones_like(slot_rows, dtype=topk_weights.dtype)
        zero_weight = topk_weights.new_zeros(len(hidden_states))
        out = moe_finalize(sums[rank].flatten(0, 1), slot_rows, ones, hidden_states, zero_weight)
        weight = topk_weights.masked_fill(topk_ids < 0, 0).sum(dim=1, keepdim=True)
        assert_equal(out, (2 * weight * hidden_states).to(dtype), f"rank {rank}")


def arguments(**changes: object) -> dict[str, object]:
    hidden_states, topk_ids, topk_weights = random_tokens(4, 8, torch.float32)
    rows, ids, weights = shared_memory(8, torch.float32)
    return {
        "hidden_states": hidden_states,
        "topk_ids": topk_ids,
        "topk_weights": topk_weights,
        "rows": rows,
        "ids": ids,
        "weights": weights,
        "rank": 1,
        "num_local_experts": NUM_LOCAL,
        **changes,
    }


BAD_INPUT = {
    "integer hidden_states": ({"hidden_states": torch.zeros(4, 8).int()}, r"^hidden_states must be float32, .*int32$"),
    "floating topk_ids": ({"topk_ids": torch.zeros(4, TOP_K)}, r"^topk_ids must be int32 or int64, got float32$"),
    "wide topk_weights": (
        {"topk_weights": torch.zeros(4, TOP_K).double()},
        r"^topk_weights must be float32 with float32 hidden_states, got float64$",
    ),
    "topk_weights of another shape": (
        {"topk_weights": torch.zeros(4, 3)},
        r"^topk_weights must have shape \[4, 4\] \[tokens, top_k\], got \[4, 3\]$",
    ),
    "no ranks": ({"rows": []}, r"^rows must have a tensor for each of 1 to 64 ranks, got 0$"),
    "no such rank": ({"rank": 3}, r"^rank must be between 0 and 2, got 3$"),
    "ids of fewer ranks": (
        {"ids": [torch.zeros(3, 9, TOP_K).int()] * 2},
        r"^ids must have a tensor for each of the 3 ranks, got 2$",
    ),
    "rows of another dtype": ({"rows": [torch.zeros(3, 9, 8).half()] * 3}, r"^rows must be float32, got float16$"),
    "rows of another width": (
        {"rows": [torch.zeros(3, 9, 7)] * 3},
        r"^rows must have shape \[3, 9, 8\] \[ranks, max_tokens, hidden_size\], got \[3, 9, 7\]$",
    ),
    "rows apart": (
        {"rows": [torch.zeros(3, 9, 16)[:, :, :8]] * 3},
        r"^rows must be contiguous, got strides \[144, 16, 1\]$",
    ),
    "weights of another shape": (
        {"weights": [torch.zeros(3, 8, TOP_K)] * 3},
        r"^weights must have shape \[3, 9, 4\] \[ranks, max_tokens, top_k\], got \[3, 8, 4\]$",
    ),
    "too many tokens": (
        {
            "rows": [torch.zeros(3, 3, 8)] * 3,
            "ids": [torch.zeros(3, 3, 4).int()] * 3,
            "weights": [torch.zeros(3, 3, 4)] * 3,
        },
        r"^hidden_states must have at most max_tokens \(3\) tokens, got 4$",
    ),
    "no such expert": (
        {"topk_ids": torch.full((4, TOP_K), 15)},
        r"^topk_ids must be in \[-1, 15\), got 15$",
    ),
    "negative num_local_experts": ({"num_local_experts": -1}, r"^num_local_experts must not be negative, got -1$"),
    "elsewhere": (
        {"topk_ids": torch.zeros(4, TOP_K, device="meta").int()},
        r"^topk_ids must be on cpu like hidden_states, .*$",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    changes, sentence = BAD_INPUT[case]
    given = arguments(**changes)
    memory = [tensor for name in ("rows", "ids", "weights") for tensor in given[name]]  # type: ignore[attr-defined]
    with unchanged(*memory), pytest.raises(RuntimeError, match=sentence):
        moe_dispatch(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_opcheck(num_tokens: int) -> None:
    tokens = random_tokens(num_tokens, 8, torch.float32)
    torch.library.opcheck(
        torch.ops.zexpert.moe_dispatch.default, (*tokens, *shared_memory(8, torch.float32), 1, NUM_LOCAL)
    )


def test_compiled_and_scripted() -> None:
    compiled = torch.compile(moe_dispatch, fullgraph=True, backend="aot_eager")
    scripted = torch.jit.script(moe_dispatch)
    tokens = random_tokens(6, 8, torch.float32)
    expected = shared_memory(8, torch.float32)
    slot_rows, row_tokens = expected_dispatch(tokens, expected, 2)
    for function in (compiled, scripted):
        memory = shared_memory(8, torch.float32)
        places = function(*tokens, *memory, 2, NUM_LOCAL)
        assert_equal(places[0], slot_rows, "slot_rows")
        assert_equal(places[1], row_tokens, "row_tokens")
        for peer in range(NUM_RANKS):
            assert_equal(memory[0][peer], expected[0][peer], f"rows of rank {peer}")
