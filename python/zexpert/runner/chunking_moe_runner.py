# SPDX-License-Identifier: Apache-2.0
"""Tokens in chunks, for a bounded amount of memory."""

import torch
from torch import Tensor, nn

from zexpert.experts.interface import MoEExperts
from zexpert.ops.moe_plan import moe_plan
from zexpert.ops.types import ExpertWeights, RoutingResult
from zexpert.router.fused_moe_router import FusedMoERouter
from zexpert.runner.moe_runner_base import MoERunnerBase


class ChunkingMoERunner(MoERunnerBase):
    """Runs the experts on chunks of the tokens. The experts' rows, which grow with tokens times experts per token, are
    then those of one chunk. Any number of tokens works, 0 included.

    All tokens are routed at once, since routing needs little memory: the choice, what a capture callback sees and the
    replicas of an expert map are those of DefaultMoERunner bit for bit. The output is too, except for what a
    matrix-product library does with another number of rows. Tokens that fit in one chunk are routed and planned by one
    operator, as DefaultMoERunner's are.

    torch.compile unrolls the chunks: a graph is for one number of chunks, and for more than one token in the last.

    Args:
        chunk_size: largest number of tokens in a chunk, at least 1.
        The others are MoERunner's.

    Raises:
        ValueError: if chunk_size is not an integer of at least 1.
    """

    def __init__(
        self,
        router: FusedMoERouter,
        experts: MoEExperts,
        shared_experts: nn.Module | None = None,
        *,
        chunk_size: int,
    ) -> None:
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
            raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
        super().__init__(router, experts, shared_experts)
        self.chunk_size = chunk_size

    def forward(self, hidden_states: Tensor, router_logits: Tensor, weights: ExpertWeights) -> Tensor:
        num_tokens = hidden_states.size(0)
        if num_tokens <= self.chunk_size:
            routing, plan = self._route_and_plan(hidden_states, router_logits, weights)
            return self._run(hidden_states, routing, plan, weights)
        routing = self._route(hidden_states, router_logits, weights)
        out = hidden_states.new_empty(hidden_states.size())
        expert_offsets: list[Tensor] = []
        for chunk in range((num_tokens + self.chunk_size - 1) // self.chunk_size):
            begin = chunk * self.chunk_size
            end = min(begin + self.chunk_size, num_tokens)
            routing_of_chunk = RoutingResult(
                routing.topk_weights[begin:end],
                routing.topk_ids[begin:end],
                routing.zero_weight[begin:end],
                routing.constant_weight[begin:end],
            )
            plan = moe_plan(routing_of_chunk.topk_ids, weights.w13.size(0))
            out[begin:end] = self._run(hidden_states[begin:end], routing_of_chunk, plan, weights)
            expert_offsets.append(plan.expert_offsets)
        if self.routing_stats is not None:
            # The offsets of all tokens are the sums of the chunks' offsets.
            self.routing_stats(routing.topk_ids, torch.stack(expert_offsets).sum(dim=0, dtype=torch.int32))
        return out

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"
