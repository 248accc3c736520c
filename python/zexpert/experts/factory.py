# SPDX-License-Identifier: Apache-2.0
"""The experts backend for a name."""

from __future__ import annotations

from zexpert.experts.auto import AutoExperts
from zexpert.experts.cpu import CpuExperts
from zexpert.experts.grouped_mm import GroupedMMExperts
from zexpert.experts.hopper import HopperExperts
from zexpert.experts.interface import MoEExperts
from zexpert.experts.torch_loop import TorchLoopExperts


def create_experts(backend: str = "auto") -> MoEExperts:
    """Makes the backend called `backend`: "auto" chooses at every call, by the tokens' device and dtype; "cpu",
    "grouped_mm", "hopper" and "torch" force CpuExperts, GroupedMMExperts, HopperExperts and TorchLoopExperts. Which
    kernel a backend's operators run for given sizes and dtypes is zexpert.kernel_plan's to tell.

    Raises:
        ValueError: for any other name.
    """
    if backend == "auto":
        return AutoExperts()
    if backend == "cpu":
        return CpuExperts()
    if backend == "grouped_mm":
        return GroupedMMExperts()
    if backend == "hopper":
        return HopperExperts()
    if backend == "torch":
        return TorchLoopExperts()
    raise ValueError(f'experts_backend must be "auto", "cpu", "grouped_mm", "hopper" or "torch", got {backend!r}')
