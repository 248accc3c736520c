# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing in one run: interleaved contenders, rotated inputs, checked outputs, floors and JSON.

What keeps a comparison honest is here, not in each benchmark:
- contenders take turns, repetition by repetition, so a slow moment of the machine falls on all of them;
- every call gets the next input of a rotation that is larger than the last-level cache, so nobody finds its data warm;
- medians and quartiles are reported, after a warm-up;
- an output passes if its error against a float64 reference is at most twice plain PyTorch's error in the same dtype.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from zexpert._info import build_info
from zexpert_tools.benchmark import cuda
from zexpert_tools.benchmark.timing import Timing

Input = TypeVar("Input")

MOST_OTHER_LOAD = 0.05  # share of the processors that others may use before a time is suspect
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ErrorCheck:
    """Largest errors against the float64 reference, and whether the error rule holds everywhere."""

    max_error: float
    plain_error: float
    passed: bool


def check_error(output: Tensor, plain: Tensor, reference: Tensor) -> ErrorCheck:
    """The error rule: no element of `output` is further from the float64 `reference` than twice the largest error of
    `plain`, plain PyTorch's result in the same dtype, plus one rounding of the element itself."""
    if reference.numel() == 0:
        return ErrorCheck(0.0, 0.0, passed=output.shape == reference.shape)
    error = (output.double() - reference).abs()
    plain_error = (plain.double() - reference).abs().max().item()
    allowed = 2.0 * plain_error + torch.finfo(output.dtype).eps * reference.abs()
    passed = output.shape == reference.shape and bool((error <= allowed).all())  # a NaN fails
    return ErrorCheck(error.max().item(), plain_error, passed)


