# SPDX-License-Identifier: Apache-2.0
"""No operator loses memory: the bytes that malloc has given out are counted over many calls of each."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch

import zexpert

NUM_CALLS = 10_000
NUM_TOKENS, NUM_REAL_EXPERTS, NUM_EXPERTS, HIDDEN_SIZE = 4, 3, 5, 8
OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zexpert::"))


class Mallinfo2(ctypes.Structure):
    """What glibc's mallinfo2() returns."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def allocated_bytes() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    gc.collect()
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def argument_values() -> dict[str, Any]:
    """A value for every argument that an operator must be given. With top_k 1 and all widths alike, one shape serves a
    name in every operator."""
    topk_ids = torch.tensor([[2], [0], [-1], [2]], dtype=torch.int32)
    plan = zexpert.ops.moe_plan(topk_ids, NUM_REAL_EXPERTS)
    rows = torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    return {
        "logits": torch.randn(NUM_TOKENS, NUM_EXPERTS),
        "bias": torch.randn(NUM_EXPERTS),
        "top_k": 1,
        "num_real_experts": NUM_REAL_EXPERTS,
        "num_experts": NUM_REAL_EXPERTS,
        "num_tokens": NUM_TOKENS,
        "hidden_states": rows,
        "rows": rows,
        "weight": torch.randn(NUM_EXPERTS, HIDDEN_SIZE),
        "tensor": rows,
        "out": rows.clone(),
        "topk_ids": topk_ids,
        "topk_weights": torch.rand(NUM_TOKENS, 1),
        "zero_weight": torch.rand(NUM_TOKENS),
        "expert_offsets": plan.expert_offsets,
        "row_slots": plan.row_slots,
        "slot_rows": plan.slot_rows,
        "gate_up": torch.randn(NUM_TOKENS, 2 * HIDDEN_SIZE),
        "w13_weight": torch.randn(NUM_REAL_EXPERTS, 2 * HIDDEN_SIZE, HIDDEN_SIZE),
        "w2_weight": torch.randn(NUM_REAL_EXPERTS, HIDDEN_SIZE, HIDDEN_SIZE),
        "grad_out": torch.randn(NUM_TOKENS, HIDDEN_SIZE),
        "grad_rows": torch.randn(NUM_TOKENS, HIDDEN_SIZE),
        "grad_topk_weights": torch.randn(NUM_TOKENS, 1),
        "grad_zero_weight": torch.randn(NUM_TOKENS),
        "grad_constant_weight": torch.randn(NUM_TOKENS, 0),
    }


def own_values(name: str) -> dict[str, Any]:
    """Values of arguments that have another shape or type in this operator than in others. Of ranks there is one."""
    to_rank = (1, NUM_TOKENS)
    return {
        "quantize_blockwise": {"weight": torch.randn(1, NUM_EXPERTS, HIDDEN_SIZE)},
        "dequantize_blockwise": {
            "weight": torch.zeros(1, NUM_EXPERTS, HIDDEN_SIZE, dtype=torch.float8_e4m3fn),
            "scale_inv": torch.ones(1, 1, 1),
            "dtype": torch.float32,
        },
        "moe_dispatch": {
            "rows": [torch.empty(*to_rank, HIDDEN_SIZE)],
            "ids": [torch.empty(*to_rank, 1, dtype=torch.int32)],
            "weights": [torch.empty(*to_rank, 1)],
            "rank": 0,
            "num_local_experts": NUM_REAL_EXPERTS,
        },
        "moe_combine": {"out": [torch.empty(*to_rank, HIDDEN_SIZE)], "topk_weights": None, "rank": 0},
        "rank_barrier": {
            "signals": [torch.zeros(1, dtype=torch.int64)],
            "epoch": torch.zeros(1, dtype=torch.int64),
            "validity": torch.ones(1),
            "absent_rank": torch.full((1,), -1, dtype=torch.int32),
            "rank": 0,
            "timeout_ms": 1000,
        },
    }.get(name, {})


def test_there_are_operators() -> None:
    assert "zexpert::biased_topk" in OPERATORS


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_loses_no_memory(name: str) -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
        pytest.skip(f"{name} does not run on the CPU")
    packet, _, overload = name.removeprefix("zexpert::").partition(".")
    operator = getattr(getattr(torch.ops.zexpert, packet), overload or "default")
    values = argument_values() | own_values(packet)
    arguments = {
        argument.name: values[argument.name]
        for argument in operator._schema.arguments
        if not argument.has_default_value()
    }
    with torch.no_grad():
        for _ in range(NUM_CALLS // 10):  # fills caches, of the allocator too
            operator(**arguments)
        before = allocated_bytes()
        for _ in range(NUM_CALLS):
            operator(**arguments)
        grown = allocated_bytes() - before
    assert grown < NUM_CALLS, f"{name} lost {grown / NUM_CALLS:.1f} bytes a call"
