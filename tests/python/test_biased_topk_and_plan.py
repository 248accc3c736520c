# SPDX-License-Identifier: Apache-2.0
"""biased_topk_and_plan: bit for bit what biased_topk and then moe_plan give, whatever the sizes, rows and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from testing import FLOAT_DTYPES, assert_equal, layouts, random_logits, unchanged
from zexpert.ops import DispatchPlan, RoutingResult, biased_topk, biased_topk_and_plan, moe_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)

# Widths for which a kernel is compiled, narrower rows, and rows that do not fit a warp.
WIDTHS = (5, 96, 192, 384, 700, 768, 896, 1024, 1500)
# One block and clusters of every size, to the last token of each; more tokens than fit one launch.
TOKENS = (0, 1, 7, 8, 9, 33, 64, 65, 128, 129, 256, 257, 300)
EVERY_KIND: dict[str, Any] = {"num_real_experts": 16, "num_identity_experts": 4, "num_constant_experts": 3}


def together_and_apart(
    logits: Tensor, bias: Tensor | None, top_k: int, **routing: Any
) -> tuple[tuple[RoutingResult, DispatchPlan], tuple[RoutingResult, DispatchPlan]]:
    """The op's results, and those of the two that it stands for, on the same device."""
    together = biased_topk_and_plan(logits, bias, top_k, **routing)
    apart = biased_topk(logits, bias, top_k, **routing)
    return together, (apart, moe_plan(apart.topk_ids, routing["num_real_experts"]))


def assert_same(
    together: tuple[RoutingResult, DispatchPlan], apart: tuple[RoutingResult, DispatchPlan], name: str = ""
) -> None:
    for part, expected_part in zip(together, apart, strict=True):
        assert type(part) is type(expected_part)
        for field, actual, expected in zip(part._fields, part, expected_part, strict=True):
            assert_equal(actual, expected, f"{name} {field}")


