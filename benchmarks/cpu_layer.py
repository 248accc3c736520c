"""Times zexpert.FusedMoE on the CPU against plain PyTorch and transformers' LongcatFlashMoE, with the same weights.

Usage: python benchmarks/cpu_layer.py [--tokens 1,16,512] [--dtype float32,bfloat16] [--threads 2] [--breakdown]
[--json PATH]

Hidden size 1024, expert ffn 512, 64 real + 32 identity experts, K 12, softmax, selection bias, scale 6. Each contender
goes from hidden states to the layer's output, the router's projection included. transformers is left out, with a line
that says so, where it is not installed. The floor is the larger of the products at the rate of a large matrix product
and the bytes of the weights used at the rate of memory reads, both measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zexpert

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import harness
import plain_moe
import torch_routing

TARGETS = {1: 2.0, 16: 2.5, 512: 1.8}  # times as fast as transformers, float32


@dataclass(frozen=True)
class Shape:
    hidden_size: int = 1024
    intermediate_size: int = 512
    num_real_experts: int = 64
    num_identity_experts: int = 32
    top_k: int = 12
    routed_scaling_factor: float = 6.0

    @property
    def num_experts(self) -> int:
        return self.num_real_experts + self.num_identity_experts

    @property
    def values_per_expert(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    def routing_case(self) -> torch_routing.RoutingCase:
        return torch_routing.RoutingCase(
            "layer",
            self.num_real_experts,
            self.num_identity_experts,
            0,
            self.top_k,
            has_bias=True,
            routed_scaling_factor=self.routed_scaling_factor,
        )


@dataclass(frozen=True)
class Weights:
    """One layer's parameters. w13 has rows for all experts, as transformers keeps it; zexpert reads the real ones."""

    classifier: Tensor  # [N, H]
    bias: Tensor  # [N], float32
    w13: Tensor  # [N, 2F, H]
    w2: Tensor  # [R, H, F]


def make_weights(shape: Shape, dtype: torch.dtype, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int, std: float) -> Tensor:
        return torch.empty(*sizes, dtype=dtype).normal_(std=std, generator=generator)

    hidden, intermediate, num_real = shape.hidden_size, shape.intermediate_size, shape.num_real_experts
    w13 = torch.empty(shape.num_experts, 2 * intermediate, hidden, dtype=dtype)
    w13[:num_real].normal_(std=hidden**-0.5, generator=generator)
    return Weights(
        classifier=normal(shape.num_experts, hidden, std=hidden**-0.5),
        bias=torch.randn(shape.num_experts, generator=generator) * 1e-3,
        w13=w13,
        w2=normal(num_real, hidden, intermediate, std=intermediate**-0.5),
    )


def router_logits(hidden_states: Tensor, weights: Weights) -> Tensor:
    """The router's projection in float32, as LongCat-Flash does it."""
    return F.linear(hidden_states.float(), weights.classifier.float())


def plain_layer(hidden_states: Tensor, weights: Weights, shape: Shape) -> Tensor:
    logits = router_logits(hidden_states, weights)
    real_w13 = weights.w13[: shape.num_real_experts]
    return plain_moe.moe(
        hidden_states, logits, weights.bias, real_w13, weights.w2, shape.top_k, shape.routed_scaling_factor
    )


def reference_layer(hidden_states: Tensor, weights: Weights, shape: Shape) -> Tensor:
    """The layer in float64 from the float32 logits on."""
    logits = router_logits(hidden_states, weights).double()
    real_w13 = weights.w13[: shape.num_real_experts]
    return plain_moe.moe(
        hidden_states.double(),
        logits,
        weights.bias.double(),
        real_w13,
        weights.w2,
        shape.top_k,
        shape.routed_scaling_factor,
    )


def zexpert_layer(weights: Weights, shape: Shape) -> zexpert.FusedMoE:
    layer = zexpert.FusedMoE(
        num_experts=shape.num_real_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        zero_expert_type="identity",
        zero_expert_num=shape.num_identity_experts,
        e_score_correction_bias=weights.bias,
        routed_scaling_factor=shape.routed_scaling_factor,
        params_dtype=weights.w2.dtype,
    )
    layer.w13_weight = nn.Parameter(weights.w13[: shape.num_real_experts], requires_grad=False)
    layer.w2_weight = nn.Parameter(weights.w2, requires_grad=False)
    return layer


