# SPDX-License-Identifier: Apache-2.0
"""Token rows through DeepEP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zexpert.ops.types import RoutingResult
from zexpert.runner.expert_exchange import Arrivals, Exchange, Trip, check_max_tokens
from zexpert.runner.expert_group import ExpertGroup


class DeepEPExchange(Exchange):
    """Dispatch and combine of DeepEP's ElasticBuffer. It, too, takes an id of -1 for a slot without work, so that zero
    slots are not sent. Its combine adds up the ranks' sums, in an order of its own. bfloat16 only; the host waits for
    the number of rows.

    Args:
        max_tokens: most tokens of a rank, for which the buffer is made at the first call.

    Raises:
        ImportError: if the package deep_ep is not installed, or has no ElasticBuffer.

    Source: https://github.com/deepseek-ai/DeepEP, version 2.
    """

    def __init__(self, group: ExpertGroup, num_local_experts: int, max_tokens: int) -> None:
        try:
            from deep_ep import ElasticBuffer
        except ImportError as error:
            raise ImportError(
                'the exchange "deep_ep" needs the package deep_ep with ElasticBuffer (github.com/deepseek-ai/DeepEP)'
            ) from error
        super().__init__(group, num_local_experts)
        self.max_tokens = max_tokens
        self.buffer_class = ElasticBuffer
        self.buffer: Any = None

    def trips(self, hidden_states: Tensor, routing: RoutingResult) -> list[Trip]:
        check_max_tokens(hidden_states, self.max_tokens)
        if hidden_states.dtype != torch.bfloat16:
            raise ValueError(f'hidden_states must be bfloat16 with the exchange "deep_ep", got {hidden_states.dtype}')
        if self.buffer is None:
            self.buffer = self.buffer_class(
                self.group.process_group,
                num_max_tokens_per_rank=self.max_tokens,
                hidden=hidden_states.size(1),
                num_topk=routing.topk_ids.size(1),
            )
        return [DeepEPTrip(self, hidden_states, routing)]


class DeepEPTrip(Trip):
    """See DeepEPExchange."""

    exchange: DeepEPExchange
    weights: Tensor
    ids: Tensor
    handle: Any  # of the buffer's dispatch, for the ways back
    event: Any  # of the call under way

    def depart(self) -> None:
        # DeepEP is not documented to take no tokens: one without experts stands for them.
        num_empty = 1 if self.num_tokens == 0 else 0
        ids = F.pad(self.routing.topk_ids.long(), (0, 0, 0, num_empty), value=-1)
        weights = F.pad(self.routing.topk_weights, (0, 0, 0, num_empty))
        rows = F.pad(self.hidden_states, (0, 0, 0, num_empty))
        self.rows, self.weights, self.ids = _Dispatch.apply(self, rows, weights, ids)  # type: ignore[no-untyped-call]

    def arrive(self) -> Arrivals:
        self.event.current_stream_wait()
        num_rows = self.rows.size(0)
        nothing = self.weights.new_zeros(num_rows)
        routing = RoutingResult(self.weights, self.ids, nothing, nothing.new_zeros(num_rows, 0))
        return Arrivals(self.rows, routing, sum(self.handle.num_recv_tokens_per_expert_list))

    def send_back(self, summed: Tensor) -> None:
        self.rows = _Combine.apply(self, summed)  # type: ignore[no-untyped-call]

    def come_back(self) -> tuple[Tensor, Tensor]:
        self.event.current_stream_wait()
        slot_rows = torch.arange(self.num_tokens, dtype=torch.int32, device=self.rows.device).unsqueeze(1)
        return self.rows[: self.num_tokens], slot_rows

    def dispatch(self, rows: Tensor, **arguments: Any) -> tuple[Any, ...]:
        """The buffer's dispatch, with the settings that all calls share."""
        exchange = self.exchange
        num_experts = exchange.num_local_experts * exchange.group.size
        result: tuple[Any, ...] = exchange.buffer.dispatch(
            rows.contiguous(), num_experts=num_experts, num_max_tokens_per_rank=exchange.max_tokens, **arguments
        )
        return result


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: DeepEPTrip, rows: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        came, came_ids, came_weights, trip.handle, trip.event = trip.dispatch(
            rows, topk_idx=ids, topk_weights=weights.contiguous(), async_with_compute_stream=True
        )
        ctx.mark_non_differentiable(came_ids)
        return came, came_weights, came_ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        trip = ctx.trip
        rows, weights, _event = trip.exchange.buffer.combine(
            grad_rows.contiguous(), handle=trip.handle, topk_weights=grad_weights.contiguous()
        )
        return None, rows, weights, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trip: DeepEPTrip, summed: Tensor) -> Tensor:
        ctx.trip = trip
        rows, _, trip.event = trip.exchange.buffer.combine(
            summed.contiguous(), handle=trip.handle, async_with_compute_stream=True
        )
        combined: Tensor = rows
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        rows, *_ = ctx.trip.dispatch(grad, handle=ctx.trip.handle)
        return None, rows
