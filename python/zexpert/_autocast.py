# SPDX-License-Identifier: Apache-2.0
"""What torch.autocast means here: experts take its dtype, what chooses among them does not.

TorchScript runs these as if autocast were off.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants products with `weight` in; None where it is off, and for float64."""
    device = weight.device.type
    if weight.dtype == torch.float64 or device not in ("cpu", "cuda"):
        return None  # not asked of PyTorch: not every version of its compiler can trace the question
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def full_precision_linear(input: Tensor, weight: Tensor) -> Tensor:
    """input @ weight.T in the dtype of the two, under autocast as well."""
    if not torch.jit.is_scripting():
        if autocast_dtype(weight) is not None:
            with torch.autocast(weight.device.type, enabled=False):
                return F.linear(input, weight)
    return F.linear(input, weight)
