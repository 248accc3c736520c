# SPDX-License-Identifier: Apache-2.0
"""Collectives that gradients pass through, waited for where their results are needed.

Each function starts a collective for several tensors at once. It appends a handle for each to `works`; the results hold
what they are to hold once these have been waited for. All tensors of a call share one node of the autograd graph, so
that every rank runs the collectives of a backward in the same order.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexpert.runner.expert_group import ExpertGroup

Works: TypeAlias = "list[dist.Work]"

# The names before PyTorch 2.13.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)


def wait(group: ExpertGroup, works: Works) -> None:
    """Waits for all `works` and forgets them. On a GPU it is the current stream that waits, not the host."""
    # Gloo writes some results here, which is no operation to differentiate.
    with group.exchanging(), torch.no_grad():
        for work in works:
            work.wait()
    works.clear()


def all_to_all(
    group: ExpertGroup,
    works: Works,
    sizes: tuple[list[int], list[int]] | None,
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """Rows to and from every rank.

    Args:
        sizes: rows that come from each rank and rows that go to each, or None for equal parts.
        tensors: rows in the order of the ranks they go to, [rows, ...].

    Returns:
        The rows that come, in the order of the ranks they come from.
    """
    results: tuple[Tensor, ...] = _AllToAll.apply(group, works, sizes, *tensors)  # type: ignore[no-untyped-call]
    return results


def all_gather(group: ExpertGroup, works: Works, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of every rank, which has as many as any other, in the order of the ranks: [P * rows, ...]."""
    results: tuple[Tensor, ...] = _AllGather.apply(group, works, *tensors)  # type: ignore[no-untyped-call]
    return results


def reduce_scatter(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    """This rank's part [rows, ...] of the sum over all ranks of [P * rows, ...]."""
    scattered: Tensor = _ReduceScatter.apply(group, works, tensor)  # type: ignore[no-untyped-call]
    return scattered


def all_reduce(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    """The sum over all ranks. Its gradient is the same on every rank, and so is the gradient of each part."""
    summed: Tensor = _AllReduce.apply(group, works, tensor)  # type: ignore[no-untyped-call]
    return summed


def replicated(group: ExpertGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors themselves, the same on every rank; their gradients are summed over the ranks that use them."""
    results: tuple[Tensor, ...] = _Replicated.apply(group, *tensors)  # type: ignore[no-untyped-call]
    return results


# ---- The collectives without gradients: each starts one and returns its result to be ----


def _start_all_to_all(
    group: ExpertGroup, works: Works, sizes: tuple[list[int], list[int]] | None, tensor: Tensor
) -> Tensor:
    output_sizes, input_sizes = (None, None) if sizes is None else sizes
    num_rows = tensor.size(0) if output_sizes is None else sum(output_sizes)
    result = tensor.new_empty((num_rows, *tensor.shape[1:]))
    sent = tensor.contiguous()
    with group.exchanging():
        works.append(
            dist.all_to_all_single(result, sent, output_sizes, input_sizes, group=group.process_group, async_op=True)
        )
    return result


def _start_all_gather(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    result = tensor.new_empty((group.size * tensor.size(0), *tensor.shape[1:]))
    with group.exchanging():
        works.append(all_gather_single(result, tensor.contiguous(), group=group.process_group, async_op=True))
    return result


def _start_reduce_scatter(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    result = tensor.new_empty((tensor.size(0) // group.size, *tensor.shape[1:]))
    with group.exchanging():
        works.append(reduce_scatter_single(result, tensor.contiguous(), group=group.process_group, async_op=True))
    return result


def _start_all_reduce(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    result = tensor.clone(memory_format=torch.contiguous_format)
    with group.exchanging():
        works.append(dist.all_reduce(result, group=group.process_group, async_op=True))
    return result


# ---- The same as nodes of the autograd graph ----


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: ExpertGroup, works: Works, sizes: tuple[list[int], list[int]] | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.sizes = group, sizes
        return tuple(_start_all_to_all(group, works, sizes, tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        works: Works = []
        back = None if ctx.sizes is None else ctx.sizes[::-1]
        wanted = zip(grads, ctx.needs_input_grad[3:], strict=True)
        results = [_start_all_to_all(ctx.group, works, back, grad) if want else None for grad, want in wanted]
        wait(ctx.group, works)
        return None, None, None, *results


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ExpertGroup, works: Works, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_start_all_gather(group, works, tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        works: Works = []
        wide = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
        wanted = zip(wide, ctx.needs_input_grad[2:], strict=True)
        results = [_start_reduce_scatter(ctx.group, works, grad) if want else None for grad, want in wanted]
        wait(ctx.group, works)
        narrow = [None if r is None else r.to(grad.dtype) for r, grad in zip(results, grads, strict=True)]
        return None, None, *narrow


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
        ctx.group = group
        return _start_reduce_scatter(group, works, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        works: Works = []
        result = _start_all_gather(ctx.group, works, grad)
        wait(ctx.group, works)
        return None, None, result


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
        return _start_all_reduce(group, works, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, grad


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ExpertGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        works: Works = []
        wanted = zip(grads, ctx.needs_input_grad[1:], strict=True)
        results = [_start_all_reduce(ctx.group, works, grad) if want else None for grad, want in wanted]
        wait(ctx.group, works)
        return None, *results