def rows_of_every_kind(num_tokens: int, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Ordinary rows, ties, masked logits, nothing and too little to choose, zero experts alone."""
    logits = random_logits(num_tokens, num_experts, dtype)
    logits[1::7] = torch.randint(0, 3, logits[1::7].shape).to(dtype)
    logits[2::7, ::5] = torch.nan
    logits[2::7, 1::7] = -torch.inf
    logits[3::7] = -torch.inf
    logits[4::7, 4:] = torch.nan
    logits[5::7, num_experts // 2 :] += 30.0
    logits[6::7, 3] = torch.inf
    return logits


@pytest.mark.every_device("together_and_apart")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", WIDTHS)
def test_sizes(num_experts: int, dtype: torch.dtype) -> None:
    num_real_experts = num_experts * 2 // 3
    bias = 0.01 * torch.randn(num_experts)
    for num_tokens in TOKENS:
        logits = rows_of_every_kind(num_tokens, num_experts, dtype)
        for top_k in sorted({1, 2, min(12, num_experts), min(17, num_experts), min(32, num_experts)}):
            with unchanged(logits, bias):
                results = together_and_apart(
                    logits, bias if top_k > 2 else None, top_k, num_real_experts=num_real_experts, renormalize=True
                )
            assert_same(*results, name=f"{num_tokens} tokens, top_k {top_k},")


@pytest.mark.every_device("together_and_apart")
@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "routing"),
    [
        (768, 12, {"num_real_experts": 512, "routed_scaling_factor": 6.0}),
        (256, 8, {"num_real_experts": 256, "num_expert_group": 8, "topk_group": 4, "renormalize": True}),
        (700, 11, {"num_real_experts": 500, "num_expert_group": 500, "topk_group": 499}),
        (200, 64, {"num_real_experts": 150}),
        (200, 33, {"num_real_experts": 1}),
        (
            97,
            16,
            {
                "num_real_experts": 40,
                "num_identity_experts": 20,
                "num_constant_experts": 17,
                "renormalize": True,
                "drop_before_renormalize": True,
            },
        ),
    ],
)
def test_routings(
    num_experts: int, top_k: int, routing: dict[str, Any], scoring_func: str, indices_dtype: torch.dtype
) -> None:
    for num_tokens in (3, 60, 200):
        for bias_dtype in (torch.float32, torch.bfloat16):
            results = together_and_apart(
                rows_of_every_kind(num_tokens, num_experts, torch.float32),
                (0.1 * torch.randn(num_experts)).to(bias_dtype),
                top_k,
                scoring_func=scoring_func,
                indices_dtype=indices_dtype,
                **routing,
            )
            assert results[0][0].topk_ids.dtype == indices_dtype
            assert_same(*results, name=f"{num_tokens} tokens,")


@pytest.mark.every_device("together_and_apart")
def test_layouts() -> None:
    logits = random_logits(40, 192)
    bias = torch.randn(384)[::2]
    for name, given in {**layouts(logits), "one row": logits[:1].expand(40, 192)}.items():
        assert_same(*together_and_apart(given, bias, 5, num_real_experts=128), name=name)


def test_many_tokens_for_one_expert() -> None:
    logits = torch.zeros(200, 8)
    logits[:, 5] = 9.0
    routing, plan = biased_topk_and_plan(logits, None, 1, num_real_experts=8)
    assert routing.topk_ids.flatten().tolist() == [5] * 200
    assert plan.expert_offsets.tolist() == [0] * 6 + [200] * 3
    assert plan.row_slots.tolist() == plan.slot_rows.flatten().tolist() == list(range(200))


@pytest.mark.parametrize(
    ("arguments", "routing", "message"),
    [
        ((torch.zeros(3, 8), torch.zeros(7), 2), {}, r"^bias must have shape \[8\] \[experts\], got \[7\]"),
        ((torch.zeros(3, 8), None, 9), {}, r"^top_k must be at most the number of experts \(8\), got 9"),
        ((torch.zeros(8), None, 2), {}, r"^logits must have 2 dimensions \[tokens, experts\], got shape \[8\]"),
        ((torch.zeros(3, 8), None, 2), {"indices_dtype": torch.int16}, r"^indices_dtype must be int32 or int64, got"),
        ((torch.zeros(3, 8), None, 2), {"num_expert_group": 3}, r"^num_expert_group must divide .*\(8\), got 3"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], routing: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        biased_topk_and_plan(*arguments, num_real_experts=8, **routing)


@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_opcheck(num_tokens: int, indices_dtype: torch.dtype) -> None:
    torch.library.opcheck(
        torch.ops.zexpert.biased_topk_and_plan.default,
        (random_logits(num_tokens, 25).requires_grad_(), torch.zeros(25), 5),
        {**EVERY_KIND, "indices_dtype": indices_dtype},
    )


def test_compiled_and_scripted() -> None:
    def function(logits: Tensor, bias: Tensor) -> tuple[RoutingResult, DispatchPlan]:
        return biased_topk_and_plan(logits, bias, 5, **EVERY_KIND)

    def script(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        results = torch.ops.zexpert.biased_topk_and_plan(logits, bias, 5, num_real_experts=16)
        return results[0], results[6]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    scripted = torch.jit.script(script)
    bias = 0.01 * torch.randn(25)
    for num_tokens in (7, 3, 40):
        logits = random_logits(num_tokens, 25)
        assert_same(compiled(logits, bias), function(logits, bias))
        for actual, expected in zip(scripted(logits, bias), script(logits, bias), strict=True):
            assert_equal(actual, expected)


# --- Gradients


def float_outputs(routing: RoutingResult) -> tuple[Tensor, Tensor, Tensor]:
    return routing.topk_weights, routing.zero_weight, routing.constant_weight


def gradient_of(outputs: Sequence[Tensor], logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    return torch.autograd.grad(outputs, logits, upstream)[0]


def test_gradient_by_finite_differences() -> None:
    bias = torch.randn(25, dtype=torch.float64)
    logits = torch.randn(4, 25, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: float_outputs(biased_topk_and_plan(x, bias, 5, **EVERY_KIND, renormalize=True)[0]), (logits,)
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_gradient_is_that_of_biased_topk(device: str) -> None:
    bias = torch.randn(25, device=device)
    logits = random_logits(40, 25).to(device).requires_grad_()
    routing, plan = biased_topk_and_plan(logits, bias, 5, **EVERY_KIND)
    assert not any(output.requires_grad for output in plan)
    expected = gradient_of(float_outputs(biased_topk(logits, bias, 5, **EVERY_KIND)), logits)
    bias.copy_(bias.flip(0))  # as a controller may, before the backward
    assert_equal(gradient_of(float_outputs(routing), logits), expected)
    weights_alone = biased_topk_and_plan(logits, bias, 5, **EVERY_KIND)[0].topk_weights
    expected = gradient_of([biased_topk(logits, bias, 5, **EVERY_KIND).topk_weights], logits)
    assert_equal(gradient_of([weights_alone], logits), expected)


# --- CUDA


@needs_cuda
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 100, 128, 200, 256, 400])
def test_graph(num_tokens: int) -> None:
    """Calls one behind the other in a graph, replayed with data of every kind."""
    placeholders = [torch.randn(num_tokens, 768, device="cuda") for _ in range(3)]
    bias = 0.001 * torch.randn(768, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [biased_topk_and_plan(logits, bias, 12, num_real_experts=512) for logits in placeholders]
    for _ in range(5):
        for placeholder in placeholders:
            placeholder.copy_(rows_of_every_kind(num_tokens, 768, torch.float32))
        bias.copy_(0.001 * torch.randn(768))
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        for logits, together in zip(placeholders, captured, strict=True):
            apart = biased_topk(logits, bias, 12, num_real_experts=512)
            assert_same(together, (apart, moe_plan(apart.topk_ids, 512)))


@needs_cuda
def test_float64_on_cuda() -> None:
    for num_tokens in (0, 3):
        with pytest.raises(RuntimeError, match=r"^logits must be float32, bfloat16 or float16 on CUDA, got float64"):
            biased_topk_and_plan(
                torch.zeros(num_tokens, 8, device="cuda", dtype=torch.float64), None, 2, num_real_experts=8
            )
