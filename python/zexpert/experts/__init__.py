# SPDX-License-Identifier: Apache-2.0
"""Experts backends: how the chosen experts' feed-forward networks are computed."""

from zexpert.experts.auto import AutoExperts
from zexpert.experts.cpu import CpuExperts
from zexpert.experts.factory import create_experts
from zexpert.experts.grouped_mm import GroupedMMExperts
from zexpert.experts.hopper import HopperExperts
from zexpert.experts.interface import MoEExperts
from zexpert.experts.torch_loop import TorchLoopExperts

__all__ = [
    "AutoExperts",
    "CpuExperts",
    "GroupedMMExperts",
    "HopperExperts",
    "MoEExperts",
    "TorchLoopExperts",
    "create_experts",
]
