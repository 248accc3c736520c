# SPDX-License-Identifier: Apache-2.0
"""The router for a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zexpert._C import ScoringFunc
from zexpert.ops.types import RoutingResult
from zexpert.router.base_router import BaseRouter
from zexpert.router.custom_routing_router import CustomRoutingFunction, CustomRoutingRouter
from zexpert.router.fused_topk_bias_router import FusedTopKBiasRouter
from zexpert.router.fused_topk_router import FusedTopKRouter
from zexpert.router.grouped_topk_router import GroupedTopKRouter
from zexpert.router.routing_simulator_router import RoutingSimulatorRouter
from zexpert.router.zero_expert_router import ZeroExpertRouter
from zexpert.router.zero_expert_spec import ZeroExperts

#: Environment variable that names a routing simulation for every router the factory makes.
ROUTING_SIMULATION_VARIABLE = "ZEXPERT_ROUTING_SIMULATION"


def create_fused_moe_router(
    top_k: int,
    global_num_experts: int,
    *,
    renormalize: bool = False,
    use_grouped_topk: bool = False,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    scoring_func: str | ScoringFunc = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
    custom_routing_function: CustomRoutingFunction | None = None,
    zero_expert_type: ZeroExperts | None = None,
    zero_expert_num: int | None = None,
    num_logical_experts: int | None = None,
    drop_before_renormalize: bool = False,
    routing_simulation: str | None = None,
    indices_dtype: torch.dtype = torch.int32,
    logical_to_physical_map: Tensor | None = None,
    expert_load: Tensor | None = None,
    capture_fn: Callable[[RoutingResult], None] | None = None,
) -> BaseRouter:
    """Makes the router for the arguments. Names and order are vLLM's. The first that applies:

        RoutingSimulatorRouter  routing_simulation, or ZEXPERT_ROUTING_SIMULATION in the environment
        ZeroExpertRouter        zero_expert_type; accepts the grouped arguments and the bias too
        GroupedTopKRouter       use_grouped_topk; accepts the bias too
        CustomRoutingRouter     custom_routing_function; without zero_expert_type and use_grouped_topk
        FusedTopKBiasRouter     e_score_correction_bias
        FusedTopKRouter

    Args:
        top_k: experts per token.
        global_num_experts: real experts that weights are stored for; replicas of an expert map included.
        renormalize: divide the weights of a token by their sum.
        use_grouped_topk: choose within the topk_group best of num_expert_group groups. Without it the two numbers
            must be None or 1, which is one group of all.
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus".
        routed_scaling_factor: factor on every weight.
        e_score_correction_bias: [N], for selection only, by reference. N counts zero experts too.
        custom_routing_function: see CustomRoutingRouter.
        zero_expert_type, zero_expert_num: see ZeroExpertRouter.
        num_logical_experts: real experts that tokens choose among. Required with zero_expert_type; equal to
            global_num_experts unless an expert map is given.
        drop_before_renormalize: weights of drop experts become 0 before renormalising (MoE++); needs both.
        routing_simulation: "uniform_random", "round_robin" or "normal"; None: what the environment says.
        indices_dtype: dtype of topk_ids, torch.int32 or torch.int64.
        logical_to_physical_map, expert_load: see BaseRouter.set_expert_map.
        capture_fn: see BaseRouter.set_capture_fn.

    Raises:
        ValueError: if an argument is out of range, is missing with another, or contradicts another.
    """
    if zero_expert_type is not None and num_logical_experts is None:
        raise ValueError("num_logical_experts is required when zero_expert_type is set")
    if zero_expert_type is None and zero_expert_num is not None:
        raise ValueError(f"zero_expert_num is {zero_expert_num} but zero_expert_type is missing")
    if use_grouped_topk and (num_expert_group is None or topk_group is None):
        raise ValueError(
            f"num_expert_group and topk_group are required when use_grouped_topk is set, got {num_expert_group} "
            f"and {topk_group}"
        )
    if not use_grouped_topk and (num_expert_group not in (None, 1) or topk_group not in (None, 1)):
        raise ValueError(
            f"num_expert_group and topk_group must be None or 1 when use_grouped_topk is not set, got "
            f"{num_expert_group} and {topk_group}"
        )
    num_real_experts = global_num_experts if num_logical_experts is None else num_logical_experts
    if logical_to_physical_map is None and num_real_experts != global_num_experts:
        raise ValueError(
            f"num_logical_experts must equal global_num_experts ({global_num_experts}) without a "
            f"logical_to_physical_map, both count real experts, got {num_real_experts}"
        )
    if logical_to_physical_map is not None and num_logical_experts is None:
        num_real_experts = logical_to_physical_map.size(0)
    groups: dict[str, Any] = (
        {"num_expert_group": num_expert_group, "topk_group": topk_group} if use_grouped_topk else {}
    )
    simulation = routing_simulation or os.environ.get(ROUTING_SIMULATION_VARIABLE)
    if not simulation:
        check_used(custom_routing_function, zero_expert_type, use_grouped_topk, drop_before_renormalize)
    common: dict[str, Any] = {
        "scoring_func": scoring_func,
        "renormalize": renormalize,
        "routed_scaling_factor": routed_scaling_factor,
        "indices_dtype": indices_dtype,
    }
    with_bias: dict[str, Any] = {**common, "e_score_correction_bias": e_score_correction_bias}
    zero_experts: dict[str, Any] = {"zero_expert_type": zero_expert_type, "zero_expert_num": zero_expert_num}

    router: BaseRouter
    if simulation:
        router = RoutingSimulatorRouter(top_k, num_real_experts, simulation, **zero_experts, **with_bias)
    elif zero_expert_type is not None:
        drop: dict[str, Any] = {"drop_before_renormalize": drop_before_renormalize}
        router = ZeroExpertRouter(top_k, num_real_experts, **zero_experts, **with_bias, **drop, **groups)
    elif use_grouped_topk:
        router = GroupedTopKRouter(top_k, num_real_experts, **with_bias, **groups)
    elif custom_routing_function is not None:
        router = CustomRoutingRouter(top_k, num_real_experts, custom_routing_function, **with_bias)
    elif e_score_correction_bias is not None:
        router = FusedTopKBiasRouter(top_k, num_real_experts, **with_bias)
    else:
        router = FusedTopKRouter(top_k, num_real_experts, **common)

    router.set_expert_map(logical_to_physical_map, expert_load)
    if logical_to_physical_map is not None and int(logical_to_physical_map.max()) >= global_num_experts:
        raise ValueError(
            f"logical_to_physical_map must hold physical experts below global_num_experts ({global_num_experts}), "
            f"got {int(logical_to_physical_map.max())}"
        )
    router.set_capture_fn(capture_fn)
    return router


def check_used(
    custom_routing_function: CustomRoutingFunction | None,
    zero_expert_type: ZeroExperts | None,
    use_grouped_topk: bool,
    drop_before_renormalize: bool,
) -> None:
    """Raises ValueError for an argument that the router of the others would not use."""
    if custom_routing_function is not None and (zero_expert_type is not None or use_grouped_topk):
        other = "use_grouped_topk" if zero_expert_type is None else "zero_expert_type"
        raise ValueError(
            f"custom_routing_function must be None when {other} is set, which makes the choice, got "
            f"{custom_routing_function!r}"
        )
    if drop_before_renormalize and zero_expert_type is None:
        raise ValueError("drop_before_renormalize needs zero_expert_type, got None")
