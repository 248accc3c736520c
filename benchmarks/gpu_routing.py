"""Times zexpert's routing on a CUDA device against the same routing composed of torch operations, eager and compiled,
and against the kernels of vLLM and FlashInfer where these are installed.

Usage: python benchmarks/gpu_routing.py [--tokens 1,8192] [--cases 768,384] [--json PATH]

Every contender runs in CUDA graphs of many calls, over inputs that together exceed the L2 cache wherever one token more
than a few makes that possible, so that neither launching nor the cache is measured in place of the kernel. "with the
plan" adds moe_plan. The floor is the time to read the logits and to write the results at the speed of a device copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import harness
import torch_routing
import zexpert
from cpu_routing import zexpert_route
from gpu_harness import copy_bandwidth, graph_seconds, head, require_gpu
from harness import CaseResult
from torch_routing import LONGCAT_FLASH, RoutingCase

CASES = {
    "768": LONGCAT_FLASH,
    "384": RoutingCase("LongCat-Flash-Lite", 256, 128, 0, 12, has_bias=True),
    "896": RoutingCase("LongCat-2.0", 768, 128, 0, 12, has_bias=True),
    "256": RoutingCase("256 experts, sigmoid", 256, 0, 0, 8, "sigmoid", True, True, 2.5),
}
TOKENS = (1, 16, 128, 1024, 8192, 65536)
SUBJECT = "zexpert"
CHECKED_TOKENS = 4096  # rows compared with the float64 reference

Route = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, Tensor, Tensor]"]


def contenders(case: RoutingCase) -> dict[str, Route]:
    def composed(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch_routing.route(logits, bias, case)

    def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return zexpert_route(logits, bias, case)

    def with_plan(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weights, ids, zero_weight = route(logits, bias)
        zexpert.ops.moe_plan(ids, case.num_real_experts)
        return weights, ids, zero_weight

    return {
        SUBJECT: route,
        "zexpert, with the plan": with_plan,
        "torch.compile": torch.compile(composed, dynamic=False),
        "torch ops": composed,
    }


def vllm_route(case: RoutingCase) -> Route:
    """vLLM's top-k kernel, then what it leaves to do for zero experts."""
    from vllm import _custom_ops

    def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weights = logits.new_empty((logits.shape[0], case.top_k), dtype=torch.float32)
        ids = torch.empty_like(weights, dtype=torch.int32)
        _custom_ops.topk_softmax(
            weights,
            ids,
            torch.empty_like(ids),
            logits,
            renormalize=case.renormalize,
            e_score_correction_bias=bias,
        )
        weights = weights * case.routed_scaling_factor
        is_zero = ids >= case.num_real_experts
        zero_weight = torch.where(is_zero, weights, 0.0).sum(dim=1)
        return weights.masked_fill(is_zero, 0.0), ids.masked_fill(is_zero, -1), zero_weight

    return route


def flashinfer_route(case: RoutingCase) -> Route:
    """FlashInfer's routing for DeepSeek-V3, which knows no zero experts."""
    from flashinfer.fused_moe import fused_topk_deepseek

    def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weights = logits.new_empty((logits.shape[0], case.top_k), dtype=torch.float32)
        ids = torch.empty_like(weights, dtype=torch.int32)
        groups = case.num_expert_group, case.topk_group
        fused_topk_deepseek(logits, bias, *groups, case.top_k, case.routed_scaling_factor, weights, ids)
        return weights, ids, weights.new_zeros(weights.shape[0])

    return route


def installed_peer(case: RoutingCase) -> dict[str, Route]:
    """The engine's kernel that serves the case, if it is installed and takes this call."""
    if case.scoring_func == "softmax":
        name, make = "vllm", vllm_route
    elif case.has_bias and case.renormalize and case.num_experts == case.num_real_experts:
        name, make = "flashinfer", flashinfer_route
    else:
        return {}
    try:
        route = make(case)
        route(torch.randn(2, case.num_experts, device="cuda"), torch.zeros(case.num_experts, device="cuda"))
    except ImportError:
        print(f"{name} is not installed, so it is left out")
    except Exception as error:  # whatever another version of the peer raises
        print(f"{name} is left out: {type(error).__name__}: {error}")
    else:
        return {name: route}
    return {}


def run_case(
    case: RoutingCase,
    num_tokens: int,
    dtype: torch.dtype,
    repeats: int,
    bandwidth: float,
    peers: dict[str, Route],
) -> CaseResult:
    bytes_per_input = num_tokens * case.num_experts * dtype.itemsize
    bytes_per_output = num_tokens * (case.top_k * 8 + 4)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    num_inputs = max(3, min(64, 3 * l2_bytes // bytes_per_input + 1))
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(num_tokens, case.num_experts, device="cuda", generator=generator).to(dtype)
        for _ in range(num_inputs)
    ]
    scale = 1e-3 if case.scoring_func == "softmax" else 1e-1
    bias = torch.randn(case.num_experts, device="cuda", generator=generator) * scale if case.has_bias else None

    rows = inputs[0][:CHECKED_TOKENS]
    far_from_ties = ~torch_routing.near_ties(rows.cpu(), None if bias is None else bias.cpu(), case).to("cuda")

    def dense(routing: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch_routing.dense_weights(*(part[:CHECKED_TOKENS] for part in routing), case)[far_from_ties]  # type: ignore[call-arg]

    expected = dense(torch_routing.route(rows.double(), None if bias is None else bias.double(), case))
    plain = dense(torch_routing.route(rows, bias, case))

    timings, checks = {}, {}
    torch.compiler.reset()
    for name, route in (contenders(case) | peers).items():
        checks[name] = harness.check_error(dense(route(inputs[0], bias)), plain, expected)
        calls = [lambda route=route, logits=logits: route(logits, bias) for logits in inputs]  # type: ignore[misc]
        timings[name] = graph_seconds(calls, repeats)
    floor = (bytes_per_input + bytes_per_output) / bandwidth
    title = f"{case.name}: {num_tokens} tokens of {case.num_experts} {str(dtype).removeprefix('torch.')} logits"
    return CaseResult(title, SUBJECT, floor, timings, checks, other_load=0.0)


def microseconds(result: CaseResult, name: str) -> str:
    return f"{result.timings[name].median * 1e6:.2f}" if name in result.timings else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="numbers of tokens")
    parser.add_argument("--cases", default=",".join(CASES), help="expert counts, of " + ", ".join(CASES))
    parser.add_argument("--dtype", default="float32", choices=harness.DTYPES, help="of the logits")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args(arguments)
    require_gpu(parser)

    bandwidth = copy_bandwidth()
    print(head(bandwidth))
    results = []
    for name in options.cases.split(","):
        peers = installed_peer(CASES[name])
        for num_tokens in map(int, options.tokens.split(",")):
            dtype = harness.DTYPES[options.dtype]
            results.append(run_case(CASES[name], num_tokens, dtype, options.repeats, bandwidth, peers))
            harness.print_case(results[-1])
    names = list(dict.fromkeys(name for result in results for name in result.timings))
    table = [
        [result.case, *(microseconds(result, name) for name in names), f"{result.floor * 1e6:.2f}",
         f"{100 * result.floor / result.timings[SUBJECT].median:.0f}%"]
        for result in results
    ]  # fmt: skip
    print("\nmedians in microseconds")
    print(harness.format_table(["case", *names, "floor", "share of floor"], table))
    settings = {"tokens": options.tokens, "cases": options.cases, "dtype": options.dtype, "copy_bandwidth": bandwidth}
    return harness.finish("gpu_routing", settings, results, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
