# SPDX-License-Identifier: Apache-2.0
"""moe_combine against moe_finalize, which forms the same sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from testing import FLOAT_DTYPES, assert_equal, layouts, unchanged, weight_dtype
from zexpert.ops import moe_combine, moe_finalize

NUM_RANKS, MAX_TOKENS, TOP_K, NUM_ROWS = 3, 5, 4, 11
UNWRITTEN = 99


def out_of_ranks(hidden_size: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.full((NUM_RANKS, MAX_TOKENS, hidden_size), UNWRITTEN, dtype=dtype) for _ in range(NUM_RANKS)]


def random_slots() -> Tensor:
    """Slots without rows, and places without slots: the last of rank 0, all of rank 1, the first of rank 2."""
    slot_rows = torch.randint(-4, NUM_ROWS, (NUM_RANKS, MAX_TOKENS, TOP_K), dtype=torch.int32).clamp(min=-1)
    slot_rows[:, :, 0] = torch.randint(0, NUM_ROWS, (NUM_RANKS, MAX_TOKENS), dtype=torch.int32)
    slot_rows[0, 3:] = slot_rows[1] = slot_rows[2, 0] = -1
    return slot_rows.flatten(0, 1)


def expected_combine(rows: Tensor, slot_rows: Tensor, weights: Tensor | None, out: list[Tensor], rank: int) -> None:
    if weights is None:
        weights = torch.ones(slot_rows.shape, dtype=weight_dtype(rows.dtype))
    nothing = rows.new_zeros(len(slot_rows), rows.size(1))
    sums = moe_finalize(rows, slot_rows, weights, nothing, weights.new_zeros(len(slot_rows)))
    sums = sums.unflatten(0, (NUM_RANKS, MAX_TOKENS))
    has_slots = (slot_rows >= 0).any(dim=1).unflatten(0, (NUM_RANKS, MAX_TOKENS))
    for peer in range(NUM_RANKS):
        out[peer][rank][has_slots[peer]] = sums[peer][has_slots[peer]]


@pytest.mark.every_device("moe_combine")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [0, 1, 257])
def test_against_moe_finalize(hidden_size: int, dtype: torch.dtype, weighted: bool) -> None:
    actual, expected = out_of_ranks(hidden_size, dtype), out_of_ranks(hidden_size, dtype)
    for rank in range(NUM_RANKS):
        rows, slot_rows = torch.randn(NUM_ROWS, hidden_size).to(dtype), random_slots()
        weights = torch.rand(slot_rows.shape, dtype=weight_dtype(dtype)) if weighted else None
        with unchanged(rows, slot_rows, weights):
            moe_combine(rows, slot_rows, weights, actual, rank)
        expected_combine(rows, slot_rows, weights, expected, rank)
    for peer in range(NUM_RANKS):
        assert_equal(actual[peer], expected[peer], f"rank {peer}")
    assert bool((actual[1] == UNWRITTEN).all()), "rank 1 had no places with slots"


@pytest.mark.every_device("moe_combine")
def test_layouts() -> None:
    rows, slot_rows = torch.randn(NUM_ROWS, 57), random_slots()
    weights = torch.rand(slot_rows.shape)
    expected = out_of_ranks(57, torch.float32)
    expected_combine(rows, slot_rows, weights, expected, 1)
    for name, given in layouts(rows).items():
        out = out_of_ranks(57, torch.float32)
        moe_combine(given, slot_rows.t().contiguous().t(), weights.t().contiguous().t(), out, 1)
        for peer in range(NUM_RANKS):
            assert_equal(out[peer], expected[peer], name)


@pytest.mark.every_device("moe_combine")
def test_nothing_to_do() -> None:
    out = out_of_ranks(8, torch.float32)
    with unchanged(*out):
        moe_combine(torch.zeros(0, 8), torch.full((15, TOP_K), -1, dtype=torch.int32), None, out, 0)
        moe_combine(torch.zeros(5, 8), torch.zeros(15, 0, dtype=torch.int32), None, out, 0)
    moe_combine(torch.zeros(5, 8), torch.zeros(0, 2, dtype=torch.int32), None, [torch.zeros(2, 0, 8)] * 2, 0)


def arguments(**changes: object) -> dict[str, object]:
    return {
        "rows": torch.randn(NUM_ROWS, 8),
        "slot_rows": random_slots(),
        "topk_weights": torch.rand(15, TOP_K),
        "out": out_of_ranks(8, torch.float32),
        "rank": 1,
        **changes,
    }


BAD_INPUT = {
    "integer rows": ({"rows": torch.zeros(11, 8).int()}, r"^rows must be float32, .* got int32$"),
    "wide slot_rows": ({"slot_rows": torch.zeros(15, 4).long()}, r"^slot_rows must be int32, got int64$"),
    "slot_rows of another shape": (
        {"slot_rows": torch.zeros(14, 4).int()},
        r"^slot_rows must have shape \[15, 4\] \[ranks \* max_tokens, top_k\], got \[14, 4\]$",
    ),
    "wide topk_weights": (
        {"topk_weights": torch.zeros(15, 4).double()},
        r"^topk_weights must be float32 with float32 rows, got float64$",
    ),
    "topk_weights of another shape": (
        {"topk_weights": torch.zeros(15, 3)},
        r"^topk_weights must have shape \[15, 4\] \[ranks \* max_tokens, top_k\], got \[15, 3\]$",
    ),
    "no ranks": ({"out": []}, r"^out must have a tensor for each of 1 to 64 ranks, got 0$"),
    "no such rank": ({"rank": -1}, r"^rank must be between 0 and 2, got -1$"),
    "out of another dtype": ({"out": [torch.zeros(3, 5, 8).half()] * 3}, r"^out must be float32, got float16$"),
    "out of other ranks": (
        {"out": [torch.zeros(2, 5, 8)] * 3},
        r"^out must have shape \[3, 5, 8\] \[ranks, max_tokens, hidden_size\], got \[2, 5, 8\]$",
    ),
    "no such row": (
        {"slot_rows": torch.full((15, TOP_K), NUM_ROWS, dtype=torch.int32)},
        r"^slot_rows must be in \[-1, 11\), got 11$",
    ),
    "elsewhere": (
        {"topk_weights": torch.zeros(15, TOP_K, device="meta")},
        r"^topk_weights must be on cpu like rows.*$",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    changes, sentence = BAD_INPUT[case]
    given = arguments(**changes)
    with unchanged(*given["out"]), pytest.raises(RuntimeError, match=sentence):  # type: ignore[misc]
        moe_combine(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_opcheck(weighted: bool) -> None:
    given = arguments() if weighted else arguments(topk_weights=None)
    torch.library.opcheck(torch.ops.zexpert.moe_combine.default, tuple(given.values()))


def test_compiled_and_scripted() -> None:
    compiled = torch.compile(moe_combine, fullgraph=True, backend="aot_eager")
    scripted = torch.jit.script(moe_combine)
    given = arguments()
    expected = out_of_ranks(8, torch.float32)
    expected_combine(given["rows"], given["slot_rows"], given["topk_weights"], expected, 1)  # type: ignore[arg-type]
    for function in (compiled, scripted):
        out = out_of_ranks(8, torch.float32)
        function(given["rows"], given["slot_rows"], given["topk_weights"], out, 1)
        for peer in range(NUM_RANKS):
            assert_equal(out[peer], expected[peer], f"rank {peer}")
