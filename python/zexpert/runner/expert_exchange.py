# SPDX-License-Identifier: Apache-2.0
"""Dispatch of token rows to the ranks that own their experts, and combine of the results.

All ranks join every exchange, each with any number of tokens, 0 included. A row is sent once per (token, rank)
however many of the token's experts that rank owns, with the token's expert ids and weights. Slots of zero experts send
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from zexpert.ops.types import DispatchPlan, RoutingResult
from zexpert.runner.collectives import Collectives, Works, wait
from zexpert.runner.expert_group import ExpertGroup
from zexpert.runner.shared_memory import SharedMemory, shared_memories, shared_memory


@dataclass
class DispatchedTokens:
    """The tokens that other ranks sent to this rank's experts.

    Attributes:
        hidden_states: [M, H].
        routing: ids of this rank's experts, [M, K], -1 where another rank does the slot's work; no zero parts.
        num_slots: slots that do work, where the host knows; None where it does not.
    """

    hidden_states: Tensor
    routing: RoutingResult
    num_slots: int | None


class Batch:
    """Tokens that are exchanged together. The methods are called in the order start_dispatch, finish_dispatch,
    start_combine, finish_combine. The caller computes between a start and its finish.

    Args:
        exchange: how to exchange.
        collectives: of this call of the layer.
        hidden_states: [T, H], this rank's tokens.
        routing: their routing.

    Attributes:
        lost_rows: 0-dimensional, rows that had no room; None where all have room.
        validity: [1], 1, or NaN if a rank did not come: to multiply with what other ranks sent; None where it raises.
        sums_rows: whether the caller must call start_combine_rows instead of start_combine.
    """

    lost_rows: Tensor | None = None
    validity: Tensor | None = None
    sums_rows = False

    def __init__(
        self, exchange: Exchange, collectives: Collectives, hidden_states: Tensor, routing: RoutingResult
    ) -> None:
        self.exchange = exchange
        self.collectives = collectives
        self.hidden_states = hidden_states
        self.routing = routing
        self.works: Works = []
        self.rows: Tensor
        self.slots: Tensor
        self.prepare()

    def prepare(self) -> None:
        """Computes what the exchange needs to know before the dispatch."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.hidden_states.size(0)

    def start_dispatch(self) -> None:
        """Starts to send the tokens to their experts."""
        raise NotImplementedError

    @contextmanager
    def beside_dispatch(self) -> Iterator[None]:
        """Inside it the caller computes what does not depend on the exchange. Results are valid after
        finish_combine."""
        yield

    def finish_dispatch(self) -> DispatchedTokens:
        """Waits for the tokens of the other ranks."""
        wait(self.exchange.group, self.works)
        return DispatchedTokens(self.rows, self.exchange.unpack(self.slots), None)

    def start_combine(self, summed: Tensor) -> None:
        """Starts to send the experts' weighted sums [M, H], one for each dispatched row, back."""
        raise NotImplementedError

    def start_combine_rows(self, rows: Tensor, slot_rows: Tensor, topk_weights: Tensor) -> None:
        """The same from the experts' rows, of which slot_rows [M, K] names those of each dispatched row."""
        raise NotImplementedError

    def finish_combine(self) -> tuple[Tensor, Tensor]:
        """Waits for the sums of this rank's tokens. Returns rows, and slot_rows [T, S]: the rows of each token, in the
        order in which to add them."""
        raise NotImplementedError


