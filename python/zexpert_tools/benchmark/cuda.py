# SPDX-License-Identifier: Apache-2.0
"""Timing on a CUDA device."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from zexpert_tools.benchmark.timing import Timing

WARMUP_SECONDS = 0.1
"""A GPU that was idle needs a while to reach its clock rate."""


def require_gpu(parser: argparse.ArgumentParser) -> None:
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device: torch.cuda.is_available() is False")


def graph_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> Timing:
    """Seconds per call, of graphs that make every call in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        num_calls = max(len(calls), 8)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(num_calls):
                calls[i % len(calls)]()
        warm_at = time.perf_counter() + WARMUP_SECONDS
        while time.perf_counter() < warm_at:
            graph.replay()
            stream.synchronize()
        seconds = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3 / num_calls)
    return Timing.of(seconds)


def copy_bandwidth(num_values: int = 1 << 29) -> float:
    """Bytes per second, read and written, of a large device-to-device copy."""
    source = torch.rand(num_values, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    bandwidth: float = 2 * source.nbytes / statistics.median(seconds)
    return bandwidth


def stream_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> Timing:
    """Seconds per call, launched one by one, as a program does."""
    for call in calls:
        call()
    seconds = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return Timing.of(seconds)


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations per second of a large square matrix product."""
    a = torch.randn(size, size, device="cuda").to(dtype)
    return 2 * size**3 / stream_seconds([lambda: a @ a], 10).median


def head(bandwidth: float) -> str:
    return f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s; torch {torch.__version__}"
