# SPDX-License-Identifier: Apache-2.0
"""Times zexpert and vLLM's own code for LongCat-Flash's layer on a CUDA device: routing, epilogue, layer.

Usage: python benchmarks/gpu_vllm.py [--parts routing,epilogue,layer] [--tokens 1,128,1024,8192] [--repeats 10]
       [--json PATH]

Needs vLLM 0.32 with its CUDA libraries; a part of it that cannot be imported or captured is named and left out.

- routing: what vLLM's ZeroExpertRouter does, the choice and the zero experts' output, a tensor of its own, which two of
  zexpert's operators do too. zexpert's layer needs "the choice alone"; vLLM's top-k kernel leaves scaling and masks.
- epilogue: moe_finalize against vLLM's moe_sum, which reads a row for each zero slot too, and the addition of that
  tensor.
- layer: from hidden states to output, and from given router logits; vLLM's is PyTorch's float32 product, which its
  GateLinear is for a float32 weight, its router, its Triton experts in the configuration that it picks for the shape,
  and the addition. Its zero slots go to expert 0, with weight 0.

All run in CUDA graphs, over inputs that together exceed the L2 cache wherever one token more than a few makes that
possible. Results are checked against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from zexpert import ops
from zexpert_tools.benchmark import (
    epilogue,
    harness,
    layer,
    machine,
    parse,
    rates,
    routing,
    torch_routing,
    vllm_peer,
)
from zexpert_tools.benchmark.cuda import head, require_gpu
from zexpert_tools.benchmark.torch_routing import LONGCAT_FLASH

TOKENS = (1, 128, 1024, 8192)
SHAPE = layer.MODELS["longcat-flash"]
DTYPE, DEVICE = torch.bfloat16, torch.device("cuda")
SUBJECT, VLLM = "zexpert", "vLLM"

Run = Callable[[int], Tensor]  # a contender: from the index of an input to its result


def usable(name: str, make: Callable[[], Run]) -> dict[str, Run]:
    """The contender of vLLM's that `make` makes, if it can be imported and captured in a graph; says why if not."""
    try:
        run = make()
        harness.measure_on(DEVICE, {name: run}, num_inputs=1, repeats=1)
    except Exception as error:  # whatever this vLLM raises on this machine
        print(f"{name} is left out: {type(error).__name__}: {error}")
        return {}
    return {name: run}


def time_case(
    case: str,
    contenders: Mapping[str, Run],
    unchecked: Mapping[str, Run],
    *,
    num_inputs: int,
    repeats: int,
    floor: float,
    rows: Tensor,
    plain: Tensor,
    expected: Tensor,
) -> harness.CaseResult:
    """Compares rows `rows` of the contenders' first results with `expected`, and times them and `unchecked`."""
    checks = {name: harness.check_error(run(0)[rows], plain, expected) for name, run in contenders.items()}
    timings = harness.measure_on(DEVICE, {**contenders, **unchecked}, num_inputs=num_inputs, repeats=repeats)
    return harness.CaseResult(case, SUBJECT, floor, timings, checks, other_load=0.0)


def routing_case(num_tokens: int, repeats: int, limits: rates.Limits) -> harness.CaseResult:
    case, hidden_size = LONGCAT_FLASH, SHAPE.hidden_size
    logit_bytes, hidden_bytes = num_tokens * case.num_experts * 4, num_tokens * hidden_size * DTYPE.itemsize
    count = harness.inputs_to_rotate(DEVICE, logit_bytes + hidden_bytes, 4)
    logits, bias = routing.make_inputs(case, num_tokens, torch.float32, DEVICE, count)
    generator = torch.Generator(DEVICE).manual_seed(num_tokens)
    hidden_states = [
        torch.randn(num_tokens, hidden_size, device=DEVICE, generator=generator).to(DTYPE) for _ in range(count)
    ]

    def choice(index: int) -> tuple[Tensor, Tensor, Tensor]:
        return routing.zexpert_route(logits[index], bias, case)

    def whole_router() -> Run:
        router = vllm_peer.zero_expert_router(case, bias)

        def run(index: int) -> Tensor:
            router.select_experts(hidden_states[index], logits[index])
            zero_expert_output: Tensor = router.zero_expert_output
            return zero_expert_output

        return run

    rows = (~torch_routing.near_ties(logits[0].cpu(), bias.cpu(), case)).nonzero().flatten()
    rows = rows[: routing.CHECKED_TOKENS].to(DEVICE)
    zero_weight = torch_routing.route(logits[0][rows].double(), bias.double(), case)[2][:, None]
    return time_case(
        f"{case.name}: routing, {harness.counted(num_tokens, 'token')}, hidden size {hidden_size}",
        {SUBJECT: lambda index: ops.zero_expert_accumulate(hidden_states[index], choice(index)[2])}
        | usable(VLLM, whole_router),
        {f"{SUBJECT}, the choice alone": lambda index: choice(index)[1]}
        | usable(f"{VLLM}, the top-k kernel alone", lambda: lambda index: vllm_peer.topk(case, logits[index], bias)[1]),
        num_inputs=count,
        repeats=repeats,
        floor=(logit_bytes + 2 * hidden_bytes) / limits.bandwidth,
        rows=rows,
        plain=zero_weight.to(DTYPE) * hidden_states[0][rows],
        expected=zero_weight * hidden_states[0][rows].double(),
    )


