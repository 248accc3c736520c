# SPDX-License-Identifier: Apache-2.0
"""biased_topk against the reference: every dtype, scoring function and kind of expert, at the models' shapes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from testing import FLOAT_DTYPES, assert_equal, assert_routing, random_logits, unchanged, weight_dtype
from zexpert.ops import RoutingResult, biased_topk

pytestmark = pytest.mark.every_device("biased_topk")


@dataclass(frozen=True)
class Model:
    name: str
    num_experts: int
    top_k: int
    has_bias: bool
    routing: dict[str, object] = field(default_factory=dict)


MODELS = [
    Model("LongCat-Flash", 768, 12, True, {"num_real_experts": 512, "routed_scaling_factor": 6.0}),
    Model("LongCat-Flash-Lite", 384, 12, True, {"num_real_experts": 256}),
    Model("LongCat-2", 896, 12, True, {"num_real_experts": 768}),
    Model(
        "MoE++",
        5,
        2,
        False,
        {
            "num_real_experts": 2,
            "num_identity_experts": 1,
            "num_constant_experts": 1,
            "renormalize": True,
            "drop_before_renormalize": True,
        },
    ),
    Model("ZEDA-Qwen3", 192, 8, False, {"num_real_experts": 128, "num_identity_experts": 0, "renormalize": True}),
    Model(
        "ZEDA-GLM",
        96,
        4,
        True,
        {
            "num_real_experts": 64,
            "num_identity_experts": 0,
            "scoring_func": "sigmoid",
            "renormalize": True,
            "routed_scaling_factor": 1.8,
            "num_expert_group": 8,
            "topk_group": 3,
        },
    ),
    Model(
        "DeepSeek-V3",
        256,
        8,
        True,
        {
            "num_real_experts": 256,
            "scoring_func": "sigmoid",
            "renormalize": True,
            "routed_scaling_factor": 2.5,
            "num_expert_group": 8,
            "topk_group": 4,
        },
    ),
    Model("sqrtsoftplus", 96, 6, True, {"num_real_experts": 64, "scoring_func": "sqrtsoftplus", "renormalize": True}),
    Model(
        "every-kind",
        97,
        16,
        True,
        {"num_real_experts": 40, "num_identity_experts": 20, "num_constant_experts": 17, "renormalize": True},
    ),
    Model("negative-scale", 96, 7, False, {"num_real_experts": 33, "routed_scaling_factor": -1.5}),
]
model_cases = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def bias_for(model: Model) -> torch.Tensor | None:
    """Of the size of the scores, so that it changes the choice and does not make it."""
    if not model.has_bias:
        return None
    scale = 0.3 if "scoring_func" in model.routing else 1.0 / model.num_experts
    return scale * torch.randn(model.num_experts)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@model_cases
def test_models(model: Model, dtype: torch.dtype) -> None:
    logits = random_logits(100, model.num_experts, dtype)
    bias = bias_for(model)
    with unchanged(logits, bias):
        result = biased_topk(logits, bias, model.top_k, **model.routing)
    assert_routing(result, logits, bias, model.top_k, share_decided=0.96, **model.routing)


@model_cases
def test_nearly_all_rows_are_decided(model: Model) -> None:
    """What test_models asserts on decided rows holds on at least 99 in 100 rows."""
    logits = random_logits(500, model.num_experts)
    bias = bias_for(model)
    result = biased_topk(logits, bias, model.top_k, **model.routing)
    assert_routing(result, logits, bias, model.top_k, share_decided=0.99, **model.routing)


@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@model_cases
def test_few_tokens(model: Model, dtype: torch.dtype) -> None:
    """None, one, an odd few: the error rule needs the plain error of many rows, so these equal many's bitwise."""
    logits = random_logits(30, model.num_experts, dtype)
    bias = bias_for(model)
    many = biased_topk(logits, bias, model.top_k, **model.routing)
    assert_routing(many, logits, bias, model.top_k, share_decided=0.9, **model.routing)
    for num_tokens in (0, 1, 7):
        few = biased_topk(logits[:num_tokens], bias, model.top_k, **model.routing)
        assert isinstance(few, RoutingResult)
        assert few.zero_weight.shape == (num_tokens,)
        assert few.constant_weight.shape == (num_tokens, model.routing.get("num_constant_experts", 0))
        for one, other in zip(few, many, strict=True):
            assert_equal(one, other[:num_tokens])


