# SPDX-License-Identifier: Apache-2.0
"""Everything public is copied and pickled."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zexpert
from layer_cases import LAYERS, make_inputs, make_layer
from testing import assert_equal
from zexpert import create_fused_moe_router, experts, models, ops
from zexpert.telemetry import RoutingStats, track_routing
from zexpert.training import LongCatBiasController, SignBiasController


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    lambda value: pickle.loads(pickle.dumps(value)),
    through_a_file,
]


def one_choice(*, gating_output: Tensor, topk: int, **_: Any) -> tuple[Tensor, Tensor]:
    values, ids = gating_output.topk(topk)
    return values, ids


def objects() -> dict[str, Any]:
    routing = ops.biased_topk(torch.randn(3, 4), None, 2, num_real_experts=4)
    return {
        "spec": zexpert.RoutingSpec(top_k=2, num_real_experts=4),
        "enum": zexpert.ScoringFunc.SIGMOID,
        "routing": routing,
        "plan": ops.moe_plan(routing.topk_ids, 4),
        "stats": RoutingStats(4, 2),
        "longcat controller": LongCatBiasController(0.1, 2.0),
        "sign controller": SignBiasController(0.1),
        "router": create_fused_moe_router(2, 4),
        "grouped router": create_fused_moe_router(2, 4, use_grouped_topk=True, num_expert_group=2, topk_group=1),
        "custom router": create_fused_moe_router(2, 4, custom_routing_function=one_choice),
        "simulator": create_fused_moe_router(2, 4, routing_simulation="normal"),
        "experts": experts.create_experts("torch"),
        **{name: getattr(models, name)() for name in models.__all__ if name.endswith("Config")},
        **{f"layer {kind}": make_layer(kind, chunk_size=3) for kind in LAYERS},
    }


@pytest.mark.parametrize("name", objects())
def test_an_object_is_copied(name: str) -> None:
    value = objects()[name]
    for way in WAYS:
        other = way(value)
        assert type(other) is type(value)
        assert repr(other) == repr(value)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_a_copied_layer_computes_the_same_and_counts_for_itself(kind: str) -> None:
    layer = make_layer(kind)
    inputs = make_inputs(kind, 9)
    stats = track_routing(layer)[""]
    expected = layer(*inputs)
    for way in WAYS[1:]:
        other = way(layer)
        assert other.router.spec == layer.router.spec
        assert_equal(other(*inputs), expected)
        assert int(other.runner.routing_stats.num_tokens) == 18
    assert int(stats.num_tokens) == 9
