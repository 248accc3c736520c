# SPDX-License-Identifier: Apache-2.0
"""ZeroExpertRouter: how zero experts are named and counted, and the output for engines that add it themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import reference
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule
from zexpert import ZeroExpertType
from zexpert.router import ZeroExpertRouter

NUM_REAL = 4


def counts(router: ZeroExpertRouter) -> tuple[int | None, ...]:
    spec = router.spec
    return (spec.num_logits, spec.num_identity_experts, spec.num_constant_experts, spec.num_drop_experts)


@pytest.mark.parametrize(
    ("zero_expert_type", "zero_expert_num", "expected"),
    [
        ("identity", 3, (7, 3, 0, 0)),
        ("copy", 3, (7, 3, 0, 0)),
        ("constant", 3, (7, 0, 3, 0)),
        ("drop", 3, (7, 0, 0, 3)),
        ("zero", 3, (7, 0, 0, 3)),
        ({"identity": 1, "constant": 2, "drop": 1}, None, (8, 1, 2, 1)),
        ({"zero": 1, "copy": 2}, 3, (7, 2, 0, 1)),
        ({"drop": 2, "identity": 0}, None, (6, 0, 0, 2)),
        (ZeroExpertType.IDENTITY, 3, (7, 3, 0, 0)),
        (ZeroExpertType.CONSTANT, 3, (7, 0, 3, 0)),
        (ZeroExpertType.DROP, 3, (7, 0, 0, 3)),
        ({ZeroExpertType.IDENTITY: 1, "constant": 2, ZeroExpertType.DROP: 1}, None, (8, 1, 2, 1)),
        ("identity", None, (None, None, 0, None)),
        ("drop", None, (None, 0, 0, None)),
    ],
)
def test_counts(zero_expert_type: Any, zero_expert_num: int | None, expected: tuple[int | None, ...]) -> None:
    assert counts(ZeroExpertRouter(2, NUM_REAL, zero_expert_type, zero_expert_num)) == expected


@pytest.mark.parametrize(
    ("zero_expert_type", "expected"),
    [("identity", (6, 2, 0, 0)), ("constant", (6, 0, 2, 0)), ("drop", (6, 0, 0, 2))],
)
def test_count_from_the_bias(zero_expert_type: str, expected: tuple[int, ...]) -> None:
    router = ZeroExpertRouter(2, NUM_REAL, zero_expert_type, e_score_correction_bias=torch.zeros(6))
    assert counts(router) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zero_expert_type": "swap"}, r'^zero_expert_type must be "identity" .*, got "swap"$'),
        ({"zero_expert_type": {"swap": 1}}, r'^zero_expert_type must be "identity" .*, got "swap"$'),
        ({"zero_expert_type": None}, r"^zero_expert_type must be a name or a mapping from names to counts, got None$"),
        ({"zero_expert_type": 3}, r"^zero_expert_type must be a name or a mapping from names to counts, got 3$"),
        ({"zero_expert_type": "constant"}, r'^zero_expert_num is required for zero_expert_type "constant" without'),
        ({"zero_expert_num": 0}, r"^zero_expert_num must be an integer of at least 1, got 0$"),
        ({"zero_expert_num": 1.5}, r"^zero_expert_num must be an integer of at least 1, got 1.5$"),
        ({"zero_expert_type": {"drop": -1}}, r'^zero_expert_type\["drop"\] must be an integer of at least 0, got -1$'),
        (
            {"zero_expert_type": {ZeroExpertType.DROP: -1}},
            r'^zero_expert_type\["drop"\] must be an integer of at least 0, got -1$',
        ),
        (
            {"zero_expert_type": {"copy": 1, ZeroExpertType.IDENTITY: 1}},
            r"^zero_expert_type must name each kind",
        ),
        ({"zero_expert_type": {"drop": 0}}, r"^zero_expert_type must count at least 1 zero expert, got"),
        ({"zero_expert_type": {}}, r"^zero_expert_type must count at least 1 zero expert, got {}$"),
        ({"zero_expert_type": {"copy": 1, "identity": 1}}, r"^zero_expert_type must name each kind .* once, got"),
        (
            {"zero_expert_type": {"drop": 2}, "zero_expert_num": 3},
            r"^zero_expert_num must be 2, the sum of zero_expert_type, got 3$",
        ),
        (
            {"e_score_correction_bias": torch.zeros(4)},
            r"^e_score_correction_bias must have an entry per expert, more than the 4 real ones, got 4$",
        ),
        (
            {"e_score_correction_bias": torch.zeros(7), "zero_expert_num": 2},
            r"^e_score_correction_bias must have shape \[6\], one entry per expert, got \[7\]$",
        ),
        ({"top_k": 7, "zero_expert_num": 2}, r"^top_k must be at most the number of experts \(6\), got 7$"),
        ({"num_expert_group": 3}, r"^num_expert_group must divide the number of real experts \(4\), got 3$"),
    ],
)
def test_rejects(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZeroExpertRouter(**{"top_k": 2, "num_real_experts": NUM_REAL, "zero_expert_type": "identity", **arguments})


@pytest.mark.parametrize("zero_expert_type", ["identity", "drop"])
def test_width_of_the_logits_decides(zero_expert_type: str) -> None:
    router = ZeroExpertRouter(2, NUM_REAL, zero_expert_type)
    for width in (5, 9):
        router_logits = torch.randn(20, width)
        routing = router.select_experts(torch.zeros(20, 3), router_logits)
        identity = width - NUM_REAL if zero_expert_type == "identity" else 0
        expected = reference.biased_topk(
            router_logits, None, 2, num_real_experts=NUM_REAL, num_identity_experts=identity
        )
        assert_equal(routing.topk_ids.long(), expected.topk_ids)
        torch.testing.assert_close(routing.zero_weight.double(), expected.zero_weight, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="at least 4"):
        router.select_experts(torch.zeros(20, 3), torch.randn(20, 3))


def test_grouped_zero_experts_are_always_eligible() -> None:
    router = ZeroExpertRouter(2, NUM_REAL, "identity", 1, num_expert_group=2, topk_group=1, scoring_func="sigmoid")
    # Expert 0 has the largest key of the real experts, but its group's second is small: experts 2 and 3 are eligible.
    router_logits = torch.tensor([[0.9, -3.0, 0.5, 0.5, 1.0]])
    routing = router.select_experts(torch.zeros(1, 3), router_logits)
    assert routing.topk_ids.tolist() == [[-1, 2]]


# --- zero_expert_output


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_zero_expert_output(dtype: torch.dtype) -> None:
    router = ZeroExpertRouter(2, NUM_REAL, {"identity": 2, "drop": 1})
    hidden_states = torch.randn(9, 5, dtype=dtype)
    assert router.zero_expert_output is None
    routing = router.select_experts(hidden_states, torch.randn(9, 7))
    assert float(routing.zero_weight.max()) > 0

    output = router.zero_expert_output

    assert output is not None
    assert output.dtype == dtype
    plain = routing.zero_weight.to(dtype)[:, None] * hidden_states
    assert_error_rule(output, plain, reference.zero_expert_accumulate(hidden_states, routing.zero_weight))
    assert router.zero_expert_output is None


def test_zero_expert_output_belongs_to_the_last_routing() -> None:
    router = ZeroExpertRouter(1, 1, "identity", 1)
    ones = torch.ones(1, 3)
    router.select_experts(ones, torch.tensor([[0.0, 50.0]]))
    router.select_experts(ones, torch.tensor([[50.0, 0.0]]))
    output = router.zero_expert_output
    assert output is not None
    assert output.tolist() == [[0.0, 0.0, 0.0]]
    router.select_experts_and_plan(2 * ones, torch.tensor([[-50.0, 50.0]]), 1)
    output = router.zero_expert_output
    assert output is not None
    assert output.tolist() == [[2.0, 2.0, 2.0]]


def test_copies_do_not_carry_the_last_routing() -> None:
    router = ZeroExpertRouter(1, 1, "identity", 1)
    router.select_experts(torch.ones(1, 3), torch.zeros(1, 2))
    assert copy.deepcopy(router).zero_expert_output is None
    assert router.zero_expert_output is not None


def test_a_routing_can_be_forgotten() -> None:
    router = ZeroExpertRouter(1, 1, "identity", 1)
    router.select_experts(torch.ones(1, 3), torch.zeros(1, 2))
    router.forget_routing()
    assert router.zero_expert_output is None
