# SPDX-License-Identifier: Apache-2.0
"""The experts backend for a name."""

from __future__ import annotations

from zexpert.experts.fused_experts import FusedExperts
from zexpert.experts.interface import MoEExperts

EXPERTS_BACKENDS = ("auto", "cpu", "grouped_mm", "hopper", "torch")


def create_experts(backend: str = "auto") -> MoEExperts:
    """Makes the experts backend `backend`.

    "auto" chooses at every call. The other names force an implementation of fused_moe, which raises RuntimeError for
    what it cannot compute: "cpu" (zexpert's CPU kernels), "grouped_mm" (PyTorch's grouped matrix product), "hopper"
    (zexpert's kernels for GPUs of compute capability 9.0), "torch" (one expert after another, any device and dtype).
    zexpert.kernel_plan prints which kernel runs for given sizes and dtypes.

    Raises:
        ValueError: for any other name.
    """
    if backend not in EXPERTS_BACKENDS:
        raise ValueError(f'experts_backend must be "auto", "cpu", "grouped_mm", "hopper" or "torch", got {backend!r}')
    return FusedExperts(backend)
