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
    """input @ weight.T, in float32 for any dtype of the two, in float64 for a float64 input, under torch.autocast too.

    router_logits computes it where that is the fastest, and a row's result then does not depend on the other rows.
    PyTorch's product computes the rest.
    """
    if router_logits_is_fastest(input):
        if weight.dtype == torch.float64:
            weight = weight.float()
        logits: Tensor = torch.ops.zexpert.router_logits(input, weight)
        return logits
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return full_precision_linear(input.to(dtype), weight.to(dtype))


def router_logits_is_fastest(hidden_states: Tensor) -> bool:
    """True on the CPU, and for bfloat16 and float16 on GPUs of compute capability 9.0. Scripts do not ask which GPU."""
    if hidden_states.dtype == torch.float64:
        return False
    if not hidden_states.is_cuda:
        return True
    if not torch.jit.is_scripting():
        if not is_hopper(hidden_states.device.index):
            return False
    return hidden_states.dtype != torch.float32


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_hopper(device_index: int) -> bool:
    """Whether the GPU has the matrix units that router_logits uses."""
    return torch.cuda.get_device_capability(device_index) == (9, 0)
