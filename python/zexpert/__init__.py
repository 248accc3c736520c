# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layers with zero experts: routing, experts and epilogue as fused PyTorch operators."""

from importlib import import_module
from typing import TYPE_CHECKING

# zexpert.ops, which all of these import, loads the operator library or says why that is impossible.
from zexpert import experts, ops, router, runner
from zexpert._C import RoutingSpec, ScoringFunc, ZeroExpertType
from zexpert._info import build_info, kernel_plan
from zexpert._version import __version__
from zexpert.layer import FusedMoE
from zexpert.ops import ConstantExperts, DispatchPlan, ExpertWeights, RoutingResult
from zexpert.quantization import quantize
from zexpert.router import RoutingMethodType, create_fused_moe_router

__all__ = [
    "ConstantExperts",
    "DispatchPlan",
    "ExpertWeights",
    "FusedMoE",
    "RoutingMethodType",
    "RoutingResult",
    "RoutingSpec",
    "ScoringFunc",
    "ZeroExpertType",
    "__version__",
    "build_info",
    "choices",
    "create_fused_moe_router",
    "experts",
    "integrations",
    "kernel_plan",
    "models",
    "ops",
    "quantize",
    "record_choices",
    "replay_choices",
    "router",
    "runner",
    "telemetry",
    "training",
]

if TYPE_CHECKING:
    from zexpert import choices, integrations, models, telemetry, training
    from zexpert.choices import record_choices, replay_choices
else:

    def __getattr__(name: str) -> object:
        """Imports at its first use what not every program needs."""
        if name in ("choices", "integrations", "models", "telemetry", "training"):
            return import_module(f"zexpert.{name}")
        if name in ("record_choices", "replay_choices"):
            return getattr(import_module("zexpert.choices"), name)
        raise AttributeError(f"module 'zexpert' has no attribute {name!r}")
