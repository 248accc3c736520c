# SPDX-License-Identifier: Apache-2.0
"""Tokens in chunks, for a bounded amount of memory."""

from torch import Tensor, nn

from zexpert.experts.interface import MoEExperts
from zexpert.ops.moe_plan import moe_plan
from zexpert.ops.types import RoutingResult
from zexpert.router.fused_moe_router import FusedMoERouter
from zexpert.runner.moe_runner_base import MoERunnerBase


class ChunkingMoERunner(MoERunnerBase):
    """Takes the tokens through the experts in chunks, so that what grows with tokens times experts per token, the
    experts' rows, is bounded by chunk_size. Any number of tokens goes, 0 included.

    All tokens are routed at once, since routing needs little memory: the choice, what a capture callback sees and the
    replicas of an expert map are those of DefaultMoERunner bit for bit. The output is too, but for what a
    matrix-product library does with another number of rows.

    torch.compile unrolls the chunks, so a graph is for one number of chunks, and for more than one token in the last.

    Args:
        chunk_size: largest number of tokens in a chunk, at least 1.
        The others are MoERunner's.

    Raises:
        ValueError: if chunk_size is no integer of at least 1.
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
        num_tokens = hidden_states.size(0)
        num_experts = w13_weight.size(0)
        if num_tokens <= self.chunk_size:
            plan = moe_plan(routing.topk_ids, num_experts)
            return self._run(
                hidden_states, routing, plan, w13_weight, w2_weight, constant_gate_weight, constant_vectors
            )
        out = hidden_states.new_empty(hidden_states.size())
        for chunk in range((num_tokens + self.chunk_size - 1) // self.chunk_size):
            begin = chunk * self.chunk_size
            end = min(begin + self.chunk_size, num_tokens)
            routing_of_chunk = self._routing_of(routing, begin, end)
            out[begin:end] = self._run(
                hidden_states[begin:end],
                routing_of_chunk,
                moe_plan(routing_of_chunk.topk_ids, num_experts),
                w13_weight,
                w2_weight,
                constant_gate_weight,
                constant_vectors,
            )
        return out

    def _routing_of(self, routing: RoutingResult, begin: int, end: int) -> RoutingResult:
        return RoutingResult(
            routing.topk_weights[begin:end],
            routing.topk_ids[begin:end],
            routing.zero_weight[begin:end],
            routing.constant_weight[begin:end],
        )

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"
