# SPDX-License-Identifier: Apache-2.0
"""fused_moe's result against the reference, and what it keeps for the backward. test_gradients_experts.py has its
gradients and bad input.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from testing import FLOAT_DTYPES, assert_error_rule, unchanged, weight_dtype
from zexpert import DispatchPlan, ops

K, R, H, F, C = 3, 5, 33, 19, 2


def tensors_of(num_tokens: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], DispatchPlan]:
    """Arguments with every optional part, and the plan of slots of which some do no work."""
    routing_dtype = weight_dtype(dtype)
    plan = ops.moe_plan(torch.randint(-2, R, (num_tokens, K)).clamp(min=-1), R)
    given = {
        "hidden_states": torch.randn(num_tokens, H).to(dtype),
        "topk_weights": torch.rand(num_tokens, K, dtype=routing_dtype),
        "zero_weight": torch.rand(num_tokens, dtype=routing_dtype),
        "w13_weight": (torch.randn(R, 2 * F, H) / H**0.5).to(dtype),
        "w2_weight": (torch.randn(R, H, F) / F**0.5).to(dtype),
        "residual": torch.randn(num_tokens, H).to(dtype),
        "constant_weight": torch.rand(num_tokens, C, dtype=routing_dtype),
        "constant_vectors": torch.randn(C, H).to(dtype),
    }
    return given, plan


def expected(given: dict[str, Tensor], plan: DispatchPlan, dtype: torch.dtype = torch.float64) -> Tensor:
    optional: dict[str, Any] = {name: given.get(name) for name in ("residual", "constant_weight", "constant_vectors")}
    rows = reference.moe_permute(given["hidden_states"], plan.row_slots, plan.expert_offsets, K)
    results = reference.grouped_mlp(rows, plan.expert_offsets, given["w13_weight"], given["w2_weight"], dtype=dtype)
    routing = (given["topk_weights"], given["hidden_states"], given["zero_weight"])
    return reference.moe_finalize(results, plan.slot_rows, *routing, **optional, dtype=dtype)


@pytest.mark.cpu_paths
@pytest.mark.parametrize("keep_gate_up", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_against_reference(num_tokens: int, dtype: torch.dtype, keep_gate_up: bool) -> None:
    given, plan = tensors_of(num_tokens, dtype)
    with unchanged(*given.values(), *plan):
        out, gate_up = ops.fused_moe(**given, **plan._asdict(), keep_gate_up=keep_gate_up)
    assert_error_rule(out, expected(given, plan, dtype), expected(given, plan))
    assert out.dtype == gate_up.dtype == dtype
    assert gate_up.shape == (num_tokens * K if keep_gate_up else 0, 2 * F)


@pytest.mark.parametrize("left_out", [("residual",), ("constant_weight", "constant_vectors")], ids=str)
def test_optional_parts(left_out: tuple[str, ...]) -> None:
    given, plan = tensors_of(7, torch.float64)
    given = {name: tensor for name, tensor in given.items() if name not in left_out}
    out, _ = ops.fused_moe(**given, **plan._asdict())
    torch.testing.assert_close(out, expected(given, plan))


@pytest.mark.parametrize("keep_gate_up", [True, False])
def test_no_tokens(keep_gate_up: bool) -> None:
    given, plan = tensors_of(0, torch.float32)
    out, gate_up = ops.fused_moe(**given, **plan._asdict(), keep_gate_up=keep_gate_up)
    assert out.shape == (0, H)
    assert gate_up.shape == (0, 2 * F)


@pytest.mark.parametrize("implementation", ["auto", "cpu", "torch"])
def test_backward_computes_gate_up_again(implementation: str) -> None:
    """The gradients do not depend on what the forward keeps."""
    given, plan = tensors_of(30, torch.float64)

    def gradients(keep_gate_up: bool) -> list[Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        options: dict[str, Any] = {"keep_gate_up": keep_gate_up, "implementation": implementation}
        out, _ = ops.fused_moe(**leaves, **plan._asdict(), **options)
        return list(torch.autograd.grad(out.square().sum(), list(leaves.values())))

    for name, kept, computed in zip(given, gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(kept, computed, msg=name)


@pytest.mark.parametrize("implementation", ["hopper", "grouped_mm", "none"])
def test_implementation_that_cannot_serve_is_refused(implementation: str) -> None:
    given, plan = tensors_of(2, torch.float32)
    with pytest.raises(RuntimeError, match=rf'^implementation must be .*, got "{implementation}"$'):
        ops.fused_moe(**given, **plan._asdict(), keep_gate_up=False, implementation=implementation)
