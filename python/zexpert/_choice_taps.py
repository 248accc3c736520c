# SPDX-License-Identifier: Apache-2.0
"""What a router calls at every choice inside record_choices and replay_choices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zexpert.ops.biased_topk_choices import choices_of
from zexpert.router.biased_topk_router import BiasedTopKRouter
from zexpert.telemetry import is_recomputation

#: tap(router, router_logits, choices so far) -> choices [T, K] int32 for the router, None for those it makes itself.
ChoiceTap = Callable[[BiasedTopKRouter, Tensor, Tensor | None], Tensor | None]


class Recorder:
    """Keeps a layer's choices, a tensor per call."""

    def __init__(self, router: BiasedTopKRouter) -> None:
        self.top_k = router.top_k
        self.parts: list[Tensor] = []

    @torch.compiler.disable(reason="record_choices without max_tokens cannot be compiled")  # type: ignore[untyped-decorator]
    def __call__(self, router: BiasedTopKRouter, router_logits: Tensor, choices: Tensor | None) -> Tensor | None:
        if is_recomputation():
            return choices
        require_eager("record_choices", " without max_tokens")
        self.parts.append(seen_choices(router, router_logits, choices).to(torch.int16))
        return choices

    def rows(self) -> Tensor:
        """[T, K]."""
        return torch.cat(self.parts) if self.parts else torch.empty(0, self.top_k, dtype=torch.int16)

    def check(self, name: str) -> None:
        """Nothing can have been lost."""


class BufferRecorder:
    """Writes a layer's choices into a buffer, behind each other by a position on the device."""

    def __init__(self, router: BiasedTopKRouter, max_tokens: int, device: torch.device) -> None:
        self.max_tokens = max_tokens
        # The last row is for tokens without room.
        self.buffer = torch.full((max_tokens + 1, router.top_k), -1, dtype=torch.int16, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, router: BiasedTopKRouter, router_logits: Tensor, choices: Tensor | None) -> Tensor | None:
        if is_recomputation():
            return choices
        seen = seen_choices(router, router_logits, choices)
        rows = self.position + torch.arange(seen.size(0), device=seen.device)
        self.buffer.index_copy_(0, rows.clamp(max=self.max_tokens), seen.to(torch.int16))
        self.position.add_(seen.size(0))
        return choices

    def rows(self) -> Tensor:
        """[T, K]."""
        return self.buffer[: min(int(self.position), self.max_tokens)].clone()

    def check(self, name: str) -> None:
        """Raises ValueError if tokens had no room."""
        if int(self.position) > self.max_tokens:
            raise ValueError(
                f"max_tokens must be at least {int(self.position)}, the tokens that layer {name!r} routed, "
                f"got {self.max_tokens}"
            )


class Player:
    """Gives a layer the rows of its record, call by call."""

    def __init__(self, name: str, rows: Tensor) -> None:
        self.name = name
        self.rows = rows
        self.begin = 0  # of the last call
        self.end = 0

    @torch.compiler.disable(reason="replay_choices cannot be compiled")  # type: ignore[untyped-decorator]
    def __call__(self, router: BiasedTopKRouter, router_logits: Tensor, choices: Tensor | None) -> Tensor | None:
        if choices is not None:  # of a block inside this one
            return choices
        require_eager("replay_choices")
        num_tokens = router_logits.size(0)
        if not is_recomputation():
            if self.end + num_tokens > self.rows.size(0):
                raise ValueError(
                    f"record must have a row for each token of layer {self.name!r}, at least {self.end + num_tokens}, "
                    f"got {self.rows.size(0)}"
                )
            self.begin, self.end = self.end, self.end + num_tokens
        elif num_tokens != self.end - self.begin:
            raise RuntimeError(
                f"layer {self.name!r} must repeat its last call, of {self.end - self.begin} tokens, in the backward, "
                f"got {num_tokens}: run the backward of a checkpointed forward before the next forward"
            )
        return self.rows[self.begin : self.end].to(router_logits.device, torch.int32)

    def check(self) -> None:
        """Raises ValueError if rows are left."""
        if self.end != self.rows.size(0):
            raise ValueError(
                f"record must have {self.end} rows for layer {self.name!r}, the tokens that it routed, "
                f"got {self.rows.size(0)}"
            )


def seen_choices(router: BiasedTopKRouter, router_logits: Tensor, choices: Tensor | None) -> Tensor:
    """The replayed choices, else those that the router will make. A recorder does not give them to the router:
    activation checkpointing needs the same operator calls when the block has ended."""
    if choices is None:
        choices = choices_of(router_logits, router.e_score_correction_bias, router.arguments)
    return choices


def require_eager(name: str, condition: str = "") -> None:
    """Raises RuntimeError where this call would be repeated without Python."""
    if torch.jit.is_tracing():
        raise RuntimeError(f"{name} cannot be used under torch.jit.trace{condition}")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name} cannot be captured into a CUDA graph{condition}")
