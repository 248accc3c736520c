# SPDX-License-Identifier: Apache-2.0
"""The SwiGLU activation between an expert's two matrix products."""

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, register_autograd, register_not_differentiable
from zexpert.ops._library import check_devices, register_fake


def silu_and_mul(gate_up: Tensor, expert_offsets: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` with ``gate, up = gate_up[:, :F], gate_up[:, F:]`` and ``silu(x) = x / (1 + exp(-x))``.

    Computed in float32 (float64 for float64 data) and rounded once.

    Args:
        gate_up: [M, 2F], any floating dtype, any strides.
        expert_offsets: [R + 1] int32, of a DispatchPlan: only rows below its last offset are computed. None: all.

    Returns:
        [M, F], type of gate_up. Rows past the last offset are not written.

    Raises:
        RuntimeError: an argument has a wrong device, dtype or shape; on the CPU, the last offset is out of range.

    Source: SwiGLU, arXiv 2002.05202.
    """
    activation: Tensor = torch.ops.zexpert.silu_and_mul(gate_up, expert_offsets)
    return activation


@register_fake("silu_and_mul")
def _silu_and_mul_fake(gate_up: Tensor, expert_offsets: Tensor | None = None) -> Tensor:
    check_devices("gate_up", gate_up, expert_offsets=expert_offsets)
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def _setup_context(ctx: Context, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Context, grad_out: Tensor | None) -> tuple[Tensor | None, None]:
    if grad_out is None:
        return None, None
    gate_up, expert_offsets = ctx.saved_tensors
    return torch.ops.zexpert.silu_and_mul_backward(grad_out, gate_up, expert_offsets), None


@register_fake("silu_and_mul_backward")
def _silu_and_mul_backward_fake(grad_out: Tensor, gate_up: Tensor, expert_offsets: Tensor | None = None) -> Tensor:
    check_devices("gate_up", gate_up, grad_out=grad_out, expert_offsets=expert_offsets)
    return gate_up.new_empty(gate_up.shape)


register_autograd("silu_and_mul", _setup_context, _backward)
register_not_differentiable("silu_and_mul_backward")
