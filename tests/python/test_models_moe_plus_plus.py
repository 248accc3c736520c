# SPDX-License-Identifier: Apache-2.0
"""MoEPlusPlusBlock against a loop written from the formulas of arXiv 2410.07348, in the published order of experts."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from model_cases import Expert, clear_rows, mixture, stacked_experts
from testing import assert_equal, assert_error_rule
from zexpert.models import MoEPlusPlusBlock, MoEPlusPlusConfig
from zexpert.models.moe_plus_plus import expert_order
from zexpert.telemetry import track_routing

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

SMALL = MoEPlusPlusConfig(hidden_size=24, intermediate_size=20, num_ffn_experts=8)
CONFIGS = {
    "7b": SMALL,
    "paper": dataclasses.replace(SMALL, logits_std=None),
    "two_layer_gate": dataclasses.replace(SMALL, two_layer_gate=True, logits_std=None),
    "scaled_input": dataclasses.replace(SMALL, scale_input_by_top_k=True, logits_std=0.5),
    "drop_after": dataclasses.replace(SMALL, drop_before_renormalize=False),
    "many": dataclasses.replace(
        SMALL, num_ffn_experts=6, num_constant_experts=3, num_copy_experts=2, num_zero_experts=4, top_k=4
    ),
    "copy_only": dataclasses.replace(SMALL, num_constant_experts=0, num_zero_experts=0),
    "ffn_only": dataclasses.replace(SMALL, num_constant_experts=0, num_copy_experts=0, num_zero_experts=0),
}


def published_weights(config: MoEPlusPlusConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of one block under the published names, in the published order [FFN | constant | copy | zero]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    hidden, intermediate, num_experts = config.hidden_size, config.intermediate_size, config.num_logits
    weights = {"moe.gate.gate_map.weight": normal(num_experts, num_experts)}
    if config.two_layer_gate:
        weights["moe.gate.wg.0.weight"] = 2 * normal(8 * num_experts, hidden)
        weights["moe.gate.wg.2.weight"] = 4 * normal(num_experts, 8 * num_experts)
    else:
        weights["moe.gate.wg.weight"] = 2 * normal(num_experts, hidden)
    for i in range(config.num_ffn_experts):
        weights[f"moe.experts.experts.{i}.up_proj.weight"] = normal(2 * intermediate, hidden).to(dtype)
        weights[f"moe.experts.experts.{i}.down_proj.weight"] = normal(hidden, intermediate).to(dtype)
    for i in range(config.num_ffn_experts, config.num_ffn_experts + config.num_constant_experts):
        weights[f"moe.experts.experts.{i}.constant"] = normal(hidden, 1).flatten().to(dtype)
        weights[f"moe.experts.experts.{i}.wg.weight"] = normal(2, hidden).to(dtype)
    return weights


def constant_expert(gate: Tensor, vector: Tensor) -> Expert:
    def expert(x: Tensor) -> Tensor:
        alpha = torch.softmax(gate.to(x.dtype) @ x, dim=0)
        return alpha[0] * x + alpha[1] * vector.to(x.dtype)

    return expert


def published_experts(config: MoEPlusPlusConfig, weights: dict[str, Tensor]) -> list[Expert]:
    name = "moe.experts.experts.{}.{}"
    ffn = range(config.num_ffn_experts)
    gate_up = torch.stack([weights[name.format(i, "up_proj.weight")] for i in ffn])
    down = torch.stack([weights[name.format(i, "down_proj.weight")] for i in ffn])
    constants = range(config.num_ffn_experts, config.num_ffn_experts + config.num_constant_experts)
    return [
        *stacked_experts(gate_up, down),
        *(
            constant_expert(weights[name.format(i, "wg.weight")], weights[name.format(i, "constant")])
            for i in constants
        ),
        *[lambda x: x] * config.num_copy_experts,
        *[torch.zeros_like] * config.num_zero_experts,
    ]


def written_out(
    config: MoEPlusPlusConfig, weights: dict[str, Tensor], x: Tensor, previous: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, logits, probabilities) in the published order; experts in `dtype`, the gate in float32 at least."""
    gate_dtype = torch.promote_types(dtype, torch.float32)
    tokens = x.to(gate_dtype)
    if config.two_layer_gate:
        hidden = torch.tanh(tokens @ weights["moe.gate.wg.0.weight"].to(gate_dtype).T)
        logits = hidden @ weights["moe.gate.wg.2.weight"].to(gate_dtype).T
    else:
        logits = tokens @ weights["moe.gate.wg.weight"].to(gate_dtype).T
    if previous is not None:
        logits = logits + previous.to(gate_dtype) @ weights["moe.gate.gate_map.weight"].to(gate_dtype).T

    normed = logits
    if config.logits_std is not None:
        normed = logits / (logits.std(dim=1, keepdim=True) / config.logits_std)
    probabilities = torch.softmax(normed, dim=1)
    gates, choices = probabilities.topk(config.top_k, dim=1)
    if config.drop_before_renormalize:
        first_zero = config.num_logits - config.num_zero_experts
        gates = torch.where(choices >= first_zero, 0.0, gates)
    total = gates.sum(dim=1, keepdim=True)
    gates = torch.where(total > 0, gates / total, 0.0)

    inputs = x.to(dtype) * (config.top_k if config.scale_input_by_top_k else 1)
    return mixture(inputs, gates, choices, published_experts(config, weights)), logits, probabilities


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_layers_agree_with_the_formulas(name: str, dtype: torch.dtype, seed: int) -> None:
    config = CONFIGS[name]
    order = expert_order(config)
    previous = {"ours": None, "plain": None, "reference": None}
    clear = torch.ones(48, dtype=torch.bool)
    for layer in range(2):
        weights = published_weights(config, dtype, seed=10 * seed + layer)
        block = MoEPlusPlusBlock.from_state_dict(config, weights, params_dtype=dtype)
        generator = torch.Generator().manual_seed(seed + 77 * layer)
        x = torch.randn(48, config.hidden_size, generator=generator).to(dtype)
        out, previous["ours"] = block(x, previous["ours"])
        plain, previous["plain"], _ = written_out(config, weights, x, previous["plain"], dtype)
        expected, previous["reference"], probabilities = written_out(
            config, weights, x, previous["reference"], torch.float64
        )
        clear &= clear_rows(probabilities, config.top_k)
        assert_error_rule(out[clear], plain[clear], expected[clear], f"output of layer {layer}")
        assert_error_rule(
            previous["ours"], previous["plain"][:, order], previous["reference"][:, order], f"logits of layer {layer}"
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_go_back_to_the_published_names(name: str) -> None:
    weights = published_weights(CONFIGS[name], torch.float32)
    saved = MoEPlusPlusBlock.from_state_dict(CONFIGS[name], weights).checkpoint_state_dict()
    assert saved.keys() == weights.keys()
    for key, weight in weights.items():
        assert_equal(saved[key], weight, key)


def test_order_of_experts() -> None:
    assert expert_order(SMALL) == [*range(8), 10, 8, 9, 11]
    assert expert_order(CONFIGS["many"]) == [*range(6), 9, 10, 6, 7, 8, 11, 12, 13, 14]


def test_a_token_that_chose_zero_experts_alone_gets_nothing() -> None:
    config = dataclasses.replace(SMALL, num_zero_experts=4, logits_std=None)
    block = MoEPlusPlusBlock(config)
    with torch.no_grad():
        block.gate.wg.weight.zero_()
        block.gate.wg.weight[-2:] = 1.0
        out, _ = block(torch.ones(3, config.hidden_size))
    assert_equal(out, torch.zeros_like(out))


@torch.no_grad()
def test_first_layer_without_residual_leaves_the_matrix_out() -> None:
    weights = published_weights(SMALL, torch.float32)
    with_map = MoEPlusPlusBlock.from_state_dict(SMALL, weights)
    without_map = MoEPlusPlusBlock.from_state_dict(dataclasses.replace(SMALL, gating_residual=False), weights)
    x = torch.randn(5, SMALL.hidden_size)
    assert without_map.gate.gate_map is None
    assert_equal(without_map(x)[0], with_map(x)[0])
    assert_equal(without_map(x, torch.randn(5, SMALL.num_logits))[0], with_map(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["7b", "two_layer_gate", "ffn_only"])
def test_scripts_compiles_and_copies(name: str) -> None:
    config = CONFIGS[name]
    block = MoEPlusPlusBlock.from_state_dict(config, published_weights(config, torch.float32))
    stats = track_routing(block)["experts"]
    x, previous = torch.randn(2, 9, config.hidden_size), torch.randn(2, 9, config.num_logits)
    for arguments in ((x,), (x, previous)):
        expected, expected_logits = block(*arguments)
        assert expected.shape == x.shape
        assert expected_logits.shape == previous.shape
        assert_equal(torch.jit.script(block)(*arguments)[0], expected)
        assert_equal(copy.deepcopy(block)(*arguments)[0], expected)
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(*arguments)[0], expected)
    assert int(stats.num_tokens) == 2 * 3 * 18


@torch.no_grad()
def test_own_state_dict_and_whole_models() -> None:
    def model() -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleDict({"mlp": MoEPlusPlusBlock(SMALL)}) for _ in range(2))

    published = {
        f"{layer}.mlp.{name}": tensor
        for layer in range(2)
        for name, tensor in published_weights(SMALL, torch.float32, seed=layer).items()
    }
    ours, again = model(), model()
    ours.load_state_dict(published)
    again.load_state_dict(ours.state_dict())
    x = torch.randn(5, SMALL.hidden_size)
    for layer in range(2):
        alone = MoEPlusPlusBlock.from_state_dict(SMALL, published, prefix=f"{layer}.mlp.")
        assert_equal(ours[layer]["mlp"](x)[0], alone(x)[0])
        assert_equal(again[layer]["mlp"](x)[0], alone(x)[0])