def epilogue_case(num_tokens: int, repeats: int, limits: rates.Limits) -> harness.CaseResult:
    case, hidden_size = LONGCAT_FLASH, SHAPE.hidden_size
    row_bytes = hidden_size * DTYPE.itemsize
    count = harness.inputs_to_rotate(DEVICE, num_tokens * case.top_k * row_bytes, 2)
    inputs = [epilogue.make_inputs(case, hidden_size, num_tokens, DTYPE, DEVICE, seed) for seed in range(count)]
    num_rows = sum(int((one.slot_rows >= 0).sum()) for one in inputs) / count

    def sum_and_add() -> Run:
        given = [vllm_peer.moe_sum_inputs(one) for one in inputs]
        return lambda index: vllm_peer.moe_sum(given[index][0]) + given[index][1]

    few = inputs[0].first(epilogue.CHECKED_TOKENS)
    return time_case(
        f"{case.name}: epilogue, {harness.counted(num_tokens, 'token')}, hidden size {hidden_size}",
        {SUBJECT: harness.on_inputs(epilogue.epilogue, inputs)} | usable(VLLM, sum_and_add),
        {},
        num_inputs=count,
        repeats=repeats,
        floor=(num_rows + 2 * num_tokens) * row_bytes / limits.bandwidth,
        rows=torch.arange(len(few.slot_rows), device=DEVICE),
        plain=epilogue.composed(few),
        expected=epilogue.composed(few.to(torch.float64)),
    )


def layer_cases(tokens: Sequence[int], repeats: int, limits: rates.Limits) -> list[harness.CaseResult]:
    weights = layer.make_weights(SHAPE, DTYPE, DEVICE)

    def some_tokens() -> Run:
        rows = torch.randn(64, SHAPE.hidden_size, device=DEVICE).to(DTYPE)
        vllm = vllm_peer.VllmLayer(SHAPE, weights)
        return lambda _: vllm(rows, layer.router_logits(rows, weights))

    peers = dict.fromkeys(usable(VLLM, some_tokens), vllm_peer.VllmLayer)
    results: list[harness.CaseResult] = []
    for num_tokens, router_projection in product(tokens, (True, False)):
        results.append(
            layer.run_case(
                SHAPE,
                num_tokens,
                [weights],
                limits=limits,
                repeats=repeats,
                router_projection=router_projection,
                peers=peers,
            )
        )
        harness.print_case(results[-1])
        torch.cuda.empty_cache()
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    cases = {"routing": routing_case, "epilogue": epilogue_case}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parts = [*cases, "layer"]
    parser.add_argument("--parts", type=parse.names_of(parts), default=parts, help="of " + ", ".join(parts))
    parser.add_argument("--tokens", type=parse.positive_ints, default=list(TOKENS))
    parser.add_argument("--repeats", type=parse.positive_int, default=10)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    require_gpu(parser)
    limits = rates.measure_limits(DEVICE, DTYPE)
    version = machine.installed_version("vllm")
    print(f"{head(limits.bandwidth)}; a matrix product runs at {limits.rate / 1e12:.0f} TFLOP/s; vLLM {version}")
    results: list[harness.CaseResult] = []
    for part in options.parts:
        if part == "layer":
            results += layer_cases(options.tokens, options.repeats, limits)
            continue
        for num_tokens in options.tokens:
            with torch.inference_mode():
                results.append(cases[part](num_tokens, options.repeats, limits))
            harness.print_case(results[-1])
            torch.cuda.empty_cache()
    settings = {"copy_bandwidth": limits.bandwidth, "matmul_rate": limits.rate, "vllm": version}
    return harness.finish("gpu_vllm", settings, results, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
