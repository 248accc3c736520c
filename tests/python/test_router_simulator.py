# SPDX-License-Identifier: Apache-2.0
"""RoutingSimulatorRouter: the load each strategy makes, with and without zero experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from testing import assert_equal
from zexpert import RoutingMethodType, RoutingResult
from zexpert.router import RoutingSimulatorRouter

STRATEGIES = ("uniform_random", "round_robin", "normal")


def route(
    strategy: str, num_tokens: int, num_experts: int, *, dtype: torch.dtype = torch.float32, **arguments: Any
) -> RoutingResult:
    router = RoutingSimulatorRouter(arguments.pop("top_k", 4), arguments.pop("num_real", 16), strategy, **arguments)
    assert router.routing_method_type == RoutingMethodType.SIMULATED
    return router.select_experts(torch.zeros(num_tokens, 3), torch.zeros(num_tokens, num_experts, dtype=dtype))


def load(topk_ids: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(topk_ids.flatten(), minlength=num_experts).double()


@pytest.mark.parametrize("num_tokens", [0, 1, 1000])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_token_chooses_different_experts(strategy: str, num_tokens: int) -> None:
    routing = route(strategy, num_tokens, 16)
    ids = routing.topk_ids
    assert ids.shape == (num_tokens, 4)
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 16 for row in ids.tolist())
    assert_equal(routing.topk_weights, torch.full((num_tokens, 4), 0.25))
    assert_equal(routing.zero_weight, torch.zeros(num_tokens))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_experts_can_be_chosen(strategy: str) -> None:
    routing = route(strategy, 5, 16, top_k=16)
    assert all(sorted(row) == list(range(16)) for row in routing.topk_ids.tolist())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zero_experts_take_their_share(strategy: str) -> None:
    routing = route(
        strategy,
        500,
        16,
        num_real=8,
        zero_expert_type={"identity": 3, "constant": 2, "drop": 3},
        routed_scaling_factor=2.0,
        dtype=torch.float64,
        indices_dtype=torch.int64,
    )
    whole = route(strategy, 500, 16).topk_ids  # the same choice among 16 real experts
    weight = 2.0 / 4
    is_real = whole < 8
    assert_equal(routing.topk_ids, torch.where(is_real, whole, -1).long())
    assert_equal(routing.topk_weights, is_real.double() * weight)
    assert_equal(routing.zero_weight, ((whole >= 8) & (whole < 11)).sum(dim=1).double() * weight)
    constants = torch.stack([(whole == 11).sum(dim=1), (whole == 12).sum(dim=1)], dim=1)
    assert_equal(routing.constant_weight, constants.double() * weight)


def test_width_of_the_logits_decides_the_number_of_identity_experts() -> None:
    routing = route("round_robin", 4, 8, num_real=6, top_k=2, zero_expert_type="identity")
    assert routing.topk_ids.tolist() == [[0, 1], [2, 3], [4, 5], [-1, -1]]
    assert routing.zero_weight.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_round_robin_is_even() -> None:
    assert load(route("round_robin", 400, 16).topk_ids, 16).tolist() == [100.0] * 16


def test_uniform_random_is_uniform() -> None:
    share = load(route("uniform_random", 20000, 16).topk_ids, 16) / 20000
    assert float((share - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 20000) ** 0.5  # five standard deviations


def test_normal_is_a_bell_curve() -> None:
    share = load(route("normal", 20000, 16, top_k=1).topk_ids, 16) / 20000
    expected = torch.softmax(-0.5 * ((torch.arange(16).double() - 7.5) / 2) ** 2, dim=0)
    assert float((share - expected).abs().max()) < 5 * (0.25 / 20000) ** 0.5


def test_seed_decides() -> None:
    first = route("uniform_random", 100, 16).topk_ids
    assert_equal(route("uniform_random", 100, 16).topk_ids, first)
    assert int((route("uniform_random", 100, 16, seed=1).topk_ids != first).sum()) > 200
    assert_equal(route("uniform_random", 60, 16).topk_ids, first[:60])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routing_simulation": "zipf"}, r'^routing_simulation must be "uniform_random", .*, got \'zipf\'$'),
        ({"seed": -1}, r"^seed must be in \[0, 2\*\*31\), got -1$"),
        ({"top_k": 5}, r"^top_k must be at most the number of experts \(4\), got 5$"),
        ({"zero_expert_num": 2}, r"^zero_expert_num is 2 but zero_expert_type is missing$"),
    ],
)
def test_rejects(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingSimulatorRouter(**{"top_k": 2, "num_real_experts": 4, "routing_simulation": "round_robin", **arguments})


def test_rejects_narrow_logits() -> None:
    with pytest.raises(ValueError, match=r"^router_logits must have one column per expert \(16\), got 15$"):
        route("round_robin", 3, 15)
    with pytest.raises(ValueError, match=r"^router_logits must have at least 4 columns, got 3$"):
        route("round_robin", 3, 3, num_real=2, zero_expert_type="drop")
