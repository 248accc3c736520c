# SPDX-License-Identifier: Apache-2.0
"""moe_permute against the reference: it copies, so every bit must agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
from testing import FLOAT_DTYPES, assert_equal, layouts, unchanged
from zexpert.ops import DispatchPlan, moe_permute, moe_plan


def plan_of(num_tokens: int, top_k: int, num_experts: int = 5, lowest: int = -1) -> DispatchPlan:
    return moe_plan(torch.randint(lowest, num_experts, (num_tokens, top_k)), num_experts)


@pytest.mark.every_device("moe_permute")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [0, 1, 200, 257])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("by_token", [False, True], ids=["by row", "by token"])
def test_against_reference(by_token: bool, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    hidden_states = torch.randn(num_tokens, hidden_size).to(dtype)
    plan = plan_of(num_tokens, 3)
    num_rows = int(plan.expert_offsets[-1])
    with unchanged(hidden_states, *plan):
        rows = moe_permute(
            hidden_states, plan.row_slots, plan.expert_offsets, 3, slot_rows=plan.slot_rows if by_token else None
        )
    assert rows.shape == (num_tokens * 3, hidden_size)
    expected = reference.moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, 3)
    assert_equal(rows[:num_rows], expected[:num_rows])


@pytest.mark.every_device("moe_permute")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    hidden_states = torch.randn(7, 57).to(dtype)
    plan = plan_of(7, 3, lowest=0)
    expected = moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, 3)
    for name, given in {**layouts(hidden_states), "expanded": hidden_states[:1].expand(7, 57)}.items():
        for slot_rows in (None, plan.slot_rows, plan.slot_rows.t().contiguous().t()):
            rows = moe_permute(given, plan.row_slots, plan.expert_offsets, 3, slot_rows)
            assert_equal(rows, expected[:1].expand_as(rows) if name == "expanded" else expected, name)


@pytest.mark.every_device("moe_permute")
def test_values_that_are_not_numbers_are_copied() -> None:
    hidden_states = torch.tensor([[float("nan"), float("inf")], [-float("inf"), -0.0]])
    plan = plan_of(2, 3, lowest=0)
    rows = moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, 3)
    assert_equal(rows.view(torch.int32), hidden_states.view(torch.int32)[plan.row_slots.long() // 3])


@pytest.mark.every_device("moe_permute")
def test_many_rows() -> None:
    """Enough for several threads."""
    hidden_states = torch.randn(1000, 300)
    plan = plan_of(1000, 4)
    num_rows = int(plan.expert_offsets[-1])
    rows = moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, 4)
    assert_equal(rows[:num_rows], hidden_states[plan.row_slots[:num_rows].long() // 4])
    rows = moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, 4, plan.slot_rows)
    assert_equal(rows[:num_rows], hidden_states[plan.row_slots[:num_rows].long() // 4])


@pytest.mark.every_device("moe_permute")
@pytest.mark.parametrize("by_token", [False, True], ids=["by row", "by token"])
def test_row_slots_cut_behind_the_last_offset(by_token: bool) -> None:
    hidden_states = torch.randn(7, 19, requires_grad=True)
    plan = plan_of(7, 3)
    num_rows = int(plan.expert_offsets[-1])
    assert 7 < num_rows < 21
    rows = moe_permute(
        hidden_states, plan.row_slots[:num_rows], plan.expert_offsets, 3, plan.slot_rows if by_token else None
    )
    tokens = plan.row_slots[:num_rows].long() // 3
    assert_equal(rows.detach(), hidden_states.detach()[tokens])
    (gradient,) = torch.autograd.grad(rows.sum(), hidden_states)
    assert_equal(gradient, tokens.bincount(minlength=7).float()[:, None].expand(7, 19))


def arguments(**changes: object) -> dict[str, object]:
    plan = DispatchPlan(torch.tensor([0, 2, 4]).int(), torch.tensor([3, 0, 1, 5, -1, -1]).int(), torch.empty(0))
    return {
        "hidden_states": torch.randn(3, 8),
        "row_slots": plan.row_slots,
        "expert_offsets": plan.expert_offsets,
        "top_k": 2,
        **changes,
    }


BAD_INPUT = {
    "integer hidden_states": (
        {"hidden_states": torch.zeros(3, 8).int()},
        r"^hidden_states must be float32, .* got int32$",
    ),
    "hidden_states of one dimension": (
        {"hidden_states": torch.zeros(3)},
        r"^hidden_states must have 2 dimensions \[tokens, hidden_size\], got shape \[3\]$",
    ),
    "wide row_slots": ({"row_slots": torch.zeros(6).long()}, r"^row_slots must be int32, got int64$"),
    "row_slots of two dimensions": ({"row_slots": torch.zeros(3, 2).int()}, r"^row_slots must have 1 dimension .*$"),
    "row_slots too long": (
        {"row_slots": torch.zeros(7).int()},
        r"^row_slots must have at most 2 elements for each of the 3 tokens, got shape \[7\]$",
    ),
    "wide expert_offsets": ({"expert_offsets": torch.zeros(3).long()}, r"^expert_offsets must be int32, got int64$"),
    "no expert_offsets": (
        {"expert_offsets": torch.zeros(0).int()},
        r"^expert_offsets must have at least 1 element, got shape \[0\]$",
    ),
    "expert_offsets of no dimension": (
        {"expert_offsets": torch.tensor(4).int()},
        r"^expert_offsets must have 1 dimension \[experts \+ 1\], got shape \[\]$",
    ),
    "last offset too large": (
        {"expert_offsets": torch.tensor([0, 7]).int()},
        r"^expert_offsets must end between 0 and the number of rows \(6\), got 7$",
    ),
    "last offset negative": ({"expert_offsets": torch.tensor([0, -1]).int()}, r"^expert_offsets must end .*, got -1$"),
    "row without a slot": (
        {"expert_offsets": torch.tensor([0, 5]).int()},
        r"^row_slots must be in \[0, 6\) below the last offset, got -1$",
    ),
    "slot of no token": (
        {"row_slots": torch.tensor([3, 6, 1, 5, -1, -1]).int()},
        r"^row_slots must be in \[0, 6\) below the last offset, got 6$",
    ),
    "wide slot_rows": ({"slot_rows": torch.zeros(3, 2).long()}, r"^slot_rows must be int32, got int64$"),
    "slot_rows of another shape": (
        {"slot_rows": torch.zeros(2, 3).int()},
        r"^slot_rows must have shape \[3, 2\] \[tokens, top_k\], got \[2, 3\]$",
    ),
    "more slots than int32 counts": (
        {"top_k": 2**30},
        r"^num_tokens \* top_k must be below 2\^31, got 3 \* 1073741824$",
    ),
    "no top_k": ({"top_k": 0}, r"^top_k must be at least 1, got 0$"),
    "elsewhere": (
        {"row_slots": torch.zeros(6, device="meta").int()},
        r"^row_slots must be on cpu like hidden_states, .*$",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    changes, sentence = BAD_INPUT[case]
    with pytest.raises(RuntimeError, match=sentence):
        moe_permute(**arguments(**changes))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_opcheck(num_tokens: int, dtype: torch.dtype) -> None:
    plan = plan_of(num_tokens, 3, lowest=0)  # every row is specified
    hidden_states = torch.randn(num_tokens, 19).to(dtype)
    torch.library.opcheck(
        torch.ops.zexpert.moe_permute.default, (hidden_states, plan.row_slots, plan.expert_offsets, 3)
    )


def test_compiled_and_scripted() -> None:
    compiled = torch.compile(moe_permute, fullgraph=True, backend="aot_eager", dynamic=True)
    scripted = torch.jit.script(moe_permute)
    for num_tokens in (7, 3, 40):
        hidden_states: Tensor = torch.randn(num_tokens, 19)
        plan = plan_of(num_tokens, 3, lowest=0)
        expected = hidden_states[plan.row_slots.long() // 3]
        for function in (compiled, scripted):
            assert_equal(function(hidden_states, plan.row_slots, plan.expert_offsets, 3), expected)
