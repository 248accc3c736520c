# SPDX-License-Identifier: Apache-2.0
"""ZedaQwen3MoE and ZedaGlm4MoE against loops written from the formulas of arXiv 2605.18643, and without zero experts
against transformers' blocks."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from model_cases import as_module_list, clear_rows, ffn_expert, mixture, stacked_experts
from testing import assert_equal, assert_error_rule
from zexpert.models import ZedaGlm4Config, ZedaGlm4MoE, ZedaQwen3Config, ZedaQwen3MoE
from zexpert.models.zeda import extend_router
from zexpert.telemetry import track_routing

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

QWEN = ZedaQwen3Config(
    hidden_size=32, moe_intermediate_size=24, num_experts=12, num_zero_experts=6, num_experts_per_tok=4
)
GLM = ZedaGlm4Config(
    hidden_size=32, moe_intermediate_size=24, n_routed_experts=12, num_zero_experts=6, num_experts_per_tok=3
)
QWEN_CONFIGS = {
    "qwen3": QWEN,
    "not_normalised": dataclasses.replace(QWEN, norm_topk_prob=False),
    "static": dataclasses.replace(QWEN, num_zero_experts=0),
}
GLM_CONFIGS = {
    "glm": GLM,
    "groups": dataclasses.replace(GLM, n_group=4, topk_group=2, num_experts_per_tok=5),
    "no_shared": dataclasses.replace(GLM, n_shared_experts=0),
    "two_shared": dataclasses.replace(GLM, n_shared_experts=2, norm_topk_prob=False),
    "static": dataclasses.replace(GLM, num_zero_experts=0),
}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5


def qwen_weights(config: ZedaQwen3Config, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    weights = {"gate.weight": 2 * normal(generator, config.num_experts + config.num_zero_experts, hidden)}
    weights["experts.gate_up_proj"] = normal(generator, config.num_experts, 2 * intermediate, hidden)
    weights["experts.down_proj"] = normal(generator, config.num_experts, hidden, intermediate)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def glm_weights(config: ZedaGlm4Config, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate = config.hidden_size, config.moe_intermediate_size
    num_experts = config.n_routed_experts + config.num_zero_experts
    weights = {
        "gate.weight": normal(generator, num_experts, hidden),
        "experts.gate_up_proj": normal(generator, config.n_routed_experts, 2 * intermediate, hidden),
        "experts.down_proj": normal(generator, config.n_routed_experts, hidden, intermediate),
    }
    shared = config.n_shared_experts * intermediate
    if shared:
        weights["shared_experts.gate_proj.weight"] = normal(generator, shared, hidden)
        weights["shared_experts.up_proj.weight"] = normal(generator, shared, hidden)
        weights["shared_experts.down_proj.weight"] = normal(generator, hidden, shared)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    weights["gate.e_score_correction_bias"] = 0.1 * torch.randn(num_experts, generator=generator)
    return weights


def tokens(hidden_size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(40, hidden_size, generator=torch.Generator().manual_seed(seed + 500)).to(dtype)


def qwen_written_out(
    config: ZedaQwen3Config, weights: dict[str, Tensor], x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(output, probabilities); experts in `dtype`. Logits are made in the dtype of x, as the model makes them."""
    logits = torch.nn.functional.linear(x, weights["gate.weight"])
    probabilities = torch.softmax(logits.to(torch.promote_types(dtype, torch.float32)), dim=1)
    gates, choices = probabilities.topk(config.num_experts_per_tok, dim=1)
    if config.norm_topk_prob:
        gates = gates / gates.sum(dim=1, keepdim=True)
    experts = stacked_experts(weights["experts.gate_up_proj"], weights["experts.down_proj"])
    experts += [torch.zeros_like] * config.num_zero_experts
    return mixture(x.to(dtype), gates, choices, experts), probabilities


