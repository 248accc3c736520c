# SPDX-License-Identifier: Apache-2.0
"""The linear map of a router, in float32."""

import torch
from torch import Tensor, nn

from zexpert._autocast import full_precision_linear


class Float32Linear(nn.Linear):
    """A linear map without bias that computes in float32 for any dtype of its input, under torch.autocast too. Routers
    need that: in lower precision logits tie, and ties decide who is chosen. float64 stays float64.

    Args:
        in_features, out_features: sizes of input and output.
        device: of the weight [out_features, in_features], float32.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=torch.float32, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features], any floating dtype -> [..., out_features], float32 (float64 for float64)."""
        return float32_linear(input, self.weight)


def float32_linear(input: Tensor, weight: Tensor) -> Tensor:
    """input @ weight.T by router_logits: float32 for any dtype of the two, under torch.autocast too, and a row's result
    does not depend on the other rows. A float64 input is multiplied in float64 by PyTorch."""
    if input.dtype == torch.float64:
        return full_precision_linear(input, weight.to(torch.float64))
    if weight.dtype == torch.float64:
        weight = weight.float()
    logits: Tensor = torch.ops.zexpert.router_logits(input, weight)
    return logits
