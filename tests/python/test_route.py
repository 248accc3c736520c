# SPDX-License-Identifier: Apache-2.0
"""route: bit for bit what router_logits and then biased_topk_and_plan give; its gradients; bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from testing import FLOAT_DTYPES, assert_equal, layouts, unchanged
from zexpert.ops import DispatchPlan, RoutingResult, biased_topk_and_plan, route, router_logits

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LONGCAT: dict[str, Any] = {"num_real_experts": 16, "routed_scaling_factor": 6.0}
DEEPSEEK: dict[str, Any] = {
    "num_real_experts": 24,
    "scoring_func": "sigmoid",
    "renormalize": True,
    "num_expert_group": 4,
    "topk_group": 2,
}
EVERY_KIND: dict[str, Any] = {"num_real_experts": 16, "num_identity_experts": 4, "num_constant_experts": 3}
SPECS = {"LongCat": LONGCAT, "DeepSeek": DEEPSEEK, "every kind": EVERY_KIND}


def together_and_apart(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, **routing: Any
) -> tuple[tuple[RoutingResult, DispatchPlan], tuple[RoutingResult, DispatchPlan]]:
    """The op's results, and those of the two that it stands for, on the same device."""
    together = route(hidden_states, weight, bias, top_k, **routing)
    return together, biased_topk_and_plan(router_logits(hidden_states, weight), bias, top_k, **routing)


def assert_same(
    together: tuple[RoutingResult, DispatchPlan], apart: tuple[RoutingResult, DispatchPlan], name: str = ""
) -> None:
    for part, expected_part in zip(together, apart, strict=True):
        assert type(part) is type(expected_part)
        for field, actual, expected in zip(part._fields, part, expected_part, strict=True):
            assert_equal(actual, expected, f"{name} {field}")


def inputs(num_tokens: int, dtype: torch.dtype, hidden_size: int = 72) -> tuple[Tensor, Tensor, Tensor]:
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    hidden_states = torch.randn(num_tokens, hidden_size).to(dtype)
    return hidden_states, torch.randn(24, hidden_size, dtype=weight_dtype), 0.1 * torch.randn(24)


