# SPDX-License-Identifier: Apache-2.0
"""create_fused_moe_router: which router each configuration gets, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from testing import assert_equal
from zexpert import RoutingMethodType, RoutingResult, create_fused_moe_router
from zexpert.router import (
    BaseRouter,
    CustomRoutingRouter,
    FusedTopKBiasRouter,
    FusedTopKRouter,
    GroupedTopKRouter,
    RoutingSimulatorRouter,
    ZeroExpertRouter,
)


def custom(*, gating_output: Tensor, topk: int, **_: Any) -> tuple[Tensor, Tensor]:
    values, ids = gating_output.topk(topk, dim=1)
    return values, ids


ZERO: dict[str, Any] = {"zero_expert_type": "identity", "zero_expert_num": 4, "num_logical_experts": 8}
GROUPED: dict[str, Any] = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
CUSTOM: dict[str, Any] = {"custom_routing_function": custom}
BIAS: dict[str, Any] = {"e_score_correction_bias": torch.zeros(8)}
ZERO_BIAS: dict[str, Any] = {"e_score_correction_bias": torch.zeros(12)}
SIMULATION: dict[str, Any] = {"routing_simulation": "round_robin"}


@pytest.mark.parametrize(
    ("arguments", "router_class", "method"),
    [
        ({}, FusedTopKRouter, RoutingMethodType.TOPK),
        (BIAS, FusedTopKBiasRouter, RoutingMethodType.TOPK_BIAS),
        (CUSTOM, CustomRoutingRouter, RoutingMethodType.CUSTOM),
        (CUSTOM | BIAS, CustomRoutingRouter, RoutingMethodType.CUSTOM),
        (GROUPED, GroupedTopKRouter, RoutingMethodType.GROUPED_TOPK),
        (GROUPED | BIAS, GroupedTopKRouter, RoutingMethodType.GROUPED_TOPK),
        (ZERO, ZeroExpertRouter, RoutingMethodType.ZERO_EXPERT),
        (ZERO | GROUPED | ZERO_BIAS, ZeroExpertRouter, RoutingMethodType.ZERO_EXPERT),
        (SIMULATION, RoutingSimulatorRouter, RoutingMethodType.SIMULATED),
        (SIMULATION | ZERO | GROUPED | CUSTOM | ZERO_BIAS, RoutingSimulatorRouter, RoutingMethodType.SIMULATED),
    ],
)
def test_order(arguments: dict[str, Any], router_class: type[BaseRouter], method: RoutingMethodType) -> None:
    router = create_fused_moe_router(2, 8, **arguments)
    assert type(router) is router_class
    assert router.routing_method_type == method
    assert router.e_score_correction_bias is arguments.get("e_score_correction_bias")
    width = 12 if "zero_expert_type" in arguments else 8
    routing = router.select_experts(torch.zeros(5, 3), torch.randn(5, width))
    assert isinstance(routing, RoutingResult)
    assert routing.topk_ids.shape == (5, 2)


@pytest.mark.parametrize("arguments", [{}, BIAS, CUSTOM, GROUPED, ZERO, SIMULATION])
def test_arguments_reach_the_spec(arguments: dict[str, Any]) -> None:
    router = create_fused_moe_router(
        2,
        8,
        renormalize=True,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=2.5,
        indices_dtype=torch.int64,
        **arguments,
    )
    assert router.spec.top_k == 2
    assert router.spec.num_real_experts == 8
    assert router.spec.num_experts == (12 if arguments is ZERO else 8)
    assert router.spec.renormalize
    assert router.scoring_func == "sqrtsoftplus"
    assert router.spec.routed_scaling_factor == 2.5
    width = router.spec.num_logits
    assert router.select_experts(torch.zeros(1, 3), torch.zeros(1, width)).topk_ids.dtype == torch.int64


def test_zero_router_takes_grouped_arguments() -> None:
    zero = {**ZERO, "zero_expert_type": {"identity": 3, "drop": 1}}
    router = create_fused_moe_router(2, 8, renormalize=True, drop_before_renormalize=True, **zero, **GROUPED)
    assert (router.spec.num_expert_group, router.spec.topk_group) == (4, 2)
    assert router.spec.drop_before_renormalize


@pytest.mark.parametrize("zero", [{}, ZERO])
def test_one_group_is_no_group(zero: dict[str, Any]) -> None:
    router = create_fused_moe_router(2, 8, num_expert_group=1, topk_group=1, **zero)
    assert (router.spec.num_expert_group, router.spec.topk_group) == (1, 1)
    assert not isinstance(router, GroupedTopKRouter)


def test_environment_asks_for_a_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEXPERT_ROUTING_SIMULATION", "normal")
    router = create_fused_moe_router(2, 8)
    assert isinstance(router, RoutingSimulatorRouter)
    assert router.routing_simulation == "normal"
    argument_wins = create_fused_moe_router(2, 8, routing_simulation="uniform_random")
    assert isinstance(argument_wins, RoutingSimulatorRouter)
    assert argument_wins.routing_simulation == "uniform_random"
    monkeypatch.setenv("ZEXPERT_ROUTING_SIMULATION", "zipf")
    with pytest.raises(ValueError, match=r"^routing_simulation must be .*, got 'zipf'$"):
        create_fused_moe_router(2, 8)
    monkeypatch.setenv("ZEXPERT_ROUTING_SIMULATION", "")
    assert isinstance(create_fused_moe_router(2, 8), FusedTopKRouter)


def test_expert_map_and_callback() -> None:
    seen: list[RoutingResult] = []
    expert_load = torch.zeros(10, dtype=torch.int32)
    expert_map = torch.stack([torch.arange(8), torch.full((8,), -1)], dim=1)
    expert_map[3] = torch.tensor([9, 8])
    router = create_fused_moe_router(
        1,
        10,
        num_logical_experts=8,
        logical_to_physical_map=expert_map,
        expert_load=expert_load,
        capture_fn=seen.append,
    )
    router_logits = torch.eye(8)[[3, 3, 5]]
    assert router.select_experts(torch.zeros(3, 2), router_logits).topk_ids.tolist() == [[9], [8], [5]]
    assert expert_load.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1, 1]
    assert seen[0].topk_ids.tolist() == [[3], [3], [5]]
    assert_equal(seen[0].zero_weight, torch.zeros(3))
    assert create_fused_moe_router(1, 10, logical_to_physical_map=expert_map).spec.num_real_experts == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, r"^top_k must be between 1 and 64, got 0$"),
        ({"top_k": 9}, r"^top_k must be at most the number of experts \(8\), got 9$"),
        ({"top_k": 13, **ZERO}, r"^top_k must be at most the number of experts \(12\), got 13$"),
        ({"global_num_experts": 0}, r"^num_real_experts must be at least 1, got 0$"),
        ({"scoring_func": "relu"}, r'^scoring_func must be "softmax", "sigmoid" or "sqrtsoftplus", got "relu"$'),
        ({"routed_scaling_factor": float("inf")}, r"^routed_scaling_factor must be finite, got inf$"),
        (
            {"zero_expert_type": "identity", "zero_expert_num": 4},
            r"^num_logical_experts is required when zero_expert_type is set$",
        ),
        ({**ZERO, "zero_expert_type": "swap"}, r'^zero_expert_type must be "identity" .*, got "swap"$'),
        ({**ZERO, "zero_expert_num": 0}, r"^zero_expert_num must be an integer of at least 1, got 0$"),
        ({**ZERO, "num_logical_experts": 7}, r"^num_logical_experts must equal global_num_experts \(8\) .*, got 7$"),
        ({"zero_expert_num": 4}, r"^zero_expert_num is 4 but zero_expert_type is missing$"),
        (
            {"use_grouped_topk": True, "topk_group": 2},
            r"^num_expert_group and topk_group are required when .* None and 2$",
        ),
        (
            {"use_grouped_topk": True, "num_expert_group": 4},
            r"^num_expert_group and topk_group are required .* 4 and None$",
        ),
        (
            {"num_expert_group": 3},
            r"^num_expert_group and topk_group must be None or 1 when use_grouped_topk is not set, got 3 and None$",
        ),
        ({**ZERO, "topk_group": 2}, r"^num_expert_group and topk_group must be None or 1 .*, got None and 2$"),
        ({**GROUPED, "use_grouped_topk": False}, r"^num_expert_group and topk_group must be .*, got 4 and 2$"),
        ({"top_k": 2.5}, r"^top_k must be an integer, got 2.5$"),
        ({**GROUPED, "num_expert_group": 3}, r"^num_expert_group must divide the number of real experts \(8\), got 3$"),
        ({**GROUPED, "topk_group": 5}, r"^topk_group must be between 1 and num_expert_group \(4\), got 5$"),
        (
            {**GROUPED, **ZERO, "num_expert_group": 3},
            r"^num_expert_group must divide the number of real experts \(8\), got 3$",
        ),
        (
            {"e_score_correction_bias": torch.zeros(9)},
            r"^e_score_correction_bias must have shape \[8\], one entry per expert, got \[9\]$",
        ),
        (
            {**ZERO, "e_score_correction_bias": torch.zeros(8)},
            r"^e_score_correction_bias must have shape \[12\], one entry per expert, got \[8\]$",
        ),
        ({"custom_routing_function": 3}, r"^custom_routing_function must be callable, got int$"),
        (
            GROUPED | CUSTOM,
            r"^custom_routing_function must be None when use_grouped_topk is set, .*, got <function custom",
        ),
        (
            ZERO | CUSTOM,
            r"^custom_routing_function must be None when zero_expert_type is set, .*, got <function custom",
        ),
        (ZERO | GROUPED | CUSTOM, r"^custom_routing_function must be None when zero_expert_type is set, "),
        ({"drop_before_renormalize": True}, r"^drop_before_renormalize needs zero_expert_type, got None$"),
        (GROUPED | {"drop_before_renormalize": True}, r"^drop_before_renormalize needs zero_expert_type, got None$"),
        (ZERO | {"drop_before_renormalize": True}, r"^drop_before_renormalize needs renormalize, got false$"),
        (
            ZERO | {"drop_before_renormalize": True, "renormalize": True},
            r"^drop_before_renormalize needs drop experts, got none of 12 experts$",
        ),
        ({"routing_simulation": "zipf"}, r"^routing_simulation must be .*, got 'zipf'$"),
        ({"indices_dtype": torch.int8}, r"^indices_dtype must be torch.int32 or torch.int64, got torch.int8$"),
        (
            {"logical_to_physical_map": torch.full((8, 1), 8)},
            r"^logical_to_physical_map must hold physical experts below global_num_experts \(8\), got 8$",
        ),
    ],
)
def test_rejects(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_fused_moe_router(**{"top_k": 2, "global_num_experts": 8, **arguments})
