# SPDX-License-Identifier: Apache-2.0
"""The auxiliary losses against their formulas, written out, and what minimising them does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zexpert import FusedMoE
from zexpert.telemetry import track_routing
from zexpert.training import group_loss, switch_loss

NUM_REAL, NUM_ZERO, TOP_K = 8, 4, 3


def probabilities(logits: Tensor, scoring_func: str) -> list[list[float]]:
    """Rows of probabilities over the experts."""
    score = {
        "softmax": math.exp,
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "sqrtsoftplus": lambda x: math.sqrt(math.log1p(math.exp(x))),
    }[scoring_func]
    rows = [[score(x) for x in row] for row in logits.tolist()]
    return [[value / sum(row) for value in row] for row in rows]


def case(num_tokens: int = 20, num_zero: int = NUM_ZERO, seed: int = 0) -> tuple[Tensor, list[list[int]]]:
    """(logits, the experts each token chose)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, NUM_REAL + num_zero, generator=generator, dtype=torch.float64)
    return logits, (logits + 0.5).topk(TOP_K, dim=1).indices.tolist()


def load_of(choices: list[list[int]]) -> Tensor:
    return torch.tensor([sum(row.count(expert) for row in choices) for expert in range(NUM_REAL)])


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_group_loss(num_groups: int, scoring_func: str) -> None:
    logits, choices = case()
    target = 1.75
    rows = probabilities(logits, scoring_func)
    size = NUM_REAL // num_groups
    expected = 0.0
    for group in range(num_groups):
        members = range(group * size, (group + 1) * size)
        slots = sum(1 for row in choices for expert in row if expert in members)
        frequency = num_groups / (target * len(rows)) * slots
        expected += frequency * sum(row[expert] for row in rows for expert in members) / len(rows)
    members = range(NUM_REAL, NUM_REAL + NUM_ZERO)
    slots = sum(1 for row in choices for expert in row if expert in members)
    frequency = slots / ((TOP_K - target) * len(rows))
    expected += frequency * sum(row[expert] for row in rows for expert in members) / len(rows)

    loss = group_loss(
        logits,
        load_of(choices),
        len(rows),
        TOP_K,
        target_ffn_experts=target,
        num_groups=num_groups,
        scoring_func=scoring_func,
    )
    assert float(loss) == pytest.approx(expected)
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_group_loss_with_one_group_is_zedas(weight: float) -> None:
    """L = (N + w Z) / K * (f_E P_E / N + f_Z P_Z / (w Z)), arXiv 2605.18643."""
    logits, choices = case()
    rows = probabilities(logits, "softmax")
    slots = sum(1 for row in choices for expert in row if expert < NUM_REAL) / len(rows)
    real = sum(sum(row[:NUM_REAL]) for row in rows) / len(rows)
    total = NUM_REAL + weight * NUM_ZERO
    expected = total / TOP_K * (slots * real / NUM_REAL + (TOP_K - slots) * (1 - real) / (weight * NUM_ZERO))
    loss = group_loss(logits, load_of(choices), len(rows), TOP_K, target_ffn_experts=TOP_K * NUM_REAL / total)
    assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize("num_zero", [0, NUM_ZERO])
def test_switch_loss(num_zero: int) -> None:
    logits, choices = case(num_zero=num_zero)
    rows = probabilities(logits, "softmax")
    num_experts = NUM_REAL + num_zero
    slots = [float(sum(row.count(expert) for row in choices)) for expert in range(num_experts)]
    if num_zero:
        slots[NUM_REAL:] = [sum(slots[NUM_REAL:]) / num_zero] * num_zero
    expected = num_experts * sum(
        slots[expert] / (TOP_K * len(rows)) * sum(row[expert] for row in rows) / len(rows)
        for expert in range(num_experts)
    )
    assert float(switch_loss(logits, load_of(choices), len(rows), TOP_K)) == pytest.approx(expected)


def test_losses_are_1_where_all_is_even() -> None:
    logits = torch.zeros(6, NUM_REAL + NUM_ZERO)
    # 3 slots per token, 2 of them on real experts: 12 slots, spread evenly.
    load = torch.full((NUM_REAL,), 1.5)
    for num_groups in (1, 4):
        loss = group_loss(logits, load, 6, TOP_K, target_ffn_experts=2.0, num_groups=num_groups)
        assert float(loss) == pytest.approx(1.0)
    assert float(switch_loss(logits, load, 6, TOP_K)) == pytest.approx(1.0)


def test_load_may_be_of_other_tokens_than_the_logits() -> None:
    logits, choices = case()
    load = load_of(choices)
    for loss in (lambda *arguments: group_loss(*arguments, target_ffn_experts=2.0), switch_loss):
        assert float(loss(logits, 5 * load, 5 * 20, TOP_K)) == pytest.approx(float(loss(logits, load, 20, TOP_K)))
        assert float(loss(logits.view(4, 5, -1), load, torch.tensor(20), TOP_K)) == pytest.approx(
            float(loss(logits, load, 20, TOP_K))
        )