def glm_written_out(
    config: ZedaGlm4Config, weights: dict[str, Tensor], x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(output, keys, minus infinity where a group is not eligible); the gate in float32 at least."""
    gate_dtype = torch.promote_types(dtype, torch.float32)
    scores = torch.sigmoid(x.to(gate_dtype) @ weights["gate.weight"].to(gate_dtype).T)
    keys = scores + weights["gate.e_score_correction_bias"].to(gate_dtype)
    real = keys[:, : config.n_routed_experts].unflatten(1, (config.n_group, -1))
    group_scores = real.topk(2, dim=2).values.sum(dim=2)
    best = group_scores.topk(config.topk_group, dim=1).indices
    eligible = torch.zeros_like(group_scores).scatter(1, best, 1.0).bool()
    real = real.masked_fill(~eligible.unsqueeze(2), -torch.inf).flatten(1)
    keys = torch.cat((real, keys[:, config.n_routed_experts :]), dim=1)

    choices = keys.topk(config.num_experts_per_tok, dim=1).indices
    gates = scores.gather(1, choices)
    if config.norm_topk_prob:
        gates = gates / gates.sum(dim=1, keepdim=True)
    experts = stacked_experts(weights["experts.gate_up_proj"], weights["experts.down_proj"])
    experts += [torch.zeros_like] * config.num_zero_experts
    out = mixture(x.to(dtype), config.routed_scaling_factor * gates, choices, experts)
    if config.n_shared_experts:
        shared = ffn_expert(*(weights[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")))
        out = out + torch.stack([shared(token) for token in x.to(dtype)])
    return out, keys


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QWEN_CONFIGS)
def test_qwen3_agrees_with_the_formulas(name: str, dtype: torch.dtype, seed: int) -> None:
    config = QWEN_CONFIGS[name]
    weights = qwen_weights(config, dtype, seed)
    block = ZedaQwen3MoE.from_state_dict(config, weights, params_dtype=dtype)
    x = tokens(config.hidden_size, dtype, seed)
    expected, probabilities = qwen_written_out(config, weights, x, torch.float64)
    clear = clear_rows(probabilities, config.num_experts_per_tok)
    assert_error_rule(block(x)[clear], qwen_written_out(config, weights, x, dtype)[0][clear], expected[clear])


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GLM_CONFIGS)
def test_glm4_agrees_with_the_formulas(name: str, dtype: torch.dtype, seed: int) -> None:
    config = GLM_CONFIGS[name]
    weights = glm_weights(config, dtype, seed)
    block = ZedaGlm4MoE.from_state_dict(config, weights, params_dtype=dtype)
    x = tokens(config.hidden_size, dtype, seed)
    expected, keys = glm_written_out(config, weights, x, torch.float64)
    clear = clear_rows(keys, config.num_experts_per_tok)
    assert_error_rule(block(x)[clear], glm_written_out(config, weights, x, dtype)[0][clear], expected[clear])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_static_models_agree_with_transformers(dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    from transformers import Glm4MoeLiteConfig, Qwen3MoeConfig
    from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteMoE
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": 32, "moe_intermediate_size": 24}
    qwen = Qwen3MoeConfig(**sizes, num_experts=12, num_experts_per_tok=4, norm_topk_prob=True)
    glm = Glm4MoeLiteConfig(**sizes, n_routed_experts=12, num_experts_per_tok=3)
    assert ZedaQwen3Config.from_hf(qwen) == QWEN_CONFIGS["static"]
    assert ZedaGlm4Config.from_hf(glm) == GLM_CONFIGS["static"]

    weights = qwen_weights(QWEN_CONFIGS["static"], dtype)
    theirs = Qwen3MoeSparseMoeBlock(qwen).to(dtype)
    theirs.load_state_dict(weights)
    ours = ZedaQwen3MoE.from_state_dict(QWEN_CONFIGS["static"], weights, params_dtype=dtype)
    x = tokens(32, dtype)[None]
    expected, keys = qwen_written_out(QWEN_CONFIGS["static"], weights, x[0], torch.float64)
    clear = clear_rows(keys, 4)
    assert_error_rule(ours(x)[0, clear], theirs(x)[0, clear], expected[clear], "Qwen3")

    weights = glm_weights(GLM_CONFIGS["static"], dtype)
    theirs = Glm4MoeLiteMoE(glm).to(dtype)
    theirs.load_state_dict(weights)
    theirs.gate.e_score_correction_bias = weights["gate.e_score_correction_bias"]
    ours = ZedaGlm4MoE.from_state_dict(GLM_CONFIGS["static"], weights, params_dtype=dtype)
    expected, keys = glm_written_out(GLM_CONFIGS["static"], weights, x[0], torch.float64)
    clear = clear_rows(keys, 3)
    assert_error_rule(ours(x)[0, clear], theirs(x)[0, clear], expected[clear], "GLM-4")


@torch.no_grad()
def test_every_layout_of_a_checkpoint_gives_the_same_bits() -> None:
    x = tokens(32, torch.float32)
    for make, config, weights in (
        (ZedaQwen3MoE, QWEN, qwen_weights(QWEN, torch.float32)),
        (ZedaGlm4MoE, GLM, glm_weights(GLM, torch.float32)),
    ):
        block = make.from_state_dict(config, weights)
        saved = block.checkpoint_state_dict()
        assert saved.keys() == weights.keys()
        for name, weight in weights.items():
            assert_equal(saved[name], weight, name)
        prefixed = {f"model.layers.1.mlp.{name}": weight for name, weight in as_module_list(weights).items()}
        assert_equal(make.from_state_dict(config, prefixed, prefix="model.layers.1.mlp.")(x), block(x))
        again = make(config)
        again.load_state_dict(block.state_dict())
        assert_equal(again(x), block(x))
        with pytest.raises(RuntimeError, match=r"Unexpected key.*gate\.bias"):
            make.from_state_dict(config, {**weights, "gate.bias": torch.zeros(18)})


@torch.no_grad()
def test_blocks_script_compile_and_copy() -> None:
    x = tokens(32, torch.float32).view(4, 10, 32)
    for block in (
        ZedaQwen3MoE.from_state_dict(QWEN, qwen_weights(QWEN, torch.float32)),
        ZedaGlm4MoE.from_state_dict(GLM, glm_weights(GLM, torch.float32)),
    ):
        stats = track_routing(block)["experts"]
        expected = block(x)
        assert_equal(torch.jit.script(block)(x), expected)
        assert_equal(copy.deepcopy(block)(x), expected)
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected)
        assert int(stats.num_tokens) == 3 * 40
        assert 0 < float(stats.zero_rate) < 1


def test_injection_keeps_the_trained_rows_and_their_statistics() -> None:
    generator = torch.Generator().manual_seed(3)
    trained = torch.randn(64, 16, generator=generator) * torch.linspace(0.1, 2.0, 16) + torch.arange(16)
    extended = extend_router(trained, 4000, generator)
    assert extended.shape == (4064, 16)
    assert_equal(extended[:64], trained)
    torch.testing.assert_close(extended[64:].mean(dim=0), trained.mean(dim=0), rtol=0.1, atol=0.15)
    torch.testing.assert_close(extended[64:].std(dim=0), trained.std(dim=0), rtol=0.1, atol=0.0)
    bias = extend_router(trained[:, 0].bfloat16(), 5)
    assert bias.shape == (69,)
    assert bias.dtype == torch.bfloat16
    assert_equal(
        extend_router(trained, 7, torch.Generator().manual_seed(1)),
        extend_router(trained, 7, torch.Generator().manual_seed(1)),
    )
    with pytest.raises(ValueError, match="2 or more"):
        extend_router(trained[:1], 5)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        extend_router(trained, -1)


@torch.no_grad()
def test_a_static_checkpoint_takes_zero_experts() -> None:
    static = qwen_weights(QWEN_CONFIGS["static"], torch.float32)
    dynamic = {**static, "gate.weight": extend_router(static["gate.weight"], QWEN.num_zero_experts)}
    block = ZedaQwen3MoE.from_state_dict(QWEN, dynamic)
    stats = track_routing(block)["experts"]
    block(tokens(32, torch.float32))
    assert 0.05 < float(stats.zero_rate) < 0.7


def test_configurations() -> None:
    qwen = {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "zce_nums": [64],
        "zce_types": ["zero"],
    }
    glm = {
        "hidden_size": 2048,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.8,
        "zce_nums": [32],
        "zce_types": ["zero"],
    }
    assert ZedaQwen3Config.from_hf(qwen) == ZedaQwen3Config()
    renamed = {**qwen, "num_local_experts": qwen["num_experts"]}  # as transformers 5 writes config.json
    del renamed["num_experts"]
    assert ZedaQwen3Config.from_hf(renamed) == ZedaQwen3Config()
    assert ZedaGlm4Config.from_hf(glm) == ZedaGlm4Config()
    with pytest.raises(ValueError, match="zce_types"):
        ZedaQwen3Config.from_hf({**qwen, "zce_types": ["copy"]})
    with pytest.raises(ValueError, match="hidden_act"):
        ZedaGlm4Config.from_hf({**glm, "hidden_act": "relu"})