def rotation_length(bytes_per_input: int, num_contenders: int, at_most_bytes: int = 3 << 30) -> int:
    """How many inputs to rotate so that they exceed the last-level cache, within a memory budget.

    The length shares no factor with the number of contenders, so that each of them meets every input.
    """
    wanted = math.ceil(1.5 * last_level_cache_bytes() / max(bytes_per_input, 1)) + 1
    length = max(2, min(wanted, 64, at_most_bytes // max(bytes_per_input, 1)))
    while math.gcd(length, max(num_contenders, 1)) != 1:
        length += 1
    return length


def measure(
    contenders: Mapping[str, Callable[[int], object]],
    *,
    num_inputs: int,
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times the contenders in turns. Each is called with the index of the next input, in [0, num_inputs).

    The order within a repetition rotates, so that nobody always follows the same neighbour. Each contender runs
    `warmup` repetitions untimed.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    call = 0
    for repetition in range(warmup + repeats):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            run = contenders[name]
            index = call % num_inputs
            call += 1
            start = clock()
            result = run(index)
            elapsed = clock() - start
            del result
            if repetition >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing.of(values) for name, values in seconds.items()}


# ---- What the machine can do ---------------------------------------------------------------------------------------


def last_level_cache_bytes() -> int:
    """Size of the largest cache the first processor sees; 32 MiB where the system does not tell."""
    sizes = [32 << 20]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)


def read_bandwidth(num_bytes: int | None = None, repeats: int = 5) -> float:
    """Bytes per second at which this machine reads memory, with torch's current number of threads."""
    if num_bytes is None:
        num_bytes = min(2 * last_level_cache_bytes(), 2 << 30)
    data = torch.zeros(max(num_bytes // 4, 1))
    timing = measure({"read": lambda _: data.sum()}, num_inputs=1, repeats=repeats)["read"]
    return data.numel() * 4 / timing.lower_quartile


def matmul_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of a large square matrix product of `dtype`."""
    a = torch.randn(size, size).to(dtype)
    timing = measure({"matmul": lambda _: a @ a}, num_inputs=1, repeats=repeats)["matmul"]
    return 2 * size**3 / timing.lower_quartile


@dataclass(frozen=True)
class Limits:
    """What a device can do at most, as measured: the floors are made of these."""

    bandwidth: float
    """Bytes per second: memory reads on the CPU, a copy's reads and writes on a GPU."""
    rate: float
    """Floating-point operations per second of a large matrix product."""

    def floor(self, operations: float, num_bytes: float) -> float:
        """Seconds below which nothing can be that does so many operations and moves so many bytes."""
        return max(operations / self.rate, num_bytes / self.bandwidth)


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measures the limits of `device`, with torch's current number of threads."""
    if device.type == "cuda":
        return Limits(cuda.copy_bandwidth(), cuda.matmul_rate(dtype))
    return Limits(read_bandwidth(), matmul_rate(dtype))


def measure_on(
    device: torch.device,
    contenders: Mapping[str, Callable[[int], object]],
    *,
    num_inputs: int,
    repeats: int,
    graphs: bool = True,
) -> dict[str, Timing]:
    """Times the contenders on inputs 0 to num_inputs - 1: in turns on the CPU; on a GPU one after another, in CUDA
    graphs, or call by call without `graphs`."""
    if device.type != "cuda":
        return measure(contenders, num_inputs=num_inputs, repeats=repeats)
    seconds = cuda.graph_seconds if graphs else cuda.stream_seconds
    return {
        name: seconds([functools.partial(run, index) for index in range(num_inputs)], repeats)
        for name, run in contenders.items()
    }


def on_inputs(run: Callable[[Input], object], inputs: Sequence[Input]) -> Callable[[int], object]:
    """`run` as a contender: called with the index of an input."""
    return lambda index: run(inputs[index])


def inputs_to_rotate(device: torch.device, bytes_per_input: int, num_contenders: int) -> int:
    """How many inputs exceed the device's last cache together."""
    if device.type != "cuda":
        return rotation_length(bytes_per_input, num_contenders)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(3, min(64, 3 * cache // max(bytes_per_input, 1) + 1))


def counted(number: int, noun: str) -> str:
    """ "1 token", "16 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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

    Others are the processes beside the benchmark and the host's other guests (steal). They may use the processors that
    the benchmark's threads leave idle. Times from a busy machine mean little. 0 where the system does not tell, or the
    block was too short for its clock of 10 ms.
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
        """Seconds: on the clock, of processors being busy, of that for this process."""
        times = os.times()
        busy = 0.0
        stat = Path("/proc/stat")
        if stat.exists():
            user, nice, system, _idle, _iowait, irq, softirq, steal = stat.read_text().split()[1:9]
            ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
            busy = ticks / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, times.user + times.system


# ---- Reports -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A speed-up that a case must reach."""

    over: str
    at_least: float

    def verdict(self, speedup: float, ceiling: float) -> str:
        """`ceiling` is the speed-up that the floor itself would have."""
        met = "met" if speedup >= self.at_least else "missed"
        return f"{met} (>= {self.at_least:g}x {self.over}; the floor is {ceiling:.2f}x)"


@dataclass
class CaseResult:
    """One line group of a report: the contenders on one case."""

    case: str
    subject: str
    floor: float
    timings: dict[str, Timing]
    checks: dict[str, ErrorCheck]
    other_load: float
    target: Target | None = None

    def speedup(self, over: str) -> float:
        return self.timings[over].median / self.timings[self.subject].median

    def as_json(self) -> dict[str, Any]:
        speedups = {name: self.speedup(name) for name in self.timings if name != self.subject}
        target = None
        if self.target is not None and self.target.over in self.timings:
            reached = self.speedup(self.target.over)
            target = asdict(self.target) | {"reached": reached, "met": reached >= self.target.at_least}
        return {
            "case": self.case,
            "subject": self.subject,
            "floor_s": self.floor,
            "timings_s": {name: asdict(timing) for name, timing in self.timings.items()},
            "share_of_floor": {name: self.floor / timing.median for name, timing in self.timings.items()},
            "speedup_of_" + self.subject + "_over": speedups,
            "other_load": self.other_load,
            "checks": {name: asdict(check) for name, check in self.checks.items()},
            "target": target,
        }


def format_seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def format_quartiles(timing: Timing) -> str:
    """Both quartiles in the unit of the median, "1.20 .. 1.31 ms"."""
    factor, unit = (1e6, "us") if timing.median < 1e-3 else (1e3, "ms")
    digits = 1 if unit == "us" else 2
    return f"{factor * timing.lower_quartile:.{digits}f} .. {factor * timing.upper_quartile:.{digits}f} {unit}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def print_case(result: CaseResult) -> None:
    """The case's timings, then the floor, the checks that failed and the target."""
    rows = []
    for name, timing in result.timings.items():
        check = result.checks.get(name)
        rows.append(
            [
                name,
                format_seconds(timing.median),
                format_quartiles(timing),
                "" if name == result.subject else f"{result.speedup(name):.2f}x",
                f"{100 * result.floor / timing.median:.0f}%",
                "" if check is None else f"{check.max_error:.1e} {'ok' if check.passed else 'WRONG'}",
            ]
        )
    print(f"\n{result.case}; floor {format_seconds(result.floor)}")
    print(format_table(["contender", "median", "quartiles", result.subject + " is", "of floor", "max error"], rows))
    if result.target is not None and result.target.over in result.timings:
        ceiling = result.timings[result.target.over].median / result.floor
        print(f"target {result.target.verdict(result.speedup(result.target.over), ceiling)}")
    if result.other_load > MOST_OTHER_LOAD:
        print(
            f"others used {100 * result.other_load:.0f}% of the processors meanwhile: measure again on a quiet machine"
        )


def finish(benchmark: str, settings: Mapping[str, Any], results: Sequence[CaseResult], json_path: Path | None) -> int:
    """Writes the JSON file, if asked for, and returns the exit code: 1 if an output is wrong, whatever the times."""
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "benchmark": benchmark,
            "settings": dict(settings),
            "environment": environment(),
            "results": [result.as_json() for result in results],
        }
        json_path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten: {json_path}")
    wrong = [
        f"{result.case}: {name}" for result in results for name, check in result.checks.items() if not check.passed
    ]
    for line in wrong:
        print(f"WRONG OUTPUT: {line}")
    return 1 if wrong else 0


def integers(text: str, is_right: Callable[[int], bool], what: str) -> list[int]:
    """ "1,16,512" as a list, for argparse types: every number must be right, that is, be `what`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(is_right, values)):
        raise argparse.ArgumentTypeError(f"must be {what}, separated by commas, got {text!r}")
    return values


def positive_ints(text: str) -> list[int]:
    """An argparse type: "1,16,512" as a list of positive integers."""
    return integers(text, lambda value: value >= 1, "positive integers")


def positive_int(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def names_of(choices: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: "a,b" as a list of names, each one of `choices`."""

    def names(text: str) -> list[str]:
        given = text.split(",")
        for name in given:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, got {name!r}")
        return given

    return names