def test_what_does_not_fit_is_told() -> None:
    weights = published_weights(SMALL, torch.float32)
    for wrong, message in (
        ({"moe.gate.wg.weight": torch.zeros(5, 24)}, r"gate.wg.weight must have shape \[12, 24\], got \[5, 24\]"),
        ({"moe.gate.gate_map.weight": torch.zeros(12, 5)}, r"gate_map.weight must have shape \[12, 12\]"),
        (
            {"moe.experts.experts.2.up_proj.weight": torch.zeros(4, 24)},
            r"experts.2.up_proj.weight must have .* got \[4, 24\]$",
        ),
        ({"moe.experts.experts.12.constant": torch.zeros(24)}, "Unexpected key.*experts.12.constant"),
        ({"moe.experts.experts.8.constant": torch.zeros(7)}, "stack|shape"),
    ):
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            MoEPlusPlusBlock.from_state_dict(SMALL, {**weights, **wrong})


def test_configuration() -> None:
    published = {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "hidden_act": "silu",
        "num_experts": [20],
        "moe_use_mixtral_gating": False,
        "moe_2layer_gate": False,
        "moe_use_logits_norm": True,
        "moe_gate_norm_std": 1.0,
        "moe_feature_no_mul_topk": True,
    }
    assert MoEPlusPlusConfig.from_hf(published) == MoEPlusPlusConfig()
    plain = MoEPlusPlusConfig.from_hf({**published, "moe_use_mixtral_gating": True, "moe_use_logits_norm": False})
    assert (plain.drop_before_renormalize, plain.logits_std, plain.scale_input_by_top_k) == (False, None, False)
    scaled = MoEPlusPlusConfig.from_hf({"hidden_size": 8, "intermediate_size": 8, "num_experts": [6]})
    assert (scaled.scale_input_by_top_k, scaled.two_layer_gate, scaled.num_ffn_experts) == (True, True, 2)
    with pytest.raises(ValueError, match="num_experts"):
        MoEPlusPlusConfig.from_hf({"hidden_size": 8, "intermediate_size": 8})