@pytest.mark.every_device("together_and_apart")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 130, 300])
def test_is_both_operators(num_tokens: int, spec: str, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("on CUDA hidden states are not float64")
    hidden_states, weight, bias = inputs(num_tokens, dtype)
    for given in (bias, None):
        for indices_dtype in (torch.int32, torch.int64):
            with unchanged(hidden_states, weight, bias):
                results = together_and_apart(
                    hidden_states, weight, given, 6, indices_dtype=indices_dtype, **SPECS[spec]
                )
            assert_same(*results)
            assert results[0][0].topk_ids.dtype == indices_dtype


@pytest.mark.every_device("together_and_apart")
def test_layouts() -> None:
    hidden_states, weight, bias = inputs(9, torch.bfloat16)
    for name, given in layouts(hidden_states).items():
        assert_same(*together_and_apart(given, weight, bias, 4, **LONGCAT), name=name)
    for name, given in layouts(weight).items():
        assert_same(*together_and_apart(hidden_states, given, bias, 4, **LONGCAT), name=f"weight, {name}")


@pytest.mark.every_device("route")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("num_tokens", [3, 150])
def test_a_token_that_is_not_finite_chooses_nothing(num_tokens: int, spec: str, value: float) -> None:
    hidden_states, weight, bias = inputs(num_tokens, torch.bfloat16)
    before, _ = route(hidden_states, weight, bias, 6, **SPECS[spec])
    hidden_states[1, 50] = value
    routing, plan = route(hidden_states, weight, bias, 6, **SPECS[spec])
    assert routing.topk_ids[1].tolist() == [-1] * 6
    assert routing.topk_weights[1].tolist() == [0.0] * 6
    assert routing.zero_weight[1] == 0
    assert not routing.constant_weight[1].any()
    assert plan.slot_rows[1].tolist() == [-1] * 6
    others = torch.arange(num_tokens) != 1
    for field, actual, expected in zip(routing._fields, routing, before, strict=True):
        assert_equal(actual[others], expected[others], field)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradcheck(needs: tuple[bool, bool]) -> None:
    hidden_states, weight, bias = inputs(4, torch.float64, 5)
    hidden_states.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])

    def function(hidden_states: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        routing, _ = route(hidden_states, weight, bias, 6, renormalize=True, **EVERY_KIND)
        return routing.topk_weights, routing.zero_weight, routing.constant_weight

    assert torch.autograd.gradcheck(function, (hidden_states, weight))


def test_gradients_are_those_of_the_parts() -> None:
    """Also of the logits, which the raw operator returns."""
    hidden_states, weight, bias = inputs(40, torch.bfloat16)
    hidden_states.requires_grad_()
    weight.requires_grad_()
    raw = torch.ops.zexpert.route(hidden_states, weight, bias, 6, **EVERY_KIND)
    logits = router_logits(hidden_states, weight)
    routing, _ = biased_topk_and_plan(logits, bias, 6, **EVERY_KIND)
    parts = (logits, routing.topk_weights, routing.zero_weight, routing.constant_weight)
    together = (raw[0], raw[1], raw[3], raw[4])
    upstream = [torch.randn_like(part) for part in parts]
    for used in ([0], [1], [2, 3], [0, 1, 2, 3], []):
        loss = torch.zeros(()) + 0 * weight.sum()
        expected_loss = loss.clone()
        for i in used:
            loss = loss + (together[i] * upstream[i]).sum()
            expected_loss = expected_loss + (parts[i] * upstream[i]).sum()
        given = torch.autograd.grad(loss, (hidden_states, weight), retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(expected_loss, (hidden_states, weight), retain_graph=True, allow_unused=True)
        for one, other in zip(given, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                # The parts' gradients of logits are added in another order.
                torch.testing.assert_close(one, other, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_bias_may_change_before_the_backward() -> None:
    hidden_states, weight, bias = inputs(12, torch.float32)
    weight.requires_grad_()
    gradients = []
    for changes in (False, True):
        own = bias.clone()
        routing, _ = route(hidden_states, weight, own, 4, **LONGCAT)
        if changes:
            own += torch.randn(24)
        gradients.append(torch.autograd.grad(routing.topk_weights.sum(), weight)[0])
    assert_equal(gradients[0], gradients[1])


WEIGHT = torch.zeros(24, 8)
BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "integers": (
        {"hidden_states": torch.zeros(3, 8).int()},
        r"^hidden_states must be float32, float64, bfloat16 or float16, got int32$",
    ),
    "weight of another width": (
        {"weight": torch.zeros(24, 9)},
        r"^weight must have shape \[24, 8\] \[experts, hidden_size\], got \[24, 9\]$",
    ),
    "weight of fewer experts than the spec": (
        {"weight": torch.zeros(12, 8)},
        r"^num_logits \(the width of the logits\) must be at least 16, the real, identity and constant experts "
        r"together, got 12$",
    ),
    "weight of one dimension": (
        {"weight": torch.zeros(8)},
        r"^weight must have 2 dimensions \[experts, hidden_size\], got shape \[8\]$",
    ),
    "weight elsewhere": (
        {"weight": torch.zeros(24, 8, device="meta")},
        r"^weight must be on cpu like hidden_states, got meta$",
    ),
    "wide weight": (
        {"weight": WEIGHT.double()},
        r"^weight must be float32, bfloat16 or float16 with float32 hidden_states, got float64$",
    ),
    "leading dimensions": (
        {"hidden_states": torch.zeros(2, 3, 8)},
        r"^hidden_states must have 2 dimensions \[tokens, hidden_size\], got shape \[2, 3, 8\]$",
    ),
    "bias elsewhere": (
        {"bias": torch.zeros(24, device="meta")},
        r"^bias must be on cpu like hidden_states, got meta$",
    ),
    "integer bias": (
        {"bias": torch.zeros(24).long()},
        r"^bias must be float32, float64, bfloat16 or float16, got int64$",
    ),
    "bias of another length": (
        {"bias": torch.zeros(23)},
        r"^bias must have shape \[24\] \[experts\], got \[23\]$",
    ),
    "top_k": ({"top_k": 25}, r"^top_k must be at most the number of experts \(24\), got 25$"),
    "scoring_func": ({"scoring_func": "tanh"}, r'^scoring_func must be .*, got "tanh"$'),
    "indices_dtype": ({"indices_dtype": torch.int16}, r"^indices_dtype must be int32 or int64, got int16$"),
    "not a dtype": ({"indices_dtype": 3}, r"^indices_dtype must be int32 or int64, got 3$"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    changes, sentence = BAD_INPUT[case]
    arguments: dict[str, Any] = {"hidden_states": torch.zeros(3, 8), "weight": WEIGHT, "bias": None, "top_k": 4}
    with pytest.raises(RuntimeError, match=sentence):
        route(**{**arguments, **LONGCAT, **changes})


@pytest.mark.parametrize("freed", ["hidden_states", "weight", "bias"])
def test_freed_storage(freed: str) -> None:
    arguments = {"hidden_states": torch.zeros(3, 8), "weight": torch.zeros(24, 8), "bias": torch.zeros(24)}
    arguments[freed].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"^{freed} must have memory, got a tensor whose storage has been freed"):
        route(**arguments, top_k=4, **LONGCAT)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_bad_dtypes_on_cuda(dtype: torch.dtype) -> None:
    sentence = f"^hidden_states must be float32, bfloat16 or float16 on CUDA, got {str(dtype)[6:]}$"
    hidden_states = torch.zeros(3, 8, device="cuda").to(dtype)
    with pytest.raises(RuntimeError, match=sentence):
        route(hidden_states, WEIGHT.cuda(), None, 4, **LONGCAT)
    with pytest.raises(RuntimeError, match=r"^bias must be on cuda:0 like hidden_states, got cpu$"):
        route(hidden_states.float(), WEIGHT.cuda(), torch.zeros(24), 4, **LONGCAT)


def raw(hidden_states: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The raw operator, which scripts call. The logits come first."""
    logits, weights, ids, zero, constant, offsets, slots, rows = torch.ops.zexpert.route(
        hidden_states, weight, bias, 6, num_real_experts=16, num_constant_experts=3
    )
    return [logits, weights, ids, zero, constant, offsets, slots, rows]


def test_compiled_and_scripted() -> None:
    compiled = torch.compile(raw, fullgraph=True, backend="aot_eager", dynamic=True)
    scripted = torch.jit.script(raw)
    _, weight, bias = inputs(1, torch.float32)
    weight.requires_grad_()
    for num_tokens in (7, 3, 40):
        hidden_states = inputs(num_tokens, torch.float32)[0].requires_grad_()
        routing, plan = route(hidden_states, weight, bias, 6, num_real_experts=16, num_constant_experts=3)
        expected = [router_logits(hidden_states, weight), *routing, *plan]
        upstream = torch.randn_like(expected[1])
        gradients = torch.autograd.grad(expected[1], (hidden_states, weight), upstream)
        for other in (compiled, scripted):
            results = other(hidden_states, weight, bias)
            for one, two in zip(results, expected, strict=True):
                assert_equal(one, two)
            for one, two in zip(
                torch.autograd.grad(results[1], (hidden_states, weight), upstream), gradients, strict=True
            ):
                assert_equal(one, two)


@needs_cuda
@pytest.mark.parametrize("num_tokens", [1, 40, 300, 2000])
def test_graph_capture(num_tokens: int) -> None:
    hidden_states, weight, bias = (tensor.cuda() for tensor in inputs(num_tokens, torch.bfloat16, 512))
    route(hidden_states, weight, bias, 6, **LONGCAT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = route(hidden_states, weight, bias, 6, **LONGCAT)
    for _ in range(2):
        hidden_states.copy_(torch.randn(num_tokens, 512, device="cuda"))
        graph.replay()
        assert_same(results, route(hidden_states, weight, bias, 6, **LONGCAT))