@pytest.mark.cpu_paths
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize(
    ("num_experts", "num_real_experts", "top_k"),
    # One expert; every width around a vector of any instruction set; all experts chosen; the largest K; the widest.
    [
        (1, 1, 1),
        (5, 5, 5),
        (7, 3, 7),
        (15, 8, 3),
        (17, 16, 4),
        (33, 1, 33),
        (65, 64, 64),
        (130, 100, 64),
        (4096, 4000, 64),
    ],
)
def test_odd_sizes(num_experts: int, num_real_experts: int, top_k: int, scoring_func: str) -> None:
    logits = random_logits(8 if num_experts == 4096 else 20, num_experts)
    routing = {"num_real_experts": num_real_experts, "scoring_func": scoring_func}
    result = biased_topk(logits, None, top_k, **routing)
    # Among 64 of 4096 the gaps are so small that rounding has a say in some rows.
    assert_routing(result, logits, None, top_k, share_decided=0.5 if num_experts == 4096 else 0.9, **routing)


@pytest.mark.parametrize("bias_dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bias_of_every_dtype(dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    logits = random_logits(30, 96, dtype)
    bias = (0.01 * torch.randn(96)).to(bias_dtype)
    result = biased_topk(logits, bias, 6, num_real_experts=64)
    assert_routing(result, logits, bias, 6, share_decided=0.9, num_real_experts=64)


def test_ids_of_64_bits() -> None:
    logits = random_logits(50, 384)
    narrow = biased_topk(logits, None, 12, num_real_experts=256)
    wide = biased_topk(logits, None, 12, num_real_experts=256, indices_dtype=torch.int64)
    assert narrow.topk_ids.dtype == torch.int32
    assert_equal(wide.topk_ids, narrow.topk_ids.long())
    assert_equal(wide.topk_weights, narrow.topk_weights)


def test_bias_decides_the_choice_and_nothing_else() -> None:
    logits = random_logits(40, 96)
    bias = torch.zeros(96)
    bias[[5, 90]] = 100.0
    result = biased_topk(logits, bias, 2, num_real_experts=64)
    scores = torch.softmax(logits.double(), dim=1)
    assert_equal(result.topk_ids.sort(dim=1).values, torch.tensor([[-1, 5]] * 40, dtype=torch.int32))
    torch.testing.assert_close(result.topk_weights.double().sum(1), scores[:, 5], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(result.zero_weight.double(), scores[:, 90], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_one_row_equals_the_row_among_many_bitwise(dtype: torch.dtype) -> None:
    logits = random_logits(37, 771, dtype)
    routing = {"num_real_experts": 512, "num_identity_experts": 200, "num_constant_experts": 3, "renormalize": True}
    many = biased_topk(logits, None, 12, **routing)
    for token in range(37):
        one = biased_topk(logits[token : token + 1], None, 12, **routing)
        for field_of_one, field_of_many in zip(one, many, strict=True):
            assert_equal(field_of_one[0], field_of_many[token])


def test_number_of_threads_changes_nothing() -> None:
    logits = random_logits(1000, 768)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = biased_topk(logits, None, 12, num_real_experts=512)
        torch.set_num_threads(3)
        parallel = biased_topk(logits, None, 12, num_real_experts=512)
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(serial, parallel, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_results_are_float32_or_float64(dtype: torch.dtype) -> None:
    result = biased_topk(random_logits(3, 8, dtype), None, 2, num_real_experts=5, num_constant_experts=1)
    assert result.topk_weights.dtype == result.zero_weight.dtype == result.constant_weight.dtype == weight_dtype(dtype)
