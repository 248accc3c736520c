"""Times zexpert's routing on the CPU against the same routing composed of torch operations.

Usage: python benchmarks/cpu_routing.py [--tokens 1,4096] [--dtype float32,bfloat16] [--threads 2,1] [--json PATH]

"torch ops" gives the whole result (weights, ids with zero slots marked, summed zero weight); "softmax, topk, gather"
is the part that transformers' LongcatFlashTopkRouter does. The floor is the time to read the logits from memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import harness
import torch_routing
import zexpert
from torch_routing import RoutingCase

TARGET = harness.Target(over="torch ops", at_least=10.0)
TARGET_TOKENS = 4096


def make_inputs(case: RoutingCase, num_tokens: int, dtype: torch.dtype, count: int) -> tuple[list[Tensor], Tensor]:
    """`count` logits [T, N] and one selection bias [N] of the size of the gaps between scores."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(num_tokens, case.num_experts, generator=generator).to(dtype) for _ in range(count)]
    bias = torch.randn(case.num_experts, generator=generator) * (1e-3 if case.scoring_func == "softmax" else 1e-1)
    return logits, bias


def zexpert_route(logits: Tensor, bias: Tensor | None, case: RoutingCase) -> tuple[Tensor, Tensor, Tensor]:
    routing = zexpert.ops.biased_topk(
        logits,
        bias,
        case.top_k,
        num_real_experts=case.num_real_experts,
        num_identity_experts=case.num_identity_experts,
        scoring_func=case.scoring_func,
        renormalize=case.renormalize,
        routed_scaling_factor=case.routed_scaling_factor,
        num_expert_group=case.num_expert_group,
        topk_group=case.topk_group,
    )
    return routing.topk_weights, routing.topk_ids, routing.zero_weight


def softmax_topk_gather(logits: Tensor, bias: Tensor, case: RoutingCase) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    topk_ids = torch.topk(scores + bias.unsqueeze(0), k=case.top_k, dim=-1, sorted=False)[1]
    return scores.gather(1, topk_ids) * case.routed_scaling_factor, topk_ids


def run_case(
    case: RoutingCase, num_tokens: int, dtype_name: str, repeats: int, bandwidth: float, with_compile: bool
) -> harness.CaseResult:
    dtype = harness.DTYPES[dtype_name]
    num_bytes = num_tokens * case.num_experts * dtype.itemsize
    count = harness.rotation_length(num_bytes, 3 + with_compile)
    logits, some_bias = make_inputs(case, num_tokens, dtype, count)
    bias = some_bias if case.has_bias else None

    contenders: dict[str, Callable[[int], object]] = {
        "zexpert": lambda i: zexpert_route(logits[i], bias, case),
        "torch ops": lambda i: torch_routing.route(logits[i], bias, case),
    }
    if case.scoring_func == "softmax" and bias is not None:
        contenders["softmax, topk, gather"] = lambda i: softmax_topk_gather(logits[i], some_bias, case)
    if with_compile:
        compiled = torch.compile(torch_routing.route, dynamic=False)
        contenders["torch.compile"] = lambda i: compiled(logits[i], bias, case)

    sure = ~torch_routing.near_ties(logits[0], bias, case)
    double_bias = None if bias is None else bias.double()
    reference, plain, ours = (
        torch_routing.dense_weights(*routing, case)[sure]
        for routing in (
            torch_routing.route(logits[0].double(), double_bias, case),
            torch_routing.route(logits[0], bias, case),
            zexpert_route(logits[0], bias, case),
        )
    )
    checks = {
        "zexpert": harness.check_error(ours, plain, reference),
        "torch ops": harness.check_error(plain, plain, reference),
    }
    with harness.OtherLoad() as load:
        timings = harness.measure(contenders, num_inputs=count, repeats=repeats)
    name = f"{case.name} {num_tokens} x {case.num_experts}, K {case.top_k}, {dtype_name} logits"
    is_target = case is torch_routing.LONGCAT_FLASH and num_tokens == TARGET_TOKENS and dtype_name == "float32"
    return harness.CaseResult(
        case=f"{name}, {torch.get_num_threads()} threads",
        subject="zexpert",
        floor=num_bytes / bandwidth,
        timings=timings,
        checks=checks,
        other_load=load.share,
        target=TARGET if is_target else None,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description="Routing on the CPU: zexpert against torch operations.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--tokens", type=harness.positive_ints, default=[1, 4096], help="default: 1,4096")
    parser.add_argument("--dtype", type=harness.dtype_names, default=["float32", "bfloat16"], help="of the logits")
    parser.add_argument("--repeats", type=int, default=15, help="timed repetitions (default 15)")
    parser.add_argument("--threads", type=harness.positive_ints, default=[cores, 1] if cores > 1 else [1])
    parser.add_argument("--compile", action="store_true", help="also time the composition under torch.compile")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    print(f"routing on {harness.processor_name()}, torch {torch.__version__}, zexpert {zexpert.__version__}")
    results = []
    threads_before = torch.get_num_threads()
    try:
        for threads in options.threads:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                bandwidth = harness.read_bandwidth()
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
