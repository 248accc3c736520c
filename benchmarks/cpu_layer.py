# SPDX-License-Identifier: Apache-2.0
"""Times zexpert.FusedMoE on the CPU against plain PyTorch and transformers' LongcatFlashMoE, with the same weights.

Usage: python benchmarks/cpu_layer.py [--tokens 1,16,512] [--dtype float32,bfloat16] [--threads 2] [--breakdown]
[--json PATH]

Hidden size 1024, expert ffn 512, 64 real + 32 identity experts, K 12, softmax, selection bias, scale 6. Each contender
goes from hidden states to the layer's output, the router's projection included: zexpert's is router_logits, plain
PyTorch's a product in float32. transformers is left out, with a line that says so, where it is not installed. The floor
is the larger of the products at the rate of a large matrix product and the bytes of the weights used at the rate of
memory reads, both measured in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import zexpert
from zexpert_tools.benchmark import harness, layer, machine, parse, rates
from zexpert_tools.benchmark.layer import SMALL, Shape, Weights, make_weights, zexpert_router_logits

TARGETS = {1: 2.0, 16: 2.5, 512: 1.8}  # times as fast as transformers, float32


def breakdown(
    layers: Sequence[zexpert.FusedMoE], hidden_states: Sequence[Tensor], weights: Sequence[Weights], repeats: int
) -> str:
    """A table of the times of the layer's steps."""
    steps: dict[str, list[Callable[[], object]]] = {}
    for index, rows in enumerate(hidden_states):
        layer, parameters = layers[index % len(layers)], weights[index % len(weights)]
        logits = zexpert_router_logits(rows, parameters)
        routing = layer.router.select_experts(rows, logits)
        plan = zexpert.ops.moe_plan(routing.topk_ids, layer.w13_weight.shape[0])
        top_k = routing.topk_ids.shape[1]
        experts = (plan.expert_offsets, layer.w13_weight, layer.w2_weight, plan.row_slots, top_k)
        expert_rows = zexpert.ops.grouped_mlp(rows, *experts)
        calls: dict[str, Callable[[], object]] = {
            "router projection": lambda x=rows, p=parameters: zexpert_router_logits(x, p),
            "biased_topk": lambda m=layer, x=rows, y=logits: m.router.select_experts(x, y),
            "moe_plan": lambda r=routing, m=layer: zexpert.ops.moe_plan(r.topk_ids, m.w13_weight.shape[0]),
            "grouped_mlp": lambda x=rows, e=experts: zexpert.ops.grouped_mlp(x, *e),
            "moe_finalize": lambda y=expert_rows, p=plan, r=routing, x=rows: zexpert.ops.moe_finalize(
                y, p.slot_rows, r.topk_weights, x, r.zero_weight
            ),
        }
        for name, call in calls.items():
            steps.setdefault(name, []).append(call)
    contenders = {name: (lambda i, calls=calls: calls[i]()) for name, calls in steps.items()}
    timings = harness.measure(contenders, num_inputs=len(hidden_states), repeats=repeats)
    total = sum(timing.median for timing in timings.values())
    rows_out = [
        [name, harness.format_seconds(timing.median), f"{100 * timing.median / total:.0f}%"]
        for name, timing in timings.items()
    ]
    return harness.format_table(["step", "median", "share"], rows_out)


def run_case(
    shape: Shape, num_tokens: int, options: argparse.Namespace, weights: Sequence[Weights]
) -> harness.CaseResult:
    dtype, num_inputs = weights[0].w2.dtype, len(weights) ** 2
    target = None
    if dtype == torch.float32 and num_tokens in TARGETS and shape == SMALL:
        target = harness.Target(over="transformers", at_least=TARGETS[num_tokens])
    limits = rates.measure_limits(torch.device("cpu"), dtype)
    repeats = options.repeats or num_inputs * (4 if num_tokens <= 4 else 2 if num_tokens <= 64 else 1)
    result = layer.run_case(shape, num_tokens, weights, limits=limits, repeats=repeats, target=target)
    harness.print_case(result)
    name = harness.dtype_name(dtype)
    print(
        f"memory reads at {limits.bandwidth / 1e9:.1f} GB/s, a {name} product runs at {limits.rate / 1e9:.0f} GFLOP/s"
    )
    if options.breakdown:
        generator = torch.Generator().manual_seed(num_tokens)
        rows = [torch.randn(num_tokens, shape.hidden_size, generator=generator).to(dtype) for _ in range(num_inputs)]
        print(breakdown([layer.zexpert_layer(shape, one) for one in weights], rows, weights, repeats))
    return result


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The layer on the CPU: zexpert, plain PyTorch and transformers.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--tokens", type=parse.positive_ints, default=[1, 16, 512], help="default: 1,16,512")
    parser.add_argument("--dtype", type=parse.names_of(harness.DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=0, help="timed repetitions (default: more for fewer tokens)")
    parser.add_argument("--threads", type=parse.positive_ints, default=[os.cpu_count() or 1])
    parser.add_argument("--breakdown", action="store_true", help="also time each step of zexpert's layer")
    parser.add_argument("--hidden-size", type=int, default=SMALL.hidden_size)
    parser.add_argument("--intermediate-size", type=int, default=SMALL.intermediate_size)
    options = parser.parse_args(arguments)
    for name in ("repeats", "hidden_size", "intermediate_size"):
        if getattr(options, name) < (0 if name == "repeats" else 1):
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    shape = Shape(SMALL.routing, options.hidden_size, options.intermediate_size)
    print(f"layer on {machine.processor_name()}, torch {torch.__version__}, zexpert {zexpert.__version__}")
    results = []
    threads_before = torch.get_num_threads()
    try:
        for dtype_name in options.dtype:
            dtype = harness.DTYPES[dtype_name]
            num_layers = min(harness.rotation_length(shape.weight_bytes(dtype), 3), 7)
            with torch.inference_mode():
                cpu = torch.device("cpu")
                weights = [make_weights(shape, dtype, cpu, seed, unused=True) for seed in range(num_layers)]
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    results += [run_case(shape, tokens, options, weights) for tokens in options.tokens]
            del weights
    finally:
        torch.set_num_threads(threads_before)
    settings = {
        "tokens": options.tokens,
        "dtype": options.dtype,
        "shape": dataclasses.asdict(shape),
        "threads": options.threads,
    }
    return harness.finish("cpu_layer", settings, results, options.json)


if __name__ == "__main__":
    sys.exit(main())
