# SPDX-License-Identifier: Apache-2.0
"""Gradients of grouped_mlp and fused_moe: by finite differences in float64, and by the error rule in every dtype."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from gradients import F, H, K, R, T, assert_gradients, finalize_inputs, gradients_of, make_plan, mlp_inputs, poisoned
from testing import FLOAT_DTYPES, assert_equal, layouts, weight_dtype
from zexpert import DispatchPlan, ops

GROUPED_MLPS = {
    "grouped_mlp": ops.grouped_mlp,
    "grouped_mlp_with_gate_up": lambda *arguments: ops.grouped_mlp_with_gate_up(*arguments)[0],
}


@pytest.mark.parametrize("name", GROUPED_MLPS)
def test_grouped_mlp(name: str) -> None:
    plan, num_rows = make_plan()
    inputs = [tensor.requires_grad_() for tensor in mlp_inputs(T * K)]
    assert torch.autograd.gradcheck(
        lambda rows, w13, w2: GROUPED_MLPS[name](rows, plan.expert_offsets, w13, w2)[:num_rows], inputs
    )


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, False)], ids=str)
def test_grouped_mlp_of_tokens(needs: tuple[bool, ...]) -> None:
    """Those of moe_permute and grouped_mlp, one after the other, bit for bit."""
    plan, num_rows = make_plan()
    inputs = mlp_inputs(T)
    upstream = torch.randn(num_rows, H, dtype=torch.float64)

    def gradients(of_tokens: bool) -> list[Tensor | None]:
        tokens, w13, w2 = (
            tensor.clone().requires_grad_(is_needed) for tensor, is_needed in zip(inputs, needs, strict=True)
        )
        if of_tokens:
            out = ops.grouped_mlp(tokens, plan.expert_offsets, w13, w2, plan.row_slots, K)
        else:
            rows = ops.moe_permute(tokens, plan.row_slots, plan.expert_offsets, K)
            out = ops.grouped_mlp(rows, plan.expert_offsets, w13, w2)
        out[:num_rows].backward(upstream)
        return [tensor.grad for tensor in (tokens, w13, w2)]

    for is_needed, actual, expected in zip(needs, gradients(True), gradients(False), strict=True):
        assert (actual is not None) == is_needed
        if actual is not None and expected is not None:
            assert_equal(actual, expected)


@pytest.mark.parametrize("given", [(), (None,), (None, 1), ("slots",), ("slots", 1)], ids=str)
def test_grouped_mlp_with_arguments_left_out(given: tuple[object, ...]) -> None:
    plan, num_rows = make_plan()
    rows, w13, w2 = (tensor.requires_grad_() for tensor in mlp_inputs(T * K))
    upstream = torch.randn(num_rows, H, dtype=torch.float64)

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out[:num_rows], (rows, w13, w2), upstream)

    own_slots = torch.arange(T * K, dtype=torch.int32)
    more = [own_slots if argument == "slots" else argument for argument in given]
    left_out = torch.ops.zexpert.grouped_mlp(rows, plan.expert_offsets, w13, w2, *more)
    whole = ops.grouped_mlp(rows, plan.expert_offsets, w13, w2)  # hands all six over
    for actual, expected in zip(gradients(left_out), gradients(whole), strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPED_MLPS)
def test_grouped_mlp_by_the_error_rule(name: str, dtype: torch.dtype) -> None:
    for sizes in ((0, 2, 0, 3), (1, 40, 7, 17)):
        expert_offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        assert_gradients(
            lambda rows, w13, w2, offsets=expert_offsets: GROUPED_MLPS[name](rows, offsets, w13, w2),
            lambda dtype, offsets=expert_offsets: (
                lambda rows, w13, w2: reference.grouped_mlp(rows, offsets, w13, w2, dtype=dtype)
            ),
            mlp_inputs(sum(sizes), dtype, 65, 33),
            dtype,
            ["rows", "w13_weight", "w2_weight"],
        )


def test_grouped_mlp_rows_past_the_last_offset_and_idle_experts() -> None:
    plan, num_rows = make_plan()
    rows, w13, w2 = mlp_inputs(T * K)
    gradient = torch.randn(T * K, H, dtype=torch.float64)
    gate_up = ops.grouped_mlp_with_gate_up(rows, plan.expert_offsets, w13, w2)[1]
    w13[2] = w2[2] = float("nan")  # expert 2 has no rows
    backward = torch.ops.zexpert.grouped_mlp_backward
    for kept in (None, poisoned(gate_up, num_rows)):
        grads = backward(poisoned(gradient, num_rows), poisoned(rows, num_rows), plan.expert_offsets, w13, w2, kept)
        assert all(bool(grad.isfinite().all()) for grad in grads)
        assert_equal(grads[0][num_rows:], torch.zeros(T * K - num_rows, H, dtype=torch.float64))
        assert_equal(grads[1][2], torch.zeros_like(w13[2]))
        assert_equal(grads[2][2], torch.zeros_like(w2[2]))


def test_grouped_mlp_computes_the_gradients_that_are_needed() -> None:
    plan, _ = make_plan()
    inputs = mlp_inputs(T * K)
    rows, w13, w2 = inputs
    gradient = torch.randn(T * K, H, dtype=torch.float64)
    backward = torch.ops.zexpert.grouped_mlp_backward
    all_needed = backward(gradient, rows, plan.expert_offsets, w13, w2, None)
    for needs in itertools.product((False, True), repeat=3):
        keywords = dict(zip(("needs_rows", "needs_w13_weight", "needs_w2_weight"), needs, strict=True))
        for is_needed, grad, full in zip(
            needs, backward(gradient, rows, plan.expert_offsets, w13, w2, None, **keywords), all_needed, strict=True
        ):
            assert_equal(grad, full if is_needed else full.new_empty(0))

        leaves = [tensor.clone().requires_grad_(is_needed) for tensor, is_needed in zip(inputs, needs, strict=True)]
        out = ops.grouped_mlp(leaves[0], plan.expert_offsets, leaves[1], leaves[2])
        assert out.requires_grad == any(needs)
        if any(needs):
            out.backward(gradient)
        for is_needed, tensor, full in zip(needs, leaves, all_needed, strict=True):
            assert (tensor.grad is not None) == is_needed
            if tensor.grad is not None:
                assert_equal(tensor.grad, full)


def test_grouped_mlp_layouts() -> None:
    """Weights that are a part of more experts, rows and gradients in any layout."""
    plan, _ = make_plan()
    rows, w13, w2 = mlp_inputs(T * K)
    gradient = torch.randn(T * K, H, dtype=torch.float64)
    backward = torch.ops.zexpert.grouped_mlp_backward
    expected = backward(gradient, rows, plan.expert_offsets, w13, w2, None)
    more_w13 = torch.cat([w13, w13])[:R]
    transposed_w2 = w2.transpose(1, 2).contiguous().transpose(1, 2)
    for name in layouts(rows):
        actual = backward(
            layouts(gradient)[name], layouts(rows)[name], plan.expert_offsets, more_w13, transposed_w2, None
        )
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, msg=name)


def fused_inputs(dtype: torch.dtype = torch.float64, hidden: int = H, inner: int = F) -> dict[str, Tensor]:
    """All that has gradients."""
    given = finalize_inputs(1, dtype, hidden)
    _, given["w13_weight"], given["w2_weight"] = mlp_inputs(1, dtype, hidden, inner)
    del given["rows"]
    return given


def composed_moe(plan: DispatchPlan, w13_weight: Tensor, w2_weight: Tensor, **epilogue: Tensor) -> Tensor:
    """fused_moe out of the ops that it stands for."""
    rows = ops.moe_permute(epilogue["hidden_states"], plan.row_slots, plan.expert_offsets, K)
    results, _ = ops.grouped_mlp_with_gate_up(rows, plan.expert_offsets, w13_weight, w2_weight)
    return ops.moe_finalize(results, plan.slot_rows, **epilogue)


@pytest.mark.parametrize("parts", [(), ("residual",), ("constant_weight", "constant_vectors"), "all"], ids=str)
def test_fused_moe(parts: tuple[str, ...] | str) -> None:
    plan, _ = make_plan()
    given = fused_inputs(hidden=5, inner=3)
    optional = ("residual", "constant_weight", "constant_vectors")
    names = [name for name in given if name not in optional or name in parts or parts == "all"]
    assert torch.autograd.gradcheck(
        lambda *tensors: ops.fused_moe(**plan._asdict(), **dict(zip(names, tensors, strict=True)))[0],
        [given[name].requires_grad_() for name in names],
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_fused_moe_by_the_error_rule(dtype: torch.dtype) -> None:
    num_tokens = 100
    topk_ids = torch.randint(-2, R, (num_tokens, K)).clamp(min=-1)
    plan = ops.moe_plan(topk_ids, R)
    weights = weight_dtype(dtype)
    _, w13_weight, w2_weight = mlp_inputs(1, dtype, 65, 33)
    given = {
        "hidden_states": torch.randn(num_tokens, 65).to(dtype),
        "topk_weights": torch.rand(num_tokens, K, dtype=weights),
        "zero_weight": torch.rand(num_tokens, dtype=weights),
        "w13_weight": w13_weight,
        "w2_weight": w2_weight,
    }

    def plain(dtype: torch.dtype) -> Any:
        # Expert by expert: sums over one token at a time would round less than any matrix product.
        def run(hidden_states: Tensor, topk_weights: Tensor, zero_weight: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
            x = hidden_states.to(dtype)
            out = zero_weight.to(dtype)[:, None] * x
            for expert in range(R):
                tokens, slots = torch.where(topk_ids == expert)
                activation = reference.silu_and_mul(x[tokens] @ w13[expert].to(dtype).T, dtype=dtype)
                weights = topk_weights[tokens, slots, None].to(dtype)
                out = out.index_add(0, tokens, weights * (activation @ w2[expert].to(dtype).T))
            return out

        return run

    assert_gradients(
        lambda *tensors: ops.fused_moe(**plan._asdict(), **dict(zip(given, tensors, strict=True)))[0],
        plain,
        list(given.values()),
        dtype,
        list(given),
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_fused_moe_is_its_parts_bit_for_bit(dtype: torch.dtype) -> None:
    plan, num_rows = make_plan()
    # Rows of whole cache lines: a matrix-product library may sum others differently by where they begin.
    given = fused_inputs(dtype, 32, 32)
    out, gate_up = ops.fused_moe(**plan._asdict(), **given)
    assert_equal(out, composed_moe(plan, **given))
    rows = ops.moe_permute(given["hidden_states"], plan.row_slots, plan.expert_offsets, K)
    expected = ops.grouped_mlp_with_gate_up(rows, plan.expert_offsets, given["w13_weight"], given["w2_weight"])[1]
    assert_equal(gate_up[:num_rows], expected[:num_rows])


def test_fused_moe_refuses_slots_past_the_last_offset() -> None:
    """Rows there have no values."""
    plan, num_rows = make_plan()
    assert num_rows < plan.row_slots.numel()
    slot_rows = plan.slot_rows.clone()
    slot_rows[0, 0] = num_rows
    with pytest.raises(RuntimeError, match=rf"^slot_rows must be in \[-1, {num_rows}\), got {num_rows}$"):
        ops.fused_moe(**plan._replace(slot_rows=slot_rows)._asdict(), **fused_inputs())


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 2, 4, 4, 22], r"^expert_offsets must be at most the number of rows \(21\), got 22$"),
        ([0, 2, 4, 4, -1], r"^expert_offsets must ascend, got -1 after 4$"),
    ],
)
def test_fused_moe_refuses_bad_offsets(offsets: list[int], message: str) -> None:
    plan, _ = make_plan()
    plan = plan._replace(expert_offsets=torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=message):
        ops.fused_moe(**plan._asdict(), **fused_inputs())


def test_fused_moe_gradients_are_those_of_its_parts() -> None:
    plan, _ = make_plan()
    given = fused_inputs()
    upstream = [torch.randn(T, H, dtype=torch.float64)]
    fused = gradients_of(
        lambda *tensors: ops.fused_moe(**plan._asdict(), **dict(zip(given, tensors, strict=True)))[0],
        list(given.values()),
        upstream,
    )
    composed = gradients_of(
        lambda *tensors: composed_moe(plan, **dict(zip(given, tensors, strict=True))), list(given.values()), upstream
    )
    for name, one, other in zip(given, fused, composed, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"gradient of {name}: {text}")
    assert bool((fused[0][plan.slot_rows < 0] == 0).all())


def test_fused_moe_layouts_and_what_is_needed() -> None:
    plan, num_rows = make_plan()
    given = fused_inputs()
    names = ("hidden_states", "topk_weights", "zero_weight")
    weights = (given["w13_weight"], given["w2_weight"])
    gate_up = poisoned(ops.fused_moe(**plan._asdict(), **given)[1], num_rows)
    gradient = torch.randn(T, H, dtype=torch.float64)
    backward = torch.ops.zexpert.fused_moe_backward
    expected = backward(gradient, *(given[name] for name in names), *plan, *weights, gate_up)
    assert all(bool(result.isfinite().all()) for result in expected)
    for name in layouts(gradient):
        hidden_states, topk_weights = layouts(given["hidden_states"])[name], layouts(given["topk_weights"])[name]
        for needs in itertools.product((False, True), repeat=3):
            keywords = ("needs_hidden_states", "needs_w13_weight", "needs_w2_weight")
            results = backward(
                layouts(gradient)[name],
                hidden_states,
                topk_weights,
                given["zero_weight"],
                *plan,
                *weights,
                layouts(gate_up)[name],
                **dict(zip(keywords, needs, strict=True)),
            )
            for is_needed, one, other in zip((needs[0], True, True, *needs[1:]), results, expected, strict=True):
                if is_needed:
                    torch.testing.assert_close(one, other, msg=name)
                else:
                    assert one.shape == (0,)
