# SPDX-License-Identifier: Apache-2.0
"""biased_topk where the choice is delicate: ties, masked logits, exhausted rows, groups, extreme biases."""

from __future__ import annotations

import math

import pytest
import torch

from testing import FLOAT_DTYPES, assert_equal, assert_ids, assert_routing, random_logits
from zexpert.ops import biased_topk

pytestmark = pytest.mark.every_device("biased_topk")

SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")


@pytest.mark.cpu_paths
@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
@pytest.mark.parametrize("num_experts", [5, 96, 768])
def test_equal_keys_go_to_the_lower_index(num_experts: int, scoring_func: str) -> None:
    result = biased_topk(
        torch.full((3, num_experts), 0.25), None, 4, num_real_experts=num_experts, scoring_func=scoring_func
    )
    assert_equal(result.topk_ids, torch.arange(4, dtype=torch.int32).expand(3, 4))


@pytest.mark.cpu_paths
@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
@pytest.mark.parametrize("levels", [2, 3, 9])
def test_many_ties(levels: int, scoring_func: str) -> None:
    """A few distinct logits and biases: ties inside the choice and across its edge."""
    logits = torch.randint(0, levels, (40, 384)).float()
    bias = torch.randint(0, 2, (384,)).float()
    for given in (None, bias):
        routing = {"num_real_experts": 256, "scoring_func": scoring_func}
        result = biased_topk(logits, given, 12, **routing)
        # With a bias, equal keys of unequal logits are the rounding's to decide.
        share_decided = 1.0 if given is None else 0.0
        assert_ids(result.topk_ids, logits, given, 12, share_decided=share_decided, **routing)


def test_ties_of_low_precision_logits() -> None:
    logits = random_logits(100, 768, torch.bfloat16)
    result = biased_topk(logits, None, 12, num_real_experts=768)
    assert_routing(result, logits, None, 12, share_decided=1.0, num_real_experts=768)


@pytest.mark.cpu_paths
@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_masked_logits_are_never_chosen_and_count_nothing(dtype: torch.dtype, scoring_func: str) -> None:
    logits = random_logits(60, 96, dtype)
    for value in (math.nan, math.inf, -math.inf):
        logits[torch.rand(60, 96) < 0.2] = value
    routing = {"num_real_experts": 64, "scoring_func": scoring_func, "renormalize": True}
    result = biased_topk(logits, None, 6, **routing)
    for token, slot in (result.topk_ids >= 0).nonzero().tolist():
        assert math.isfinite(logits[token, result.topk_ids[token, slot]])
    assert_routing(result, logits, None, 6, share_decided=0.9, **routing)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("renormalize", [False, True])
def test_row_without_a_finite_logit(value: float, renormalize: bool) -> None:
    logits = random_logits(3, 24)
    logits[1] = value
    result = biased_topk(
        logits, None, 4, num_real_experts=16, num_constant_experts=2, num_identity_experts=6, renormalize=renormalize
    )
    assert_equal(result.topk_ids[1], torch.full((4,), -1, dtype=torch.int32))
    for weight in (result.topk_weights[1], result.zero_weight[1], result.constant_weight[1]):
        assert_equal(weight, torch.zeros_like(weight))
    alone = biased_topk(
        logits[[0, 2]],
        None,
        4,
        num_real_experts=16,
        num_constant_experts=2,
        num_identity_experts=6,
        renormalize=renormalize,
    )
    for with_garbage, without in zip(result, alone, strict=True):
        assert_equal(with_garbage[[0, 2]], without, "rows next to a garbage row")


@pytest.mark.cpu_paths
@pytest.mark.parametrize("choosable", [1, 2, 5])
def test_exhausted_rows_fill_up_with_no_work(choosable: int) -> None:
    logits = torch.full((10, 96), -math.inf)
    for token in range(10):
        logits[token, torch.randperm(96)[:choosable]] = torch.randn(choosable)
    routing = {"num_real_experts": 96, "renormalize": True}
    result = biased_topk(logits, None, 6, **routing)
    assert_routing(result, logits, None, 6, **routing)
    assert torch.equal((result.topk_ids >= 0).sum(1), torch.full((10,), choosable))
    torch.testing.assert_close(result.topk_weights.sum(1), torch.ones(10))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bias_that_is_not_finite(value: float) -> None:
    """A NaN key is never chosen; an infinite one is the first or the last choice."""
    logits = random_logits(20, 24)
    bias = 0.01 * torch.randn(24)
    bias[[3, 11, 20]] = value
    for top_k in (4, 24):
        result = biased_topk(logits, bias, top_k, num_real_experts=24)
        assert_routing(result, logits, bias, top_k, num_real_experts=24, share_decided=0.9)
        chosen = (result.topk_ids == 11).any(dim=1)
        expected = not math.isnan(value) and (value > 0 or top_k == 24)
        assert torch.equal(chosen, torch.full((20,), expected))


