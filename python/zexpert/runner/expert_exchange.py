# SPDX-License-Identifier: Apache-2.0
"""Ways of token rows to the ranks that hold their experts, and of the experts' sums back.

Every rank takes part in every exchange, with as many tokens as it has, 0 included. A row travels once per (token, rank)
however many of the token's experts that rank holds; beside it go the token's expert ids and weights. Slots without an
expert's work, those of zero experts, send nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from zexpert.ops.types import DispatchPlan, RoutingResult
from zexpert.runner.collectives import Works, all_gather, all_to_all, reduce_scatter, wait
from zexpert.runner.expert_group import ExpertGroup


@dataclass
class Arrivals:
    """What came to this rank's experts.

    Attributes:
        hidden_states: [M, H].
        routing: ids of this rank's experts, [M, K], -1 where another rank has the slot's work; no zero parts.
        num_slots: slots that do work, where the host knows; None where it does not.
    """

    hidden_states: Tensor
    routing: RoutingResult
    num_slots: int | None


class Trip:
    """One batch of tokens to the experts and back: depart, arrive, send_back, come_back, in that order. Between two
    calls other work can be done while rows are under way.

    Args:
        exchange: the exchange that makes the trip.
        hidden_states: [T, H], this rank's tokens.
        routing: their routing.
    """

    def __init__(self, exchange: Exchange, hidden_states: Tensor, routing: RoutingResult) -> None:
        self.exchange = exchange
        self.hidden_states = hidden_states
        self.routing = routing
        self.works: Works = []
        self.rows: Tensor
        self.slots: Tensor
        self.lost_rows: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_states.size(0)

    def depart(self) -> None:
        """Starts the tokens' way to the experts."""
        raise NotImplementedError

    def arrive(self) -> Arrivals:
        """Waits for what the other ranks sent."""
        wait(self.exchange.group, self.works)
        return Arrivals(self.rows, self.exchange.unpack(self.slots), None)

    def send_back(self, summed: Tensor) -> None:
        """Starts the way back of the experts' weighted sums [M, H], one for each row that came."""
        raise NotImplementedError

    def come_back(self) -> tuple[Tensor, Tensor]:
        """Waits for the sums of this rank's tokens: rows, and slot_rows [T, S] that says which are a token's, in the
        order in which to add them."""
        raise NotImplementedError


