# SPDX-License-Identifier: Apache-2.0
"""Times FusedMoE with float8 block-scaled experts on a CUDA device, routing to output, against the same layer in
bfloat16.

Usage: python benchmarks/gpu_fp8.py [--shapes longcat,lite] [--tokens 1,16,...] [--json PATH]

Both layers start from the router's logits and are captured in CUDA graphs. "experts" is the float8 layer without
routing and epilogue. The floor is that of gpu_layer.py with one byte a weight and twice the bfloat16 rate of products.
Sampled tokens are checked against the float64 product of the dequantised weights: at most 1.2 times the error of plain
PyTorch that quantises tokens and activations the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zexpert
from gpu_layer import DTYPE, SHAPES, TOKENS
from zexpert.layer import FusedMoE
from zexpert_tools.benchmark import harness, parse, rates
from zexpert_tools.benchmark.cuda import head, require_gpu
from zexpert_tools.benchmark.layer import Shape

DEVICE = torch.device("cuda")
SUBJECT = "zexpert float8"
CHECKED_TOKENS = 16
MOST_ERROR = 1.2


def make_layer(shape: Shape, quantization: str | None) -> FusedMoE:
    """Random weights, drawn expert by expert: a layer in bfloat16 and a copy do not fit a GPU together."""
    routing, device = shape.routing, DEVICE
    bias = torch.randn(routing.num_experts, device=device) * 1e-3 if routing.has_bias else None
    layer = FusedMoE(
        routing.num_real_experts,
        routing.top_k,
        shape.hidden_size,
        shape.intermediate_size,
        zero_expert_type={"identity": routing.num_identity_experts, "drop": routing.num_drop_experts},
        e_score_correction_bias=bias,
        scoring_func=routing.scoring_func,
        renormalize=routing.renormalize,
        routed_scaling_factor=routing.routed_scaling_factor,
        params_dtype=DTYPE,
        quantization=quantization,
        device="meta",
    )
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))
    generator = torch.Generator(device).manual_seed(0)
    for expert in range(routing.num_real_experts):
        for name, rows, depth in (
            ("w13", 2 * shape.intermediate_size, shape.hidden_size),
            ("w2", shape.hidden_size, shape.intermediate_size),
        ):
            weight = torch.randn(rows, depth, device=device, generator=generator) / depth**0.5
            with torch.no_grad():
                if quantization is None:
                    getattr(layer, f"{name}_weight")[expert] = weight
                else:
                    quantised, scale_inv = zexpert.ops.quantize_blockwise(weight)
                    getattr(layer, f"{name}_weight")[expert] = quantised
                    getattr(layer, f"{name}_weight_scale_inv")[expert] = scale_inv
    return layer


def quantised_rows(rows: Tensor) -> Tensor:
    """rows as float8 with a scale for each row and 128 channels represents them, float64."""
    groups = rows.float().unflatten(1, (-1, 128))
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-10) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).double() * scale).flatten(1)


def check(layer: FusedMoE, hidden_states: Tensor, router_logits: Tensor, out: Tensor) -> harness.ErrorCheck:
    """Root-mean-square errors of the experts' part of sampled tokens."""
    sampled = (
        torch.linspace(0, len(hidden_states) - 1, min(len(hidden_states), CHECKED_TOKENS)).long().unique().to(DEVICE)
    )
    rows = hidden_states[sampled]
    routing = layer.router.select_experts(rows, router_logits[sampled])
    zero = routing.zero_weight[:, None].double() * rows.double()
    expected, plain = zero.clone(), zero.clone()
    for token in range(len(rows)):
        for slot in range(routing.topk_ids.shape[1]):
            expert = int(routing.topk_ids[token, slot])
            if expert < 0:
                continue
            weights = [
                zexpert.ops.dequantize_blockwise(
                    getattr(layer, f"{name}_weight")[expert],
                    getattr(layer, f"{name}_weight_scale_inv")[expert],
                    torch.float32,
                )
                for name in ("w13", "w2")
            ]
            weight = routing.topk_weights[token, slot].double()
            gate, up = (rows[token : token + 1].double() @ weights[0].double().T).chunk(2, dim=1)
            expected[token] += weight * (F.silu(gate) * up @ weights[1].double().T)[0]
            gate, up = (quantised_rows(rows[token : token + 1]).float() @ weights[0].T).chunk(2, dim=1)
            quantised = (quantised_rows(F.silu(gate) * up).float() @ weights[1].T)[0].to(DTYPE)
            plain[token] += weight * quantised.double()
    error, plain_error = (
        float((value.double() - expected).square().mean().sqrt()) for value in (out[sampled], plain.to(DTYPE))
    )
    return harness.ErrorCheck(error, plain_error, error <= MOST_ERROR * plain_error)


