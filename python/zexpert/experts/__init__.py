# SPDX-License-Identifier: Apache-2.0
"""Experts backends: how the feed-forward networks of the chosen experts are computed."""

from zexpert.experts.aliases import AutoExperts, CpuExperts, GroupedMMExperts, HopperExperts, TorchLoopExperts
from zexpert.experts.factory import create_experts
from zexpert.experts.fused_experts import FusedExperts
from zexpert.experts.interface import MoEExperts

__all__ = [
    "AutoExperts",
    "CpuExperts",
    "FusedExperts",
    "GroupedMMExperts",
    "HopperExperts",
    "MoEExperts",
    "TorchLoopExperts",
    "create_experts",
]
