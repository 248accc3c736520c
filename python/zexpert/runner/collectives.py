# SPDX-License-Identifier: Apache-2.0
"""Collectives that gradients pass through. Results are valid after `wait`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from zexpert.runner.expert_group import ExpertGroup

Works: TypeAlias = "list[dist.Work]"
#: Starts a collective for one tensor and returns its future result.
Start: TypeAlias = Callable[[ExpertGroup, Works, Tensor], Tensor]
#: Exchanges several tensors at once.
Exchange: TypeAlias = Callable[..., tuple[Tensor, ...]]

# The names before PyTorch 2.13.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)


class Collectives:
    """The collectives of one call of a layer, in the order of the calls below.

    Each method starts a collective for several tensors at once and appends its handles to `works`. In grad mode every
    collective is one node of the autograd graph, and the nodes form a chain: a backward that reaches the last one runs
    all of them, in reverse order and for all their tensors, whatever requires_grad says on this rank. So all ranks run
    the same collectives, and results require gradients on every rank.

    Args:
        group: the ranks.
        device: of the tensors.
    """

    def __init__(self, group: ExpertGroup, device: torch.device) -> None:
        self.group = group
        self.link = torch.empty(0, device=device, requires_grad=torch.is_grad_enabled())

    def all_to_all(
        self, works: Works, sizes: tuple[list[int], list[int]] | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Rows to and from every rank.

        Args:
            sizes: rows that come from each rank and rows that go to each, or None for equal parts.
            tensors: rows in the order of the ranks they go to, [rows, ...].

        Returns:
            The rows that come, in the order of the ranks they come from.
        """
        back = None if sizes is None else sizes[::-1]
        return self._run(works, partial(_all_to_all, sizes), partial(_all_to_all, back), *tensors)

    def all_gather(self, works: Works, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The rows of every rank, in the order of the ranks: [P * rows, ...]. All ranks have the same number."""
        return self._run(works, _all_gather, _reduce_scatter_in_float32, *tensors)

    def reduce_scatter(self, works: Works, tensor: Tensor) -> Tensor:
        """This rank's part [rows, ...] of the sum over all ranks of [P * rows, ...]."""
        return self._run(works, _reduce_scatter, _all_gather, tensor)[0]

    def all_reduce(self, works: Works, tensor: Tensor) -> Tensor:
        """The sum over all ranks. Its gradient is the same on every rank, and so is the gradient of each part."""
        return self._run(works, _all_reduce, _identity, tensor)[0]

    def replicate(self, works: Works, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors themselves, the same on every rank; their gradients are summed over the ranks."""
        return self._run(works, _identity, _all_reduce, *tensors)

    def run(self, forward: Exchange, backward: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`forward` of the tensors as one node of the chain: `backward` turns the gradients of its results into those
        of the tensors."""
        self.link, *results = _Collective.apply(forward, backward, self.link, *tensors)  # type: ignore[no-untyped-call]
        return tuple(results)

    def _run(self, works: Works, start: Start, start_backward: Start, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.run(
            partial(_start_all, start, self.group, works), partial(_exchange_all, start_backward, self.group), *tensors
        )


def wait(group: ExpertGroup, works: Works) -> None:
    """Waits for all `works` and forgets them. On a GPU the current stream waits, not the host."""
    # Gloo writes some results here, and autograd must not see the write.
    with group.exchanging(), torch.no_grad():
        for work in works:
            work.wait()
    works.clear()


class _Collective(torch.autograd.Function):
    """A collective for all its tensors, and another one for all their gradients."""

    @staticmethod
    def forward(ctx: Any, forward: Exchange, backward: Exchange, link: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.backward_exchange = backward
        return (torch.empty_like(link), *forward(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, grad_link, *ctx.backward_exchange(*grads)


def _start_all(start: Start, group: ExpertGroup, works: Works, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(start(group, works, tensor) for tensor in tensors)


def _exchange_all(start: Start, group: ExpertGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    works: Works = []
    results = _start_all(start, group, works, *tensors)
    wait(group, works)
    return tuple(result.to(tensor.dtype) for result, tensor in zip(results, tensors, strict=True))


# ---- One tensor each ----


def _all_to_all(sizes: tuple[list[int], list[int]] | None, group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    output_sizes, input_sizes = (None, None) if sizes is None else sizes
    num_rows = tensor.size(0) if output_sizes is None else sum(output_sizes)
    result = tensor.new_empty((num_rows, *tensor.shape[1:]))
    sent = tensor.contiguous()
    with group.exchanging():
        works.append(
            dist.all_to_all_single(result, sent, output_sizes, input_sizes, group=group.process_group, async_op=True)
        )
    return result


def _all_gather(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    result = tensor.new_empty((group.size * tensor.size(0), *tensor.shape[1:]))
    with group.exchanging():
        works.append(all_gather_single(result, tensor.contiguous(), group=group.process_group, async_op=True))
    return result


def _reduce_scatter(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    result = tensor.new_empty((tensor.size(0) // group.size, *tensor.shape[1:]))
    with group.exchanging():
        works.append(reduce_scatter_single(result, tensor.contiguous(), group=group.process_group, async_op=True))
    return result


def _reduce_scatter_in_float32(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    return _reduce_scatter(group, works, tensor.to(torch.promote_types(tensor.dtype, torch.float32)))


def _all_reduce(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    result = tensor.clone(memory_format=torch.contiguous_format)
    with group.exchanging():
        works.append(dist.all_reduce(result, group=group.process_group, async_op=True))
    return result


def _identity(group: ExpertGroup, works: Works, tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)
