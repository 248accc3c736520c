# SPDX-License-Identifier: Apache-2.0
"""Gradients that have no addends are zeros, whatever the memory held before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from testing import FLOAT_DTYPES, assert_equal, filled_memory, weight_dtype
from zexpert.ops import moe_finalize, zero_expert_accumulate

moe_permute_backward = torch.ops.zexpert.moe_permute_backward
moe_finalize_backward = torch.ops.zexpert.moe_finalize_backward
zero_expert_accumulate_backward = torch.ops.zexpert.zero_expert_accumulate_backward
silu_and_mul_backward = torch.ops.zexpert.silu_and_mul_backward

H = 5


@pytest.fixture(autouse=True)
def _filled_memory() -> Iterator[None]:
    with filled_memory():
        yield


def integers(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value, dtype=torch.int32)


@pytest.mark.every_device("moe_finalize_backward")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "top_k", "hidden_size"), [(0, 2, H), (3, 0, H), (3, 2, H), (3, 2, 0)])
def test_moe_finalize_backward(num_tokens: int, top_k: int, hidden_size: int, dtype: torch.dtype) -> None:
    """Seven rows and no slot that names one."""
    weights = weight_dtype(dtype)
    rows, hidden_states = torch.randn(7, hidden_size).to(dtype), torch.zeros(num_tokens, hidden_size, dtype=dtype)
    topk_weights, zero_weight = torch.rand(num_tokens, top_k, dtype=weights), torch.rand(num_tokens, dtype=weights)
    slot_rows = integers(num_tokens, top_k, value=-1)
    given = (rows, slot_rows, topk_weights, hidden_states, zero_weight)
    gradients = moe_finalize_backward(torch.zeros_like(hidden_states), *given)
    for gradient, tensor in zip(gradients, (rows, topk_weights, hidden_states, zero_weight), strict=True):
        assert_equal(gradient, torch.zeros_like(tensor))


@pytest.mark.every_device("moe_finalize")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_moe_finalize_of_no_tokens_in_autograd(dtype: torch.dtype) -> None:
    weights = weight_dtype(dtype)
    rows = torch.randn(7, H, dtype=torch.float64).to(dtype).requires_grad_()
    hidden_states = torch.zeros(0, H, dtype=dtype)
    none = torch.zeros(0, dtype=weights)
    out = moe_finalize(rows, integers(0, 2), none.view(0, 2), hidden_states, none)
    (gradient,) = torch.autograd.grad(out.sum(), rows)
    assert_equal(gradient, torch.zeros_like(rows))


@pytest.mark.every_device("moe_permute_backward")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("by_token", [False, True], ids=["by row", "by token"])
@pytest.mark.parametrize("num_rows", [0, 6])
def test_moe_permute_backward(num_rows: int, by_token: bool, dtype: torch.dtype) -> None:
    """No row does work."""
    grad_rows = torch.full((num_rows, H), torch.nan, dtype=dtype)
    slot_rows = integers(3, 2, value=-1) if by_token else None
    gradient = moe_permute_backward(grad_rows, integers(num_rows, value=-1), integers(4), 3, 2, slot_rows)
    assert_equal(gradient, torch.zeros(3, H, dtype=dtype))


@pytest.mark.every_device("zero_expert_accumulate_backward")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_zero_expert_accumulate_backward(dtype: torch.dtype) -> None:
    hidden_states, zero_weight = torch.zeros(3, 0, dtype=dtype), torch.rand(3, dtype=weight_dtype(dtype))
    gradients = zero_expert_accumulate_backward(hidden_states, hidden_states, zero_weight)
    assert_equal(gradients[0], hidden_states)
    assert_equal(gradients[1], torch.zeros_like(zero_weight))


@pytest.mark.every_device("zero_expert_accumulate")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_zero_expert_accumulate(dtype: torch.dtype) -> None:
    hidden_states = torch.randn(3, H).to(dtype)
    zeros = torch.zeros(3, dtype=weight_dtype(dtype))
    assert_equal(zero_expert_accumulate(hidden_states, zeros), torch.zeros_like(hidden_states))


@pytest.mark.every_device("silu_and_mul_backward")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_silu_and_mul_backward(dtype: torch.dtype) -> None:
    """No row does work."""
    gate_up = torch.full((3, 2 * H), torch.nan, dtype=dtype)
    gradient = silu_and_mul_backward(gate_up[:, :H], gate_up, integers(4))
    assert_equal(gradient, torch.zeros_like(gate_up))
