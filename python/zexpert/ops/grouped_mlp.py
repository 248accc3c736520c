# SPDX-License-Identifier: Apache-2.0
"""Each expert's feed-forward network over its segment of rows."""

from typing import Any

import torch
from torch import Tensor

from zexpert.ops._autograd import Context, register_autograd, register_not_differentiable
from zexpert.ops._library import check_devices, register_fake


def grouped_mlp(
    rows: Tensor,
    expert_offsets: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
    row_slots: Tensor | None = None,
    top_k: int = 1,
    implementation: str = "auto",
    w13_scale_inv: Tensor | None = None,
    w2_scale_inv: Tensor | None = None,
) -> Tensor:
    """``(silu(x @ gate.T) * (x @ up.T)) @ down.T`` for every row x, with the weights of the row's expert.

    Sums are float32 (float64 for float64). Gate, up and activation may be rounded to the data's type in between.

    Args:
        rows: [M, H], any floating dtype, any strides; in the order of a DispatchPlan; with row_slots, tokens, [T, H].
        expert_offsets: [R + 1] int32, of the DispatchPlan: from 0, ascending, at most M.
        w13_weight: [R, 2F, H], type of rows, or float8_e4m3fn with scales: gate rows first, then up. May be a slice of
            more experts.
        w2_weight: [R, H, F], likewise: down.
        row_slots: [M] int32, of the DispatchPlan, or None. With it the result is that of
            ``moe_permute(rows, row_slots, expert_offsets, top_k)``, bit for bit: tokens are gathered expert by expert,
            and only the backward makes an [M, H] of them.
        top_k: K; 1 without row_slots.
        implementation: which kernels run the experts. "auto" chooses by device, GPU, dtype and sizes; kernel_plan
            prints the choice. The other names force one:

            "cpu": on the CPU. An expert with few rows streams its weights through zexpert's own kernel; one with many
            goes through PyTorch's matrix product.

            "hopper": zexpert's own kernels for GPUs of compute capability 9.0, in bfloat16 and float16, for hidden and
            intermediate sizes that are multiples of 64 and at most 1024 experts. They have no gradients.

            "grouped_mm": PyTorch's grouped matrix product on a GPU, in bfloat16, for sizes that are multiples of 8 and
            fewer than 1024 experts. On compute capability 9 and 10 the host does not wait for the GPU.

            "torch": PyTorch's matrix product, expert by expert, on any device in any dtype. On a GPU the host waits for
            the offsets, which a CUDA graph cannot capture. Quantised weights are converted to the type of rows first.
        w13_scale_inv: [R, 2 * ceil(F / 128), ceil(H / 128)] float32 with float8_e4m3fn weights, else None: a weight's
            value is itself times the scale of its block of 128 x 128. Gate's blocks first, then up's. Finite, not
            negative.
        w2_scale_inv: [R, ceil(H / 128), ceil(F / 128)] float32, likewise.

    Returns:
        [M, H], type of rows. Rows past the last offset hold anything. Differentiable in rows, and in weights that are
        not quantised; the backward of "auto" chooses again, without "hopper".

    Raises:
        RuntimeError: an argument has a wrong device, dtype or shape; the implementation cannot serve; where the host
            reads the offsets, they do not ascend from 0; on the CPU, an entry of row_slots is out of range.

    Source: SwiGLU experts, arXiv 2002.05202; grouped computation, MegaBlocks, arXiv 2211.15841.
    """
    out: Tensor = torch.ops.zexpert.grouped_mlp(
        rows,
        expert_offsets,
        w13_weight,
        w2_weight,
        row_slots,
        top_k,
        w13_scale_inv,
        w2_scale_inv,
        implementation=implementation,
    )
    return out


@register_fake("grouped_mlp")
def _grouped_mlp_fake(
    rows: Tensor,
    expert_offsets: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
    row_slots: Tensor | None = None,
    top_k: int = 1,
    w13_scale_inv: Tensor | None = None,
    w2_scale_inv: Tensor | None = None,
    *,
    implementation: str = "auto",
) -> Tensor:
    check_devices(
        "rows",
        rows,
        expert_offsets=expert_offsets,
        w13_weight=w13_weight,
        w2_weight=w2_weight,
        row_slots=row_slots,
        w13_scale_inv=w13_scale_inv,
        w2_scale_inv=w2_scale_inv,
    )
    return rows.new_empty(((rows if row_slots is None else row_slots).size(0), rows.shape[1]))


