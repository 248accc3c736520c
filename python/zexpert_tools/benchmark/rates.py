# SPDX-License-Identifier: Apache-2.0
"""What a machine can do at most, as measured: floors are made of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from zexpert_tools.benchmark import cuda

SHORTEST = 0.3  # seconds: a rate is measured for so long, and until it stops growing


@dataclass(frozen=True)
class Limits:
    """What a device can do at most."""

    bandwidth: float
    """Bytes per second: of main memory, read by the CPU; read and written by a copy on a GPU."""
    rate: float
    """Floating-point operations per second of a large matrix product."""

    def floor(self, operations: float, num_bytes: float) -> float:
        """The least seconds for so many operations and bytes."""
        return max(operations / self.rate, num_bytes / self.bandwidth)

    def best(self, other: Limits) -> Limits:
        """The larger of two measurements: a machine that was busy meanwhile looks slower than it is."""
        return Limits(max(self.bandwidth, other.bandwidth), max(self.rate, other.rate))


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measures the limits of `device`, with torch's current number of threads."""
    if device.type == "cuda":
        return Limits(cuda.copy_bandwidth(), cuda.matmul_rate(dtype))
    return Limits(memory_rate(), matmul_rate(dtype))


def last_level_cache_bytes() -> int:
    """Size of the largest cache the first processor sees; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)


def memory_rate() -> float:
    """Bytes per second at which this machine reads main memory."""
    return read_rate(min(max(4 * last_level_cache_bytes(), 256 << 20), 2 << 30))


def bandwidth_for(num_bytes: int, device: torch.device, bandwidth: float) -> float:
    """The limit for calls that together read `num_bytes`, again and again: `bandwidth`, or a CPU's caches' rate if the
    bytes fit there."""
    if device.type == "cuda" or num_bytes >= 4 * last_level_cache_bytes():
        return bandwidth
    return max(bandwidth, read_rate(num_bytes))


def read_rate(num_bytes: int) -> float:
    """Bytes per second at which this machine reads so many bytes, again and again; the best piece counts."""
    pieces = torch.zeros(max(num_bytes, 1 << 20) // 4).split(8 << 20)
    pieces = tuple(piece for piece in pieces if len(piece) == len(pieces[0]))
    readers: list[Callable[[torch.Tensor], object]] = [torch.sum, torch.amax]  # which is faster depends on the machine

    def attempt() -> float:
        return max(4 * len(piece) / seconds(read, piece) for read in readers for piece in pieces)

    return largest(attempt)


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, its inputs in `dtype` or converted to float32."""
    products = [
        (2 * size**3, torch.randn(size, size).to(each), torch.randn(size, size).to(each))
        for size in (512, 1024, 2048)
        for each in {dtype, torch.float32}
    ]
    return largest(lambda: max(operations / seconds(torch.mm, a, b) for operations, a, b in products))


def seconds(run: Callable[..., object], *arguments: object) -> float:
    begin = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begin


def largest(attempt: Callable[[], float], most_attempts: int = 50) -> float:
    """The largest of several attempts: at least two, for SHORTEST seconds, and until one in four is no larger."""
    begin, values = time.perf_counter(), [attempt()]
    for _ in range(most_attempts):
        values.append(attempt())
        grew = max(values[-4:]) == max(values)
        if time.perf_counter() - begin > SHORTEST and not grew:
            break
    return max(values)