def transformers_layer(weights: Weights, shape: Shape) -> nn.Module:
    """transformers' LongcatFlashMoE around the same tensors. Raises ImportError where it is not installed."""
    from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

    config = LongcatFlashConfig(
        hidden_size=shape.hidden_size,
        expert_ffn_hidden_size=shape.intermediate_size,
        n_routed_experts=shape.num_real_experts,
        zero_expert_num=shape.num_identity_experts,
        moe_topk=shape.top_k,
        routed_scaling_factor=shape.routed_scaling_factor,
    )
    with torch.device("meta"):
        layer: nn.Module = LongcatFlashMoE(config)
    state = {
        "router.classifier.weight": weights.classifier,
        "router.e_score_correction_bias": weights.bias,
        "experts.gate_up_proj": weights.w13,
        "experts.down_proj": weights.w2,
    }
    layer.load_state_dict(state, assign=True)
    return layer.eval().requires_grad_(False)


def floor_seconds(
    hidden_states: Sequence[Tensor], weights: Sequence[Weights], shape: Shape, bandwidth: float, flops: float
) -> float:
    """Mean over the inputs of max(products / rate of a large product, bytes of the weights used / memory rate)."""
    floors = []
    for index, rows in enumerate(hidden_states):
        layer = weights[index % len(weights)]
        logits = router_logits(rows, layer)
        _, topk_ids, _ = plain_moe.route(logits, layer.bias, shape.top_k, shape.num_real_experts, 1.0)
        busy = topk_ids[topk_ids >= 0]
        compute = 2 * busy.numel() * shape.values_per_expert / flops
        streamed = busy.unique().numel() * shape.values_per_expert * rows.element_size() / bandwidth
        floors.append(max(compute, streamed))
    return sum(floors) / len(floors)