@pytest.mark.cpu_paths
@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
@pytest.mark.parametrize("magnitude", [1e4, 1e30, 3e38])
def test_extreme_biases(magnitude: float, scoring_func: str) -> None:
    """Scores vanish in such keys, which then tie as float32 rounds them; the weights stay the scores'."""
    logits = random_logits(40, 96)
    bias = magnitude * torch.where(torch.rand(96) < 0.5, 1.0, -1.0)
    routing = {"num_real_experts": 64, "scoring_func": scoring_func}
    result = biased_topk(logits, bias, 12, **routing)
    assert_routing(result, logits, bias, 12, share_decided=0.9, **routing)
    if magnitude > 1e4:
        ahead = (bias > 0).nonzero().flatten()[:12].to(torch.int32)
        assert_equal(result.topk_ids, torch.where(ahead < 64, ahead, -1).expand(40, 12))


@pytest.mark.parametrize("scoring_func", SCORING_FUNCS)
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_extreme_logits(scale: float, scoring_func: str) -> None:
    """Scores that underflow, saturate or grow: no NaN, and the reference's choice."""
    logits = scale * random_logits(40, 96)
    routing = {"num_real_experts": 64, "scoring_func": scoring_func, "renormalize": True}
    result = biased_topk(logits, None, 6, **routing)
    assert_routing(result, logits, None, 6, share_decided=0.0, **routing)
    for weight in result[:1] + result[2:]:
        assert bool(torch.isfinite(weight).all())


@pytest.mark.cpu_paths
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("num_real_experts", "num_zero_experts", "num_expert_group", "topk_group", "top_k"),
    # Groups of one, of two, of odd size; one group eligible; all groups eligible; more slots than eligible experts.
    [(8, 0, 8, 3, 3), (16, 4, 8, 1, 4), (51, 13, 3, 2, 8), (64, 32, 8, 8, 6), (256, 128, 8, 4, 12), (24, 2, 12, 1, 6)],
)
def test_groups(
    num_real_experts: int,
    num_zero_experts: int,
    num_expert_group: int,
    topk_group: int,
    top_k: int,
    renormalize: bool,
) -> None:
    logits = random_logits(60, num_real_experts + num_zero_experts)
    bias = 0.2 * torch.randn(num_real_experts + num_zero_experts)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        routing = {
            "num_real_experts": num_real_experts,
            "scoring_func": "sigmoid",
            "renormalize": renormalize,
            "num_expert_group": num_expert_group,
            "topk_group": topk_group,
        }
        result = biased_topk(logits.to(dtype), bias, top_k, **routing)
        assert_routing(result, logits.to(dtype), bias, top_k, share_decided=0.9, **routing)


def test_zero_experts_are_eligible_whatever_the_groups() -> None:
    """The zero experts have the largest keys by far, and only one group of real experts is eligible."""
    logits = random_logits(30, 24)
    logits[:, 16:] += 20.0
    result = biased_topk(logits, None, 10, num_real_experts=16, num_expert_group=4, topk_group=1)
    assert bool((result.topk_ids[:, :8] == -1).all())
    groups = result.topk_ids[:, 8:] // 4
    assert bool((groups == groups[:, :1]).all())
    assert bool((groups >= 0).all())


def test_groups_with_masked_members() -> None:
    logits = random_logits(60, 48)
    logits[torch.rand(60, 48) < 0.6] = math.nan
    routing = {"num_real_experts": 32, "scoring_func": "sigmoid", "num_expert_group": 8, "topk_group": 2}
    result = biased_topk(logits, None, 8, **routing)
    assert_routing(result, logits, None, 8, share_decided=0.9, **routing)


def test_drop_before_renormalize_takes_the_drop_experts_out_of_the_sum() -> None:
    logits = random_logits(50, 12)
    kinds = {"num_real_experts": 4, "num_identity_experts": 2, "num_constant_experts": 2, "renormalize": True}
    kept = biased_topk(logits, None, 5, drop_before_renormalize=True, **kinds)
    total = kept.topk_weights.sum(1) + kept.zero_weight + kept.constant_weight.sum(1)
    torch.testing.assert_close(total, torch.ones(50))
    lost = biased_topk(logits, None, 5, **kinds)
    total = lost.topk_weights.sum(1) + lost.zero_weight + lost.constant_weight.sum(1)
    assert bool((total <= 1.0 + 1e-6).all())
    assert bool((total < 0.99).any())


def test_only_drop_experts_chosen_leaves_nothing_to_divide() -> None:
    logits = torch.tensor([[0.0, 0.0, 9.0, 8.0]])
    result = biased_topk(
        logits,
        None,
        2,
        num_real_experts=2,
        num_identity_experts=0,
        renormalize=True,
        drop_before_renormalize=True,
    )
    assert_equal(result.topk_weights, torch.zeros(1, 2))
    assert_equal(result.topk_ids, torch.full((1, 2), -1, dtype=torch.int32))
    assert_equal(result.zero_weight, torch.zeros(1))