def grouped_mlp_with_gate_up(
    rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """grouped_mlp that keeps gate_up for its backward; the backward of grouped_mlp computes it again.

    An alias, for one release: use fused_moe, which keeps gate_up too. Arguments and errors are grouped_mlp's.

    Returns:
        The result of grouped_mlp, [M, H], and gate_up [M, 2F], through which no gradient flows; both of the type of
        rows. Rows past the last offset hold anything.
    """
    out, gate_up = torch.ops.zexpert.grouped_mlp_with_gate_up(rows, expert_offsets, w13_weight, w2_weight)
    return out, gate_up


@register_fake("grouped_mlp_with_gate_up")
def _grouped_mlp_with_gate_up_fake(
    rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor
) -> tuple[Tensor, Tensor]:
    check_devices("rows", rows, expert_offsets=expert_offsets, w13_weight=w13_weight, w2_weight=w2_weight)
    return rows.new_empty(rows.shape), rows.new_empty((rows.shape[0], w13_weight.shape[1]))


def check_has_gradients(implementation: str) -> None:
    """Raises RuntimeError if an operator is asked for gradients that its implementation does not have."""
    if implementation == "hopper":
        raise RuntimeError(
            'implementation must be "auto", "grouped_mm" or "torch" where gradients are wanted, got "hopper"'
        )


def check_frozen(w13_weight: Tensor, w2_weight: Tensor, w13_scale_inv: Tensor | None) -> None:
    """Raises RuntimeError if gradients of quantised weights are wanted."""
    if w13_scale_inv is not None and (w13_weight.requires_grad or w2_weight.requires_grad):
        name = "w13_weight" if w13_weight.requires_grad else "w2_weight"
        raise RuntimeError(f"{name} must not require gradients: it is quantised, got requires_grad=True")


def _setup_context(ctx: Context, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.implementation = keyword_only_inputs["implementation"]
    check_has_gradients(ctx.implementation)
    rows, expert_offsets, w13_weight, w2_weight, row_slots, ctx.top_k, *scales = inputs
    check_frozen(w13_weight, w2_weight, scales[0])
    ctx.save_for_backward(rows, expert_offsets, w13_weight, w2_weight, row_slots, *scales)


def _backward(ctx: Context, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 8
    rows, expert_offsets, w13_weight, w2_weight, row_slots, *scales = ctx.saved_tensors
    num_tokens = rows.shape[0]
    if row_slots is not None:
        rows = torch.ops.zexpert.moe_permute(rows, row_slots, expert_offsets, ctx.top_k)
    saved = (rows, expert_offsets, w13_weight, w2_weight, None, *scales)
    grad_rows, *others = _gradients(ctx, grad_out, saved, ctx.implementation)
    if row_slots is not None and grad_rows is not None:
        grad_rows = torch.ops.zexpert.moe_permute_backward(grad_rows, row_slots, expert_offsets, num_tokens, ctx.top_k)
    return grad_rows, *others, None, None, None, None


def _setup_context_with_gate_up(ctx: Context, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    gate_up = output[1]
    ctx.mark_non_differentiable(gate_up)
    ctx.save_for_backward(*inputs, gate_up)


def _backward_with_gate_up(ctx: Context, grad_out: Tensor | None, _grad_gate_up: None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad_out, ctx.saved_tensors, "auto")


def _gradients(
    ctx: Context, grad_out: Tensor | None, saved: tuple[Tensor | None, ...], implementation: str
) -> tuple[Tensor | None, ...]:
    """Of rows, expert_offsets and both weights."""
    if grad_out is None:
        return None, None, None, None
    needs_rows, _, needs_w13_weight, needs_w2_weight = ctx.needs_input_grad[:4]
    grad_rows, grad_w13_weight, grad_w2_weight = torch.ops.zexpert.grouped_mlp_backward(
        grad_out,
        *saved,
        needs_rows=needs_rows,
        needs_w13_weight=needs_w13_weight,
        needs_w2_weight=needs_w2_weight,
        implementation=implementation,
    )
    return (
        grad_rows if needs_rows else None,
        None,
        grad_w13_weight if needs_w13_weight else None,
        grad_w2_weight if needs_w2_weight else None,
    )


@register_fake("grouped_mlp_backward")
def _grouped_mlp_backward_fake(
    grad_out: Tensor,
    rows: Tensor,
    expert_offsets: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
    gate_up: Tensor | None,
    w13_scale_inv: Tensor | None = None,
    w2_scale_inv: Tensor | None = None,
    *,
    needs_rows: bool = True,
    needs_w13_weight: bool = True,
    needs_w2_weight: bool = True,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(
        "rows",
        rows,
        grad_out=grad_out,
        expert_offsets=expert_offsets,
        w13_weight=w13_weight,
        w2_weight=w2_weight,
        gate_up=gate_up,
        w13_scale_inv=w13_scale_inv,
        w2_scale_inv=w2_scale_inv,
    )
    return (
        rows.new_empty(rows.shape if needs_rows else (0,)),
        rows.new_empty(w13_weight.shape if needs_w13_weight else (0,)),
        rows.new_empty(w2_weight.shape if needs_w2_weight else (0,)),
    )


register_autograd("grouped_mlp", _setup_context, _backward)
register_autograd("grouped_mlp_with_gate_up", _setup_context_with_gate_up, _backward_with_gate_up)
register_not_differentiable("grouped_mlp_backward")
