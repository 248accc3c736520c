# SPDX-License-Identifier: Apache-2.0
"""The router's projection of hidden states to logits."""

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, register_autograd
from zexpert.ops._library import check_devices, register_fake, weight_dtype


def router_logits(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """``hidden_states @ weight.T``, as accurate as a product in float32 (float64 for float64 hidden states).

    The order of a logit's additions is fixed: results are bitwise repeatable, and a token's logits depend neither on
    the other tokens nor on their number. A token with NaN or infinite hidden states changes no other token's logits.

    Args:
        hidden_states: [..., H], any floating dtype (on CUDA not float64), any strides.
        weight: [N, H], float32, bfloat16 or float16, any strides; with float64 hidden states also float64.

    Returns:
        [..., N], float32; float64 for float64 hidden states.

    Raises:
        RuntimeError: an argument has a wrong device, dtype or shape.
    """
    logits: Tensor = torch.ops.zexpert.router_logits(hidden_states, weight)
    return logits


@register_fake("router_logits")
def router_logits_fake(hidden_states: Tensor, weight: Tensor) -> Tensor:
    check_devices("hidden_states", hidden_states, weight=weight)
    shape = (*hidden_states.shape[:-1], weight.shape[0])
    return hidden_states.new_empty(shape, dtype=weight_dtype(hidden_states.dtype))


def projection_gradients(
    grad_logits: Tensor, hidden_states: Tensor, weight: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden states and weight, None for one that is not needed."""
    dtype = weight_dtype(hidden_states.dtype)
    grad_hidden_states = grad_weight = None
    if needs[0]:
        grad_hidden_states = (grad_logits @ weight.to(dtype)).to(hidden_states.dtype)
    if needs[1]:
        grad_rows = grad_logits.reshape(-1, weight.shape[0])
        rows = hidden_states.reshape(-1, weight.shape[1]).to(dtype)
        grad_weight = (grad_rows.t() @ rows).to(weight.dtype)
    return grad_hidden_states, grad_weight


def _setup_context(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Context, grad_logits: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if grad_logits is None:
        return None, None
    hidden_states, weight = ctx.saved_tensors
    return projection_gradients(grad_logits, hidden_states, weight, ctx.needs_input_grad)


register_autograd("router_logits", _setup_context, _backward)
