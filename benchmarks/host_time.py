# SPDX-License-Identifier: Apache-2.0
"""Measures the host's time for a layer and for every operator that it calls.

Usage: python benchmarks/host_time.py [--device auto] [--tokens 1] [--repeats 2000] [--json PATH]

The layer is tiny, so that there is next to nothing to compute: 8 real and 4 identity experts, K 3. On a CPU the time is
that of the call. On a GPU it is the time until the call returns, with nothing queued before it; the kernels run later.
An operator is called as the layer calls it, with the same tensors.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zexpert
from zexpert_tools.benchmark import harness, machine, parse
from zexpert_tools.benchmark.timing import Timing

WARMUP = 200  # calls
SIZES = {"cpu": (16, 8), "cuda": (256, 128)}  # H and F


class OperatorCalls(TorchDispatchMode):
    """The calls of zexpert's operators in its block, by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Callable[[], object]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zexpert":
            self.calls[func.name().partition("::")[2]] = functools.partial(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def host_time(call: Callable[[], object], repeats: int, device: torch.device) -> Timing:
    seconds = []
    for _ in range(WARMUP + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return Timing.of(seconds[WARMUP:])


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype, num_tokens: int, repeats: int) -> dict[str, Timing]:
    """Host times of the layer, then of its operators in the order of their calls."""
    hidden_size, intermediate_size = SIZES[device.type]
    layer = zexpert.FusedMoE(
        8, 3, hidden_size, intermediate_size, zero_expert_type="identity", zero_expert_num=4, params_dtype=dtype
    )
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    layer = layer.to(device).eval()
    hidden_states = torch.randn(num_tokens, hidden_size, device=device).to(dtype)
    router_logits = torch.randn(num_tokens, 12, device=device)
    calls: dict[str, Callable[[], object]] = {"layer": lambda: layer(hidden_states, router_logits)}
    with OperatorCalls() as operators:
        calls["layer"]()
    calls |= operators.calls
    return {name: host_time(call, repeats, device) for name, call in calls.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument("--dtype", choices=harness.DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--tokens", type=parse.positive_int, default=1)
    parser.add_argument("--repeats", type=parse.positive_int, default=2000)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        parser.error("--device cuda needs a GPU that PyTorch can use, and there is none")
    device = torch.device("cuda" if has_gpu and options.device != "cpu" else "cpu")
    dtype = harness.DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    torch.set_num_threads(1)  # there is nothing to share
    torch.manual_seed(0)

    timings = measure(device, dtype, options.tokens, options.repeats)
    print(f"host time on {machine.device_name(device)}, {harness.counted(options.tokens, 'token')}")
    rows = [[name, harness.format_seconds(one.median), harness.format_quartiles(one)] for name, one in timings.items()]
    print(harness.format_table(["", "median", "quartiles"], rows))
    if options.json is not None:
        report = {
            "benchmark": "host_time",
            "settings": {
                "device": device.type,
                "dtype": harness.dtype_name(dtype),
                "tokens": options.tokens,
                "hidden_size": SIZES[device.type][0],
                "intermediate_size": SIZES[device.type][1],
            },
            "environment": machine.environment(),
            "median_us": {name: 1e6 * one.median for name, one in timings.items()},
            "timings_s": {name: asdict(one) for name, one in timings.items()},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten: {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
