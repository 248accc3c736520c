# SPDX-License-Identifier: Apache-2.0
"""What every op's file starts from: the loaded operator library, and the check that fake kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from zexpert._loader import load_libraries

load_libraries()

Fake = TypeVar("Fake", bound=Callable[..., object])


def register_fake(op: str) -> Callable[[Fake], Fake]:
    """Makes the decorated function what ``zexpert::<op>`` does to tensors that have shapes and no values."""
    register: Callable[[Fake], Fake] = torch.library.register_fake(f"zexpert::{op}")
    return register


def check_devices(like_name: str, like: Tensor, **others: Tensor | None) -> None:
    """Raises RuntimeError unless the other tensors are where ``like`` is.

    The kernels check this themselves, but a meta tensor among real ones, and every tensor under torch.compile, only
    meets the fake kernel.
    """
    for name, other in others.items():
        if other is not None and other.device != like.device:
            raise RuntimeError(f"{name} must be on {like.device} like {like_name}, got {other.device}")


def weight_dtype(data: torch.dtype) -> torch.dtype:
    """The type of routing weights for data of type ``data``: float64 for float64, else float32."""
    return torch.float64 if data == torch.float64 else torch.float32
