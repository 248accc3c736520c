# SPDX-License-Identifier: Apache-2.0
"""biased_topk on a CUDA device: every specialised kernel on many rows, adversarial rows, graphs, streams, devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reference
from testing import assert_equal
from zexpert.ops import biased_topk

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)

SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Widths with kernels of their own, in between, and wider than those.
SPECIAL_WIDTHS = (128, 192, 256, 384, 512, 576, 768, 896, 1024)
OTHER_WIDTHS = (1, 5, 33, 100, 640, 1025, 8192)
LONGCAT = {"num_real_experts": 512, "routed_scaling_factor": 6.0}


def assert_selection(logits: Tensor, bias: Tensor | None, top_k: int, scoring_func: str) -> None:
    """All experts real. Passes if the chosen keys are the largest in float64 to within what float32 rounding can do to
    them, in order and without repetition, and if the weights are within twice plain PyTorch's error.

    On the device and row-parallel, so that it can look at very many rows; the op tests have the exact rules.
    """
    num_experts = logits.shape[1]
    weights, ids, _, _ = biased_topk(logits, bias, top_k, num_real_experts=num_experts, scoring_func=scoring_func)
    scores = reference.expert_scores(logits, scoring_func)
    keys = scores if bias is None else scores + bias.double()
    choosable = torch.isfinite(logits) & ~keys.isnan()
    keys = keys.masked_fill(~choosable, -torch.inf)
    filled = torch.arange(top_k, device=logits.device) < choosable.sum(1, keepdim=True)
    assert torch.equal(ids >= 0, filled)

    chosen = ids.clamp(min=0).long()
    largest, chosen_keys, chosen_scores = (
        keys.topk(top_k, dim=1).values,
        keys.gather(1, chosen),
        scores.gather(1, chosen),
    )
    eps = torch.finfo(torch.float32).eps
    units = torch.full_like(chosen_scores, 16.0)
    if scoring_func == "softmax":
        finite = logits.double().masked_fill(~torch.isfinite(logits), -torch.inf)
        units += (finite.amax(1, keepdim=True) - finite).gather(1, chosen).nan_to_num(0.0, 0.0, 0.0)
    slack = 2 * chosen_scores * eps * units + eps * largest.abs().nan_to_num(0.0, 0.0, 0.0) + 1e-37
    close = ((chosen_keys - largest).abs() <= slack) | (chosen_keys == largest) | ~filled
    assert bool(close.all()), f"{int((~close).any(1).sum())} rows with another choice"
    apart = torch.where(filled, chosen, -1 - torch.arange(top_k, device=logits.device)).sort(1).values.diff(dim=1)
    assert bool((apart != 0).all()), "an expert is chosen twice"

    plain = reference.expert_scores(logits, scoring_func, torch.float32).gather(1, chosen).double()
    plain_error = ((plain - chosen_scores).abs() * filled).max()
    error = (weights.double() - chosen_scores).abs() * filled
    allowed = 2 * plain_error + eps * chosen_scores + torch.finfo(torch.float32).smallest_normal
    assert bool((error <= allowed).all())
    assert bool((weights[~filled] == 0).all())


@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", SPECIAL_WIDTHS)
def test_many_random_rows(num_experts: int, dtype: torch.dtype, scoring_func: str) -> None:
    logits = (1.5 * torch.randn(100_000, num_experts, device="cuda")).to(dtype)
    bias = torch.randn(num_experts, device="cuda") * (1.0 / num_experts if scoring_func == "softmax" else 0.1)
    top_k = 8 if num_experts <= 256 else 12
    assert_selection(logits, None, top_k, scoring_func)
    assert_selection(logits, bias, top_k, scoring_func)
    if dtype != torch.float32 and scoring_func == "softmax":
        # Equal logits are frequent and unequal ones have unequal scores: the order is known exactly.
        order = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        assert_equal(biased_topk(logits, None, top_k, num_real_experts=num_experts).topk_ids, order.int())


@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_experts", SPECIAL_WIDTHS + OTHER_WIDTHS)
def test_masked_logits_and_every_kind_of_k(num_experts: int, dtype: torch.dtype, scoring_func: str) -> None:
    for top_k in (1, 2, 6, 16, 32, 64):
        if top_k > num_experts:
            continue
        logits = (1.5 * torch.randn(300, num_experts, device="cuda")).to(dtype)
        assert_selection(logits, None, top_k, scoring_func)
        for value in (torch.nan, torch.inf, -torch.inf):
            logits[torch.rand(300, num_experts, device="cuda") < 0.2] = value
        logits[:10] = torch.nan
        logits[10:60, 3:] = -torch.inf
        assert_selection(logits, torch.randn(num_experts, device="cuda"), top_k, scoring_func)


ADVERSARIAL: dict[str, Callable[[int], Tensor]] = {
    "zeros": lambda n: torch.zeros(64, n),
    "equal": lambda n: torch.full((64, n), 0.25),
    "sorted": lambda n: torch.linspace(3, -3, n).expand(64, n),
    "sorted the other way round": lambda n: torch.linspace(-3, 3, n).expand(64, n),
    "two levels": lambda n: torch.randint(0, 2, (500, n)).float(),
    "nine levels": lambda n: torch.randint(0, 9, (500, n)).float(),
    "forty levels": lambda n: torch.randint(0, 40, (500, n)) * 0.125,
    "one lane": lambda n: (torch.arange(n) % 32 == 7).float().expand(64, n),
}


@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_experts", SPECIAL_WIDTHS + OTHER_WIDTHS)
def test_ties_go_to_the_lower_expert(num_experts: int, dtype: torch.dtype, scoring_func: str) -> None:
    top_k = min(num_experts, 12)
    for name, make in ADVERSARIAL.items():
        logits = make(num_experts).to("cuda", dtype)
        order = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        result = biased_topk(logits, None, top_k, num_real_experts=num_experts, scoring_func=scoring_func)
        assert_equal(result.topk_ids, order.int(), name)


@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
@pytest.mark.parametrize("num_experts", [5, 128, 768, 2000])
def test_extreme_logits_and_biases(num_experts: int, scoring_func: str) -> None:
    top_k = min(num_experts, 12)
    for scale in (30.0, 1e3, 1e30, 1e38):
        logits = (scale * torch.randn(200, num_experts, device="cuda")).clamp(-3e38, 3e38)
        assert_selection(logits, None, top_k, scoring_func)
    huge = torch.zeros(64, num_experts, device="cuda")
    huge[:, num_experts // 2] = 80.0
    assert_selection(huge, None, top_k, scoring_func)
    for magnitude in (1e4, 3e38):
        bias = torch.where(torch.rand(num_experts, device="cuda") < 0.5, magnitude, -magnitude)
        assert_selection(torch.randn(200, num_experts, device="cuda"), bias, top_k, scoring_func)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", SPECIAL_WIDTHS + OTHER_WIDTHS[1:])
def test_a_row_alone_equals_the_row_among_many_bitwise(num_experts: int, dtype: torch.dtype) -> None:
    logits = (1.5 * torch.randn(1000, num_experts, device="cuda")).to(dtype)
    bias = 0.01 * torch.randn(num_experts, device="cuda")
    many = biased_topk(logits, bias, 3, num_real_experts=num_experts // 2 + 1, renormalize=True)
    again = biased_topk(logits, bias, 3, num_real_experts=num_experts // 2 + 1, renormalize=True)
    for token in (0, 1, 37, 999):
        one = biased_topk(logits[token : token + 1], bias, 3, num_real_experts=num_experts // 2 + 1, renormalize=True)
        for field, field_again, field_of_one in zip(many, again, one, strict=True):
            assert_equal(field, field_again)
            assert_equal(field_of_one[0], field[token])


def test_graph_capture_and_side_stream() -> None:
    logits = torch.randn(1000, 768, device="cuda")
    bias = torch.randn(768, device="cuda") / 768
    expected = biased_topk(logits, bias, 12, **LONGCAT)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = biased_topk(logits, bias, 12, **LONGCAT)
    stream.synchronize()

    placeholder = torch.randn_like(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = placeholder * 2.0  # a kernel right before, whose result the routing must wait for
        captured = biased_topk(doubled, bias, 12, **LONGCAT)
    placeholder.copy_(logits / 2.0)
    graph.replay()
    torch.cuda.synchronize()
    for field, field_beside, field_captured in zip(expected, beside, captured, strict=True):
        assert_equal(field_beside, field)
        assert_equal(field_captured, field)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_second_device() -> None:
    logits = torch.randn(100, 768, device="cuda:0")
    on_second = biased_topk(logits.to("cuda:1"), None, 12, **LONGCAT)
    assert on_second.topk_ids.device == torch.device("cuda:1")
    for field, field_on_first in zip(on_second, biased_topk(logits, None, 12, **LONGCAT), strict=True):
        assert_equal(field.to("cuda:0"), field_on_first)


def test_four_million_tokens() -> None:
    logits = torch.randn(1 << 22, 128, device="cuda", dtype=torch.bfloat16)
    result = biased_topk(logits, None, 8, num_real_experts=128)
    tail = biased_topk(logits[-1000:], None, 8, num_real_experts=128)
    for field, field_of_tail in zip(result, tail, strict=True):
        assert_equal(field[-1000:], field_of_tail)


def test_what_the_device_does_not_support_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"^logits must be float32, bfloat16 or float16 on CUDA, got float64"):
        biased_topk(torch.zeros(3, 8, device="cuda", dtype=torch.float64), None, 2, num_real_experts=8)
    with pytest.raises(RuntimeError, match=r"^logits must have at most 8192 columns on CUDA, got 8193"):
        biased_topk(torch.zeros(3, 8193, device="cuda"), None, 2, num_real_experts=8)
    with pytest.raises(RuntimeError, match=r"^bias must be on cuda:0 like logits, got cpu"):
        biased_topk(torch.zeros(3, 8, device="cuda:0"), torch.zeros(8), 2, num_real_experts=8)
