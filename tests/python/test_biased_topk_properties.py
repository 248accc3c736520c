# SPDX-License-Identifier: Apache-2.0
"""What holds for every routing, tried on routings and logits that hypothesis makes up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from testing import assert_equal, assert_ids
from zexpert.ops import biased_topk

# Few values, so that ties and masked entries are frequent; bounded, so that no score underflows.
LOGITS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, math.nan, math.inf, -math.inf]),
    st.floats(-8.0, 8.0, width=32),
)


@dataclass
class Case:
    logits: Tensor
    bias: Tensor | None
    top_k: int
    routing: dict[str, object]

    def route(self, logits: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return biased_topk(self.logits if logits is None else logits, self.bias, self.top_k, **self.routing)

    @property
    def num_drop(self) -> int:
        counted = sum(int(self.routing[f"num_{kind}_experts"]) for kind in ("real", "identity", "constant"))  # type: ignore[call-overload]
        return self.logits.shape[1] - counted


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_expert_group = draw(st.integers(1, 4))
    num_real = num_expert_group * draw(st.sampled_from([1, 2, 3, 6, 17]))  # 17: more than a vector
    num_identity, num_constant, num_drop = (draw(st.integers(0, 4)) for _ in range(3))
    num_experts = num_real + num_identity + num_constant + num_drop
    top_k = draw(st.integers(1, min(num_experts, 64)))
    num_tokens = draw(st.integers(1, 4))
    values = draw(st.lists(LOGITS, min_size=num_tokens * num_experts, max_size=num_tokens * num_experts))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    bias = draw(st.none() | st.lists(st.floats(-1.0, 1.0, width=32), min_size=num_experts, max_size=num_experts))
    renormalize = draw(st.booleans())
    return Case(
        torch.tensor(values).reshape(num_tokens, num_experts).to(dtype),
        None if bias is None else torch.tensor(bias),
        top_k,
        {
            "num_real_experts": num_real,
            "num_identity_experts": num_identity,
            "num_constant_experts": num_constant,
            "scoring_func": draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
            "renormalize": renormalize,
            "drop_before_renormalize": renormalize and num_drop > 0 and draw(st.booleans()),
            "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 6.0])),
            "num_expert_group": num_expert_group,
            "topk_group": draw(st.integers(1, num_expert_group)),
        },
    )


def total_weight(result: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    topk_weights, _, zero_weight, constant_weight = (field.double() for field in result)
    return topk_weights.sum(1) + zero_weight + constant_weight.sum(1)


@given(cases())
def test_agrees_with_the_reference(case: Case) -> None:
    """Ids exactly; weights closely, as the error rule needs the plain error of more rows than these."""
    result = case.route()
    decided, expected = assert_ids(result[1], case.logits, case.bias, case.top_k, share_decided=0.0, **case.routing)
    for index in (0, 2, 3):
        torch.testing.assert_close(result[index][decided].double(), expected[index][decided], rtol=1e-5, atol=1e-30)


@given(cases())
def test_ids_are_unique_and_of_real_experts_with_finite_logits(case: Case) -> None:
    result = case.route()
    for token, ids in enumerate(result[1].tolist()):
        real = [expert for expert in ids if expert != -1]
        assert len(set(real)) == len(real)
        assert all(0 <= expert < case.routing["num_real_experts"] for expert in real)
        assert all(math.isfinite(case.logits[token, expert]) for expert in real)


@given(cases())
def test_weights_are_finite_and_none_is_negative(case: Case) -> None:
    topk_weights, topk_ids, zero_weight, constant_weight = case.route()
    for weight in (topk_weights, zero_weight, constant_weight):
        assert bool(torch.isfinite(weight).all())
        assert bool((weight >= 0).all())
    assert bool((topk_weights[topk_ids == -1] == 0).all())


@given(cases())
def test_weights_sum_as_they_must(case: Case) -> None:
    result = case.route()
    total = total_weight(result) / float(case.routing["routed_scaling_factor"])  # type: ignore[arg-type]
    if case.routing["renormalize"] or case.routing["scoring_func"] == "softmax":
        assert bool((total <= 1.0 + 1e-5).all())
    if case.routing["renormalize"] and (case.num_drop == 0 or case.routing["drop_before_renormalize"]):
        # All of the weight is there, unless nothing but drop experts was chosen.
        nothing = total == 0.0
        torch.testing.assert_close(total[~nothing], torch.ones_like(total[~nothing]), rtol=1e-5, atol=0.0)
        assert bool((result[1][nothing] == -1).all())


@given(cases(), st.randoms())
def test_permuting_tokens_permutes_results(case: Case, random: st.random.random.Random) -> None:  # type: ignore[name-defined]
    order = list(range(case.logits.shape[0]))
    random.shuffle(order)
    for permuted, field in zip(case.route(case.logits[order]), case.route(), strict=True):
        assert_equal(permuted, field[order])


@given(cases())
def test_one_token_equals_the_token_among_many(case: Case) -> None:
    many = case.route()
    for token in range(case.logits.shape[0]):
        for one, field in zip(case.route(case.logits[token : token + 1]), many, strict=True):
            assert_equal(one[0], field[token])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@given(case=cases())
def test_masked_experts_might_as_well_not_be_there(case: Case, value: float) -> None:
    """How a logit is masked makes no difference."""
    masked = ~torch.isfinite(case.logits)
    for field, other in zip(case.route(case.logits.masked_fill(masked, value)), case.route(), strict=True):
        assert_equal(field, other)