@torch.inference_mode()
def run_case(
    shape: Shape, layers: dict[str, FusedMoE], num_tokens: int, repeats: int, limits: rates.Limits
) -> harness.CaseResult:
    generator = torch.Generator(DEVICE).manual_seed(num_tokens)
    hidden_states = torch.randn(num_tokens, shape.hidden_size, device=DEVICE, generator=generator).to(DTYPE)
    router_logits = torch.randn(num_tokens, shape.routing.num_experts, device=DEVICE, generator=generator)
    layer = layers[SUBJECT]
    plan = layer.router.select_experts_and_plan(hidden_states, router_logits, shape.routing.num_real_experts)[1]
    weights = {name: getattr(layer, name) for name in ("w13_weight", "w2_weight")} | {
        f"{name}_scale_inv": getattr(layer, f"{name}_weight_scale_inv") for name in ("w13", "w2")
    }
    contenders = {name: (lambda _, one=one: one(hidden_states, router_logits)) for name, one in layers.items()}
    contenders["its experts alone"] = lambda _: zexpert.ops.grouped_mlp(
        hidden_states, plan.expert_offsets, row_slots=plan.row_slots, top_k=shape.routing.top_k, **weights
    )
    checks = {SUBJECT: check(layer, hidden_states, router_logits, contenders[SUBJECT](0))}
    timings = harness.measure_on(DEVICE, contenders, num_inputs=1, repeats=repeats, graphs=True)
    counts = plan.expert_offsets.diff()
    operations = 2 * int(plan.expert_offsets[-1]) * shape.values_per_expert
    weight_bytes = int((counts > 0).sum()) * shape.values_per_expert
    result = harness.CaseResult(
        case=f"{shape.routing.name}: layer, {harness.counted(num_tokens, 'token')}, float8",
        subject=SUBJECT,
        floor=limits.floor(operations // 2, weight_bytes),
        timings=timings,
        checks=checks,
        other_load=0.0,
    )
    harness.print_case(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", type=parse.names_of(SHAPES), default=["longcat"], help="of " + ", ".join(SHAPES))
    parser.add_argument("--tokens", type=parse.positive_ints, default=list(TOKENS))
    parser.add_argument("--repeats", type=parse.positive_int, default=5)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    require_gpu(parser)
    limits = rates.measure_limits(DEVICE, DTYPE)
    print(f"{head(limits.bandwidth)}; a bfloat16 matrix product runs at {limits.rate / 1e12:.0f} TFLOP/s")
    results = []
    for name in options.shapes:
        shape = SHAPES[name]
        layers = {SUBJECT: make_layer(shape, "fp8_block"), "zexpert bfloat16": make_layer(shape, None)}
        for num_tokens in options.tokens:
            results.append(run_case(shape, layers, num_tokens, options.repeats, limits))
            torch.cuda.empty_cache()
    settings = {"copy_bandwidth": limits.bandwidth, "matmul_rate": limits.rate}
    return harness.finish("gpu_fp8", settings, results, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
