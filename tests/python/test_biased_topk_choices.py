# SPDX-License-Identifier: Apache-2.0
"""biased_topk_choices, and biased_topk with given choices: forward, gradients, bad choices, modes of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from testing import (
    FLOAT_DTYPES,
    assert_equal,
    assert_error_rule,
    layouts,
    random_logits,
    unchanged,
    weight_dtype,
)
from zexpert.ops import biased_topk, biased_topk_and_plan, biased_topk_choices, moe_plan

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)

ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax": {"num_identity_experts": 5, "num_constant_experts": 3, "routed_scaling_factor": 6.0},
    "sigmoid": {"num_constant_experts": 2, "scoring_func": "sigmoid", "renormalize": True},
    "drop": {"num_identity_experts": 3, "renormalize": True, "drop_before_renormalize": True},
    "groups": {"num_expert_group": 4, "topk_group": 2, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": -1.5},
}
# Experts and K of rows in a vector, in registers of every kind, and of rows that do not fit a warp.
SIZES = [(12, 3), (96, 8), (192, 32), (700, 12), (768, 12), (130, 64), (1500, 12)]


def routing_of(name: str, num_experts: int) -> dict[str, Any]:
    return {"num_real_experts": num_experts // 8 * 4, **ROUTINGS[name]}


def random_choices(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Any experts, in any order, each at most once per token; some slots empty, and all of the last token's."""
    choices = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :top_k].int()
    choices[torch.rand(num_tokens, top_k) < 0.2] = -1
    choices[-1:] = -1
    return choices


def route(logits: Tensor, bias: Tensor | None, top_k: int, **routing: Any) -> tuple[Tensor, ...]:
    """What `biased_topk` gives, and the same from its choices."""
    choices = biased_topk_choices(logits, bias, top_k, **routing)
    return (*biased_topk(logits, bias, top_k, **routing), *biased_topk(logits, None, top_k, **routing, choices=choices))


@pytest.mark.cpu_paths
@pytest.mark.every_device("route")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_own_choices_give_the_same_routing(num_experts: int, top_k: int, routing: str, dtype: torch.dtype) -> None:
    """Bit for bit, ties and rows with nothing to choose included."""
    logits = random_logits(23, num_experts, dtype)
    logits[1::7] = torch.randint(0, 3, logits[1::7].shape).to(dtype)
    logits[2::7, ::5] = torch.nan
    logits[3::7] = -torch.inf
    logits[4::7, 4:] = torch.nan
    bias = 0.1 * torch.randn(num_experts)
    results = route(logits, bias, top_k, **routing_of(routing, num_experts))
    for made, given in zip(results[:4], results[4:], strict=True):
        assert_equal(given, made)


@pytest.mark.every_device("biased_topk_choices")
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_choices(num_experts: int, top_k: int, routing: str) -> None:
    """Zero experts by their own number, where rounding decides nothing."""
    arguments = routing_of(routing, num_experts)
    logits, bias = random_logits(40, num_experts), 0.1 * torch.randn(num_experts)
    logits[0, : num_experts - 2] = torch.nan
    with unchanged(logits, bias):
        choices = biased_topk_choices(logits, bias, top_k, **arguments)
    keys = reference.selection_keys(
        logits, bias, reference.expert_scores(logits, arguments.get("scoring_func", "softmax"))
    )
    groups = (arguments["num_real_experts"], arguments.get("num_expert_group", 1), arguments.get("topk_group", 1))
    expected = reference.chosen_experts(keys, reference.choosable_experts(logits, keys), top_k, *groups)
    decided = reference.decided_rows(logits, bias, top_k, **arguments)
    assert float(decided.float().mean()) > 0.8
    assert_equal(choices[decided], expected[decided].int())
    assert bool((choices[0, min(2, top_k) :] == -1).all())


@pytest.mark.cpu_paths
@pytest.mark.every_device("biased_topk")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_any_choices(num_experts: int, top_k: int, routing: str, dtype: torch.dtype) -> None:
    """Weights follow from the logits, whatever is chosen: masked logits and empty slots weigh nothing."""
    arguments = routing_of(routing, num_experts)
    logits = random_logits(500, num_experts, dtype)
    logits[::9, ::4] = torch.nan
    logits[1::9, 1::4] = -torch.inf
    choices = random_choices(500, num_experts, top_k)
    bias = torch.full((num_experts,), torch.nan)  # is not used
    with unchanged(logits, choices):
        result = biased_topk(logits, bias, top_k, **arguments, choices=choices)
    expected = reference.biased_topk(logits, None, top_k, **arguments, choices=choices)
    plain = reference.biased_topk(logits, None, top_k, **arguments, choices=choices, dtype=weight_dtype(dtype))
    assert_equal(result.topk_ids, expected.topk_ids.int())
    for index in (0, 2, 3):
        assert result[index].dtype == weight_dtype(dtype)
        assert_error_rule(result[index], plain[index], expected[index], result._fields[index])


