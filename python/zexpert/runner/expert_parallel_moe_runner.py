# SPDX-License-Identifier: Apache-2.0
"""Experts spread over ranks."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import DispatchPlan
from zexpert.router.base_router import BaseRouter, check_tensor
from zexpert.router.fused_moe_router import FusedMoERouter
from zexpert.runner.expert_exchange import AllGatherExchange, Arrivals, Exchange, FixedExchange, RaggedExchange, Trip
from zexpert.runner.expert_group import ExpertGroup
from zexpert.runner.sharded_moe_runner import ShardedMoERunner

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class ExpertParallelMoERunner(ShardedMoERunner):
    """Takes each rank's tokens to the ranks that hold their experts, and the experts' sums back.

    Every rank has all of the routing and num_experts / P experts; the weights it is called with are those of its own. A
    token's row goes once to each rank that holds an expert of its; what comes back is one row per token and rank, the
    weighted sum over that rank's experts in slot order, rounded to the dtype of hidden_states. The epilogue on the
    token's own rank adds these in float32 and rank order, and once its zero part, constants and shared experts. So
    results are repeatable; they are one process's but for the order of the sum. Slots of zero experts are never sent.

    All ranks of the group call it, and where gradients flow its backward, equally often and in the same order, with as
    many tokens as each has, 0 included. A rank that cannot leaves the others waiting: they raise RuntimeError when it
    ends, or after the process group's timeout. Gradients of an expert's weights are summed over the tokens of all
    ranks; what it takes to make them a mean over ranks is the caller's.

    Shared experts run while rows are under way. torch.compile leaves this runner to eager mode and torch.jit.script
    refuses it.

    Args:
        num_experts: E, experts of all ranks: the router's, or with an expert map the physical ones. Rank p holds those
            from p * E / P on.
        group: the ranks: a torch.distributed.ProcessGroup, or a DeviceMesh of one dimension.
        chunk_size: most tokens to exchange at a time, by the "ragged" exchange: rows of one chunk are under way while
            the experts work on the chunk before. None for all.
        The others are MoERunner's.

    Attributes:
        num_local_experts: E / P.
        lost_rows: 0-dimensional int64, rows without room since check_overflow; see use_exchange.

    Raises:
        ValueError: if an argument is out of range, or the group is none that this process is in.
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
        self.chunk_size = chunk_size
        self.lost_rows = torch.zeros((), dtype=torch.int64)
        self.use_exchange("ragged")

    def use_exchange(self, name: str, max_tokens: int | None = None, capacity: int | None = None) -> None:
        """Chooses how later calls exchange rows; all ranks choose the same.

        "ragged", the default: all-to-all of exactly the rows there are. The host waits once per call for their number,
            with chunk_size once more for the number of chunks.
        "fixed": all-to-all of `capacity` rows between every two ranks. Nothing waits for the host, so that a CUDA graph
            captures it.
        "all_gather": every rank gathers max_tokens rows of every rank, and a reduce-scatter in float32 adds up the
            results, in the order of the library's choice. The fewest steps, for few tokens; captured likewise.

        "deep_ep": DeepEP's kernels, in bfloat16; the package deep_ep is imported now. See DeepEPExchange.

        A token sends a rank one row at most, so a capacity of max_tokens, the default, is always enough. A smaller one
        sends less, and can be too small for a routing. No token is then silently wrong: on the CPU forward raises
        RuntimeError, once all ranks have their rows; on a GPU, where the host does not wait to know, the outputs of the
        tokens concerned are NaN and check_overflow raises.

        Args:
            name: "ragged", "fixed", "all_gather" or "deep_ep".
            max_tokens: most tokens of any rank; needed but for "ragged".
            capacity: rows from each rank to each, at most max_tokens; for "fixed".

        Raises:
            ValueError: if an argument, or the layer's chunk_size, is out of range, missing, or not the exchange's.
            ImportError: if "deep_ep" is not installed.
        """
        bounds = {"max_tokens": max_tokens, "capacity": capacity}
        for argument, bound in bounds.items():
            if bound is not None:
                check_at_least_one(argument, bound)
        allowed = {
            "ragged": ("chunk_size",),
            "fixed": ("max_tokens", "capacity"),
            "all_gather": ("max_tokens",),
            "deep_ep": ("max_tokens",),
        }.get(str(name))
        if allowed is None:
            raise ValueError(f'name must be "ragged", "fixed", "all_gather" or "deep_ep", got {name!r}')
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
            elif name == "deep_ep":
                from zexpert.runner.deep_ep_exchange import DeepEPExchange

                exchange = DeepEPExchange(self.group, self.num_local_experts, max_tokens)
            else:
                exchange = AllGatherExchange(self.group, self.num_local_experts, max_tokens)
        self.exchange = exchange
        self.exchange_name = name

    def check_overflow(self) -> None:
        """Raises RuntimeError if rows of this rank had no room since the last check, and forgets them. Waits for the
        device: to be called where its results are read anyway."""
        lost_rows = int(self.lost_rows)
        if lost_rows > 0:
            self.lost_rows.zero_()
            raise RuntimeError(
                "capacity must hold the rows from each rank to each, and "
                f"{lost_rows} rows of rank {self.group.rank} had no room; the outputs of their tokens are NaN"
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        w13_weight: Tensor,
        w2_weight: Tensor,
        constant_gate_weight: Tensor | None = None,
        constant_vectors: Tensor | None = None,
    ) -> Tensor:
        routing = self._route(hidden_states, router_logits, w13_weight)
        routing = self._mix_constants(hidden_states, routing, constant_gate_weight, constant_vectors)
        if self.routing_stats is not None:
            self.routing_stats(routing.topk_ids, torch.ops.zexpert.moe_plan(routing.topk_ids, self.num_experts)[0])

        trips = deque(self.exchange.trips(hidden_states, routing))
        trips[0].depart()
        residual = self._shared_experts_output(hidden_states)
        residuals = iter([None] * len(trips) if residual is None else residual.split([t.num_tokens for t in trips]))
        outputs: list[Tensor] = []
        returning: Trip | None = None
        while trips:
            trip = trips.popleft()
            # The next tokens go out before the experts start on these, and these come back while they work on those.
            if trips:
                trips[0].depart()
            trip.send_back(self._local_experts(trip.arrive(), w13_weight, w2_weight))
            if returning is not None:
                outputs.append(self._output(returning, next(residuals), constant_vectors))
            returning = trip  # the one before goes, and its rows with it
        assert returning is not None
        outputs.append(self._output(returning, next(residuals), constant_vectors))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _local_experts(self, arrivals: Arrivals, w13_weight: Tensor, w2_weight: Tensor) -> Tensor:
        """[M, H]: weighted sums over this rank's experts."""
        hidden_states, routing = arrivals.hidden_states, arrivals.routing
        expert_offsets, row_slots, slot_rows = torch.ops.zexpert.moe_plan(routing.topk_ids, w13_weight.size(0))
        if arrivals.num_slots is not None and not self.experts.fuses_epilogue_for(hidden_states, w13_weight, w2_weight):
            # Most slots of a row are other ranks' work: no memory for those.
            row_slots = row_slots[: arrivals.num_slots]
        plan = DispatchPlan(expert_offsets, row_slots, slot_rows)
        summed = self._experts_and_epilogue(hidden_states, routing, plan, w13_weight, w2_weight, None, None)
        if torch.is_grad_enabled() and not summed.requires_grad:
            # Without work here the sums may depend on nothing, but all ranks have to run the same backward.
            weights = (weight.flatten()[:1] for weight in (w13_weight, w2_weight))
            for tensor in (hidden_states, routing.topk_weights[:, :1], *weights):
                if tensor.requires_grad:
                    return torch.where(torch.zeros_like(summed, dtype=torch.bool), tensor.to(summed.dtype), summed)
        return summed

    def _output(self, trip: Trip, residual: Tensor | None, constant_vectors: Tensor | None) -> Tensor:
        rows, slot_rows = trip.come_back()
        weights = torch.ones_like(slot_rows, dtype=trip.routing.zero_weight.dtype)
        out = self._finalize(rows, slot_rows, weights, trip.hidden_states, trip.routing, residual, constant_vectors)
        if trip.lost_rows is not None:
            if self.lost_rows.device != trip.lost_rows.device:
                # At the first call, which is outside of a graph; the next may be inside or outside of inference mode.
                with torch.inference_mode(False):
                    self.lost_rows = torch.zeros_like(self.lost_rows, device=trip.lost_rows.device)
            self.lost_rows += trip.lost_rows
            if not self.lost_rows.is_cuda:
                self.check_overflow()
        return out

    def own_experts(self) -> Tensor:
        expert_map = self.router.logical_to_physical_map
        logical = torch.arange(self.num_experts)
        if isinstance(expert_map, Tensor):
            replicas = expert_map.cpu().long()
            owners = torch.arange(replicas.size(0)).unsqueeze(1).expand_as(replicas)
            logical[replicas[replicas >= 0]] = owners[replicas >= 0]
        return logical.chunk(self.group.size)[self.group.rank]

    def own_slice(self, name: str, experts: Tensor) -> Tensor:
        return experts

    def saved_shape(self, name: str, shard: Tensor) -> list[int]:
        return [self.num_experts, *shard.shape[1:]]

    def sharded(self, name: str, shard: Tensor) -> DTensor:
        """[E, ...], by physical experts."""
        return self.group.as_sharded(shard, dim=0)

    def extra_repr(self) -> str:
        return f"{self.group}, {self.num_local_experts} experts here, exchange={self.exchange_name}"


