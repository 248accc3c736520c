"""The experts backend for a name."""

from __future__ import annotations

from zexpert.experts.auto import AutoExperts
from zexpert.experts.cpu import CpuExperts
from zexpert.experts.interface import MoEExperts
from zexpert.experts.torch_loop import TorchLoopExperts


def create_experts(backend: str = "auto") -> MoEExperts:
    """Makes the backend called `backend`: "auto" chooses by the tokens' device at every call, "cpu" and "torch" force
    CpuExperts and TorchLoopExperts. Which kernel a backend's operators run for given sizes and dtypes is
    zexpert.kernel_plan's to tell.

    Raises:
        ValueError: for any other name.
    """
    if backend == "auto":
        return AutoExperts()
    if backend == "cpu":
        return CpuExperts()
    if backend == "torch":
        return TorchLoopExperts()
    raise ValueError(f'experts_backend must be "auto", "cpu" or "torch", got {backend!r}')
