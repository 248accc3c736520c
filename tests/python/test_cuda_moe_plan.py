# SPDX-License-Identifier: Apache-2.0
"""moe_plan on a CUDA device: sizes for one block and for many, against a stable sort; graphs after routing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from testing import assert_equal
from zexpert.ops import DispatchPlan, biased_topk, moe_plan

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)


def assert_plan(plan: DispatchPlan, topk_ids: Tensor, num_experts: int) -> None:
    """The plan by a stable sort on the device; ids out of range do no work."""
    slots = topk_ids.flatten().long()
    experts = torch.where((slots >= 0) & (slots < num_experts), slots, num_experts)
    order = experts.sort(stable=True).indices
    counts = torch.bincount(experts, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    num_rows = int(offsets[-1])
    row_slots, slot_rows = torch.full_like(slots, -1), torch.full_like(slots, -1)
    row_slots[:num_rows] = order[:num_rows]
    slot_rows[order[:num_rows]] = torch.arange(num_rows, device=slots.device)
    assert_equal(plan.expert_offsets, offsets.int(), "expert_offsets")
    assert_equal(plan.row_slots, row_slots.int(), "row_slots")
    assert_equal(plan.slot_rows, slot_rows.reshape(topk_ids.shape).int(), "slot_rows")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    # Around the number of slots from which several blocks work; counts that exactly fill the shared memory that needs
    # no asking; very many and very few experts; many slots.
    [
        (1, 1, 1),
        (7, 3, 5),
        (16, 12, 512),
        (128, 12, 512),
        (170, 12, 512),
        (171, 12, 512),
        (2048, 1, 512),
        (300, 12, 8192),
        (8192, 12, 512),
        (8192, 8, 8192),
        (3000, 4, 1),
        (2000, 64, 768),
        (65536, 12, 512),
        (1 << 22, 8, 128),
    ],
)
def test_against_a_stable_sort(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype) -> None:
    topk_ids = torch.randint(-1, num_experts, (num_tokens, top_k), device="cuda", dtype=dtype)
    topk_ids[torch.rand(num_tokens, top_k, device="cuda") < 0.3] = -1
    assert_plan(moe_plan(topk_ids, num_experts), topk_ids, num_experts)
    topk_ids[torch.rand(num_tokens, top_k, device="cuda") < 0.2] = num_experts // 2  # a crowded expert
    assert_plan(moe_plan(topk_ids, num_experts), topk_ids, num_experts)


def test_ids_out_of_range_do_no_work() -> None:
    topk_ids = torch.randint(-3, 9, (500, 6), device="cuda")
    topk_ids[3, 3] = 2**40 + 1
    assert_plan(moe_plan(topk_ids, 5), topk_ids, 5)


def test_too_many_experts() -> None:
    with pytest.raises(RuntimeError, match=r"^num_experts must be at most 8192 on CUDA, got 8193"):
        moe_plan(torch.zeros(3, 2, device="cuda", dtype=torch.int32), 8193)


@pytest.mark.parametrize("num_tokens", [16, 2000])
def test_graph_of_routing_and_plan(num_tokens: int) -> None:
    logits = torch.randn(num_tokens, 768, device="cuda")
    expected = moe_plan(biased_topk(logits, None, 12, num_real_experts=512).topk_ids, 512)
    placeholder = torch.randn_like(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moe_plan(biased_topk(placeholder, None, 12, num_real_experts=512).topk_ids, 512)
    placeholder.copy_(logits)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for field, field_captured in zip(expected, captured, strict=True):
        assert_equal(field_captured, field)
