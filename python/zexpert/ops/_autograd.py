# SPDX-License-Identifier: Apache-2.0
"""Registration of the ops' derivatives with the dispatcher, so that eager mode, torch.compile and TorchScript in a
Python process differentiate alike. There are first derivatives by a backward; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

Context = Any
"""A torch.autograd.function.FunctionCtx: the setup_context function fills it, and the backward function reads it."""


def refuse_tangents(op: str, arguments: Iterable[object]) -> None:
    """Raises RuntimeError if an argument is a dual tensor of forward-mode differentiation: the op would drop the
    tangent, which then counts as 0."""
    if forward_ad._current_level < 0:  # not in forward mode
        return
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            if forward_ad.unpack_dual(argument).tangent is not None:
                raise RuntimeError(
                    f"zexpert::{op} cannot be differentiated in forward mode (torch.func.jvp, dual tensors): "
                    "use backward or torch.autograd.grad"
                )


class AutogradLibrary(torch.library.Library):
    """Registers kernels of the dispatch key Autograd that call refuse_tangents first."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", *arguments: Any, **keywords: Any) -> Any:
        assert dispatch_key == "Autograd", dispatch_key

        def kernel(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
            if forward_ad._current_level >= 0:
                refuse_tangents(op_name, (*args, *kwargs.values()))
            return fn(keyset, *args, **kwargs)

        return super().impl(op_name, kernel, dispatch_key, *arguments, **keywords)  # type: ignore[no-untyped-call]


_library = AutogradLibrary("zexpert", "FRAGMENT")  # type: ignore[no-untyped-call]


def register_autograd(op: str, setup_context: Callable[..., None], backward: Callable[..., object]) -> None:
    """Makes `backward` the derivative of ``zexpert::<op>``. A gradient that does not arrive is None, not zeros."""

    def setup(ctx: Context, **arguments: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, **arguments)

    torch.library.register_autograd(f"zexpert::{op}", backward, setup_context=setup, lib=_library)


NOT_DIFFERENTIABLE: set[str] = set()
"""Names of the ops that cannot be differentiated."""


def register_not_differentiable(op: str) -> None:
    """Makes differentiating ``zexpert::<op>`` an error. Without this its outputs would have no gradient."""
    NOT_DIFFERENTIABLE.add(op)
    reason = "second derivatives are not available" if op.endswith("_backward") else "it computes forward only"

    def backward(_ctx: Context, *_gradients: object) -> NoReturn:
        raise RuntimeError(f"zexpert::{op} cannot be differentiated: {reason}")

    torch.library.register_autograd(f"zexpert::{op}", backward, lib=_library)
