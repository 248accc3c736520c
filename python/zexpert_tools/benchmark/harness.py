# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing in one run: interleaved contenders, rotated inputs, checked outputs, floors and JSON.

What keeps a comparison honest is here, not in each benchmark:
- contenders run in turns, repetition by repetition: a slow moment of the machine affects all of them;
- every call gets the next input of a rotation that is larger than the last-level cache where that is possible;
- the floor is what the machine reached in the same run, from a cache if the rotation fits into one;
- medians and quartiles are reported, after a warm-up;
- an output passes if its error against a float64 reference is at most twice plain PyTorch's error in the same dtype.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from zexpert_tools.benchmark import cuda, rates
from zexpert_tools.benchmark.machine import environment
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
    wanted = math.ceil(1.5 * rates.last_level_cache_bytes() / max(bytes_per_input, 1)) + 1
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

    The order rotates from repetition to repetition. Each contender runs `warmup` repetitions untimed.
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
    """How many inputs together exceed the device's last cache."""
    if device.type != "cuda":
        return rotation_length(bytes_per_input, num_contenders)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(3, min(64, 3 * cache // max(bytes_per_input, 1) + 1))


def counted(number: int, noun: str) -> str:
    """ "1 token", "16 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- Reports -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A speed-up that a case must reach."""

    over: str
    at_least: float

    def verdict(self, speedup: float, ceiling: float) -> str:
        """`ceiling` is the speed-up of the floor."""
        met = "met" if speedup >= self.at_least else "missed"
        return f"{met} (>= {self.at_least:g}x {self.over}; the floor is {ceiling:.2f}x)"


@dataclass
class CaseResult:
    """The contenders on one case."""

    case: str
    subject: str
    floor: float
    timings: dict[str, Timing]
    checks: dict[str, ErrorCheck]
    other_load: float
    target: Target | None = None

    @property
    def floor_is_beaten(self) -> bool:
        """Whether a contender was faster than the floor, which is then wrong."""
        return min(timing.median for timing in self.timings.values()) < self.floor

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
    """Prints the floor, the timings, the checks and the target."""
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
        print(f"others used {100 * result.other_load:.0f}% of the processors: measure again on a quiet machine")


def finish(benchmark: str, settings: Mapping[str, Any], results: Sequence[CaseResult], json_path: Path | None) -> int:
    """Writes the JSON file if json_path is given. Returns the exit code: 1 if an output is wrong, else 0."""
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
