# SPDX-License-Identifier: Apache-2.0
"""What a benchmark ran on, and what else that machine did."""

from __future__ import annotations

import datetime
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from zexpert import build_info
from zexpert_tools.benchmark.rates import last_level_cache_bytes


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def processor_features() -> list[str]:
    """The vector extensions that decide which kernels run, as Linux names them."""
    cpuinfo = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                flags = set(line.partition(":")[2].split())
                break
    wanted = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_bf16")
    return [feature for feature in wanted if feature in flags]


def installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """Machine and versions, for the JSON file and the head of the report; the GPU in a process that has used it."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: installed_version(name) for name in ("zexpert", "transformers")}
    gpu: dict[str, Any] = {}
    if torch.cuda.is_initialized():
        properties = torch.cuda.get_device_properties()
        gpu = {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **gpu,
        "processor": processor_name(),
        "features": processor_features(),
        "cores": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "system": platform.platform(),
        "git_revision": build_info()["git_revision"],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
    }


class OtherLoad:
    """How much of the benchmark's processors others used while a block ran, between 0 and 1.

    Others are other processes and the host's other guests (steal). They may use the processors that the benchmark's
    threads leave idle. 0 where the system does not say, or if the block was too short for its clock of 10 ms.
    """

    SHORTEST = 0.3  # seconds

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = torch.get_num_threads() if num_threads is None else num_threads

    def __enter__(self) -> OtherLoad:
        self.share = 0.0
        self._start = self._sample()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (end - start for end, start in zip(self._sample(), self._start, strict=True))
        cores = os.cpu_count() or 1
        threads = min(self.num_threads, cores)
        if wall >= self.SHORTEST and busy > 0:
            others = (busy - own) / wall - (cores - threads)
            self.share = min(max(others / threads, 0.0), 1.0)

    @staticmethod
    def _sample() -> tuple[float, float, float]:
        """Seconds: on the clock, of busy processors, of this process on them."""
        times = os.times()
        busy = 0.0
        stat = Path("/proc/stat")
        if stat.exists():
            user, nice, system, _idle, _iowait, irq, softirq, steal = stat.read_text().split()[1:9]
            ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
            busy = ticks / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, times.user + times.system
