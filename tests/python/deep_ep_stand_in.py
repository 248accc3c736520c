# SPDX-License-Identifier: Apache-2.0
"""What zexpert uses of DeepEP's ElasticBuffer, with torch.distributed in its place.

Shapes, dtypes, arguments and meanings are those that DeepEP documents: rows in bfloat16, int64 ids of all experts, -1
for none; what comes has ids of this rank's experts, -1 for others'. Every use that is not so fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Event:
    def current_stream_wait(self) -> None:
        pass


@dataclass
class Handle:
    num_recv_tokens_per_expert_list: list[int]
    tokens: Tensor  # of this rank, one for each row sent
    sent: list[int]
    received: list[int]
    num_tokens: int


class ElasticBuffer:
    def __init__(self, group: Any, *, num_max_tokens_per_rank: int, hidden: int, num_topk: int) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.max_tokens, self.hidden, self.top_k = num_max_tokens_per_rank, hidden, num_topk

    def exchange(self, tensor: Tensor, received: list[int], sent: list[int]) -> Tensor:
        result = tensor.new_empty(sum(received), tensor.size(1))
        dist.all_to_all_single(result, tensor.contiguous(), received, sent, group=self.group)
        return result

    def dispatch(
        self,
        x: Tensor,
        *,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int,
        num_max_tokens_per_rank: int,
        async_with_compute_stream: bool = False,
        handle: Handle | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Handle, Event]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.size(1) == self.hidden
        assert 0 < x.size(0) <= num_max_tokens_per_rank == self.max_tokens
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            return self.exchange(x[handle.tokens], handle.received, handle.sent), None, None, handle, Event()
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_idx.dtype == torch.int64
        assert topk_weights.dtype == torch.float32
        assert topk_idx.shape == topk_weights.shape == (x.size(0), self.top_k)
        num_local = num_experts // self.size
        places = [
            ((topk_idx >= 0) & (topk_idx // num_local == rank)).any(dim=1).nonzero()[:, 0] for rank in range(self.size)
        ]
        sent = torch.tensor([len(place) for place in places])
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        handle = Handle([], torch.cat(places), sent.tolist(), received.tolist(), x.size(0))
        rows, ids, weights = (
            self.exchange(tensor[handle.tokens], handle.received, handle.sent) for tensor in (x, topk_idx, topk_weights)
        )
        ids = ids - self.rank * num_local
        ids[(ids < 0) | (ids >= num_local)] = -1
        handle.num_recv_tokens_per_expert_list = ids[ids >= 0].bincount(minlength=num_local).tolist()
        return rows, ids, weights, handle, Event()

    def combine(
        self,
        x: Tensor,
        *,
        handle: Handle,
        topk_weights: Tensor | None = None,
        async_with_compute_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Event]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape == (sum(handle.received), self.hidden)
        combined = self.add(x.float(), handle).bfloat16()
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.shape == (x.size(0), self.top_k)
            weights = self.add(topk_weights, handle)
        return combined, weights, Event()

    def add(self, rows: Tensor, handle: Handle) -> Tensor:
        back = self.exchange(rows, handle.sent, handle.received)
        return rows.new_zeros(handle.num_tokens, rows.size(1)).index_add_(0, handle.tokens, back)