def set_physical_experts(router: BaseRouter, logical_to_physical_map: Tensor, device: torch.device | str | None) -> int:
    """Gives the router the map and a load record on `device`, and returns E, the number of physical experts.

    Raises:
        ValueError: if the map is not as BaseRouter.set_expert_map describes it, does not name every physical expert
            from 0 on once, or would have no values.
    """
    check_tensor("logical_to_physical_map", logical_to_physical_map)
    logical_to_physical_map = logical_to_physical_map.to(device)
    if logical_to_physical_map.is_meta:
        raise ValueError('logical_to_physical_map needs a device that holds its values, got "meta"')
    router.set_expert_map(logical_to_physical_map)
    named = logical_to_physical_map[logical_to_physical_map >= 0].sort().values
    num_physical = named.numel()
    if named.tolist() != list(range(num_physical)):
        router.set_expert_map(None)
        raise ValueError(
            "logical_to_physical_map must name every physical expert from 0 on exactly once, "
            f"got {num_physical} entries between {int(named[0])} and {int(named[-1])}"
        )
    router.set_expert_map(
        logical_to_physical_map, torch.zeros(num_physical, dtype=torch.int64, device=logical_to_physical_map.device)
    )
    return num_physical


def check_at_least_one(argument: str, value: object) -> None:
    """Raises ValueError unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{argument} must be an integer of at least 1, got {value!r}")
