# SPDX-License-Identifier: Apache-2.0
"""moe_plan against the reference, its properties, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from testing import assert_equal, unchanged
from zexpert.ops import DispatchPlan, moe_plan

ID_DTYPES = (torch.int32, torch.int64)


def random_ids(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(-1, num_experts, (num_tokens, top_k), dtype=dtype)


def assert_plan(plan: DispatchPlan, topk_ids: Tensor, num_experts: int) -> None:
    for name, actual, expected in zip(
        DispatchPlan._fields, plan, reference.moe_plan(topk_ids, num_experts), strict=True
    ):
        assert_equal(actual, expected, name)


@pytest.mark.every_device("moe_plan")
@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 200])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 2), (96, 12), (512, 3)])
def test_against_reference(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    topk_ids = random_ids(num_tokens, top_k, num_experts, dtype)
    with unchanged(topk_ids):
        plan = moe_plan(topk_ids, num_experts)
    assert isinstance(plan, DispatchPlan)
    assert_plan(plan, topk_ids, num_experts)


@pytest.mark.every_device("moe_plan")
@pytest.mark.parametrize("expert", [-1, 0, 4])
def test_all_slots_alike(expert: int) -> None:
    """No work at all, and all of it for the first or the last expert."""
    topk_ids = torch.full((30, 4), expert)
    assert_plan(moe_plan(topk_ids, 5), topk_ids, 5)


@pytest.mark.every_device("moe_plan")
def test_no_slots() -> None:
    plan = moe_plan(torch.zeros(3, 0, dtype=torch.int32), 4)
    assert_equal(plan.expert_offsets, torch.zeros(5, dtype=torch.int32))
    assert plan.row_slots.shape == (0,)
    assert plan.slot_rows.shape == (3, 0)


@pytest.mark.every_device("moe_plan")
@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    topk_ids = random_ids(7, 6, 20, dtype)
    wide = torch.zeros(7, 13, dtype=dtype)
    wide[:, 1::2] = topk_ids
    for given_ids in (topk_ids.t().contiguous().t(), wide[:, 1::2], topk_ids[:1].expand(7, 6)):
        assert not given_ids.is_contiguous()
        assert_plan(moe_plan(given_ids, 20), given_ids, 20)


@pytest.mark.every_device("moe_plan")
@given(st.data(), st.integers(1, 9), st.integers(0, 12), st.integers(1, 5))
def test_properties(data: st.DataObject, num_experts: int, num_tokens: int, top_k: int) -> None:
    count = num_tokens * top_k
    values = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=count, max_size=count))
    topk_ids = torch.tensor(values, dtype=torch.int32).reshape(num_tokens, top_k)
    plan = moe_plan(topk_ids, num_experts)
    assert_plan(plan, topk_ids, num_experts)

    slots = topk_ids.flatten()
    num_rows = int(plan.expert_offsets[-1])
    assert num_rows == int((slots >= 0).sum())
    used = plan.row_slots[:num_rows].long()
    assert len(set(used.tolist())) == num_rows, "a slot has one row"
    assert_equal(plan.expert_offsets.diff(), torch.bincount(slots[slots >= 0], minlength=num_experts).int())
    assert_equal(plan.slot_rows.flatten()[used], torch.arange(num_rows, dtype=torch.int32))


@pytest.mark.every_device("moe_plan")
@given(st.data(), st.integers(1, 9), st.integers(1, 30))
def test_taking_slots_away_keeps_the_order_of_the_rest(data: st.DataObject, num_experts: int, num_slots: int) -> None:
    values = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=num_slots, max_size=num_slots))
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_slots, max_size=num_slots)))
    topk_ids = torch.tensor(values)[:, None]
    fewer = torch.where(keep[:, None], topk_ids, -1)
    full_order = moe_plan(topk_ids, num_experts).row_slots
    plan = moe_plan(fewer, num_experts)
    assert_equal(plan.row_slots[: int(plan.expert_offsets[-1])], full_order[keep[full_order.long()]])


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("position", [0, 1500, 4199])
def test_ids_out_of_range(bad: int, position: int, dtype: torch.dtype) -> None:
    topk_ids = random_ids(1400, 3, 4, dtype)
    topk_ids.view(-1)[position] = bad
    with unchanged(topk_ids), pytest.raises(RuntimeError, match=rf"^topk_ids must be in \[-1, 4\), got {bad}$"):
        moe_plan(topk_ids, 4)


@pytest.mark.parametrize("bad", [2**32, 2**32 + 1, -(2**32)])
def test_ids_that_would_fit_if_they_were_cut_to_32_bits(bad: int) -> None:
    with pytest.raises(RuntimeError, match=rf"^topk_ids must be in \[-1, 4\), got {bad}$"):
        moe_plan(torch.tensor([[0, bad]]), 4)


BAD_INPUT = {
    "float ids": (torch.zeros(3, 2), 4, r"^topk_ids must be int32 or int64, got float32$"),
    "short ids": (torch.zeros(3, 2, dtype=torch.int16), 4, r"^topk_ids must be int32 or int64, got int16$"),
    "one dimension": (torch.zeros(3).int(), 4, r"^topk_ids must have 2 dimensions \[tokens, top_k\], got shape \[3\]$"),
    "no experts": (torch.zeros(3, 2).int(), 0, r"^num_experts must be between 1 and \d+, got 0$"),
    "too many experts": (torch.zeros(3, 2).int(), 2**31, r"^num_experts must be between 1 and \d+, got 2147483648$"),
    "too many slots": (
        torch.zeros(1, 1, dtype=torch.int32).expand(2**20, 2**11),
        4,
        r"^topk_ids must have fewer than 2147483647 elements, got shape \[1048576, 2048\]$",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    topk_ids, num_experts, sentence = BAD_INPUT[case]
    with pytest.raises(RuntimeError, match=sentence):
        moe_plan(topk_ids, num_experts)


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_opcheck(num_tokens: int, dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.zexpert.moe_plan.default, (random_ids(num_tokens, 3, 5, dtype), 5))


def test_compiled_and_scripted() -> None:
    compiled = torch.compile(moe_plan, fullgraph=True, backend="aot_eager", dynamic=True)
    scripted = torch.jit.script(moe_plan)
    for num_tokens in (7, 3, 40):
        topk_ids = random_ids(num_tokens, 3, 5)
        assert_plan(compiled(topk_ids, 5), topk_ids, 5)
        assert_plan(scripted(topk_ids, 5), topk_ids, 5)