class Exchange:
    """A way to exchange rows.

    Args:
        group: the ranks.
        num_local_experts: experts on each rank; rank p has those from p * num_local_experts on.
    """

    def __init__(self, group: ExpertGroup, num_local_experts: int) -> None:
        self.group = group
        self.num_local_experts = num_local_experts

    def trips(self, hidden_states: Tensor, routing: RoutingResult) -> list[Trip]:
        """The trips that take all tokens there and back: as many on every rank."""
        raise NotImplementedError

    def pack(self, routing: RoutingResult, num_empty: int = 0) -> Tensor:
        """[T + num_empty, 2K]: weights and, in the bits of as many more, ids: one tensor to send, which carries the
        weights' gradients. The last rows are those of tokens without experts. Ids count from 1 here, with 0 for none,
        so that no bits are a NaN's."""
        weights = F.pad(routing.topk_weights, (0, 0, 0, num_empty))
        ids = F.pad(routing.topk_ids, (0, 0, 0, num_empty), value=-1)
        ids = ids.to(torch.int64 if weights.dtype == torch.float64 else torch.int32)
        return torch.cat([weights, (ids + 1).view(weights.dtype)], dim=1)

    def unpack(self, slots: Tensor) -> RoutingResult:
        """The routing of rows that came with `slots` [M, 2K], for this rank's experts."""
        weights, bits = slots.chunk(2, dim=1)
        ids = bits.detach().contiguous().view(torch.int64 if weights.dtype == torch.float64 else torch.int32)
        local = ids - 1 - self.group.rank * self.num_local_experts
        local = torch.where((local >= 0) & (local < self.num_local_experts), local, -1)
        num_rows = weights.size(0)
        return RoutingResult(weights, local, weights.new_zeros(num_rows), weights.new_zeros(num_rows, 0))

    def slot_ranks(self, topk_ids: Tensor) -> Tensor:
        """[T, K]: the rank that each slot's expert is on, -1 for a slot without work."""
        return torch.where(topk_ids >= 0, topk_ids // self.num_local_experts, -1)

    def rank_plan(self, topk_ids: Tensor) -> tuple[Tensor, DispatchPlan]:
        """The ranks that each token's row goes to, [T, K], ascending, each once and -1 between them; and moe_plan of
        these."""
        ranks = self.slot_ranks(topk_ids).sort(dim=1).values
        repeats = F.pad(ranks[:, 1:] == ranks[:, :-1], (1, 0))
        ranks = ranks.masked_fill(repeats, -1)
        return ranks, DispatchPlan(*torch.ops.zexpert.moe_plan(ranks, self.group.size))


class RaggedExchange(Exchange):
    """All-to-all of exactly the rows there are. Ranks tell each other how many first, and the host waits for that.

    Args:
        chunk_size: most tokens in a trip; None for all. With chunks, the rows of one are exchanged while the experts
            work on those of the one before; the ranks agree on the largest number of chunks.
    """

    def __init__(self, group: ExpertGroup, num_local_experts: int, chunk_size: int | None = None) -> None:
        super().__init__(group, num_local_experts)
        self.chunk_size = chunk_size

    def trips(self, hidden_states: Tensor, routing: RoutingResult) -> list[Trip]:
        num_chunks = self._agreed_number_of_chunks(hidden_states)
        size = max(1, hidden_states.size(0) if self.chunk_size is None else self.chunk_size)
        trips = [
            RaggedTrip(
                self,
                hidden_states[chunk * size : (chunk + 1) * size],
                RoutingResult(*(tensor[chunk * size : (chunk + 1) * size] for tensor in routing)),
            )
            for chunk in range(num_chunks)
        ]
        sent = torch.stack([trip.counts for trip in trips], dim=1)  # [P, chunks, 2]
        received = torch.empty_like(sent)
        with self.group.exchanging():
            dist.all_to_all_single(received, sent, group=self.group.process_group)
            counts = torch.stack([received, sent]).permute(2, 3, 0, 1).tolist()
        for trip, ((rows_in, rows_out), (slots_in, _)) in zip(trips, counts, strict=True):
            trip.sizes = (rows_in, rows_out)
            trip.num_slots = sum(slots_in)
        return list(trips)

    def _agreed_number_of_chunks(self, hidden_states: Tensor) -> int:
        if self.chunk_size is None:
            return 1
        num_chunks = torch.tensor(max(1, -(-hidden_states.size(0) // self.chunk_size)), device=hidden_states.device)
        with self.group.exchanging():
            dist.all_reduce(num_chunks, dist.ReduceOp.MAX, group=self.group.process_group)
            return int(num_chunks)


class RaggedTrip(Trip):
    """See RaggedExchange.

    Attributes:
        counts: [P, 2] int32: rows, and slots that do work, for each rank.
        sizes: rows from each rank and rows to each.
        num_slots: slots that come and do work.
    """

    sizes: tuple[list[int], list[int]]
    num_slots: int

    def __init__(self, exchange: Exchange, hidden_states: Tensor, routing: RoutingResult) -> None:
        super().__init__(exchange, hidden_states, routing)
        _, self.plan = exchange.rank_plan(routing.topk_ids)
        slot_offsets = torch.ops.zexpert.moe_plan(exchange.slot_ranks(routing.topk_ids), exchange.group.size)[0]
        self.counts = torch.stack([self.plan.expert_offsets, slot_offsets], dim=1).diff(dim=0)

    def depart(self) -> None:
        row_slots = self.plan.row_slots[: sum(self.sizes[1])]
        rows, slots = (
            torch.ops.zexpert.moe_permute(tensor, row_slots, self.plan.expert_offsets, self.plan.slot_rows.size(1))
            for tensor in (self.hidden_states, self.exchange.pack(self.routing))
        )
        self.rows, self.slots = all_to_all(self.exchange.group, self.works, self.sizes, rows, slots)

    def arrive(self) -> Arrivals:
        arrivals = super().arrive()
        arrivals.num_slots = self.num_slots
        return arrivals

    def send_back(self, summed: Tensor) -> None:
        (self.rows,) = all_to_all(self.exchange.group, self.works, self.sizes[::-1], summed)

    def come_back(self) -> tuple[Tensor, Tensor]:
        wait(self.exchange.group, self.works)
        return self.rows, self.plan.slot_rows


class FixedExchange(Exchange):
    """All-to-all of `capacity` rows between every two ranks: shapes are known beforehand and the host waits for
    nothing, so a CUDA graph captures it.

    A token sends a rank at most one row. So with capacity = max_tokens all rows fit whatever the routing. With less,
    rows may be left over: FixedTrip.lost_rows counts them, and the outputs of their tokens become NaN.

    Args:
        max_tokens: most tokens of a rank.
        capacity: rows from each rank to each.
    """

    def __init__(self, group: ExpertGroup, num_local_experts: int, max_tokens: int, capacity: int) -> None:
        super().__init__(group, num_local_experts)
        self.max_tokens = max_tokens
        self.capacity = capacity

    def trips(self, hidden_states: Tensor, routing: RoutingResult) -> list[Trip]:
        check_max_tokens(hidden_states, self.max_tokens)
        return [FixedTrip(self, hidden_states, routing, self.capacity)]


class FixedTrip(Trip):
    """See FixedExchange."""

    def __init__(self, exchange: Exchange, hidden_states: Tensor, routing: RoutingResult, capacity: int) -> None:
        super().__init__(exchange, hidden_states, routing)
        ranks, plan = exchange.rank_plan(routing.topk_ids)
        begin, end = plan.expert_offsets[:-1, None], plan.expert_offsets[1:, None]

        # A row's place among all that are sent is rank * capacity + position, its position among those for the rank.
        position = plan.slot_rows - begin.flatten()[ranks.clamp(min=0)]
        lost = (ranks >= 0) & (position >= capacity)
        self.lost_rows = lost.sum()
        self.slot_rows = torch.where((ranks < 0) | lost, -1, ranks * capacity + position).int()
        self.routing = routing._replace(zero_weight=routing.zero_weight.masked_fill(lost.any(dim=1), torch.nan))

        # A place without a row takes that of an empty token behind the others.
        row = begin + torch.arange(capacity, dtype=torch.int32, device=ranks.device)
        slot = F.pad(plan.row_slots, (0, 1))[row.clamp(max=plan.row_slots.numel())]
        self.tokens = torch.where(row < end, slot // max(1, ranks.size(1)), ranks.size(0)).flatten()

    def depart(self) -> None:
        rows = F.pad(self.hidden_states, (0, 0, 0, 1)).index_select(0, self.tokens)
        slots = self.exchange.pack(self.routing, 1).index_select(0, self.tokens)
        self.rows, self.slots = all_to_all(self.exchange.group, self.works, None, rows, slots)

    def send_back(self, summed: Tensor) -> None:
        (self.rows,) = all_to_all(self.exchange.group, self.works, None, summed)

    def come_back(self) -> tuple[Tensor, Tensor]:
        wait(self.exchange.group, self.works)
        return self.rows, self.slot_rows


class AllGatherExchange(Exchange):
    """Every rank gathers all tokens, runs its experts on those that chose them, and a reduce-scatter in float32 adds up
    the sums: the fewest steps, for few tokens. Nothing waits for the host. The order of the sum is the library's.

    Args:
        max_tokens: most tokens of a rank; as many rows go.
    """

    def __init__(self, group: ExpertGroup, num_local_experts: int, max_tokens: int) -> None:
        super().__init__(group, num_local_experts)
        self.max_tokens = max_tokens

    def trips(self, hidden_states: Tensor, routing: RoutingResult) -> list[Trip]:
        check_max_tokens(hidden_states, self.max_tokens)
        return [AllGatherTrip(self, hidden_states, routing, self.max_tokens - hidden_states.size(0))]


class AllGatherTrip(Trip):
    """See AllGatherExchange."""

    def __init__(self, exchange: Exchange, hidden_states: Tensor, routing: RoutingResult, num_empty: int) -> None:
        super().__init__(exchange, hidden_states, routing)
        self.num_empty = num_empty

    def depart(self) -> None:
        rows = F.pad(self.hidden_states, (0, 0, 0, self.num_empty))
        slots = self.exchange.pack(self.routing, self.num_empty)
        self.rows, self.slots = all_gather(self.exchange.group, self.works, rows, slots)

    def send_back(self, summed: Tensor) -> None:
        self.rows = reduce_scatter(self.exchange.group, self.works, summed.to(self.routing.topk_weights.dtype))

    def come_back(self) -> tuple[Tensor, Tensor]:
        wait(self.exchange.group, self.works)
        slot_rows = torch.arange(self.num_tokens, dtype=torch.int32, device=self.rows.device).unsqueeze(1)
        return self.rows[: self.num_tokens].to(self.hidden_states.dtype), slot_rows


def check_max_tokens(hidden_states: Tensor, max_tokens: int) -> None:
    """Raises ValueError if there are more tokens than an exchange has room for."""
    if hidden_states.size(0) > max_tokens:
        raise ValueError(
            f"hidden_states must have at most the exchange's max_tokens ({max_tokens}) tokens, "
            f"got {hidden_states.size(0)}"
        )
