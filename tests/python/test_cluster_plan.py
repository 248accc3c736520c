# SPDX-License-Identifier: Apache-2.0
"""The model of a cluster: what can be worked out by hand, and the simulation beside the formula."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from zexpert_tools.cli.app import app
from zexpert_tools.cluster_plan import Cluster, MoEShape, expected_ranks_per_token, plan_layer, simulate_routing

SMALL = MoEShape(num_experts=4, top_k=3, hidden_size=10, intermediate_size=5, ffn_experts=2, num_layers=7)


def test_ranks_per_token_by_hand() -> None:
    """Of 4 experts on 2 ranks, 2 of 6 pairs lie on one rank."""
    assert expected_ranks_per_token(SMALL, 2) == pytest.approx(2 / 6 * 1 + 4 / 6 * 2)
    assert expected_ranks_per_token(SMALL, 1) == 1.0
    assert expected_ranks_per_token(SMALL, 4) == pytest.approx(2.0)


@pytest.mark.parametrize("ffn_experts", [8.0, 7.3, 0.5])
@pytest.mark.parametrize("gpus", [1, 8, 64, 512])
def test_simulation_agrees_with_the_formula(gpus: int, ffn_experts: float) -> None:
    shape = MoEShape(ffn_experts=ffn_experts)
    simulated = simulate_routing(gpus, 4096, shape, max_tokens=8192)
    assert simulated.ranks_per_token == pytest.approx(expected_ranks_per_token(shape, gpus), rel=0.03)
    assert simulated.busiest_rank >= 1.0


def test_skewed_routing_has_a_busier_rank() -> None:
    even, skewed = (simulate_routing(8, 4096, skew=skew, max_tokens=8192) for skew in (0.0, 1.0))
    assert skewed.busiest_rank > even.busiest_rank


def test_bytes_and_times_by_hand() -> None:
    """Half of the rows leave the rank; a row is 20 bytes, and 24 more for three ids and weights."""
    cluster = Cluster(2, nvlink=100.0, network=10.0, latency=1.0, memory_bandwidth=50.0, matmul_rate=1000.0)
    plan = plan_layer(2, 6, SMALL, cluster)
    rows = 6 * 5 / 3
    assert plan.dispatch_bytes == pytest.approx(rows / 2 * 44)
    assert plan.combine_bytes == pytest.approx(rows / 2 * 20)
    assert plan.all_slots_bytes == pytest.approx(2 * 6 * 3 / 2 * 20)
    assert plan.network_bytes == 0.0
    assert plan.dispatch_seconds == pytest.approx(rows / 2 * 44 / 100 + 1)
    assert plan.weight_bytes == 2 * 3 * 10 * 5 * 2
    assert plan.model_weight_bytes == 7 * plan.weight_bytes
    products, passes = math.hypot(2 * 12 * 150 / 1000, plan.weight_bytes / 50), (2 * 12 + 3 * rows) * 20 / 50
    assert plan.expert_seconds == pytest.approx(products + passes)
    assert plan.seconds == pytest.approx(plan.dispatch_seconds + plan.expert_seconds + plan.combine_seconds)

    across = plan_layer(4, 6, SMALL, cluster)  # two nodes: half of the rows go to the other
    assert across.network_bytes == pytest.approx(6 * 2 / 2 * 64)
    assert across.combine_seconds == pytest.approx(6 * 2 / 2 * 20 / 10 + 1)
    alone = plan_layer(1, 6, SMALL, cluster)
    assert alone.dispatch_bytes == alone.combine_bytes == alone.dispatch_seconds == 0.0
    replicas = plan_layer(8, 6, SMALL, cluster)
    assert replicas.weight_bytes == 3 * 10 * 5 * 2
    assert replicas.ranks_per_token == pytest.approx(2.0)


@pytest.mark.parametrize(("gpus", "tokens"), [(3, 1), (6, 1), (0, 1), (2, 0)])
def test_bad_sizes(gpus: int, tokens: int) -> None:
    with pytest.raises(ValueError, match=r"^(gpus|tokens) must (divide|be) .*, got \d$"):
        plan_layer(gpus, tokens, SMALL)


def test_command() -> None:
    arguments = ["plan", "--gpus", "64,1024", "--tokens", "4096"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    for shown in ("7.63", "8.00", "1,206.8 MB", "20.392 ms", "0.60 GB", "16.9 GB", "NVLink 450 GB/s", "4096 tokens"):
        assert shown in result.output
    assert "…" not in result.output
    result = CliRunner().invoke(app, ["plan", "--gpus", "8", "--tokens", "16", "--ffn-experts", "0"])
    assert result.exit_code == 0, result.output
    assert "1.00x mean" in result.output
    result = CliRunner().invoke(app, ["plan", "--gpus", "7"])
    assert result.exit_code == 2
    assert "gpus must divide the number of experts (512) or be a multiple, got 7" in " ".join(result.output.split())
