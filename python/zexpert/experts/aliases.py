# SPDX-License-Identifier: Apache-2.0
"""Names of the experts backends before FusedExperts. They stay for one release."""

from zexpert.experts.fused_experts import FusedExperts


class AutoExperts(FusedExperts):
    """FusedExperts("auto")."""

    def __init__(self) -> None:
        super().__init__("auto")


class CpuExperts(FusedExperts):
    """FusedExperts("cpu")."""

    def __init__(self) -> None:
        super().__init__("cpu")


class GroupedMMExperts(FusedExperts):
    """FusedExperts("grouped_mm")."""

    def __init__(self) -> None:
        super().__init__("grouped_mm")


class HopperExperts(FusedExperts):
    """FusedExperts("hopper")."""

    def __init__(self) -> None:
        super().__init__("hopper")


class TorchLoopExperts(FusedExperts):
    """FusedExperts("torch")."""

    def __init__(self) -> None:
        super().__init__("torch")
