# SPDX-License-Identifier: Apache-2.0
"""The controllers of the selection bias: their formulas, and that they reach what they aim at."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layer_cases import make_inputs, make_layer
from testing import assert_equal
from zexpert import FusedMoE
from zexpert.telemetry import collect_routing_stats, track_routing
from zexpert.training import BiasController, LongCatBiasController, SignBiasController

NUM_REAL, NUM_ZERO, TOP_K, HIDDEN = 16, 8, 6, 8


def controlled_layer(bias_dtype: torch.dtype = torch.float32, **arguments: object) -> FusedMoE:
    layer = FusedMoE(
        NUM_REAL,
        TOP_K,
        HIDDEN,
        8,
        zero_expert_type="identity",
        zero_expert_num=NUM_ZERO,
        e_score_correction_bias=torch.zeros(NUM_REAL + NUM_ZERO, dtype=bias_dtype),
        **arguments,
    )
    track_routing(layer)
    return layer


def run(layer: FusedMoE, num_tokens: int = 512, seed: int = 0) -> None:
    """One batch whose logits favour some experts over others."""
    generator = torch.Generator().manual_seed(seed)
    router_logits = torch.randn(num_tokens, NUM_REAL + NUM_ZERO, generator=generator)
    router_logits += torch.linspace(-1.0, 1.5, NUM_REAL + NUM_ZERO)
    with torch.no_grad():
        layer(torch.zeros(num_tokens, HIDDEN), router_logits)


def test_longcat_rule() -> None:
    bias = torch.randn(7, dtype=torch.float64)
    before = bias.clone()
    load, num_tokens, top_k, target, rate = torch.tensor([5, 0, 11, 2]), 9, 3, 1.75, 0.4
    LongCatBiasController(rate, target).update_bias(bias, load, num_tokens, top_k)
    expected = [rate * (target / (top_k * 4) - count / (top_k * num_tokens)) for count in load.tolist()]
    torch.testing.assert_close(bias[:4] - before[:4], torch.tensor(expected, dtype=torch.float64))
    assert_equal(bias[4:], before[4:])


def test_sign_rule() -> None:
    bias = torch.zeros(6)
    load = torch.tensor([6, 4, 1, 5])  # mean 4
    SignBiasController(0.25).update_bias(bias, load, 8, 3)
    assert_equal(bias, torch.tensor([-0.25, 0.0, 0.25, -0.25, 0.0, 0.0]))


@pytest.mark.parametrize("controller", [LongCatBiasController(0.5, 2.0), SignBiasController(0.5)], ids=repr)
def test_without_tokens_nothing_moves(controller: BiasController) -> None:
    bias = torch.randn(6)
    before = bias.clone()
    controller.update_bias(bias, torch.zeros(4, dtype=torch.int64), 0, 3)
    assert_equal(bias, before)
    layer = controlled_layer()
    controller.update(layer)
    assert_equal(layer.e_score_correction_bias, torch.zeros(NUM_REAL + NUM_ZERO))


@pytest.mark.parametrize("chunk_size", [None, 100])
@pytest.mark.parametrize("target", [2.0, 4.5])
def test_longcat_controller_holds_the_mean_and_evens_the_load(target: float, chunk_size: int | None) -> None:
    layer = controlled_layer(chunk_size=chunk_size)
    controller = LongCatBiasController(0.5, target)
    stats = collect_routing_stats(layer)[""]
    for step in range(300):
        controller.update_rate = 0.5 * (1 - step / 400)
        run(layer, seed=step)
        controller.update(layer)
    for step in range(1000, 1010):  # other batches than those it saw
        run(layer, seed=step)
    assert float(stats.mean_ffn_slots) == pytest.approx(target, rel=0.05)
    assert float(stats.load_imbalance) < 1.3
    assert_equal(layer.e_score_correction_bias[NUM_REAL:], torch.zeros(NUM_ZERO))
    assert controller.num_updates == 300


def test_sign_controller_evens_the_load() -> None:
    layer = controlled_layer()
    stats = collect_routing_stats(layer)[""]
    run(layer)
    before = float(stats.load_imbalance)
    controller = SignBiasController(0.002)
    for step in range(200):
        stats.reset()
        run(layer, seed=step)
        controller.update(layer, reset_stats=False)
    assert before > 1.8
    assert float(stats.load_imbalance) < 1.3


def test_an_update_is_of_the_tokens_since_the_last_one() -> None:
    """Two micro-batches count as one batch, and what was seen before the last update does not count."""
    whole, parts = controlled_layer(), controlled_layer()
    controller = LongCatBiasController(0.3, 3.0)
    logits = torch.randn(40, NUM_REAL + NUM_ZERO)
    with torch.no_grad():
        for _ in range(2):
            whole(torch.zeros(40, HIDDEN), logits)
            parts(torch.zeros(15, HIDDEN), logits[:15])
            parts(torch.zeros(25, HIDDEN), logits[15:])
            assert_equal(collect_routing_stats(whole)[""].expert_load, collect_routing_stats(parts)[""].expert_load)
            controller.update(whole)
            controller.update(parts)
            assert_equal(whole.e_score_correction_bias, parts.e_score_correction_bias)
            assert int(collect_routing_stats(parts)[""].num_tokens) == 0


@pytest.mark.parametrize("controller", [LongCatBiasController(0.3, 3.0), SignBiasController(0.3)], ids=repr)
def test_validation_moves_no_bias(controller: BiasController) -> None:
    trained, validated = controlled_layer(), controlled_layer()
    for step in range(3):
        run(trained, seed=step)
        run(validated, seed=step)
        run(validated.eval(), seed=100 + step)
        validated.train()
        controller.update(trained)
        controller.update(validated)
        assert_equal(validated.e_score_correction_bias, trained.e_score_correction_bias)
    before = trained.e_score_correction_bias.clone()
    run(trained.eval())
    with pytest.warns(UserWarning, match=r"^the model is in eval mode.*call model\.train\(\)"):
        controller.update(trained)
    assert_equal(trained.e_score_correction_bias, before)


def test_checkpointed_micro_batches_count_like_others() -> None:
    plain, checkpointed = controlled_layer(), controlled_layer()
    controller = LongCatBiasController(0.3, 3.0)
    for layer in (plain, checkpointed):
        for micro_batch in range(2):
            hidden_states = torch.zeros(64, HIDDEN, requires_grad=True)
            logits = torch.randn(64, NUM_REAL + NUM_ZERO, generator=torch.Generator().manual_seed(micro_batch))
            if layer is checkpointed and micro_batch == 0:
                out = checkpoint(layer, hidden_states, logits, use_reentrant=False)
            else:
                out = layer(hidden_states, logits)
            out.sum().backward()
        controller.update(layer)
    assert_equal(checkpointed.e_score_correction_bias, plain.e_score_correction_bias)


def test_a_layer_without_a_bias_is_left_alone() -> None:
    with_bias, without = controlled_layer(), make_layer("identity", with_bias=False)
    model = nn.ModuleList([without, with_bias])
    stats = track_routing(model)["0"]
    without(*make_inputs("identity", 12))
    run(with_bias)
    LongCatBiasController(0.3, 3.0).update(model)
    assert bool(with_bias.e_score_correction_bias.any())
    assert int(stats.num_tokens) == 12


def test_reset_stats_false_keeps_the_counts() -> None:
    layer = controlled_layer()
    run(layer)
    LongCatBiasController(0.1, 3.0).update(layer, reset_stats=False)
    assert int(collect_routing_stats(layer)[""].num_tokens) == 512


def test_every_layer_of_a_model_moves_on_its_own() -> None:
    first, second = controlled_layer(), controlled_layer()
    untracked = controlled_layer()
    track_routing(untracked, enabled=False)
    model = nn.ModuleList([first, second, untracked])
    run(first, seed=1)
    run(second, num_tokens=64, seed=2)
    loads = [stats.expert_load.clone() for stats in collect_routing_stats(model).values()]
    controller = LongCatBiasController(0.3, 3.0)
    controller.update(model)
    for layer, load, num_tokens in zip((first, second), loads, (512, 64), strict=True):
        expected = torch.zeros(NUM_REAL + NUM_ZERO)
        controller.update_bias(expected, load, num_tokens, TOP_K)
        assert_equal(layer.e_score_correction_bias, expected)
    assert_equal(untracked.e_score_correction_bias, torch.zeros(NUM_REAL + NUM_ZERO))


def test_a_bias_that_is_a_parameter_is_updated_too() -> None:
    bias = nn.Parameter(torch.zeros(NUM_REAL + NUM_ZERO))
    layer = FusedMoE(
        NUM_REAL, TOP_K, HIDDEN, 8, zero_expert_type="drop", zero_expert_num=NUM_ZERO, e_score_correction_bias=bias
    )
    track_routing(layer)
    run(layer)
    LongCatBiasController(0.3, 3.0).update(layer)
    assert bool((bias[:NUM_REAL] != 0).any())
    assert bias.grad is None


def test_compiled_layer_sees_the_update() -> None:
    layer = controlled_layer()
    compiled = torch.compile(layer, fullgraph=True)
    controller = LongCatBiasController(2.0, 1.0)
    hidden_states, logits = torch.randn(64, HIDDEN), torch.randn(64, NUM_REAL + NUM_ZERO)
    with torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(compiled(hidden_states, logits), layer(hidden_states, logits))
            controller.update(layer)


@pytest.mark.parametrize("make", [lambda: LongCatBiasController(0.3, 3.5), lambda: SignBiasController(0.002)])
def test_resumed_equals_uninterrupted(make: object) -> None:
    def steps(layer: FusedMoE, controller: BiasController, first: int, last: int) -> None:
        for step in range(first, last):
            controller.update_rate *= 0.9
            run(layer, seed=step)
            controller.update(layer)

    straight, controller = controlled_layer(), make()
    steps(straight, controller, 0, 6)

    interrupted, before = controlled_layer(), make()
    steps(interrupted, before, 0, 3)
    file = io.BytesIO()
    torch.save({"model": interrupted.state_dict(), "controller": before.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, after = controlled_layer(), type(before)(*[1.0] * len(state["controller"].keys() - {"num_updates"}))
    resumed.load_state_dict(state["model"])
    after.load_state_dict(state["controller"])
    steps(resumed, after, 3, 6)
    assert_equal(resumed.e_score_correction_bias, straight.e_score_correction_bias)
    assert after.state_dict() == controller.state_dict()
    assert repr(after) == repr(controller)


def test_values_out_of_range() -> None:
    for rate in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="update_rate must be finite and at least 0"):
            SignBiasController(rate)
    for target in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="target_ffn_experts must be finite and above 0"):
            LongCatBiasController(0.1, target)
    controller = LongCatBiasController(0.1, 4.0)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        controller.update_rate = -1
    with pytest.raises(ValueError, match=r"at most top_k \(3\), got 4.0"):
        controller.update_bias(torch.zeros(5), torch.zeros(4), 1, 3)
    with pytest.raises(
        ValueError, match=r"expert_load must have one entry per real expert, at most 5, got shape \[6\]"
    ):
        controller.update_bias(torch.zeros(5), torch.zeros(6), 1, 6)
    with pytest.raises(KeyError, match="num_updates"):
        controller.load_state_dict({"update_rate": 0.1, "target_ffn_experts": 1.0})


def test_layers_that_cannot_be_controlled() -> None:
    controller = LongCatBiasController(0.1, 2.0)
    with pytest.raises(ValueError, match=r"^e_score_correction_bias must be a tensor, got NoneType$"):
        SignBiasController(0.1).update_bias(None, torch.ones(3), 1, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^model must be a torch\.nn\.Module, got list$"):
        SignBiasController(0.1).update([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"track_routing.*got none"):
        controller.update(make_layer("identity"))

    no_bias = make_layer("identity", with_bias=False)
    track_routing(no_bias)
    with pytest.raises(ValueError, match="layer '0' must have an e_score_correction_bias"):
        controller.update(nn.ModuleList([no_bias]))

    good, low_precision = controlled_layer(), controlled_layer(torch.bfloat16)
    run(good)
    with pytest.raises(ValueError, match=r"must be float32 or float64.*torch\.bfloat16"):
        controller.update(nn.ModuleList([good, low_precision]))
    assert_equal(good.e_score_correction_bias, torch.zeros(NUM_REAL + NUM_ZERO))  # nothing moved before the check
    assert controller.num_updates == 0

    mapped = mapped_layer(torch.stack((torch.arange(16), torch.arange(16, 32)), dim=1))
    mapped.router.set_expert_map(None)
    with pytest.raises(ValueError, match="16 logical experts, got 32 physical ones"):
        controller.update(mapped)


def mapped_layer(expert_map: Tensor) -> FusedMoE:
    layer = controlled_layer()
    track_routing(layer, enabled=False)
    layer.router.set_expert_map(expert_map)
    track_routing(layer)
    return layer


@pytest.mark.parametrize("controller", [LongCatBiasController(0.5, 2.0), SignBiasController(0.5)], ids=repr)
def test_biases_follow_the_experts_that_tokens_choose(controller: BiasController) -> None:
    """Where a map places the experts elsewhere or in several places, the update is that of a layer without one."""
    plain, placed = controlled_layer(), mapped_layer(torch.arange(16).flip(0)[:, None])
    for layer in (plain, placed):
        run(layer)
    plain_stats = collect_routing_stats(plain)[""]
    load, histogram = plain_stats.expert_load.clone(), plain_stats.ffn_slots_histogram.clone()

    second = torch.where(torch.arange(16) < 4, torch.arange(16, 32), -1)
    replicas = mapped_layer(torch.stack((torch.arange(16), second), dim=1))
    stats = collect_routing_stats(replicas)[""]
    stats.expert_load[:16] = load - torch.where(second >= 0, load // 3, 0)
    stats.expert_load[16:] = load[:4] // 3
    stats.ffn_slots_histogram.copy_(histogram)

    for layer in (plain, placed, replicas):
        controller.update(layer)
    assert bool(plain.e_score_correction_bias.any())
    assert_equal(placed.e_score_correction_bias, plain.e_score_correction_bias)
    assert_equal(replicas.e_score_correction_bias, plain.e_score_correction_bias)


def test_update_between_forward_and_backward_changes_no_gradient() -> None:
    def gradient(update: bool) -> Tensor:
        layer = make_layer("identity")
        track_routing(layer)
        hidden_states, router_logits = make_inputs("identity", 30)
        router_logits.requires_grad_()
        out = layer(hidden_states, router_logits)
        if update:
            LongCatBiasController(50.0, 1.0).update(layer)
        out.square().sum().backward()
        assert router_logits.grad is not None
        return router_logits.grad

    assert_equal(gradient(update=True), gradient(update=False))
