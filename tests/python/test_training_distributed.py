# SPDX-License-Identifier: Apache-2.0
"""Counts are summed over data-parallel ranks: two processes do what one does with both their tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from layer_cases import NUM_EXPERTS, TOP_K, make_inputs, make_layer
from testing import assert_equal
from zexpert.telemetry import collect_routing_stats, track_routing
from zexpert.training import LongCatBiasController, group_loss, switch_loss

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")

NUM_TOKENS = 20
RANKS = 2


def model_and_tokens() -> tuple[nn.ModuleList, list[tuple[Tensor, Tensor]]]:
    """Two tracked layers, and each one's inputs; the first layer's are shared by the ranks unevenly."""
    model = nn.ModuleList([make_layer("identity", seed=1), make_layer("drop", seed=2)])
    track_routing(model)
    return model, [make_inputs("identity", NUM_TOKENS), make_inputs("drop", NUM_TOKENS)]


def results(model: nn.ModuleList, tokens: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """What depends on the counts of all ranks."""
    with torch.no_grad():
        for layer, (hidden_states, router_logits) in zip(model, tokens, strict=True):
            layer(hidden_states, router_logits)
    stats = collect_routing_stats(model)["0"]
    everyone = stats.all_reduced()
    logits = make_inputs("identity", NUM_TOKENS)[1]  # the same everywhere, so that P is
    losses = [
        group_loss(logits, stats.expert_load, stats.num_tokens, TOP_K, target_ffn_experts=2.0),
        switch_loss(logits, stats.expert_load, stats.num_tokens, TOP_K),
    ]
    local = group_loss(logits, stats.expert_load, stats.num_tokens, TOP_K, target_ffn_experts=2.0, all_reduce=False)
    LongCatBiasController(0.5, 2.0).update(model)
    return {
        "bias of layer 0": model[0].e_score_correction_bias,
        "bias of layer 1": model[1].e_score_correction_bias,
        "load": everyone.expert_load,
        "histogram": everyone.ffn_slots_histogram,
        "losses": torch.stack(losses),
        "local loss": local,
    }


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    model, tokens = model_and_tokens()
    share = slice(0, 7) if rank == 0 else slice(7, None)
    found = results(model, [(hidden_states[share], logits[share]) for hidden_states, logits in tokens])
    torch.save(found, f"{folder}/rank{rank}.pt")

    # A group of one rank sums over that rank alone.
    groups = [dist.new_group([each]) for each in range(RANKS)]
    alone, tokens = model_and_tokens()
    with torch.no_grad():
        alone[0](tokens[0][0][share], tokens[0][1][share])
    stats = collect_routing_stats(alone)["0"]
    assert stats.all_reduced(groups[rank]).as_dict() == stats.as_dict()
    before = stats.expert_load.sum()
    LongCatBiasController(0.5, 2.0).update(alone[0], process_group=groups[rank])
    assert int(before) > 0
    dist.destroy_process_group()


def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_of_two, args=(str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    expected = results(*model_and_tokens())
    for name, value in expected.items():
        if name != "local loss":
            for rank in ranks:
                assert_equal(rank[name], value, name)
    assert float(ranks[0]["local loss"]) != float(ranks[1]["local loss"])
    assert int(expected["load"].sum()) == int(expected["histogram"] @ torch.arange(TOP_K + 1))
    assert expected["load"].numel() == NUM_EXPERTS
