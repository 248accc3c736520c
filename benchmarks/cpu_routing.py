# SPDX-License-Identifier: Apache-2.0
"""Times zexpert's routing on the CPU against the same routing composed of torch operations.

Usage: python benchmarks/cpu_routing.py [--tokens 1,4096] [--dtype float32,bfloat16] [--threads 2,1] [--json PATH]

"torch ops" gives the whole result (weights, ids with zero slots marked, summed zero weight); "softmax, topk, gather"
is the part that transformers' LongcatFlashTopkRouter does. The floor is the time to read the logits from memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import zexpert
from zexpert_tools.benchmark import harness, machine, parse, rates, routing, torch_routing
from zexpert_tools.benchmark.torch_routing import RoutingCase

TARGET = harness.Target(over="torch ops", at_least=10.0)
TARGET_TOKENS = 4096


def softmax_topk_gather(logits: Tensor, bias: Tensor, case: RoutingCase) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    topk_ids = torch.topk(scores + bias.unsqueeze(0), k=case.top_k, dim=-1, sorted=False)[1]
    return scores.gather(1, topk_ids) * case.routed_scaling_factor, topk_ids


def run_case(
    case: RoutingCase, num_tokens: int, dtype_name: str, repeats: int, bandwidth: float, with_compile: bool
) -> harness.CaseResult:
    unchecked: dict[str, routing.Route] = {}
    if case.scoring_func == "softmax" and case.has_bias:
        unchecked["softmax, topk, gather"] = lambda logits, bias: softmax_topk_gather(logits, bias, case)
    if with_compile:
        unchecked["torch.compile"] = routing.compiled(case)
    is_target = case is torch_routing.LONGCAT_FLASH and num_tokens == TARGET_TOKENS and dtype_name == "float32"
    result = routing.run_case(
        case,
        num_tokens,
        dtype=harness.DTYPES[dtype_name],
        device=torch.device("cpu"),
        repeats=repeats,
        bandwidth=bandwidth,
        unchecked=unchecked,
        target=TARGET if is_target else None,
    )
    result.case += f", {torch.get_num_threads()} threads"
    return result


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description="Routing on the CPU: zexpert against torch operations.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--tokens", type=parse.positive_ints, default=[1, 4096], help="default: 1,4096")
    dtypes = parse.names_of(harness.DTYPES)
    parser.add_argument("--dtype", type=dtypes, default=["float32", "bfloat16"], help="of the logits")
    parser.add_argument("--repeats", type=parse.positive_int, default=15, help="timed repetitions (default 15)")
    parser.add_argument("--threads", type=parse.positive_ints, default=[cores, 1] if cores > 1 else [1])
    parser.add_argument("--compile", action="store_true", help="also time the composition under torch.compile")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    print(f"routing on {machine.processor_name()}, torch {torch.__version__}, zexpert {zexpert.__version__}")
    results = []
    threads_before = torch.get_num_threads()
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                bandwidth = rates.memory_rate()
                print(f"\n{threads} threads: memory reads at {bandwidth / 1e9:.1f} GB/s")
                for case in torch_routing.CASES:
                    for num_tokens in options.tokens:
                        for dtype_name in options.dtype:
                            result = run_case(case, num_tokens, dtype_name, options.repeats, bandwidth, options.compile)
                            harness.print_case(result)
                            results.append(result)
    finally:
        torch.set_num_threads(threads_before)
    settings = {"tokens": options.tokens, "dtype": options.dtype, "repeats": options.repeats}
    return harness.finish("cpu_routing", settings, results, options.json)


if __name__ == "__main__":
    sys.exit(main())
