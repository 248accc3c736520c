# SPDX-License-Identifier: Apache-2.0
"""CustomRoutingRouter: the user's function, its contract and its checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zexpert import RoutingMethodType
from zexpert.ops import moe_plan
from zexpert.router import CustomRoutingRouter


def first_experts(
    *, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    ids = torch.arange(topk).expand(hidden_states.shape[0], topk)
    weights = gating_output[:, :topk]
    return (weights / weights.sum(dim=1, keepdim=True) if renormalize else weights), ids


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_result_is_the_functions(num_tokens: int, dtype: torch.dtype, renormalize: bool) -> None:
    router = CustomRoutingRouter(
        2, 4, first_experts, renormalize=renormalize, routed_scaling_factor=2.0, indices_dtype=torch.int64
    )
    assert router.routing_method_type == RoutingMethodType.CUSTOM
    router_logits = torch.ones(num_tokens, 4, dtype=dtype)

    routing = router.select_experts(torch.zeros(num_tokens, 3), router_logits)

    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert routing.topk_ids.tolist() == [[0, 1]] * num_tokens
    assert routing.topk_ids.dtype == torch.int64
    assert routing.topk_weights.tolist() == [[1.0, 1.0] if renormalize else [2.0, 2.0]] * num_tokens
    assert routing.topk_weights.dtype == routing.zero_weight.dtype == routing.constant_weight.dtype == weight_dtype
    assert routing.zero_weight.tolist() == [0.0] * num_tokens
    assert routing.constant_weight.shape == (num_tokens, 0)
    assert not router.has_zero_experts


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ((torch.zeros(3, 1), torch.zeros(3, 2).int()), r"floating-point topk_weights of shape \[3, 2\], got \[3, 1\]"),
        ((torch.zeros(3, 2).int(), torch.zeros(3, 2).int()), r"floating-point topk_weights .* of torch.int32$"),
        ((torch.zeros(3, 2), torch.zeros(2, 2).int()), r"integer topk_ids of shape \[3, 2\], got \[2, 2\]"),
        ((torch.zeros(3, 2), torch.zeros(3, 2)), r"integer topk_ids .*, got \[3, 2\] of torch.float32$"),
        (None, r"the tensors topk_weights and topk_ids, got NoneType$"),
        (torch.zeros(2, 3, 2), r"the tensors topk_weights and topk_ids, got Tensor$"),
        (([[0.5]], [[1]]), r"the tensors topk_weights and topk_ids, got tuple$"),
    ],
)
def test_rejects_a_bad_result(result: object, message: str) -> None:
    router = CustomRoutingRouter(2, 4, lambda **_: result)
    with pytest.raises(ValueError, match=f"^custom_routing_function must return {message}"):
        router.select_experts(torch.zeros(3, 3), torch.zeros(3, 4))


@pytest.mark.parametrize("function", [None, 3, "softmax"])
def test_rejects_what_cannot_be_called(function: Any) -> None:
    with pytest.raises(ValueError, match=r"^custom_routing_function must be callable, got "):
        CustomRoutingRouter(2, 4, function)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_cannot_be_scripted() -> None:
    with pytest.raises(RuntimeError, match=r"^CustomRoutingRouter cannot be scripted: custom_routing_function is a"):
        torch.jit.script(CustomRoutingRouter(2, 4, first_experts))


def test_ids_that_int32_cannot_hold_do_not_become_others() -> None:
    router = CustomRoutingRouter(1, 4, lambda **_: (torch.ones(2, 1), torch.tensor([[2**32 + 1], [-(2**32)]])))
    topk_ids = router.select_experts(torch.zeros(2, 3), torch.zeros(2, 4)).topk_ids
    assert topk_ids.dtype == torch.int32
    with pytest.raises(RuntimeError, match=r"^topk_ids must be in \[-1, 4\), got 2147483647$"):
        moe_plan(topk_ids[:1], 4)
    with pytest.raises(RuntimeError, match=r"^topk_ids must be in \[-1, 4\), got -2$"):
        moe_plan(topk_ids[1:], 4)