def test_gradients_reach_gate_constants_and_previous_logits() -> None:
    config = CONFIGS["many"]
    weights = published_weights(config, torch.float64)
    block = MoEPlusPlusBlock.from_state_dict(config, weights, params_dtype=torch.float64).double()
    x = torch.randn(4, config.hidden_size, dtype=torch.float64, requires_grad=True)
    previous = torch.randn(4, config.num_logits, dtype=torch.float64, requires_grad=True)
    order = expert_order(config)

    out, _ = block(x, previous)
    scale = torch.randn_like(out)
    (out * scale).sum().backward()
    leaves = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    plain_x, plain_previous = x.detach().clone().requires_grad_(), previous.detach().clone().requires_grad_()
    published_previous = plain_previous[:, torch.tensor(order).argsort()]
    plain, _, _ = written_out(config, leaves, plain_x, published_previous, torch.float64)
    (plain * scale).sum().backward()

    torch.testing.assert_close(x.grad, plain_x.grad)
    torch.testing.assert_close(previous.grad, plain_previous.grad)
    torch.testing.assert_close(block.gate.wg.weight.grad, leaves["moe.gate.wg.weight"].grad[order])
    constants = range(config.num_ffn_experts, config.num_ffn_experts + config.num_constant_experts)
    for ours, theirs in (("constant_vectors", "constant"), ("constant_gate_weight", "wg.weight")):
        published = [leaves[f"moe.experts.experts.{i}.{theirs}"] for i in constants]
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in published]
        assert any(bool(gradient.any()) for gradient in gradients)
        torch.testing.assert_close(getattr(block.experts, ours).grad, torch.stack(gradients))


