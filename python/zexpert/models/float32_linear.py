# SPDX-License-Identifier: Apache-2.0
"""The classifier of a router."""

import torch
from torch import Tensor, nn

from zexpert._autocast import full_precision_linear


class Float32Linear(nn.Linear):
    """A linear map without bias that computes in float32 whatever the dtype of its input, and under torch.autocast, as
    routers do: in a lower precision experts tie, and ties decide who is chosen. float64 stays float64.

    Args:
        in_features, out_features: sizes of input and output.
        device: where the weight [out_features, in_features] is made, in float32.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=torch.float32, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features], any floating dtype -> [..., out_features], float32 (float64 for float64)."""
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        return full_precision_linear(input.to(dtype), self.weight.to(dtype))