def breakdown(
    layers: Sequence[zexpert.FusedMoE], hidden_states: Sequence[Tensor], weights: Sequence[Weights], repeats: int
) -> str:
    """A table of the time each step of the layer takes on its own."""
    steps: dict[str, list[Callable[[], object]]] = {}
    for index, rows in enumerate(hidden_states):
        layer, parameters = layers[index % len(layers)], weights[index % len(weights)]
        logits = router_logits(rows, parameters)
        routing = layer.router.select_experts(rows, logits)
        plan = zexpert.ops.moe_plan(routing.topk_ids, layer.w13_weight.shape[0])
        top_k = routing.topk_ids.shape[1]
        permuted = zexpert.ops.moe_permute(rows, plan.row_slots, plan.expert_offsets, top_k)
        expert_rows = zexpert.ops.grouped_mlp(permuted, plan.expert_offsets, layer.w13_weight, layer.w2_weight)
        calls: dict[str, Callable[[], object]] = {
            "router projection": lambda x=rows, p=parameters: router_logits(x, p),
            "biased_topk": lambda m=layer, x=rows, y=logits: m.router.select_experts(x, y),
            "moe_plan": lambda r=routing, m=layer: zexpert.ops.moe_plan(r.topk_ids, m.w13_weight.shape[0]),
            "moe_permute": lambda x=rows, p=plan, k=top_k: zexpert.ops.moe_permute(x, p.row_slots, p.expert_offsets, k),
            "grouped_mlp": lambda x=permuted, p=plan, m=layer: zexpert.ops.grouped_mlp(
                x, p.expert_offsets, m.w13_weight, m.w2_weight
            ),
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
    shape: Shape, num_tokens: int, dtype_name: str, options: argparse.Namespace, weights: Sequence[Weights]
) -> harness.CaseResult:
    num_inputs = len(weights) ** 2
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_states = [
        torch.randn(num_tokens, shape.hidden_size, generator=generator).to(harness.DTYPES[dtype_name])
        for _ in range(num_inputs)
    ]
    layers = [zexpert_layer(layer_weights, shape) for layer_weights in weights]

    def ours(index: int) -> Tensor:
        rows = hidden_states[index]
        return layers[index % len(layers)](rows, router_logits(rows, weights[index % len(weights)]))

    contenders: dict[str, Callable[[int], Tensor]] = {
        "zexpert": ours,
        "plain PyTorch": lambda i: plain_layer(hidden_states[i], weights[i % len(weights)], shape),
    }
    try:
        others = [transformers_layer(layer_weights, shape) for layer_weights in weights]
        contenders["transformers"] = lambda i: others[i % len(others)](hidden_states[i])
    except ImportError:
        print("transformers is not installed, so it is left out (pip install transformers)")

    logits = router_logits(hidden_states[0], weights[0])
    sure = ~torch_routing.near_ties(logits, weights[0].bias, shape.routing_case())
    reference = reference_layer(hidden_states[0], weights[0], shape)[sure]
    plain = contenders["plain PyTorch"](0)[sure]
    checks = {name: harness.check_error(run(0)[sure], plain, reference) for name, run in contenders.items()}

    bandwidth = harness.read_bandwidth()
    flops = harness.matmul_rate(harness.DTYPES[dtype_name])
    repeats = options.repeats or num_inputs * (4 if num_tokens <= 4 else 2 if num_tokens <= 64 else 1)
    with harness.OtherLoad() as load:
        timings = harness.measure(contenders, num_inputs=num_inputs, repeats=repeats)
    target = None
    if dtype_name == "float32" and num_tokens in TARGETS and shape == Shape():
        target = harness.Target(over="transformers", at_least=TARGETS[num_tokens])
    result = harness.CaseResult(
        case=f"layer, {num_tokens} tokens, {dtype_name}, {torch.get_num_threads()} threads",
        subject="zexpert",
        floor=floor_seconds(hidden_states, weights, shape, bandwidth, flops),
        timings=timings,
        checks=checks,
        other_load=load.share,
        target=target,
    )
    harness.print_case(result)
    print(f"memory reads at {bandwidth / 1e9:.1f} GB/s, a {dtype_name} product runs at {flops / 1e9:.0f} GFLOP/s")
    if options.breakdown:
        print(breakdown(layers, hidden_states, weights, repeats))
    return result


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The layer on the CPU: zexpert, plain PyTorch and transformers.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--tokens", type=harness.positive_ints, default=[1, 16, 512], help="default: 1,16,512")
    parser.add_argument("--dtype", type=harness.dtype_names, default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=0, help="timed repetitions (default: more for fewer tokens)")
    parser.add_argument("--threads", type=harness.positive_ints, default=[os.cpu_count() or 1])
    parser.add_argument("--breakdown", action="store_true", help="also time each step of zexpert's layer")
    parser.add_argument("--hidden-size", type=int, default=Shape.hidden_size)
    parser.add_argument("--intermediate-size", type=int, default=Shape.intermediate_size)
    options = parser.parse_args(arguments)
    for name in ("repeats", "hidden_size", "intermediate_size"):
        if getattr(options, name) < (0 if name == "repeats" else 1):
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    shape = Shape(hidden_size=options.hidden_size, intermediate_size=options.intermediate_size)
    print(f"layer on {harness.processor_name()}, torch {torch.__version__}, zexpert {zexpert.__version__}")
    results = []
    threads_before = torch.get_num_threads()
    try:
        for dtype_name in options.dtype:
            dtype = harness.DTYPES[dtype_name]
            bytes_per_layer = shape.num_real_experts * shape.values_per_expert * dtype.itemsize
            num_layers = min(harness.rotation_length(bytes_per_layer, 3), 7)
            with torch.inference_mode():
                weights = [make_weights(shape, dtype, seed) for seed in range(num_layers)]
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    results += [run_case(shape, tokens, dtype_name, options, weights) for tokens in options.tokens]
            del weights
    finally:
        torch.set_num_threads(threads_before)
    settings = {"tokens": options.tokens, "dtype": options.dtype, "shape": vars(shape), "threads": options.threads}
    return harness.finish("cpu_layer", settings, results, options.json)


if __name__ == "__main__":
    sys.exit(main())
