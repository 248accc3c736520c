# SPDX-License-Identifier: Apache-2.0
"""The base of runners that spread the experts over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from zexpert.ops.types import RoutingResult
from zexpert.router.base_router import BaseRouter
from zexpert.runner.expert_group import ExpertGroup
from zexpert.runner.moe_runner_base import MoERunnerBase
from zexpert.runner.placement import ShardedExperts

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ShardedMoERunner(MoERunnerBase):
    """A runner of which each rank holds a part of the layer's w13_weight [R, 2F, H] and w2_weight [R, H, F].

    Attributes:
        group: the ranks.
        placement: the part of each rank.
    """

    group: ExpertGroup
    placement: ShardedExperts
    _agreed = False  # the ranks have compared what they were called with

    def sharded(self, name: str, shard: Tensor) -> DTensor:
        """This rank's weight `name`, or a tensor of its shape, as a part of all ranks' weight; shares its memory."""
        return self.placement.sharded(name, shard)

    def _require_agreement(
        self, hidden_states: Tensor, router_logits: Tensor, routing: RoutingResult, **settings: object
    ) -> None:
        """At the first call: raises ValueError on every rank unless all were called alike. The host waits, so a call
        that a CUDA graph captures leaves this to a later one."""
        if self._agreed or (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        router = self.router
        settings |= {
            "hidden_size": hidden_states.size(1),
            "top_k": routing.topk_ids.size(1),
            "num_logits": router_logits.size(1),
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
        }
        if isinstance(router, BaseRouter):
            settings |= router.arguments._asdict()
        self.group.require_agreement(dtype=hidden_states.dtype, **settings)
        self._agreed = True

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError("torch.jit.script cannot compile a layer with experts spread over ranks")
