"""Times zexpert.FusedMoE on a CUDA device, routing to output, against the same layer composed of torch operations.

Usage: python benchmarks/gpu_layer.py [--shapes longcat,lite,qwen3] [--tokens 1,16,...] [--json PATH] [--plot PATH]

The composition, "torch grouped_mm", sorts the slots by expert, leaves those of zero experts out, and runs the rest
through torch's grouped matrix product. Both are captured in CUDA graphs. The floor is the larger of the products at the
rate of a large matrix product and the bytes of the weights used at the speed of a device copy, both measured in the
same run. Outputs of sampled tokens are checked against float64. --plot draws the roofline.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
import torch_routing
import zexpert
from gpu_harness import copy_bandwidth, graph_seconds, head, matmul_rate, require_gpu
from harness import CaseResult
from torch_routing import RoutingCase

TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
SUBJECT = "zexpert"
CHECKED_TOKENS = 32
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    routing: RoutingCase
    hidden_size: int
    intermediate_size: int
    zero_expert_type: str

    @property
    def values_per_expert(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size


SHAPES = {
    "longcat": Shape(torch_routing.LONGCAT_FLASH, 6144, 2048, "identity"),
    "lite": Shape(RoutingCase("LongCat-Flash-Lite", 256, 128, 0, 12, has_bias=True), 3072, 1024, "identity"),
    "qwen3": Shape(RoutingCase("Qwen3-like with drop experts", 128, 0, 64, 8, renormalize=True), 2048, 768, "drop"),
}


@dataclass(frozen=True)
class Weights:
    bias: Tensor | None
    w13: Tensor  # [R, 2F, H]
    w2: Tensor  # [R, H, F]


def make_weights(shape: Shape) -> Weights:
    routing = shape.routing
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=DTYPE, device="cuda").normal_(std=sizes[-1] ** -0.5, generator=generator)

    bias = torch.randn(routing.num_experts, device="cuda", generator=generator) * 1e-3 if routing.has_bias else None
    return Weights(
        bias,
        normal(routing.num_real_experts, 2 * shape.intermediate_size, shape.hidden_size),
        normal(routing.num_real_experts, shape.hidden_size, shape.intermediate_size),
    )


def make_layer(shape: Shape, weights: Weights) -> zexpert.FusedMoE:
    routing = shape.routing
    layer = zexpert.FusedMoE(
        routing.num_real_experts,
        routing.top_k,
        shape.hidden_size,
        shape.intermediate_size,
        zero_expert_type=shape.zero_expert_type,
        zero_expert_num=routing.num_identity_experts + routing.num_drop_experts,
        e_score_correction_bias=weights.bias,
        scoring_func=routing.scoring_func,
        renormalize=routing.renormalize,
        routed_scaling_factor=routing.routed_scaling_factor,
        params_dtype=DTYPE,
        device="meta",
    )
    layer.w13_weight = torch.nn.Parameter(weights.w13, requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(weights.w2, requires_grad=False)
    return layer


def composed(hidden_states: Tensor, router_logits: Tensor, weights: Weights, routing: RoutingCase) -> Tensor:
    topk_weights, topk_ids, zero_weight = torch_routing.route(router_logits, weights.bias, routing)
    num_experts = weights.w13.shape[0]
    slot_experts = torch.where(topk_ids < 0, num_experts, topk_ids).flatten()
    sorted_experts, order = slot_experts.sort()
    ends = torch.searchsorted(
        sorted_experts, torch.arange(num_experts, device=order.device, dtype=sorted_experts.dtype), right=True
    ).int()
    rows = hidden_states[order // routing.top_k]
    gate, up = torch._grouped_mm(rows, weights.w13.transpose(1, 2), ends).chunk(2, dim=1)
    rows = torch._grouped_mm(F.silu(gate) * up, weights.w2.transpose(1, 2), ends)
    in_slot_order = torch.empty_like(rows)
    in_slot_order[order] = rows
    by_slot = in_slot_order.reshape(-1, routing.top_k, rows.shape[1])
    by_slot = torch.where((topk_ids < 0)[:, :, None], 0.0, by_slot)
    summed = torch.einsum("tk,tkh->th", topk_weights.to(rows.dtype), by_slot)
    return summed + zero_weight[:, None].to(rows.dtype) * hidden_states


def reference(
    hidden_states: Tensor, router_logits: Tensor, weights: Weights, routing: RoutingCase, dtype: torch.dtype
) -> Tensor:
    """The layer token by token in `dtype`, from the routing of the given logits."""
    topk_weights, topk_ids, zero_weight = torch_routing.route(router_logits, weights.bias, routing)
    out = zero_weight[:, None].to(dtype) * hidden_states.to(dtype)
    for token, ids in enumerate(topk_ids.tolist()):
        x = hidden_states[token].to(dtype)
        for k, expert in enumerate(ids):
            if expert >= 0:
                gate, up = F.linear(x, weights.w13[expert].to(dtype)).chunk(2)
                row = F.linear(F.silu(gate) * up, weights.w2[expert].to(dtype))
                out[token] += topk_weights[token, k].to(dtype) * row
    return out


@dataclass(kw_only=True)
class LayerResult(CaseResult):
    """A case, with what the roofline needs."""

    shape: Shape
    operations: int
    weight_bytes: int


def run_case(
    shape: Shape, weights: Weights, num_tokens: int, repeats: int, bandwidth: float, rate: float
) -> LayerResult:
    routing = shape.routing
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    inputs = [
        (
            torch.randn(num_tokens, shape.hidden_size, device="cuda", generator=generator).to(DTYPE),
            torch.randn(num_tokens, routing.num_experts, device="cuda", generator=generator),
        )
        for _ in range(max(2, 8 if num_tokens <= 64 else 2))
    ]
    layer = make_layer(shape, weights)
    contenders = {
        SUBJECT: layer,
        "torch grouped_mm": lambda x, logits: composed(x, logits, weights, routing),
    }

    hidden_states, router_logits = inputs[0]
    topk_ids = torch_routing.route(router_logits, weights.bias, routing)[1]
    sampled = torch.linspace(0, num_tokens - 1, min(num_tokens, CHECKED_TOKENS), device="cuda").long().unique()
    close = torch_routing.near_ties(
        router_logits[sampled].cpu(), None if weights.bias is None else weights.bias.cpu(), routing
    )
    sampled = sampled[~close.cuda()]
    expected = reference(hidden_states[sampled], router_logits[sampled], weights, routing, torch.float64)
    plain = reference(hidden_states[sampled], router_logits[sampled], weights, routing, DTYPE)

    timings, checks = {}, {}
    with torch.no_grad():
        for name, run in contenders.items():
            checks[name] = harness.check_error(run(*inputs[0])[sampled], plain, expected)
            calls = [lambda run=run, one=one: run(*one) for one in inputs]  # type: ignore[misc]
            timings[name] = graph_seconds(calls, repeats)
    num_rows = int((topk_ids >= 0).sum())
    experts_used = int(topk_ids[topk_ids >= 0].unique().numel())
    operations = 2 * num_rows * shape.values_per_expert
    weight_bytes = experts_used * shape.values_per_expert * DTYPE.itemsize
    return LayerResult(
        case=f"{routing.name}: {num_tokens} tokens, {num_rows} rows that do work",
        subject=SUBJECT,
        floor=max(operations / rate, weight_bytes / bandwidth),
        timings=timings,
        checks=checks,
        other_load=0.0,
        shape=shape,
        operations=operations,
        weight_bytes=weight_bytes,
    )


def plot_roofline(results: Sequence[LayerResult], bandwidth: float, rate: float, path: Path) -> None:
    """Reached TFLOP/s over operations per byte of weights read, under the device's two limits."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [2.0**power for power in range(13)]
    limit = [min(rate, intensity * bandwidth) / 1e12 for intensity in intensities]
    axes.loglog(intensities, limit, color="black", label="the device: memory, matrix products")
    for color, shape in enumerate(dict.fromkeys(result.shape for result in results)):
        own = [result for result in results if result.shape == shape]
        x = [result.operations / result.weight_bytes for result in own]
        for name, style in ((SUBJECT, "o-"), ("torch grouped_mm", "x:")):
            y = [result.operations / result.timings[name].median / 1e12 for result in own]
            axes.plot(x, y, style, color=f"C{color}", label=f"{name}, {shape.routing.name}")
    axes.set(xlabel="operations per byte of the weights used (more tokens: more)", ylabel="TFLOP/s reached")
    axes.set_title(f"The layer on {torch.cuda.get_device_name()}, bfloat16")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--tokens", type=harness.positive_ints, default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw the roofline there (needs matplotlib)")
    options = parser.parse_args(arguments)
    require_gpu(parser)
    bandwidth, rate = copy_bandwidth(), matmul_rate(DTYPE)
    print(f"{head(bandwidth)}; a matrix product runs at {rate / 1e12:.0f} TFLOP/s")
    results = []
    for name in options.shapes.split(","):
        weights = make_weights(SHAPES[name])
        for num_tokens in options.tokens:
            results.append(run_case(SHAPES[name], weights, num_tokens, options.repeats, bandwidth, rate))
            harness.print_case(results[-1])
            torch.cuda.empty_cache()
    if options.plot is not None:
        plot_roofline(results, bandwidth, rate, options.plot)
    settings = {"copy_bandwidth": bandwidth, "matmul_rate": rate}
    return harness.finish("gpu_layer", settings, results, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