def flat_tokens(config: MoEPlusPlusConfig) -> Tensor:
    """Tokens of which some are all zero, as padding embeddings are, and some tiny."""
    x = torch.randn(12, config.hidden_size)
    x[3] = 0.0
    x[7:9] = 0.0
    x[9] *= 1e-30
    x[10] *= 1e-40
    return x


@pytest.mark.parametrize("zero_gate", [False, True])
@pytest.mark.parametrize("two_layer_gate", [False, True])
@pytest.mark.parametrize("logits_std", [1.0, 0.5])
def test_logits_without_spread_train(logits_std: float, two_layer_gate: bool, zero_gate: bool) -> None:
    """A token whose logits are all the same is routed, and spoils no gradient."""
    block = MoEPlusPlusBlock(dataclasses.replace(SMALL, two_layer_gate=two_layer_gate, logits_std=logits_std))
    if zero_gate:
        for parameter in block.gate.parameters():
            nn.init.zeros_(parameter)
    stats = track_routing(block)["experts"]
    x = flat_tokens(SMALL).requires_grad_()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        out, _ = block(x, torch.zeros(12, SMALL.num_logits))
        assert bool(out.isfinite().all())
        out.square().sum().backward()
        for name, tensor in [*block.named_parameters(), ("x", x)]:
            assert tensor.grad is not None, name
            assert bool(tensor.grad.isfinite().all()), name
        optimizer.step()
    assert int(stats.num_tokens) == 36
    assert float(stats.ffn_slots_histogram[0]) < 36
    if zero_gate:
        assert bool(block.gate.wg.weight.any()) if not two_layer_gate else True


@torch.no_grad()
def test_tokens_with_spread_do_not_feel_those_without() -> None:
    """Bit for bit what the published formula gives them."""
    block = MoEPlusPlusBlock(SMALL)
    x = flat_tokens(SMALL)
    usual = [0, 1, 2, 4, 5, 6, 11]
    logits = block.gate(x[usual])
    expected = block.experts(x[usual], logits / (logits.std(dim=-1, keepdim=True) / 1.0))
    assert_equal(block(x[usual])[0], expected)
    assert_equal(torch.jit.script(block)(x)[0], block(x)[0])
    one = MoEPlusPlusConfig(8, 8, 1, 0, 0, 0, top_k=1)
    assert bool(MoEPlusPlusBlock(one)(torch.randn(3, 8))[0].any())
