# SPDX-License-Identifier: Apache-2.0
"""Experts spread over ranks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import DispatchPlan, ExpertWeights
from zexpert.router.fused_moe_router import FusedMoERouter
from zexpert.runner.expert_exchange import (
    AllGatherExchange,
    Batch,
    DispatchedTokens,
    Exchange,
    FixedExchange,
    RaggedExchange,
    SymmetricExchange,
)
from zexpert.runner.expert_group import ExpertGroup
from zexpert.runner.placement import ExpertParallelPlacement
from zexpert.runner.sharded_moe_runner import ShardedMoERunner

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

#: What the operators of the exchange "symmetric" accept.
MOST_SHARING_RANKS = 64
#: Bytes of token rows for which there is room without knowing how many come. For more, the host waits to know.
LARGEST_ROWS = 2**32


class ExpertParallelMoERunner(ShardedMoERunner):
    """Dispatches each rank's tokens to the ranks that own their experts, and combines the results.

    Every rank has all of the routing and num_experts / P experts; it is called with the weights of its own experts. A
    token's row goes once to each rank that owns an expert of the token. One row per token and rank comes back: the
    weighted sum over that rank's experts in slot order, rounded to the dtype of hidden_states. The epilogue on the
    token's own rank adds these rows in float32 and rank order, and once its zero part, constants and shared experts. So
    results are repeatable; they differ from one process's only by the order of the sum. Slots of zero experts are never
    sent.

    All ranks of the group must call it, and in grad mode its backward, equally often and in the same order, with as
    many tokens as each has, 0 included. In grad mode the output requires gradients on every rank, and all ranks run the
    same collectives whatever their tensors require; use torch.no_grad() for inference. If a rank fails, the others
    block until the process-group timeout, then raise RuntimeError. Gradients of an expert's weights are summed over the
    tokens of all ranks; divide by the world size for a mean.

    Shared experts run while rows are being dispatched. torch.compile runs this runner eagerly and torch.jit.script
    refuses it.

    Args:
        num_experts: E, experts of all ranks: the router's, or with an expert map the physical ones. Rank p holds those
            from p * E / P on.
        group: the ranks: a torch.distributed.ProcessGroup, or a DeviceMesh of one dimension.
        chunk_size: most tokens to exchange at a time, by the exchanges "ragged" and "symmetric": rows of one chunk are
            exchanged while the experts work on the chunk before. None for all.
        The others are MoERunner's.

    Attributes:
        num_local_experts: E / P.
        lost_rows: 0-dimensional int64, rows without room since check_overflow; see use_exchange.

    Raises:
        ValueError: if an argument is out of range, or this process is not in the group; from the first forward, if
            ranks disagree on dtype, sizes, routing, exchange or grad mode.
        RuntimeError: from forward, if another rank failed or did not come in time.
    """

    def __init__(
        self,
        router: FusedMoERouter,
        experts: MoEExperts,
        shared_experts: nn.Module | None = None,
        *,
        num_experts: int,
        group: dist.ProcessGroup | DeviceMesh,
        chunk_size: int | None = None,
    ) -> None:
        if chunk_size is not None:
            check_at_least_one("chunk_size", chunk_size)
        super().__init__(router, experts, shared_experts)
        self.group = ExpertGroup("expert_parallel_group", group)
        if num_experts % self.group.size != 0:
            raise ValueError(
                f"num_experts must be a multiple of the ranks of expert_parallel_group ({self.group.size}), "
                f"got {num_experts}"
            )
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.group.size
        self.placement = ExpertParallelPlacement(self.group, router, num_experts)
        self.chunk_size = chunk_size
        self.lost_rows = torch.zeros((), dtype=torch.int64, device="cpu")  # also of a layer made on another device
        self.use_exchange("ragged")

    def use_exchange(self, name: str, max_tokens: int | None = None, capacity: int | None = None) -> None:
        """Chooses how later calls exchange rows. All ranks must choose the same.

        "ragged", the default: all-to-all of exactly the rows there are. The host waits once per call for their number,
            with chunk_size once more for the number of chunks.
        "fixed": all-to-all of `capacity` rows between every two ranks. The host does not wait, so a CUDA graph captures
            it.
        "all_gather": every rank gathers max_tokens rows of every rank, and a reduce-scatter in float32 adds up the
            results; the library chooses the order. The fewest steps, for few tokens; a CUDA graph captures it.
        "symmetric": kernels write exactly the rows there are into the memory of other ranks, in places known
            beforehand. No collective, and the host does not wait; a CUDA graph captures it. For GPUs connected by
            NVLink, and CPUs of one host. The ranks allocate the memory, 2 * P * max_tokens rows on each, at the first
            call; all layers of the group that need the same use it in turn, so they must run on one stream. If a rank
            does not come within the process group's timeout, outputs on a GPU are NaN, and the next call and
            check_overflow raise RuntimeError.

        Without "ragged" the experts have room for top_k slots of each row that may come. Where that is more than 4 GiB,
        the host waits once to learn how many come, unless a CUDA graph is being captured.

        A token sends a rank one row at most, so a capacity of max_tokens, the default, is always enough. A smaller one
        sends less, and can be too small for a routing. No token is then silently wrong: on the CPU forward raises
        RuntimeError, once all ranks have their rows; on a GPU, where the host does not wait, the outputs of the tokens
        concerned are NaN and check_overflow raises.

        Args:
            name: "ragged", "fixed", "all_gather" or "symmetric".
            max_tokens: most tokens of any rank; required except for "ragged".
            capacity: rows from each rank to each, at most max_tokens; for "fixed".

        Raises:
            ValueError: if an argument, or the layer's chunk_size, is out of range, missing, or not the exchange's.
        """
        bounds = {"max_tokens": max_tokens, "capacity": capacity}
        for argument, bound in bounds.items():
            if bound is not None:
                check_at_least_one(argument, bound)
        allowed = {
            "ragged": ("chunk_size",),
            "fixed": ("max_tokens", "capacity"),
            "all_gather": ("max_tokens",),
            "symmetric": ("max_tokens", "chunk_size"),
        }.get(str(name))
        if allowed is None:
            raise ValueError(f'name must be "ragged", "fixed", "all_gather" or "symmetric", got {name!r}')
        for argument, bound in {**bounds, "chunk_size": self.chunk_size}.items():
            if bound is not None and argument not in allowed:
                raise ValueError(f'{argument} must be None with the exchange "{name}", got {bound}')
        if name == "ragged":
            exchange: Exchange = RaggedExchange(self.group, self.num_local_experts, self.chunk_size)
        else:
            if max_tokens is None:
                raise ValueError(f'max_tokens is required with the exchange "{name}"')
            if capacity is None:
                capacity = max_tokens
            if capacity > max_tokens:
                raise ValueError(f"capacity must be at most max_tokens ({max_tokens}), got {capacity}")
            if name == "fixed":
                exchange = FixedExchange(self.group, self.num_local_experts, max_tokens, capacity)
            elif name == "symmetric":
                if self.group.size > MOST_SHARING_RANKS:
                    raise ValueError(
                        f'the ranks must be at most {MOST_SHARING_RANKS} with the exchange "symmetric", '
                        f"got {self.group.size}"
                    )
                exchange = SymmetricExchange(self.group, self.num_local_experts, max_tokens, self.chunk_size)
            else:
                exchange = AllGatherExchange(self.group, self.num_local_experts, max_tokens)
        self.exchange = exchange
        self.exchange_name = name
        self.exchange_sizes = {"max_tokens": max_tokens, "capacity": capacity, "chunk_size": self.chunk_size}
        self._agreed = False

    def check_overflow(self) -> None:
        """Raises RuntimeError if rows of this rank had no room since the last check, and forgets them, or if a rank did
        not come in time to an exchange "symmetric". Waits for the device: call it where you read results anyway."""
        lost_rows = int(self.lost_rows)
        self.exchange.check()
        if lost_rows > 0:
            self.lost_rows.zero_()
            raise RuntimeError(
                f"capacity is too small: rank {self.group.rank} dropped {lost_rows} rows and their outputs are NaN; "
                "increase capacity"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, router_logits: Tensor, weights: ExpertWeights) -> Tensor:
        routing = self._route(hidden_states, router_logits, weights)
        routing = self._mix_constants(hidden_states, routing, weights.constants)
        if self.routing_stats is not None:
            self.routing_stats(routing.topk_ids, torch.ops.zexpert.moe_plan(routing.topk_ids, self.num_experts)[0])
        self._require_agreement(
            hidden_states,
            router_logits,
            routing,
            num_experts=self.num_experts,
            intermediate_size=weights.w2.size(2),
            exchange=self.exchange_name,
            **self.exchange_sizes,
        )

        batches = deque(self.exchange.batches(hidden_states, routing))
        batches[0].start_dispatch()
        residual: Tensor | None = None
        if self.shared_experts is not None:
            with batches[0].beside_dispatch():
                residual = self._shared_experts_output(hidden_states)
        residuals = iter([None] * len(batches) if residual is None else residual.split([b.num_tokens for b in batches]))
        outputs: list[Tensor] = []
        combining: Batch | None = None
        while batches:
            batch = batches.popleft()
            # The next tokens are sent before the experts start on these, and these are combined while they work on the
            # next.
            if batches:
                batches[0].start_dispatch()
            self._start_combine(batch, batch.finish_dispatch(), weights)
            if combining is not None:
                outputs.append(self._output(combining, next(residuals), weights))
            combining = batch  # the one before is released, with its rows
        assert combining is not None
        outputs.append(self._output(combining, next(residuals), weights))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _start_combine(self, batch: Batch, tokens: DispatchedTokens, weights: ExpertWeights) -> None:
        """Runs this rank's experts and starts to send their weighted sums back."""
        if batch.sums_rows and not self.experts.reduces:
            plan, own = self._local_plan(tokens, weights)
            rows = self.experts(tokens.hidden_states, tokens.routing, plan, own)
            batch.start_combine_rows(rows, plan.slot_rows, tokens.routing.topk_weights)
        else:
            batch.start_combine(self._local_experts(tokens, weights))

    def _local_experts(self, tokens: DispatchedTokens, weights: ExpertWeights) -> Tensor:
        """[M, H]: weighted sums over this rank's experts."""
        plan, own = self._local_plan(tokens, weights)
        return self._experts_and_epilogue(tokens.hidden_states, tokens.routing, plan, own, None)

    def _local_plan(self, tokens: DispatchedTokens, weights: ExpertWeights) -> tuple[DispatchPlan, ExpertWeights]:
        """The plan of this rank's experts, and their weights."""
        plan = DispatchPlan(*torch.ops.zexpert.moe_plan(tokens.routing.topk_ids, weights.w13.size(0)))
        num_slots = tokens.num_slots
        if num_slots is None:
            row_bytes = tokens.hidden_states.size(1) * tokens.hidden_states.element_size()
            is_large = plan.row_slots.numel() * row_bytes > LARGEST_ROWS
            if is_large and not (plan.row_slots.is_cuda and torch.cuda.is_current_stream_capturing()):
                num_slots = int(plan.expert_offsets[-1])
        if num_slots is not None:
            # Other ranks do the work of most slots: no memory for those.
            plan = plan._replace(row_slots=plan.row_slots[:num_slots])
        return plan, weights._replace(constants=None)

    def _output(self, batch: Batch, residual: Tensor | None, weights: ExpertWeights) -> Tensor:
        rows, slot_rows = batch.finish_combine()
        ones = torch.ones_like(slot_rows, dtype=batch.routing.zero_weight.dtype)
        if batch.validity is not None:
            ones = batch.validity.to(ones.dtype).expand(slot_rows.size())
        out = self._finalize(rows, slot_rows, ones, batch.hidden_states, batch.routing, residual, weights.constants)
        if batch.lost_rows is not None:
            if self.lost_rows.device != batch.lost_rows.device:
                # At the first call, which is outside of a graph; the next may be inside or outside of inference mode.
                with torch.inference_mode(False):
                    self.lost_rows = torch.zeros_like(self.lost_rows, device=batch.lost_rows.device)
            self.lost_rows += batch.lost_rows
            if not self.lost_rows.is_cuda:
                self.check_overflow()
        return out

    def extra_repr(self) -> str:
        return f"{self.group}, {self.num_local_experts} experts here, exchange={self.exchange_name}"


def check_at_least_one(argument: str, value: object) -> None:
    """Raises ValueError unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{argument} must be an integer of at least 1, got {value!r}")
