# SPDX-License-Identifier: Apache-2.0
"""How the ops' derivatives are registered: with the dispatcher, so that eager mode, torch.compile and TorchScript in a
Python process differentiate alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

Context = Any
"""What a setup_context function fills and the backward function reads: a torch.autograd.function.FunctionCtx."""


def register_autograd(op: str, setup_context: Callable[..., None], backward: Callable[..., object]) -> None:
    """Makes `backward` the derivative of ``zexpert::<op>``. A gradient that does not arrive is None, not zeros."""

    def setup(ctx: Context, **arguments: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, **arguments)

    torch.library.register_autograd(f"zexpert::{op}", backward, setup_context=setup)


NOT_DIFFERENTIABLE: set[str] = set()
"""Names of the ops whose derivative is an error."""


def register_not_differentiable(op: str) -> None:
    """Makes differentiating ``zexpert::<op>`` an error where it would be silently wrong."""
    NOT_DIFFERENTIABLE.add(op)
    reason = "second derivatives are not available" if op.endswith("_backward") else "it computes forward only"

    def backward(_ctx: Context, *_gradients: object) -> NoReturn:
        raise RuntimeError(f"zexpert::{op} cannot be differentiated: {reason}")

    torch.library.register_autograd(f"zexpert::{op}", backward)