def gradients(logits: Tensor, top_k: int, choices: Tensor, upstream: tuple[Tensor, ...], **routing: Any) -> Tensor:
    """The gradient of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    result = biased_topk(leaf, None, top_k, **routing, choices=choices)
    outputs = (result.topk_weights, result.zero_weight, result.constant_weight)
    return torch.autograd.grad(outputs, leaf, [gradient.to(outputs[0].dtype) for gradient in upstream])[0]


@pytest.mark.cpu_paths
@pytest.mark.every_device("gradients")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_gradients(num_experts: int, top_k: int, routing: str, dtype: torch.dtype) -> None:
    arguments = routing_of(routing, num_experts)
    logits = random_logits(300, num_experts, dtype)
    logits[::9, ::4] = torch.nan
    choices = random_choices(300, num_experts, top_k)
    num_constants = arguments.get("num_constant_experts", 0)
    upstream = (torch.randn(300, top_k), torch.randn(300), torch.randn(300, num_constants))

    def plain(arithmetic: torch.dtype) -> Tensor:
        leaf = logits.to(arithmetic).requires_grad_()
        result = reference.biased_topk(leaf, None, top_k, **arguments, choices=choices, dtype=arithmetic)
        outputs = [result.topk_weights, result.zero_weight, result.constant_weight]
        pairs = [(one, grad.to(arithmetic)) for one, grad in zip(outputs, upstream, strict=True) if one.requires_grad]
        return torch.autograd.grad([one for one, _ in pairs], leaf, [grad for _, grad in pairs])[0]

    actual = gradients(logits, top_k, choices, upstream, **arguments)
    assert actual.dtype == dtype
    assert bool((actual[-1] == 0).all()), "a token without a choice has no gradient"
    # The float32 kernels' own arithmetic, rounded: a narrow dtype's plain PyTorch would allow anything.
    assert_error_rule(actual, plain(weight_dtype(dtype)).to(dtype), plain(torch.float64), "grad_logits")


def test_given_choices_with_a_plan() -> None:
    logits, choices = random_logits(50, 96), random_choices(50, 96, 8)
    routing, plan = biased_topk_and_plan(logits, None, 8, num_real_experts=64, choices=choices)
    expected = biased_topk(logits, None, 8, num_real_experts=64, choices=choices)
    for one, other in zip((*routing, *plan), (*expected, *moe_plan(expected.topk_ids, 64)), strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens: int) -> None:
    logits = random_logits(num_tokens, 12)
    choices = biased_topk_choices(logits, None, 3, num_real_experts=8)
    assert choices.shape == (num_tokens, 3)
    assert choices.dtype == torch.int32
    assert biased_topk(logits, None, 3, num_real_experts=8, choices=choices).topk_ids.shape == (num_tokens, 3)


@pytest.mark.every_device("biased_topk")
def test_layouts() -> None:
    logits, choices = random_logits(7, 97), random_choices(7, 97, 5)
    expected = biased_topk(logits, None, 5, num_real_experts=64, choices=choices)
    for name, given in layouts(choices).items():
        for one, other in zip(biased_topk(logits, None, 5, num_real_experts=64, choices=given), expected, strict=True):
            assert_equal(one, other, name)


BAD: dict[str, tuple[Any, str]] = {
    "too large": (
        torch.tensor([[0, 12, 1]]).int(),
        r"choices must be experts from 0 to 11, .*got 12 for token 0",
    ),
    "too small": (
        torch.tensor([[0, -2, 1]]).int(),
        r"choices must be experts from 0 to 11, .*got -2 for token 0",
    ),
    "repeated": (
        torch.tensor([[5, -1, 5]]).int(),
        r"choices must name an expert once per token, got 5 twice",
    ),
    "dtype": (torch.tensor([[0, 1, 2]]), r"choices must be int32, got int64"),
    "shape": (torch.tensor([[0, 1]]).int(), r"choices must have shape \[1, 3\] \[tokens, top_k\], got \[1, 2\]"),
    "dimensions": (torch.tensor([0, 1, 2]).int(), r"choices must have 2 dimensions \[tokens, top_k\], got shape \[3\]"),
    "device": (torch.zeros(1, 3, dtype=torch.int32, device="meta"), r"choices must be on cpu like logits, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_choices(case: str) -> None:
    choices, message = BAD[case]
    logits = random_logits(1, 12)
    for op in (biased_topk, biased_topk_and_plan):
        with pytest.raises(RuntimeError, match=message):
            op(logits, None, 3, num_real_experts=8, choices=choices)
    gradient = (torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 0), logits, None, 3)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.zexpert.biased_topk_backward(*gradient, choices, num_real_experts=8)


@needs_cuda
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_bad_choices_on_a_gpu_are_empty_slots(num_experts: int, top_k: int) -> None:
    choices = random_choices(300, num_experts, top_k)
    clean = choices.clone()
    choices[::5, 1] = num_experts
    choices[1::5, 1] = -7
    choices[2::5, 1] = choices[2::5, 0]
    choices[3::5, -1] = choices[3::5, 1]
    clean[::5, 1] = clean[1::5, 1] = clean[2::5, 1] = clean[3::5, -1] = -1
    logits = random_logits(300, num_experts).cuda()
    for arguments in (routing_of(name, num_experts) for name in ROUTINGS):
        (one, plan), (other, other_plan) = (
            biased_topk_and_plan(logits, None, top_k, **arguments, choices=given.cuda()) for given in (choices, clean)
        )
        for actual, expected in zip((*one, *plan), (*other, *other_plan), strict=True):
            assert_equal(actual, expected)


@needs_cuda
def test_choices_are_captured_into_a_cuda_graph() -> None:
    logits = random_logits(64, 96).cuda()
    buffer = torch.empty(64, 8, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer.copy_(biased_topk_choices(logits, None, 8, num_real_experts=64))
        routing = biased_topk(logits, None, 8, num_real_experts=64, choices=buffer)
    logits.copy_(random_logits(64, 96))
    graph.replay()
    assert_equal(buffer, biased_topk_choices(logits, None, 8, num_real_experts=64))
    for one, other in zip(routing, biased_topk(logits, None, 8, num_real_experts=64), strict=True):
        assert_equal(one, other)


def test_compiled_and_scripted() -> None:
    logits, bias = random_logits(9, 24).requires_grad_(), torch.randn(24)

    def function(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        choices = torch.ops.zexpert.biased_topk_choices(logits, bias, 4, num_real_experts=16)
        weights, ids, zero, _ = torch.ops.zexpert.biased_topk(logits, bias, 4, choices, num_real_experts=16)
        return weights.sum(1) + 2 * zero, ids

    expected = function(logits, bias)
    expected_gradient = torch.autograd.grad(expected[0].sum(), logits)[0]
    for variant in (torch.compile(function, fullgraph=True), torch.jit.script(function)):
        actual = variant(logits, bias)
        assert_equal(actual[0], expected[0])
        assert_equal(actual[1], expected[1])
        assert_equal(torch.autograd.grad(actual[0].sum(), logits)[0], expected_gradient)


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_opcheck(num_tokens: int) -> None:
    logits, bias = random_logits(num_tokens, 12).requires_grad_(), torch.rand(12)
    routing = {"num_real_experts": 8, "num_constant_experts": 2}
    torch.library.opcheck(torch.ops.zexpert.biased_topk_choices.default, (logits, bias, 3), routing)
    choices = biased_topk_choices(logits, bias, 3, **routing)
    for op in (torch.ops.zexpert.biased_topk, torch.ops.zexpert.biased_topk_and_plan):
        torch.library.opcheck(op.default, (logits, bias, 3, choices), routing)
    upstream = (torch.rand(num_tokens, 3), torch.rand(num_tokens), torch.rand(num_tokens, 2))
    arguments = (*upstream, logits.detach(), None, 3, choices)
    torch.library.opcheck(torch.ops.zexpert.biased_topk_backward.default, arguments, routing)


def test_the_backward_keeps_the_choices_and_no_bias() -> None:
    logits, bias = random_logits(5, 12).requires_grad_(), torch.rand(12)
    choices = biased_topk_choices(logits, bias, 3, num_real_experts=8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        biased_topk(logits, bias, 3, num_real_experts=8, choices=choices)
    assert [tensor.data_ptr() for tensor in kept] == [logits.data_ptr(), choices.data_ptr()]
