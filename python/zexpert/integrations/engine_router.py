# SPDX-License-Identifier: Apache-2.0
"""The projection of an engine's router."""

from typing import Any

import torch
from torch import Tensor

from zexpert.models.float32_linear import router_logits_is_fastest
from zexpert.ops import router_logits


def engine_router_logits(classifier: Any, hidden_states: Tensor) -> Tensor | None:
    """[T, N] float32 by router_logits, or None if the engine's linear layer must compute them: a bias, a weight that is
    not float32 or has been packed, or hidden states for which router_logits is not the fastest.

    Args:
        classifier: the engine's linear layer, with `weight` [N, H].
        hidden_states: [T, H].
    """
    weight = getattr(classifier, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype != torch.float32 or getattr(classifier, "bias", None) is not None:
        return None
    is_packed = weight.dim() != 2 or weight.size(1) != hidden_states.size(-1)
    if is_packed or not router_logits_is_fastest(hidden_states):
        return None
    return router_logits(hidden_states, weight)
