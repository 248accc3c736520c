# SPDX-License-Identifier: Apache-2.0
"""The identity experts' part of a layer's output on its own."""

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, refuse_tangents, register_autograd, register_not_differentiable
from zexpert.ops._library import check_devices, register_fake


def zero_expert_accumulate(hidden_states: Tensor, zero_weight: Tensor, out: Tensor | None = None) -> Tensor:
    """``zero_weight[:, None] * hidden_states``, added into ``out`` if that is given.

    Computed in float32 (float64 for float64 data) and rounded once. Use it if the experts' rows are already summed.
    Otherwise ``moe_finalize`` adds this part in the same pass as the rows.

    Args:
        hidden_states: [T, H], any floating dtype, any strides.
        zero_weight: [T] float32, or float64 with float64 hidden_states.
        out: [T, H], type of hidden_states, inner stride 1, rows that do not overlap; may be hidden_states itself. Must
            be None if a gradient is wanted.

    Returns:
        ``out`` if given, else a new tensor [T, H].

    Raises:
        RuntimeError: an argument has a wrong device, dtype, shape or layout; ``out`` is then as it was.

    Source: the identity ("copy") expert of MoE++, arXiv 2410.07348, and LongCat-Flash, arXiv 2509.01322.
    """
    if out is None:
        result: Tensor = torch.ops.zexpert.zero_expert_accumulate(hidden_states, zero_weight)
        return result
    if torch.is_grad_enabled() and (out.requires_grad or hidden_states.requires_grad or zero_weight.requires_grad):
        raise RuntimeError("out must be None where a gradient is wanted: what is written into it has none")
    torch.ops.zexpert.zero_expert_accumulate(hidden_states, zero_weight, out=out)
    return out


@register_fake("zero_expert_accumulate")
def _zero_expert_accumulate_fake(hidden_states: Tensor, zero_weight: Tensor) -> Tensor:
    check_devices("hidden_states", hidden_states, zero_weight=zero_weight)
    return hidden_states.new_empty(hidden_states.shape)


@register_fake("zero_expert_accumulate.out")
def _zero_expert_accumulate_out_fake(hidden_states: Tensor, zero_weight: Tensor, *, out: Tensor) -> None:
    check_devices("hidden_states", hidden_states, zero_weight=zero_weight, out=out)


def _count_write(keyset: torch.DispatchKeySet, hidden_states: Tensor, zero_weight: Tensor, *, out: Tensor) -> None:
    refuse_tangents("zero_expert_accumulate.out", (hidden_states, zero_weight, out))
    below = keyset & torch._C._after_ADInplaceOrView_keyset
    torch.ops.zexpert.zero_expert_accumulate.out.redispatch(below, hidden_states, zero_weight, out=out)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


# Counts the write to `out`, so that autograd refuses a backward that would read the values from before.
_library = torch.library.Library("zexpert", "IMPL")
_library.impl("zero_expert_accumulate.out", _count_write, "ADInplaceOrView", with_keyset=True)


def _setup_context(ctx: Context, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Context, grad_out: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if grad_out is None:
        return None, None
    hidden_states, zero_weight = ctx.saved_tensors
    grad_hidden_states, grad_zero_weight = torch.ops.zexpert.zero_expert_accumulate_backward(
        grad_out, hidden_states, zero_weight
    )
    return grad_hidden_states, grad_zero_weight


@register_fake("zero_expert_accumulate_backward")
def _zero_expert_accumulate_backward_fake(
    grad_out: Tensor, hidden_states: Tensor, zero_weight: Tensor
) -> tuple[Tensor, Tensor]:
    check_devices("hidden_states", hidden_states, grad_out=grad_out, zero_weight=zero_weight)
    return hidden_states.new_empty(hidden_states.shape), zero_weight.new_empty(zero_weight.shape)


register_autograd("zero_expert_accumulate", _setup_context, _backward)
register_not_differentiable("zero_expert_accumulate_backward")
