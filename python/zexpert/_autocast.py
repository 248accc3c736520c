# SPDX-License-Identifier: Apache-2.0
"""torch.autocast: experts run in its dtype, the routing does not.

TorchScript runs these functions as if autocast were off.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from zexpert.ops.types import ConstantExperts, ExpertWeights


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products with `weight`; None where it is off, and for float64."""
    device = weight.device.type
    if weight.dtype == torch.float64 or device not in ("cpu", "cuda"):
        return None  # do not ask PyTorch: not every version of its compiler traces the question
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def weights_to(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """The weights of the experts' products in `dtype`. The gates of constant experts belong to the routing."""
    constants = weights.constants
    if constants is not None:
        constants = ConstantExperts(constants.gate_weight, constants.vectors.to(dtype))
    if weights.w13_scale_inv is not None:
        return weights._replace(constants=constants)  # quantised weights stay as they are
    return ExpertWeights(weights.w13.to(dtype), weights.w2.to(dtype), constants=constants)


def full_precision_linear(input: Tensor, weight: Tensor) -> Tensor:
    """input @ weight.T in the dtype of the two, under autocast as well."""
    if not torch.jit.is_scripting():
        if autocast_dtype(weight) is not None:
            with torch.autocast(weight.device.type, enabled=False):
                return F.linear(input, weight)
    return F.linear(input, weight)