def test_without_tokens() -> None:
    logits = torch.zeros(0, 12, requires_grad=True)
    load = torch.zeros(8, dtype=torch.int64)
    for loss in (group_loss(logits, load, 0, TOP_K, target_ffn_experts=2.0), switch_loss(logits, load, 0, TOP_K)):
        assert float(loss.detach()) == 0.0
        loss.backward()


def test_gradients() -> None:
    logits, choices = case(num_tokens=5)
    load = load_of(choices)
    logits.requires_grad_()
    for scoring_func in ("softmax", "sigmoid", "sqrtsoftplus"):
        assert torch.autograd.gradcheck(
            lambda x, scoring_func=scoring_func: (
                group_loss(x, load, 5, TOP_K, target_ffn_experts=2.0, num_groups=2, scoring_func=scoring_func)
                + switch_loss(x, load, 5, TOP_K, scoring_func=scoring_func)
            ),
            (logits,),
        )
    even = torch.full((NUM_REAL,), 5 * 2 / NUM_REAL)
    group_loss(logits, even, 5, TOP_K, target_ffn_experts=2.0).backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits))  # at the target nothing pulls


def test_low_precision_logits_are_taken_in_float32() -> None:
    logits, choices = case()
    loss = switch_loss(logits.bfloat16(), load_of(choices), 20, TOP_K)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(switch_loss(logits.bfloat16().double(), load_of(choices), 20, TOP_K)))


@pytest.mark.parametrize("target", [1.0, 2.5])
def test_group_loss_moves_the_mean_to_its_target(target: float) -> None:
    """A router trained on the loss alone, with the counts of its own layer."""
    layer = FusedMoE(
        NUM_REAL, TOP_K, 16, 8, zero_expert_type="identity", zero_expert_num=NUM_ZERO, routed_scaling_factor=1.0
    )
    classifier = torch.nn.Linear(16, NUM_REAL + NUM_ZERO, bias=False)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.02)
    stats = track_routing(layer)[""]
    tokens = torch.randn(512, 16) + 1.0
    for _ in range(200):
        stats.reset()
        logits = classifier(tokens)
        with torch.no_grad():
            layer(tokens, logits)
        loss = group_loss(logits, stats.expert_load, stats.num_tokens, TOP_K, target_ffn_experts=target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(stats.mean_ffn_slots) == pytest.approx(target, rel=0.05)


def test_arguments_out_of_range() -> None:
    logits, choices = case()
    load = load_of(choices)
    for loss in (lambda *arguments: group_loss(*arguments, target_ffn_experts=2.0), switch_loss):
        for arguments, message in (
            ((logits[0], load, 20, TOP_K), r"router_logits must be floating point of shape \[..., experts\]"),
            ((logits.long(), load, 20, TOP_K), "router_logits must be floating point"),
            ((logits, load[None], 20, TOP_K), "expert_load must have one entry per real expert"),
            ((logits, torch.zeros(13), 20, TOP_K), r"at most 12, got shape \[13\]"),
            ((logits, load, 20, 13), r"top_k must be between 1 and the number of experts \(12\), got 13"),
        ):
            with pytest.raises(ValueError, match=message):
                loss(*arguments)
    with pytest.raises(ValueError, match="columns for zero experts after the 12 real ones"):
        group_loss(logits, torch.zeros(12), 20, TOP_K, target_ffn_experts=2.0)
    for target in (0.0, 3.0, 4.0):
        with pytest.raises(ValueError, match=r"must be above 0 and below top_k \(3\)"):
            group_loss(logits, load, 20, TOP_K, target_ffn_experts=target)
    with pytest.raises(ValueError, match=r"num_groups must divide the number of real experts \(8\), got 3"):
        group_loss(logits, load, 20, TOP_K, target_ffn_experts=2.0, num_groups=3)
    for losses_input in ((None, torch.ones(8)), (torch.randn(4, 12), [1] * 8)):
        with pytest.raises(ValueError, match=r"^(router_logits|expert_load) must be a tensor, got (NoneType|list)$"):
            switch_loss(*losses_input, 4, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='scoring_func must be "softmax"'):
        switch_loss(logits, load, 20, TOP_K, scoring_func="tanh")


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_logits_far_below_zero_have_finite_gradients(scoring_func: str) -> None:
    logits = torch.tensor([[-200.0, 1.0, 0.5, -1e4], [-300.0, -300.0, -400.0, -500.0]], requires_grad=True)
    load = torch.tensor([1, 1, 2])
    loss = switch_loss(logits, load, 2, 2, scoring_func=scoring_func)
    loss = loss + group_loss(logits, load, 2, 2, target_ffn_experts=1.0, scoring_func=scoring_func)
    loss.backward()
    assert bool(loss.isfinite())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
