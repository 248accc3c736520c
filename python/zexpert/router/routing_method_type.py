# SPDX-License-Identifier: Apache-2.0
"""The kinds of routers."""

from enum import Enum


class RoutingMethodType(Enum):
    """Which router made a choice, in the order in which the factory considers them."""

    SIMULATED = 0
    ZERO_EXPERT = 1
    GROUPED_TOPK = 2
    CUSTOM = 3
    TOPK_BIAS = 4
    TOPK = 5
