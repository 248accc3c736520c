# SPDX-License-Identifier: Apache-2.0
"""Gradients of every op but the experts: by finite differences in float64, and by the error rule in every dtype."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from gradients import (
    F,
    H,
    K,
    T,
    assert_gradients,
    finalize_inputs,
    gradients_of,
    leaf,
    make_plan,
    poisoned,
    random_like,
)
from testing import FLOAT_DTYPES, assert_equal, layouts, random_logits, weight_dtype
from zexpert.ops import biased_topk, moe_finalize, moe_permute, silu_and_mul, zero_expert_accumulate

moe_permute_backward = torch.ops.zexpert.moe_permute_backward
silu_and_mul_backward = torch.ops.zexpert.silu_and_mul_backward
moe_finalize_backward = torch.ops.zexpert.moe_finalize_backward

#: Experts of every kind, and the logits' width.
EVERY_KIND = {"num_real_experts": 8, "num_identity_experts": 5, "num_constant_experts": 3}
WIDTH = 20


def weights_of(logits: Tensor, bias: Tensor | None = None, top_k: int = 6, **routing: Any) -> tuple[Tensor, ...]:
    """What of a routing has gradients."""
    result = biased_topk(logits, bias, top_k, **{**EVERY_KIND, **routing})
    return result.topk_weights, result.zero_weight, result.constant_weight


def reference_weights_of(logits: Tensor, bias: Tensor | None, top_k: int = 6, **routing: Any) -> tuple[Tensor, ...]:
    result = reference.biased_topk(logits, bias, top_k, **{**EVERY_KIND, **routing})
    return result.topk_weights, result.zero_weight, result.constant_weight


# ---- biased_topk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize(("renormalize", "drop_before_renormalize"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_biased_topk_by_finite_differences(
    scoring_func: str, renormalize: bool, drop_before_renormalize: bool, groups: tuple[int, int]
) -> None:
    for bias in (None, 0.3 * torch.randn(WIDTH, dtype=torch.float64)):
        assert torch.autograd.gradcheck(
            lambda logits, bias=bias: weights_of(
                logits,
                bias,
                scoring_func=scoring_func,
                renormalize=renormalize,
                drop_before_renormalize=drop_before_renormalize,
                routed_scaling_factor=2.5,
                num_expert_group=groups[0],
                topk_group=groups[1],
            ),
            (leaf(T, WIDTH),),
        )


@pytest.mark.every_device("biased_topk")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_biased_topk_by_the_error_rule(scoring_func: str, renormalize: bool, dtype: torch.dtype) -> None:
    # 20 and 777 logits leave partial vectors on every instruction set; 64 do not.
    for width, top_k in ((WIDTH, 6), (64, 2), (64, 12), (777, 40)):
        bias = 0.01 * torch.randn(width)
        routing = {"scoring_func": scoring_func, "renormalize": renormalize, "routed_scaling_factor": 6.0}
        routing |= {"num_real_experts": width // 2, "num_identity_experts": width // 4}
        logits = random_logits(33, width, dtype)
        routing_of_plain = {"num_constant_experts": 3, **routing}
        decided = reference.decided_rows(logits, bias, top_k, **routing_of_plain)
        # What rounding decides may be chosen differently at another precision.
        logits = logits[decided]
        assert_gradients(
            lambda x, bias=bias, k=top_k, routing=routing: weights_of(x, bias, k, **routing),
            lambda dtype, bias=bias, k=top_k, routing=routing: (
                lambda x: reference_weights_of(x, bias, k, dtype=dtype, **routing)
            ),
            [logits],
            weight_dtype(dtype),
            ["logits"],
        )


@pytest.mark.every_device("biased_topk")
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_biased_topk_single_renormalized_weight_is_constant(scoring_func: str) -> None:
    upstream = random_like(weights_of(random_logits(9, WIDTH), None, 1))
    gradient = gradients_of(
        lambda x: weights_of(x, None, 1, scoring_func=scoring_func, renormalize=True),
        [random_logits(9, WIDTH)],
        upstream,
    )[0]
    assert_equal(gradient, torch.zeros(9, WIDTH))


@pytest.mark.every_device("biased_topk")
def test_biased_topk_gradient_at_ties_flows_to_the_chosen() -> None:
    logits = torch.zeros(1, 8, requires_grad=True)
    result = biased_topk(logits, None, 3, num_real_experts=8, scoring_func="sigmoid")
    assert result.topk_ids.tolist() == [[0, 1, 2]]
    result.topk_weights.sum().backward()
    assert_equal(logits.grad, torch.tensor([[0.25, 0.25, 0.25, 0, 0, 0, 0, 0]]))


@pytest.mark.every_device("biased_topk")
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_biased_topk_masked_logits_have_no_gradient(scoring_func: str, renormalize: bool) -> None:
    logits = random_logits(5, WIDTH)
    logits[0, ::2] = float("nan")
    logits[1, 3] = float("inf")
    logits[2, :] = -float("inf")
    logits[3, 4:] = float("nan")  # fewer than top_k are choosable
    masked = ~logits.isfinite()
    tracked = logits.requires_grad_()
    outputs = weights_of(tracked, scoring_func=scoring_func, renormalize=renormalize)
    torch.autograd.backward(outputs, random_like(outputs))
    gradient = tracked.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    assert bool((gradient[masked] == 0).all())
    assert bool((gradient[0] != 0).any())


@pytest.mark.every_device("biased_topk")
@pytest.mark.parametrize("scoring_func", ["sigmoid", "sqrtsoftplus"])
def test_biased_topk_weights_that_sum_to_zero_have_no_gradient(scoring_func: str) -> None:
    logits = torch.full((2, WIDTH), -300.0, requires_grad=True)  # scores underflow
    outputs = weights_of(logits, scoring_func=scoring_func, renormalize=True)
    torch.autograd.backward(outputs, random_like(outputs))
    assert_equal(logits.grad, torch.zeros(2, WIDTH))


def test_biased_topk_bias_has_no_gradient_and_may_change_before_the_backward() -> None:
    logits, bias = random_logits(9, WIDTH, torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    upstream = random_like(weights_of(logits, bias))
    expected = gradients_of(lambda x: weights_of(x, bias), [logits], upstream)[0]

    parameter = bias.clone().requires_grad_()
    tracked = logits.clone().requires_grad_()
    outputs = weights_of(tracked, parameter)
    with torch.no_grad():
        parameter.neg_()
    torch.autograd.backward(outputs, upstream)
    assert parameter.grad is None
    assert_equal(tracked.grad, expected)

    torch.autograd.backward(weights_of(logits, parameter), upstream)  # where the bias alone would like a gradient
    assert parameter.grad is None


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_biased_topk_with_outputs_that_nobody_uses(used: tuple[int, ...]) -> None:
    logits = random_logits(9, WIDTH, torch.float64)
    upstream = random_like(weights_of(logits))
    only_used = [gradient if i in used else torch.zeros_like(gradient) for i, gradient in enumerate(upstream)]
    expected = gradients_of(weights_of, [logits], only_used)[0]
    tracked = logits.clone().requires_grad_()
    outputs = weights_of(tracked)
    torch.autograd.backward([outputs[i] for i in used], [upstream[i] for i in used])
    assert_equal(tracked.grad, expected)


def test_biased_topk_layouts_and_id_types() -> None:
    logits, bias = random_logits(9, WIDTH), torch.randn(2 * WIDTH)[::2]
    upstream = random_like(weights_of(logits, bias))
    expected = gradients_of(lambda x: weights_of(x, bias), [logits], upstream)[0]
    for name, view in layouts(logits).items():
        gradients = [layouts(gradient)[name] if gradient.dim() == 2 else gradient for gradient in upstream]
        tracked = view.detach().requires_grad_()
        outputs = weights_of(tracked, bias, indices_dtype=torch.int64)
        assert_equal(torch.autograd.grad(outputs, tracked, gradients)[0], expected, name)


# ---- The other ops --------------------------------------------------------------------------------------------------


@pytest.mark.every_device("zero_expert_accumulate")
def test_zero_expert_accumulate() -> None:
    assert torch.autograd.gradcheck(zero_expert_accumulate, (leaf(T, H), leaf(T)))


@pytest.mark.every_device("zero_expert_accumulate")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 200, 257])
def test_zero_expert_accumulate_by_the_error_rule(hidden_size: int, dtype: torch.dtype) -> None:
    inputs = [torch.randn(T, hidden_size).to(dtype), torch.rand(T, dtype=weight_dtype(dtype))]
    assert_gradients(
        zero_expert_accumulate,
        lambda dtype: lambda x, weight: reference.zero_expert_accumulate(x, weight, dtype=dtype),
        inputs,
        dtype,
        ["hidden_states", "zero_weight"],
    )


def test_zero_expert_accumulate_refuses_out_where_a_gradient_is_wanted() -> None:
    hidden_states, zero_weight, out = torch.randn(T, H), torch.rand(T), torch.zeros(T, H)
    for wants_gradient in itertools.product((False, True), repeat=3):
        given = [tensor.clone() for tensor in (hidden_states, zero_weight, out)]
        for tensor, wants in zip(given, wants_gradient, strict=True):
            tensor.requires_grad_(wants)
        if any(wants_gradient):
            with pytest.raises(RuntimeError, match=r"out must be None where a gradient is wanted"):
                zero_expert_accumulate(given[0], given[1], given[2])
        with torch.no_grad():
            zero_expert_accumulate(given[0], given[1], given[2])


@pytest.mark.every_device("moe_permute")
@pytest.mark.parametrize("by_token", [False, True], ids=["by row", "by token"])
def test_moe_permute(by_token: bool) -> None:
    plan, num_rows = make_plan()
    slot_rows = plan.slot_rows if by_token else None
    assert torch.autograd.gradcheck(
        lambda x: moe_permute(x, plan.row_slots, plan.expert_offsets, K, slot_rows)[:num_rows], (leaf(T, H),)
    )


@pytest.mark.every_device("moe_permute")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 200, 257])
def test_moe_permute_by_the_error_rule(hidden_size: int, dtype: torch.dtype) -> None:
    plan, num_rows = make_plan()
    assert_gradients(
        lambda x: moe_permute(x, plan.row_slots, plan.expert_offsets, K)[:num_rows],
        lambda dtype: lambda x: reference.moe_permute(x, plan.row_slots, plan.expert_offsets, K)[:num_rows],
        [torch.randn(T, hidden_size).to(dtype)],
        dtype,
        ["hidden_states"],
    )


@pytest.mark.every_device("moe_permute_backward")
def test_moe_permute_reads_no_gradient_past_the_last_offset() -> None:
    plan, num_rows = make_plan()
    gradient = torch.randn(T * K, H)
    results = [
        moe_permute_backward(poisoned(gradient, num_rows, value), plan.row_slots, plan.expert_offsets, T, K)
        for value in (0.0, float("nan"))
    ]
    assert_equal(results[1], results[0])


@pytest.mark.every_device("moe_permute")
def test_moe_permute_sums_rows_that_share_a_slot() -> None:
    """No plan has such rows, but moe_permute copies them, so they count."""
    row_slots = torch.tensor([4, 0, 4, 4, 1, 5], dtype=torch.int32)
    expert_offsets = torch.tensor([0, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: moe_permute(x, row_slots, expert_offsets, 2), (leaf(3, H),))


@pytest.mark.every_device("moe_permute_backward")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_moe_permute_sums_in_slot_order(dtype: torch.dtype) -> None:
    """Rows of one slot in ascending order; one rounding."""
    num_rows, num_tokens, top_k = 40, 16, 3
    row_slots = torch.randint(0, 20, (num_rows,), dtype=torch.int32)
    expert_offsets = torch.tensor([0, num_rows], dtype=torch.int32)
    gradient = torch.randn(num_rows, 257).to(dtype)
    expected = torch.zeros(num_tokens, 257, dtype=weight_dtype(dtype))
    for row in row_slots.argsort(stable=True).tolist():
        expected[int(row_slots[row]) // top_k] += gradient[row]
    actual = moe_permute_backward(gradient, row_slots, expert_offsets, num_tokens, top_k)
    assert_equal(actual, expected.to(dtype))


@pytest.mark.every_device("moe_permute_backward")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_moe_permute_backward_with_slot_rows(dtype: torch.dtype) -> None:
    plan, num_rows = make_plan()
    gradient = poisoned(torch.randn(T * K, H).to(dtype), num_rows)
    expected = moe_permute_backward(gradient, plan.row_slots, plan.expert_offsets, T, K)
    for slot_rows in (plan.slot_rows, plan.slot_rows.t().contiguous().t()):
        assert_equal(moe_permute_backward(gradient, plan.row_slots, plan.expert_offsets, T, K, slot_rows), expected)


@pytest.mark.every_device("silu_and_mul")
def test_silu_and_mul() -> None:
    assert torch.autograd.gradcheck(silu_and_mul, (leaf(T, 2 * F),))


@pytest.mark.every_device("silu_and_mul")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("intermediate_size", [1, 100, 129])
def test_silu_and_mul_by_the_error_rule(intermediate_size: int, dtype: torch.dtype) -> None:
    gate_up = (3 * torch.randn(T, 2 * intermediate_size)).to(dtype)
    assert_gradients(
        silu_and_mul, lambda dtype: lambda x: reference.silu_and_mul(x, dtype=dtype), [gate_up], dtype, ["gate_up"]
    )


@pytest.mark.every_device("silu_and_mul_backward")
def test_silu_and_mul_rows_past_the_last_offset() -> None:
    expert_offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    gate_up, gradient = torch.randn(T, 2 * F), torch.randn(T, F)
    expected = silu_and_mul_backward(gradient[:5], gate_up[:5])
    actual = silu_and_mul_backward(poisoned(gradient, 5), poisoned(gate_up, 5), expert_offsets)
    assert_equal(actual, torch.cat([expected, torch.zeros(2, 2 * F)]))


@pytest.mark.every_device("moe_finalize")
@pytest.mark.parametrize("parts", [(), ("residual",), ("constant_weight", "constant_vectors"), "all"], ids=str)
def test_moe_finalize(parts: tuple[str, ...] | str) -> None:
    plan, _ = make_plan()
    given = finalize_inputs(T * K)
    optional = ("residual", "constant_weight", "constant_vectors")
    names = [name for name in given if name not in optional or name in parts or parts == "all"]
    assert torch.autograd.gradcheck(
        lambda *tensors: moe_finalize(slot_rows=plan.slot_rows, **dict(zip(names, tensors, strict=True))),
        [given[name].requires_grad_() for name in names],
    )


@pytest.mark.every_device("moe_finalize")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 200, 257])
def test_moe_finalize_by_the_error_rule(hidden_size: int, dtype: torch.dtype) -> None:
    plan, _ = make_plan()
    given = finalize_inputs(T * K, dtype, hidden_size)
    assert_gradients(
        lambda *tensors: moe_finalize(slot_rows=plan.slot_rows, **dict(zip(given, tensors, strict=True))),
        lambda dtype: (
            lambda *tensors: reference.moe_finalize(
                slot_rows=plan.slot_rows, dtype=dtype, **dict(zip(given, tensors, strict=True))
            )
        ),
        list(given.values()),
        dtype,
        list(given),
    )


@pytest.mark.every_device("moe_finalize_backward")
def test_moe_finalize_rows_that_no_slot_names() -> None:
    plan, num_rows = make_plan()
    given = finalize_inputs(T * K)
    gradient = torch.randn(T, H, dtype=torch.float64)
    grads = moe_finalize_backward(
        gradient,
        poisoned(given["rows"], num_rows),
        plan.slot_rows,
        given["topk_weights"],
        given["hidden_states"],
        given["zero_weight"],
    )
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert_equal(grads[0][num_rows:], torch.zeros(T * K - num_rows, H, dtype=torch.float64))
    assert bool((grads[1][plan.slot_rows < 0] == 0).all())


@pytest.mark.parametrize(
    ("slot_rows", "message"),
    [
        ([[0, 1, 9]], r"slot_rows must be in \[-1, 3\), got 9"),
        ([[0, -2, 1]], r"slot_rows must be in \[-1, 3\), got -2"),
        ([[0, 2, 2]], r"slot_rows must name every row at most once, got 2 twice"),
    ],
    ids=["too large", "too small", "twice"],
)
def test_moe_finalize_refuses_rows_it_cannot_write(slot_rows: list[list[int]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.zexpert.moe_finalize_backward(
            torch.randn(1, H),
            torch.randn(3, H),
            torch.tensor(slot_rows, dtype=torch.int32),
            torch.rand(1, 3),
            torch.randn(1, H),
            torch.rand(1),
        )