class Exchange:
    """A method of exchanging rows.

    Args:
        group: the ranks.
        num_local_experts: experts on each rank; rank p has those from p * num_local_experts on.
    """

    def __init__(self, group: ExpertGroup, num_local_experts: int) -> None:
        self.group = group
        self.num_local_experts = num_local_experts

    def batches(self, hidden_states: Tensor, routing: RoutingResult) -> list[Batch]:
        """The batches that exchange all tokens: as many on every rank."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises RuntimeError if an exchange for which the host did not wait has failed."""

    def pack(self, routing: RoutingResult, num_empty: int = 0) -> Tensor:
        """[T + num_empty, 2K]: weights and, as bits of the same dtype, ids: one tensor to send, which carries the
        weights' gradients. The last rows are tokens without experts. Ids count from 1 here, with 0 for none: their bits
        are never those of a NaN."""
        weights = F.pad(routing.topk_weights, (0, 0, 0, num_empty))
        ids = F.pad(routing.topk_ids, (0, 0, 0, num_empty), value=-1)
        ids = ids.to(torch.int64 if weights.dtype == torch.float64 else torch.int32)
        return torch.cat([weights, (ids + 1).view(weights.dtype)], dim=1)

    def unpack(self, slots: Tensor) -> RoutingResult:
        """The routing of rows that were sent with `slots` [M, 2K], for this rank's experts."""
        weights, bits = slots.chunk(2, dim=1)
        ids = bits.detach().contiguous().view(torch.int64 if weights.dtype == torch.float64 else torch.int32)
        local = ids - 1 - self.group.rank * self.num_local_experts
        local = torch.where((local >= 0) & (local < self.num_local_experts), local, -1)
        num_rows = weights.size(0)
        return RoutingResult(weights, local, weights.new_zeros(num_rows), weights.new_zeros(num_rows, 0))

    def slot_ranks(self, topk_ids: Tensor) -> Tensor:
        """[T, K]: the rank of each slot's expert, -1 for a slot without work."""
        return torch.where(topk_ids >= 0, topk_ids // self.num_local_experts, -1)

    def rank_plan(self, topk_ids: Tensor) -> tuple[Tensor, DispatchPlan]:
        """The ranks that each token's row is sent to, [T, K], ascending, each once and -1 between them; and moe_plan of
        these."""
        ranks = self.slot_ranks(topk_ids).sort(dim=1).values
        repeats = F.pad(ranks[:, 1:] == ranks[:, :-1], (1, 0))
        ranks = ranks.masked_fill(repeats, -1)
        return ranks, DispatchPlan(*torch.ops.zexpert.moe_plan(ranks, self.group.size))


class RaggedExchange(Exchange):
    """All-to-all of exactly the rows there are. Ranks exchange the numbers of rows first, and the host waits for them.

    Args:
        chunk_size: most tokens in a batch; None for all. With chunks, the rows of one are exchanged while the experts
            work on the chunk before; the ranks agree on the largest number of chunks.
    """

    def __init__(self, group: ExpertGroup, num_local_experts: int, chunk_size: int | None = None) -> None:
        super().__init__(group, num_local_experts)
        self.chunk_size = chunk_size

    def batches(self, hidden_states: Tensor, routing: RoutingResult) -> list[Batch]:
        num_chunks = self._agreed_number_of_chunks(hidden_states)
        size = max(1, hidden_states.size(0) if self.chunk_size is None else self.chunk_size)
        collectives = Collectives(self.group, hidden_states.device)
        batches = [
            RaggedBatch(
                self,
                collectives,
                hidden_states[chunk * size : (chunk + 1) * size],
                RoutingResult(*(tensor[chunk * size : (chunk + 1) * size] for tensor in routing)),
            )
            for chunk in range(num_chunks)
        ]
        sent = torch.stack([batch.counts for batch in batches], dim=1)  # [P, chunks, 2]
        received = torch.empty_like(sent)
        with self.group.exchanging():
            dist.all_to_all_single(received, sent, group=self.group.process_group)
            counts = torch.stack([received, sent]).permute(2, 3, 0, 1).tolist()
        for batch, ((rows_in, rows_out), (slots_in, _)) in zip(batches, counts, strict=True):
            batch.sizes = (rows_in, rows_out)
            batch.num_slots = sum(slots_in)
        return list(batches)

    def _agreed_number_of_chunks(self, hidden_states: Tensor) -> int:
        if self.chunk_size is None:
            return 1
        num_chunks = torch.tensor(max(1, -(-hidden_states.size(0) // self.chunk_size)), device=hidden_states.device)
        with self.group.exchanging():
            dist.all_reduce(num_chunks, dist.ReduceOp.MAX, group=self.group.process_group)
            return int(num_chunks)


class RaggedBatch(Batch):
    """See RaggedExchange.

    Attributes:
        counts: [P, 2] int32: rows, and slots that do work, for each rank.
        sizes: rows from each rank and rows to each.
        num_slots: slots of the dispatched tokens that do work.
    """

    sizes: tuple[list[int], list[int]]
    num_slots: int

    def prepare(self) -> None:
        _, self.plan = self.exchange.rank_plan(self.routing.topk_ids)
        slot_ranks = self.exchange.slot_ranks(self.routing.topk_ids)
        slot_offsets = torch.ops.zexpert.moe_plan(slot_ranks, self.exchange.group.size)[0]
        self.counts = torch.stack([self.plan.expert_offsets, slot_offsets], dim=1).diff(dim=0)

    def start_dispatch(self) -> None:
        row_slots = self.plan.row_slots[: sum(self.sizes[1])]
        rows, slots = (
            torch.ops.zexpert.moe_permute(tensor, row_slots, self.plan.expert_offsets, self.plan.slot_rows.size(1))
            for tensor in (self.hidden_states, self.exchange.pack(self.routing))
        )
        self.rows, self.slots = self.collectives.all_to_all(self.works, self.sizes, rows, slots)

    def finish_dispatch(self) -> DispatchedTokens:
        tokens = super().finish_dispatch()
        tokens.num_slots = self.num_slots
        return tokens

    def start_combine(self, summed: Tensor) -> None:
        (self.rows,) = self.collectives.all_to_all(self.works, self.sizes[::-1], summed)

    def finish_combine(self) -> tuple[Tensor, Tensor]:
        wait(self.exchange.group, self.works)
        return self.rows, self.plan.slot_rows


class FixedExchange(Exchange):
    """All-to-all of `capacity` rows between every two ranks: shapes are known beforehand and the host does not wait, so
    a CUDA graph captures it.

    A token sends a rank at most one row. So with capacity = max_tokens all rows fit whatever the routing. With less,
    some rows may have no room: FixedBatch.lost_rows counts them, and the outputs of their tokens are NaN.

    Args:
        max_tokens: most tokens of a rank.
        capacity: rows from each rank to each.
    """

    def __init__(self, group: ExpertGroup, num_local_experts: int, max_tokens: int, capacity: int) -> None:
        super().__init__(group, num_local_experts)
        self.max_tokens = max_tokens
        self.capacity = capacity

    def batches(self, hidden_states: Tensor, routing: RoutingResult) -> list[Batch]:
        check_max_tokens(hidden_states, self.max_tokens)
        return [FixedBatch(self, Collectives(self.group, hidden_states.device), hidden_states, routing)]


class FixedBatch(Batch):
    """See FixedExchange."""

    exchange: FixedExchange

    def prepare(self) -> None:
        routing, capacity = self.routing, self.exchange.capacity
        ranks, plan = self.exchange.rank_plan(routing.topk_ids)
        begin, end = plan.expert_offsets[:-1, None], plan.expert_offsets[1:, None]

        # A row's place in all that is sent is rank * capacity + position, its position among the rows for that rank.
        position = plan.slot_rows - begin.flatten()[ranks.clamp(min=0)]
        lost = (ranks >= 0) & (position >= capacity)
        self.lost_rows = lost.sum()
        self.slot_rows = torch.where((ranks < 0) | lost, -1, ranks * capacity + position).int()
        self.routing = routing._replace(zero_weight=routing.zero_weight.masked_fill(lost.any(dim=1), torch.nan))

        # A place without a row sends an empty token, which is padded behind the others.
        row = begin + torch.arange(capacity, dtype=torch.int32, device=ranks.device)
        slot = F.pad(plan.row_slots, (0, 1))[row.clamp(max=plan.row_slots.numel())]
        self.tokens = torch.where(row < end, slot // max(1, ranks.size(1)), ranks.size(0)).flatten()

    def start_dispatch(self) -> None:
        rows = F.pad(self.hidden_states, (0, 0, 0, 1)).index_select(0, self.tokens)
        slots = self.exchange.pack(self.routing, 1).index_select(0, self.tokens)
        self.rows, self.slots = self.collectives.all_to_all(self.works, None, rows, slots)

    def start_combine(self, summed: Tensor) -> None:
        (self.rows,) = self.collectives.all_to_all(self.works, None, summed)

    def finish_combine(self) -> tuple[Tensor, Tensor]:
        wait(self.exchange.group, self.works)
        return self.rows, self.slot_rows


class AllGatherExchange(Exchange):
    """Every rank gathers all tokens and runs its experts on those that chose them; a reduce-scatter in float32 adds up
    the sums: the fewest steps, for few tokens. The host does not wait. The library chooses the order of the sum.

    Args:
        max_tokens: most tokens of a rank; every rank sends as many rows.
    """

    def __init__(self, group: ExpertGroup, num_local_experts: int, max_tokens: int) -> None:
        super().__init__(group, num_local_experts)
        self.max_tokens = max_tokens

    def batches(self, hidden_states: Tensor, routing: RoutingResult) -> list[Batch]:
        check_max_tokens(hidden_states, self.max_tokens)
        return [AllGatherBatch(self, Collectives(self.group, hidden_states.device), hidden_states, routing)]


class AllGatherBatch(Batch):
    """See AllGatherExchange."""

    exchange: AllGatherExchange

    def start_dispatch(self) -> None:
        num_empty = self.exchange.max_tokens - self.num_tokens
        rows = F.pad(self.hidden_states, (0, 0, 0, num_empty))
        slots = self.exchange.pack(self.routing, num_empty)
        self.rows, self.slots = self.collectives.all_gather(self.works, rows, slots)

    def start_combine(self, summed: Tensor) -> None:
        self.rows = self.collectives.reduce_scatter(self.works, summed.to(self.routing.topk_weights.dtype))

    def finish_combine(self) -> tuple[Tensor, Tensor]:
        wait(self.exchange.group, self.works)
        slot_rows = torch.arange(self.num_tokens, dtype=torch.int32, device=self.rows.device).unsqueeze(1)
        return self.rows[: self.num_tokens].to(self.hidden_states.dtype), slot_rows


class SymmetricExchange(Exchange):
    """Kernels write rows into the memory of the rank that needs them: no collective, and the host does not wait, so a
    CUDA graph captures it. The order of sums is fixed.

    Args:
        max_tokens: most tokens of a rank; every rank has room for as many from each.
        chunk_size: most tokens in a batch; None for all. The rows of one batch travel while the experts work on the one
            before. As many batches as max_tokens needs, on every rank.
    """

    def __init__(
        self, group: ExpertGroup, num_local_experts: int, max_tokens: int, chunk_size: int | None = None
    ) -> None:
        super().__init__(group, num_local_experts)
        self.max_tokens = max_tokens
        self.chunk_size = max_tokens if chunk_size is None else min(chunk_size, max_tokens)
        self.num_chunks = -(-max_tokens // self.chunk_size)

    def batches(self, hidden_states: Tensor, routing: RoutingResult) -> list[Batch]:
        check_max_tokens(hidden_states, self.max_tokens)
        collectives = Collectives(self.group, hidden_states.device)
        if self.num_chunks == 1:
            return [SymmetricBatch(self, collectives, hidden_states, routing, 0)]
        chunks = [slice(i * self.chunk_size, (i + 1) * self.chunk_size) for i in range(self.num_chunks)]
        return [
            SymmetricBatch(
                self, collectives, hidden_states[chunk], RoutingResult(*(tensor[chunk] for tensor in routing)), i
            )
            for i, chunk in enumerate(chunks)
        ]

    def memory(self, hidden_states: Tensor, top_k: int, chunk: int) -> SharedMemory:
        """The memory for a chunk of tokens like these, if no rank failed to come when it was last used."""
        # The chunk before is with its experts, and the sums of the one before that may not have been read.
        num_lanes = 3
        memory = shared_memory(
            self.group,
            hidden_states.device,
            hidden_states.dtype,
            self.chunk_size,
            hidden_states.size(1),
            top_k,
            chunk % num_lanes,
        )
        memory.check()
        return memory

    def check(self) -> None:
        for memory in shared_memories(self.group):
            if memory.validity.is_cuda:
                torch.cuda.synchronize(memory.validity.device)
            memory.check()


@dataclass
class Places:
    """Where the rows of a batch are.

    Attributes:
        slot_rows: [T, P], the rows of each token, rank by rank; -1 where it was not sent.
        row_tokens: [P, M], the inverse.
        ids: [P * M, K], experts of the rows that came; -1 in places without a row.
    """

    slot_rows: Tensor
    row_tokens: Tensor
    ids: Tensor


#: Multiprocessors of a GPU that send rows while the others multiply: enough for NVLink.
SENDING_MULTIPROCESSORS = 32


class SymmetricBatch(Batch):
    """See SymmetricExchange. Without gradients the experts read what other ranks wrote where it is, and on a GPU a side
    stream works meanwhile: for shared experts, and for all chunks but the first one's dispatch and the last one's
    combine, beside which no experts work.

    Args:
        chunk: its place in the batches.
    """

    exchange: SymmetricExchange

    def __init__(
        self,
        exchange: SymmetricExchange,
        collectives: Collectives,
        hidden_states: Tensor,
        routing: RoutingResult,
        chunk: int,
    ) -> None:
        self.chunk = chunk
        super().__init__(exchange, collectives, hidden_states, routing)

    def prepare(self) -> None:
        self.memory = self.exchange.memory(self.hidden_states, self.routing.topk_ids.size(1), self.chunk)
        self.validity = self.memory.validity
        self.sums_rows = not torch.is_grad_enabled()
        self.has_side_stream = self.sums_rows and self.hidden_states.is_cuda
        self.beside: list[torch.cuda.Event] = []  # what runs on the side stream
        self.kept: tuple[Tensor, ...] = ()  # what it reads
        if self.has_side_stream:
            self.side_stream = self.exchange.memory(self.hidden_states, self.routing.topk_ids.size(1), 0).side_stream
            self.inputs_ready = self.now()

    @contextmanager
    def on_side_stream(self, after: torch.cuda.Event) -> Iterator[None]:
        """Inside it work goes to the side stream, and starts after the event. Everything that the side stream reads or
        frees was used before an event that it waits for, so memory needs no other care."""
        self.side_stream.wait_event(after)
        with torch.cuda.stream(self.side_stream):
            yield
            self.beside.append(self.side_stream.record_event())

    def wait_for_side_stream(self) -> None:
        for event in self.beside:
            torch.cuda.current_stream(self.hidden_states.device).wait_event(event)
        self.beside.clear()
        self.kept = ()

    def now(self) -> torch.cuda.Event:
        """All work on the current stream so far."""
        event: torch.cuda.Event = torch.cuda.current_stream(self.hidden_states.device).record_event()
        return event

    def start_dispatch(self) -> None:
        if self.has_side_stream and self.chunk > 0:
            with self.on_side_stream(self.now()):
                self.dispatch(SENDING_MULTIPROCESSORS)
        else:
            self.dispatch()

    def dispatch(self, most_multiprocessors: int = 0) -> None:
        """Writes the tokens into other ranks' memory."""
        memory, routing = self.memory, self.routing
        slot_rows, row_tokens = memory.dispatch(
            self.hidden_states.detach(),
            routing.topk_ids,
            routing.topk_weights.detach(),
            self.exchange.num_local_experts,
            most_multiprocessors,
        )
        self.places = Places(slot_rows, row_tokens, memory.own(memory.ids))

    @contextmanager
    def beside_dispatch(self) -> Iterator[None]:
        # The stream waits for the other ranks' rows. What it would compute meanwhile runs on the other one.
        if self.has_side_stream:
            with self.on_side_stream(self.inputs_ready):
                yield
        else:
            yield

    def finish_dispatch(self) -> DispatchedTokens:
        memory, places = self.memory, self.places
        if self.sums_rows:
            if self.chunk > 0:
                self.wait_for_side_stream()
            memory.barrier()
            self.rows, weights = memory.own(memory.rows), memory.own(memory.weights)
        else:
            self.rows, weights = self.collectives.run(
                partial(_receive_tokens, memory, places),
                partial(_return_token_gradients, memory, places),
                self.hidden_states,
                self.routing.topk_weights,
            )
        num_rows = weights.size(0)
        routing = RoutingResult(weights, places.ids, weights.new_zeros(num_rows), weights.new_zeros(num_rows, 0))
        return DispatchedTokens(self.rows, routing, None)

    def start_combine(self, summed: Tensor) -> None:
        if self.sums_rows:
            self.memory.combine(summed, _own_places(self.places.ids), None, self.memory.sums)
            return
        (self.rows,) = self.collectives.run(
            partial(_return_sums, self.memory, self.places),
            partial(_send_sum_gradients, self.memory, self.places),
            summed,
        )

    def start_combine_rows(self, rows: Tensor, slot_rows: Tensor, topk_weights: Tensor) -> None:
        memory = self.memory
        if self.has_side_stream and self.chunk < self.exchange.num_chunks - 1:
            self.kept = (rows, slot_rows, topk_weights)
            with self.on_side_stream(self.now()):
                memory.combine(rows, slot_rows, topk_weights, memory.sums, SENDING_MULTIPROCESSORS)
        else:
            memory.combine(rows, slot_rows, topk_weights, memory.sums)

    def finish_combine(self) -> tuple[Tensor, Tensor]:
        if self.sums_rows:
            self.wait_for_side_stream()
            self.memory.barrier()
            self.rows = self.memory.own(self.memory.sums)
        return self.rows, self.places.slot_rows


# ---- Steps of SymmetricBatch with gradients ----
# What came is copied out of the shared memory: the next exchange overwrites it, and the backward needs it.


def _own_places(tokens_or_ids: Tensor) -> Tensor:
    """[P * M, 1]: the row itself for places with a row, of which `tokens_or_ids` has an entry that is not -1."""
    rows = torch.arange(tokens_or_ids.size(0), dtype=torch.int32, device=tokens_or_ids.device)
    return torch.where((tokens_or_ids >= 0).any(dim=1), rows, -1).unsqueeze(1)


def _receive_tokens(memory: SharedMemory, places: Places, *_sent: Tensor) -> tuple[Tensor, ...]:
    memory.barrier()
    places.ids = places.ids.clone()
    return memory.received(memory.rows), memory.received(memory.weights)


def _return_token_gradients(
    memory: SharedMemory, places: Places, grad_rows: Tensor, grad_weights: Tensor
) -> tuple[Tensor, ...]:
    own_places = _own_places(places.ids)
    memory.combine(grad_rows, own_places, None, memory.sums)
    memory.combine(grad_weights, own_places, None, memory.weight_sums)
    memory.barrier()
    return _sum_of_ranks(memory, places, memory.sums), _sum_of_ranks(memory, places, memory.weight_sums)


def _return_sums(memory: SharedMemory, places: Places, summed: Tensor) -> tuple[Tensor, ...]:
    memory.combine(summed, _own_places(places.ids), None, memory.sums)
    memory.barrier()
    return (memory.received(memory.sums),)


def _send_sum_gradients(memory: SharedMemory, places: Places, grad_sums: Tensor) -> tuple[Tensor, ...]:
    memory.combine(grad_sums, _own_places(places.row_tokens.flatten().unsqueeze(1)), None, memory.rows)
    memory.barrier()
    return (memory.received(memory.rows),)


def _sum_of_ranks(memory: SharedMemory, places: Places, arrays: list[Tensor]) -> Tensor:
    """[T, H]: the sum of each token's rows in the order of ranks."""
    rows, slot_rows = memory.own(arrays), places.slot_rows
    weights = memory.validity.to(memory.weights[0].dtype).expand(slot_rows.size())
    nothing = rows.new_zeros(1, 1).expand(slot_rows.size(0), rows.size(1))
    summed: Tensor = torch.ops.zexpert.moe_finalize(
        rows, slot_rows, weights, nothing, weights.new_zeros(slot_rows.size(0))
    )
    return summed


def check_max_tokens(hidden_states: Tensor, max_tokens: int) -> None:
    """Raises ValueError if there are more tokens than an exchange has room for."""
    if hidden_states.size(0) > max_tokens:
        raise ValueError(
            f"hidden_states must have at most the exchange's max_tokens ({max_tokens}) tokens, "
            f"got {hidden_states.size(0)}"
        )
