# SPDX-License-Identifier: Apache-2.0
"""RoutingStats: counts of what routing did, in every way a layer runs."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layer_cases import make_inputs, make_layer
from testing import assert_equal
from zexpert import FusedMoE, ops
from zexpert.telemetry import RoutingStats, collect_routing_stats, moe_runners, track_routing

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")


def counted(topk_ids: Tensor, num_experts: int, stats: RoutingStats | None = None) -> RoutingStats:
    stats = stats or RoutingStats(num_experts, topk_ids.shape[1])
    stats(topk_ids, ops.moe_plan(topk_ids, num_experts).expert_offsets)
    return stats


def random_ids(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """No expert twice in a row; about a third of the slots do no work."""
    keys = torch.rand(num_tokens, num_experts + num_experts // 2)
    ids = keys.topk(top_k, dim=1).indices
    return torch.where(ids < num_experts, ids, -1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts_and_what_they_say(dtype: torch.dtype) -> None:
    ids = random_ids(50, 4, 9, dtype)
    stats = counted(ids, 9)
    works = ids >= 0
    load = [int((ids == expert).sum()) for expert in range(9)]
    histogram = [int((works.sum(dim=1) == slots).sum()) for slots in range(5)]
    shares = [count / sum(load) for count in load]
    entropy = -sum(share * math.log(share) for share in shares if share)
    assert stats.as_dict() == {
        "num_tokens": 50,
        "mean_ffn_slots": pytest.approx(sum(load) / 50),
        "zero_rate": pytest.approx(1 - sum(load) / 200),
        "load_imbalance": pytest.approx(max(load) / (sum(load) / 9)),
        "load_entropy": pytest.approx(entropy),
        "normalized_load_entropy": pytest.approx(entropy / math.log(9)),
        "ffn_slots_histogram": histogram,
        "expert_load": load,
    }
    json.dumps(stats.as_dict())
    assert f"num_tokens=50, mean_ffn_slots={sum(load) / 50:.3f}" in repr(stats)


def test_even_and_lopsided_loads() -> None:
    even = counted(torch.arange(8).reshape(4, 2), 8)
    assert float(even.load_imbalance) == 1.0
    assert float(even.normalized_load_entropy) == pytest.approx(1.0)
    assert float(even.zero_rate) == 0.0
    lopsided = counted(torch.tensor([[3, -1], [3, -1]]), 8)
    assert float(lopsided.load_imbalance) == 8.0
    assert float(lopsided.load_entropy) == 0.0
    assert float(lopsided.zero_rate) == 0.5
    assert float(counted(torch.zeros(3, 1, dtype=torch.int32), 1).normalized_load_entropy) == 1.0


def test_without_tokens_or_load() -> None:
    stats = counted(torch.zeros(0, 3, dtype=torch.int32), 4)
    assert int(stats.num_tokens) == 0
    assert all(math.isnan(float(value)) for value in (stats.mean_ffn_slots, stats.zero_rate, stats.load_imbalance))
    assert repr(stats) == "RoutingStats(num_experts=4, top_k=3, num_tokens=0)"
    idle = counted(torch.full((5, 3), -1), 4)
    assert float(idle.zero_rate) == 1.0
    assert math.isnan(float(idle.load_imbalance))
    assert repr(RoutingStats(4, 3).to("meta")) == "RoutingStats(num_experts=4, top_k=3)"


def test_reset_clone_and_merge() -> None:
    first, second = random_ids(20, 3, 6), random_ids(30, 3, 6)
    stats = counted(first, 6)
    copied = stats.clone()
    counted(second, 6, stats)
    together = copied.clone().merge(counted(second, 6))
    assert stats.as_dict() == together.as_dict() == counted(torch.cat((first, second)), 6).as_dict()
    assert copied.as_dict() == counted(first, 6).as_dict()
    load = stats.expert_load
    stats.reset()
    assert int(stats.num_tokens) == 0
    assert stats.expert_load is load
    for other in (RoutingStats(7, 3), RoutingStats(6, 2)):
        with pytest.raises(ValueError, match="other must count 6 experts and 3 slots"):
            stats.merge(other)
    assert copied.all_reduced().as_dict() == copied.as_dict()


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        RoutingStats(0, 3)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        RoutingStats(3, 0)


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("kind", ["identity", "mixed", "plain"])
def test_a_layer_counts_what_its_router_chose(kind: str, chunk_size: int | None) -> None:
    layer = make_layer(kind, chunk_size=chunk_size)
    hidden_states, router_logits = make_inputs(kind, num_tokens=23)
    expected = layer(hidden_states, router_logits)
    stats = track_routing(layer)[""]
    assert_equal(layer(hidden_states, router_logits), expected)
    ids = layer.router.select_experts(hidden_states, router_logits).topk_ids
    once = counted(ids, layer.num_experts)
    assert stats.as_dict() == once.as_dict()

    scripted = torch.jit.script(layer)
    assert_equal(scripted(hidden_states, router_logits), expected)
    twice = once.clone().merge(once)
    assert stats.as_dict() == twice.as_dict()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(hidden_states, router_logits), expected)
    assert stats.as_dict() == twice.merge(once).as_dict()

    track_routing(layer, enabled=False)
    assert collect_routing_stats(layer) == {}
    assert_equal(layer(hidden_states, router_logits), expected)
    assert stats.as_dict() == twice.as_dict()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"moe": make_layer("identity")}) for _ in range(2))
        self.head = nn.Linear(3, 3)


def test_names_of_a_models_layers() -> None:
    model = Model()
    assert collect_routing_stats(model) == {}
    stats = track_routing(model)
    assert list(stats) == ["layers.0.moe", "layers.1.moe"]
    assert list(moe_runners(model)) == list(stats)
    hidden_states, router_logits = make_inputs("identity", 12)
    model.layers[1]["moe"](hidden_states, router_logits)
    assert [int(layer.num_tokens) for layer in stats.values()] == [0, hidden_states.shape[0]]
    assert track_routing(model) == stats  # a second call keeps the counts
    assert list(track_routing(model.layers[0]["moe"].runner)) == [""]


def test_stats_stay_out_of_the_state_dict_and_move_with_the_model() -> None:
    model = Model()
    names = list(model.state_dict())
    stats = track_routing(model)
    assert list(model.state_dict()) == names
    model.load_state_dict(Model().state_dict())
    model.to(torch.bfloat16)
    assert stats["layers.0.moe"].expert_load.dtype == torch.int64
    copied = copy.deepcopy(model)
    assert collect_routing_stats(copied)["layers.0.moe"] is not stats["layers.0.moe"]
    meta = track_routing(FusedMoE(4, 2, 8, 8, device="meta", e_score_correction_bias=torch.zeros(4, device="meta")))
    assert meta[""].expert_load.is_meta
    assert "RoutingStats" in repr(model)


@torch.no_grad()
def test_an_expert_map_counts_physical_experts() -> None:
    layer = FusedMoE(6, 2, 8, 8)
    replicas = torch.tensor([[0, 5], [1, -1], [2, -1], [3, -1]])
    layer.runner.router = type(layer.router)(2, 4)
    layer.router.set_expert_map(replicas)
    stats = track_routing(layer)[""]
    assert stats.num_experts == 6
    layer(torch.randn(40, 8), torch.randn(40, 4) + torch.tensor([2.0, 0.0, 0.0, 0.0]))
    assert int(stats.expert_load.sum()) == 80
    assert int(stats.expert_load[4]) == 0
    assert int(stats.expert_load[5]) > 0


def test_counting_in_training_leaves_gradients_alone() -> None:
    layer = make_layer("identity")
    hidden_states, router_logits = make_inputs("identity", 12)
    track_routing(layer)
    out = layer(hidden_states, router_logits.requires_grad_())
    assert out.requires_grad
    stats = collect_routing_stats(layer)[""]
    assert not stats.expert_load.requires_grad


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_counts_of_eval_mode_are_kept_apart(chunk_size: int | None) -> None:
    layer = make_layer("identity", chunk_size=chunk_size)
    inputs = make_inputs("identity", 23)
    stats = track_routing(layer.eval())[""]
    layer(*inputs)
    load = stats.expert_load.clone()
    assert int(stats.num_tokens) == int(stats.evaluation_tokens) == 23
    assert int(stats.num_training_tokens) == int(stats.training_load.sum()) == 0
    layer.train()
    for _ in range(2):
        layer(*inputs)
    assert int(stats.num_tokens) == 69
    assert int(stats.num_training_tokens) == 46
    assert_equal(stats.training_load, 2 * load)
    assert_equal(stats.expert_load, 3 * load)
    for other in (stats.clone(), stats.all_reduced(), RoutingStats(stats.num_experts, stats.top_k).merge(stats)):
        assert_equal(other.training_load, 2 * load)
        assert int(other.num_training_tokens) == 46

    torch.compiler.reset()  # other tests compile the same forward: past a number of variants PyTorch gives up
    scripted = torch.jit.script(layer)
    stats.reset()
    scripted.eval()(*inputs)
    assert int(stats.num_training_tokens) == 0
    scripted.train()(*inputs)
    compiled = torch.compile(layer, fullgraph=True)
    compiled(*inputs)
    layer.eval()
    compiled(*inputs)
    assert int(stats.num_tokens) == 4 * 23
    assert_equal(stats.training_load, 2 * load)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_counts_once(use_reentrant: bool) -> None:
    layer = make_layer("identity", recompute=True)
    stats = track_routing(layer)[""]
    hidden_states, router_logits = make_inputs("identity", 23)
    layer(hidden_states, router_logits)
    once = stats.as_dict()
    stats.reset()
    hidden_states.requires_grad_()
    out = checkpoint(layer, hidden_states, router_logits, use_reentrant=use_reentrant)
    out.sum().backward()
    assert hidden_states.grad is not None
    assert stats.as_dict() == once


def test_counts_stay_on_the_device_until_read() -> None:
    """A layer on the meta device cannot be read: what would wait for a device fails there."""
    layer = FusedMoE(
        4,
        2,
        8,
        8,
        zero_expert_type="drop",
        zero_expert_num=2,
        device="meta",
        e_score_correction_bias=torch.zeros(6, device="meta"),
    )
    stats = track_routing(layer)[""]
    layer(torch.empty(5, 8, device="meta"), torch.empty(5, 6, device="meta"))
    assert stats.mean_ffn_slots.is_meta
    assert stats.load_imbalance.is_meta
    assert stats.normalized_load_entropy.is_meta
    stats.reset()
