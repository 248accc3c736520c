# SPDX-License-Identifier: Apache-2.0
"""Times routing: zexpert, torch operations, and what other packages have for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from zexpert import ops
from zexpert_tools.benchmark import harness, machine, rates, torch_routing
from zexpert_tools.benchmark.torch_routing import RoutingCase

SUBJECT = "zexpert"
CHECKED_TOKENS = 4096  # rows compared with the float64 reference


class Route(Protocol):
    """(topk_weights [T, K], topk_ids [T, K] with -1 for zero experts, zero_weight [T]) from logits [T, N] and a bias
    [N]."""

    def __call__(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]: ...


def routing_arguments(case: RoutingCase) -> dict[str, Any]:
    """The arguments of zexpert's routing, without logits and bias."""
    return {
        "top_k": case.top_k,
        "num_real_experts": case.num_real_experts,
        "num_identity_experts": case.num_identity_experts,
        "scoring_func": case.scoring_func,
        "renormalize": case.renormalize,
        "routed_scaling_factor": case.routed_scaling_factor,
        "num_expert_group": case.num_expert_group,
        "topk_group": case.topk_group,
    }


def zexpert_route(logits: Tensor, bias: Tensor | None, case: RoutingCase) -> tuple[Tensor, Tensor, Tensor]:
    routing = ops.biased_topk(logits, bias, **routing_arguments(case))
    return routing.topk_weights, routing.topk_ids, routing.zero_weight


def contenders(case: RoutingCase) -> dict[str, Route]:
    """zexpert, and the same routing composed of torch operations."""
    return {
        SUBJECT: lambda logits, bias: zexpert_route(logits, bias, case),
        "torch ops": lambda logits, bias: torch_routing.route(logits, bias, case),
    }


def compiled(case: RoutingCase) -> Route:
    """The composition under torch.compile."""
    route = torch.compile(torch_routing.route, dynamic=False)
    return lambda logits, bias: route(logits, bias, case)


def with_plan(case: RoutingCase) -> Route:
    """zexpert's routing together with its plan."""
    arguments = routing_arguments(case)

    def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        routing, _ = ops.biased_topk_and_plan(logits, bias, **arguments)
        return routing.topk_weights, routing.topk_ids, routing.zero_weight

    return route


def vllm_route(case: RoutingCase) -> Route:
    """vLLM's top-k kernel, then PyTorch for the zero experts."""
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
    """FlashInfer's routing for DeepSeek-V3, without zero experts."""
    from flashinfer.fused_moe import fused_topk_deepseek

    def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weights = logits.new_empty((logits.shape[0], case.top_k), dtype=torch.float32)
        ids = torch.empty_like(weights, dtype=torch.int32)
        groups = case.num_expert_group, case.topk_group
        fused_topk_deepseek(logits, bias, *groups, case.top_k, case.routed_scaling_factor, weights, ids)
        return weights, ids, weights.new_zeros(weights.shape[0])

    return route


def installed_peers(case: RoutingCase, device: torch.device, say: Callable[[str], object] = print) -> dict[str, Route]:
    """The engine's kernel that serves the case on a GPU, if it is installed and accepts this call."""
    if device.type != "cuda":
        return {}
    if case.scoring_func == "softmax":
        name, make = "vllm", vllm_route
    elif case.has_bias and case.renormalize and case.num_experts == case.num_real_experts:
        name, make = "flashinfer", flashinfer_route
    else:
        return {}
    try:
        route = make(case)
        route(torch.randn(2, case.num_experts, device=device), torch.zeros(case.num_experts, device=device))
    except ImportError:
        say(f"{name} is not installed, so it is left out")
    except Exception as error:  # whatever another version of the peer raises
        say(f"{name} is left out: {type(error).__name__}: {error}")
    else:
        return {name: route}
    return {}


def make_inputs(
    case: RoutingCase, num_tokens: int, dtype: torch.dtype, device: torch.device, count: int
) -> tuple[list[Tensor], Tensor]:
    """`count` logits [T, N] and one selection bias [N] of the size of the gaps between scores."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_tokens, case.num_experts)
    logits = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]
    scale = 1e-3 if case.scoring_func == "softmax" else 1e-1
    return logits, torch.randn(case.num_experts, generator=generator, device=device) * scale


def run_case(
    case: RoutingCase,
    num_tokens: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    bandwidth: float,
    others: Mapping[str, Route] | None = None,
    unchecked: Mapping[str, Route] | None = None,
    target: harness.Target | None = None,
) -> harness.CaseResult:
    """Times zexpert, torch operations and `others`, and compares their results with float64; `unchecked` ones are timed
    only.

    The floor is the time to read the logits; on a GPU, to write the results as well. `bandwidth` is the memory's.
    """
    entries: dict[str, Route] = {**contenders(case), **(others or {})}
    timed: dict[str, Route] = {**entries, **(unchecked or {})}
    input_bytes = num_tokens * case.num_experts * dtype.itemsize
    output_bytes = num_tokens * (case.top_k * 8 + 4) if device.type == "cuda" else 0
    count = harness.inputs_to_rotate(device, input_bytes, len(timed))
    logits, some_bias = make_inputs(case, num_tokens, dtype, device, count)
    bias = some_bias if case.has_bias else None

    rows = logits[0][:CHECKED_TOKENS]
    sure = ~torch_routing.near_ties(rows.cpu(), None if bias is None else bias.cpu(), case).to(device)

    def dense(routing: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        weights, ids, zero_weight = (part[:CHECKED_TOKENS] for part in routing)
        return torch_routing.dense_weights(weights, ids, zero_weight, case)[sure]

    reference = dense(torch_routing.route(rows.double(), None if bias is None else bias.double(), case))
    plain = dense(torch_routing.route(rows, bias, case))
    checks = {
        name: harness.check_error(dense(route(logits[0], bias)), plain, reference) for name, route in entries.items()
    }
    runs = {name: harness.on_inputs(functools.partial(route, bias=bias), logits) for name, route in timed.items()}
    with machine.OtherLoad() as load:
        timings = harness.measure_on(device, runs, num_inputs=count, repeats=repeats)
    bandwidth = rates.bandwidth_for(count * input_bytes, device, bandwidth)
    return harness.CaseResult(
        case=f"{case.name} {num_tokens} x {case.num_experts}, K {case.top_k}, {harness.dtype_name(dtype)} logits",
        subject=SUBJECT,
        floor=(input_bytes + output_bytes) / bandwidth,
        timings=timings,
        checks=checks,
        other_load=0.0 if device.type == "cuda" else load.share,
        target=target,
    )
