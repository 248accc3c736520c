# SPDX-License-Identifier: Apache-2.0
"""Routers: how tokens choose their experts. create_fused_moe_router makes the one for a configuration."""

from zexpert.router.base_router import BaseRouter
from zexpert.router.custom_routing_router import CustomRoutingRouter
from zexpert.router.factory import create_fused_moe_router
from zexpert.router.fused_moe_router import FusedMoERouter
from zexpert.router.fused_topk_bias_router import FusedTopKBiasRouter
from zexpert.router.fused_topk_router import FusedTopKRouter
from zexpert.router.grouped_topk_router import GroupedTopKRouter
from zexpert.router.routing_method_type import RoutingMethodType
from zexpert.router.routing_simulator_router import RoutingSimulatorRouter
from zexpert.router.zero_expert_router import ZeroExpertRouter

__all__ = [
    "BaseRouter",
    "CustomRoutingRouter",
    "FusedMoERouter",
    "FusedTopKBiasRouter",
    "FusedTopKRouter",
    "GroupedTopKRouter",
    "RoutingMethodType",
    "RoutingSimulatorRouter",
    "ZeroExpertRouter",
    "create_fused_moe_router",
]
