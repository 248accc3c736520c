# SPDX-License-Identifier: Apache-2.0
"""Times the experts' products alone on a Hopper GPU: grouped_mlp_hopper, for several tiles, against torch's grouped_mm.

Usage: python benchmarks/gpu_experts.py [--shapes longcat,lite,qwen3] [--tokens 1,16,...] [--tile-rows 0,64,160,288]
       [--json PATH]

Rows are in the order of the layer's plan. "torch grouped_mm" is its two products with zexpert's silu_and_mul between
them, "its products alone" is without. All are captured in CUDA graphs. The floor is that of gpu_layer.py. Rows of
sampled experts are checked against float64. Prints TFLOP/s and TB/s of weights too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import zexpert
from gpu_layer import DTYPE, SHAPES, TOKENS
from zexpert_tools.benchmark import harness, parse, rates, torch_routing
from zexpert_tools.benchmark.cuda import head, require_gpu
from zexpert_tools.benchmark.layer import Shape, Weights, make_weights

SUBJECT = "hopper"
CHECKED_EXPERTS = 4


def grouped_mm(rows: Tensor, offsets: Tensor, weights: Weights) -> Tensor:
    gate_up = torch._grouped_mm(rows, weights.w13.transpose(1, 2), offsets[1:])
    activation = torch.ops.zexpert.silu_and_mul(gate_up, offsets)
    return torch._grouped_mm(activation, weights.w2.transpose(1, 2), offsets[1:])


def products_alone(rows: Tensor, offsets: Tensor, weights: Weights, activation: Tensor) -> Tensor:
    torch._grouped_mm(rows, weights.w13.transpose(1, 2), offsets[1:])
    return torch._grouped_mm(activation, weights.w2.transpose(1, 2), offsets[1:])


def expert(rows: Tensor, weights: Weights, index: int, dtype: torch.dtype) -> Tensor:
    gate, up = F.linear(rows.to(dtype), weights.w13[index].to(dtype)).chunk(2, dim=1)
    return F.linear(F.silu(gate) * up, weights.w2[index].to(dtype))


def run_case(
    shape: Shape, weights: Weights, num_tokens: int, tile_rows: Sequence[int], repeats: int, limits: rates.Limits
) -> harness.CaseResult:
    routing = shape.routing
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    router_logits = torch.randn(num_tokens, routing.num_experts, device="cuda", generator=generator)
    topk_ids = torch_routing.route(router_logits, weights.bias, routing)[1]
    offsets = zexpert.ops.moe_plan(topk_ids, routing.num_real_experts).expert_offsets
    num_rows = int(offsets[-1])
    rows = torch.randn(topk_ids.numel(), shape.hidden_size, device="cuda", generator=generator).to(DTYPE)
    activation = torch.randn(topk_ids.numel(), shape.intermediate_size, device="cuda", generator=generator).to(DTYPE)

    def hopper(choice: int) -> Callable[[int], Tensor]:
        return lambda _: zexpert.ops.grouped_mlp_hopper(rows, offsets, weights.w13, weights.w2, tile_rows=choice)

    names = [SUBJECT if choice == 0 else f"hopper, tiles of {choice} rows" for choice in tile_rows]
    contenders = {name: hopper(choice) for name, choice in zip(names, tile_rows, strict=True)}
    contenders["torch grouped_mm"] = lambda _: grouped_mm(rows, offsets, weights)

    counts = offsets.diff()
    used = counts.nonzero().flatten()
    sampled = used[torch.linspace(0, len(used) - 1, CHECKED_EXPERTS, device="cuda").long()].unique().tolist()
    bounds = offsets.tolist()
    segments = {index: slice(bounds[index], bounds[index + 1]) for index in [*sampled, int(counts.argmax())]}
    chosen = torch.cat([torch.arange(part.start, part.stop, device="cuda") for part in segments.values()])
    plain, expected = (
        torch.cat([expert(rows[part], weights, index, dtype) for index, part in segments.items()])
        for dtype in (DTYPE, torch.float64)
    )
    checks = {name: harness.check_error(run(0)[chosen], plain, expected) for name, run in contenders.items()}
    alone = "its products alone"
    checks[alone] = checks["torch grouped_mm"]
    contenders[alone] = lambda _: products_alone(rows, offsets, weights, activation)
    timings = harness.measure_on(torch.device("cuda"), contenders, num_inputs=1, repeats=repeats, graphs=True)

    operations = 2 * num_rows * shape.values_per_expert
    weight_bytes = len(used) * shape.values_per_expert * DTYPE.itemsize
    result = harness.CaseResult(
        case=f"{routing.name}: {num_tokens} tokens, {num_rows} rows that do work, {len(used)} experts",
        subject=names[0],
        floor=limits.floor(operations, weight_bytes),
        timings=timings,
        checks=checks,
        other_load=0.0,
    )
    harness.print_case(result)
    for name, timing in timings.items():
        print(
            f"    {name}: {operations / timing.median / 1e12:.0f} TFLOP/s,"
            f" {weight_bytes / timing.median / 1e12:.2f} TB/s of weights"
        )
    return result


def tile_rows(text: str) -> list[int]:
    """An argparse type: "0,64" as a list of values of grouped_mlp_hopper's tile_rows."""
    return parse.integers(text, lambda value: value % 8 == 0 and 0 <= value <= 288, "multiples of 8 up to 288")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", type=parse.names_of(SHAPES), default=list(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--tokens", type=parse.positive_ints, default=list(TOKENS))
    parser.add_argument("--tile-rows", type=tile_rows, default=[0], help="choices of grouped_mlp_hopper's tile_rows")
    parser.add_argument("--repeats", type=parse.positive_int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    require_gpu(parser)
    device = torch.device("cuda")
    limits = rates.measure_limits(device, DTYPE)
    print(f"{head(limits.bandwidth)}; a matrix product runs at {limits.rate / 1e12:.0f} TFLOP/s")
    results = []
    for name in options.shapes:
        weights = make_weights(SHAPES[name], DTYPE, device)
        for num_tokens in options.tokens:
            results.append(run_case(SHAPES[name], weights, num_tokens, options.tile_rows, options.repeats, limits))
            torch.cuda.empty_cache()
    settings = {"copy_bandwidth": limits.bandwidth, "matmul_rate": limits.rate}
    return harness.finish("gpu_experts", settings, results, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
