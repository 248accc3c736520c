# SPDX-License-Identifier: Apache-2.0
"""LongcatFlashMoE against transformers' LongcatFlashMoE, and its ways of loading."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_cases import TINY_DECODER, as_module_list, clear_rows, mixture, stacked_experts
from testing import assert_equal, assert_error_rule
from zexpert.models import LongcatFlashConfig, LongcatFlashMoE
from zexpert.models.float32_linear import Float32Linear
from zexpert.ops import router_logits
from zexpert.telemetry import track_routing
from zexpert.training import LongCatBiasController

pytest.importorskip("transformers")

from transformers import LongcatFlashConfig as HfConfig
from transformers import LongcatFlashForCausalLM
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE as HfMoE

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

# R, zero experts, K, H, F, factor: the proportions of Flash and of LongCat-2.0, no zero experts, odd sizes.
SIZES = {
    "flash": (16, 8, 6, 64, 24, 6.0),
    "2.0": (24, 4, 6, 48, 32, 2.5),
    "all_real": (12, 0, 4, 32, 16, 1.0),
    "odd": (7, 5, 3, 33, 13, 1.7),
}


def hf_config(size: str = "flash", **others: Any) -> HfConfig:
    real, zero, top_k, hidden, intermediate, factor = SIZES[size]
    return HfConfig(
        n_routed_experts=real,
        zero_expert_num=zero,
        moe_topk=top_k,
        hidden_size=hidden,
        expert_ffn_hidden_size=intermediate,
        routed_scaling_factor=factor,
        **others,
    )


def hf_block(config: HfConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> HfMoE:
    """transformers' block with random weights, and NaN in the rows of gate_up_proj that belong to zero experts."""
    generator = torch.Generator().manual_seed(seed)
    block = HfMoE(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        block.router.e_score_correction_bias.normal_(std=0.02, generator=generator)
        block.experts.gate_up_proj[config.n_routed_experts :] = torch.nan
    return block.to(dtype)


def inputs(config: HfConfig, dtype: torch.dtype = torch.float32, seed: int = 0, tokens: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(tokens, config.hidden_size, generator=generator).to(dtype)


def reference(config: HfConfig, state_dict: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(output [T, H], keys [T, N]) in float64, from the formulas of arXiv 2509.01322."""
    x = x.double()
    scores = torch.softmax(x @ state_dict["router.classifier.weight"].double().T, dim=-1)
    keys = scores + state_dict["router.e_score_correction_bias"].double()
    choices = keys.topk(config.moe_topk, dim=-1).indices
    experts = stacked_experts(
        state_dict["experts.gate_up_proj"][: config.n_routed_experts], state_dict["experts.down_proj"]
    )
    experts += [lambda token: token] * config.zero_expert_num
    return mixture(x, config.routed_scaling_factor * scores.gather(1, choices), choices, experts), keys


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_transformers(size: str, dtype: torch.dtype, seed: int) -> None:
    config = hf_config(size)
    theirs = hf_block(config, dtype, seed)
    state_dict = theirs.state_dict()
    ours = LongcatFlashMoE.from_state_dict(LongcatFlashConfig.from_hf(config), state_dict, params_dtype=dtype)
    x = inputs(config, dtype, seed)
    expected, keys = reference(config, state_dict, x)
    clear = clear_rows(keys, config.moe_topk)
    with torch.no_grad():
        assert_error_rule(ours(x)[clear], theirs(x)[clear], expected[clear])


@torch.no_grad()
def test_leading_dimensions_and_chunks() -> None:
    config = hf_config()
    state_dict = hf_block(config).state_dict()
    block = LongcatFlashMoE.from_state_dict(LongcatFlashConfig.from_hf(config), state_dict)
    chunked = LongcatFlashMoE.from_state_dict(LongcatFlashConfig.from_hf(config), state_dict, chunk_size=7)
    x = inputs(config)
    torch.testing.assert_close(block(x.view(2, 5, 4, -1)), block(x).view(2, 5, 4, -1))
    torch.testing.assert_close(chunked(x), block(x))
    assert block(x[:0]).shape == (0, config.hidden_size)


@torch.no_grad()
def test_every_layout_of_a_checkpoint_gives_the_same_bits() -> None:
    config = hf_config()
    ours = LongcatFlashConfig.from_hf(config)
    state_dict = hf_block(config).state_dict()
    trimmed = {**state_dict, "experts.gate_up_proj": state_dict["experts.gate_up_proj"][: config.n_routed_experts]}
    listed = as_module_list(state_dict)
    x = inputs(config)
    expected = LongcatFlashMoE.from_state_dict(ours, state_dict)(x)
    for layout in (trimmed, listed):
        assert_equal(LongcatFlashMoE.from_state_dict(ours, layout)(x), expected)
    prefixed = {f"model.layers.3.mlp.{name}": tensor for name, tensor in listed.items()}
    prefixed["model.layers.3.mlps.0.gate_proj.weight"] = torch.zeros(1)
    assert_equal(LongcatFlashMoE.from_state_dict(ours, prefixed, prefix="model.layers.3.mlp.")(x), expected)


@torch.no_grad()
def test_assign_uses_the_tensors_themselves() -> None:
    config = hf_config()
    state_dict = hf_block(config).state_dict()
    ours = LongcatFlashConfig.from_hf(config)
    block = LongcatFlashMoE.from_state_dict(ours, state_dict, assign=True)
    assert block.experts.w13_weight.data_ptr() == state_dict["experts.gate_up_proj"].data_ptr()
    assert block.e_score_correction_bias.data_ptr() == state_dict["router.e_score_correction_bias"].data_ptr()
    x = inputs(config)
    assert_equal(block(x), LongcatFlashMoE.from_state_dict(ours, state_dict)(x))
    # The rows of zero experts are in no file that the block is saved to.
    assert block.experts.w13_weight.untyped_storage().nbytes() == block.experts.w13_weight.nbytes
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    assert file.tell() < 1.1 * sum(tensor.nbytes for tensor in block.state_dict().values()) + 10_000


def test_safetensors_saves_an_assigned_block(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    config = hf_config()
    ours, state_dict = LongcatFlashConfig.from_hf(config), hf_block(config).state_dict()
    block = LongcatFlashMoE.from_state_dict(ours, state_dict, assign=True)
    safetensors.save_model(block, tmp_path / "block.safetensors")
    again = LongcatFlashMoE(ours)
    safetensors.load_model(again, tmp_path / "block.safetensors")
    for name, tensor in block.state_dict().items():
        assert_equal(again.state_dict()[name], tensor, name)


def tiny_model_config() -> HfConfig:
    return hf_config(**TINY_DECODER)


class WithOurBlocks(nn.Module):
    """transformers' model with every MoE block replaced."""

    def __init__(self, model: LongcatFlashForCausalLM) -> None:
        super().__init__()
        self.whole = copy.deepcopy(model)
        for layer in self.whole.model.layers:
            layer.mlp = LongcatFlashMoE(LongcatFlashConfig.from_hf(model.config))


@torch.no_grad()
def test_a_whole_model_loads_a_whole_state_dict() -> None:
    theirs = LongcatFlashForCausalLM(tiny_model_config()).eval()
    for name, parameter in theirs.named_parameters():
        if "mlp." in name:
            parameter.normal_(std=0.2)
    ours = WithOurBlocks(theirs).whole
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(50, (2, 9))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    # Its own state dict has its own names, and loads as well.
    again = WithOurBlocks(theirs).whole
    again.load_state_dict(ours.state_dict())
    assert_equal(again(tokens).logits, ours(tokens).logits)


@torch.no_grad()
def test_weights_go_back_to_transformers() -> None:
    config = hf_config()
    ours = LongcatFlashMoE(LongcatFlashConfig.from_hf(config))
    ours.e_score_correction_bias.normal_(std=0.02)
    theirs = HfMoE(config)
    theirs.load_state_dict(ours.checkpoint_state_dict())
    x = inputs(config)
    torch.testing.assert_close(ours(x), theirs(x))


@torch.no_grad()
@pytest.mark.parametrize("track", [False, True])
def test_scripts_and_compiles(track: bool) -> None:
    config = hf_config()
    block = LongcatFlashMoE.from_state_dict(LongcatFlashConfig.from_hf(config), hf_block(config).state_dict())
    if track:
        track_routing(block)
    x = inputs(config)
    expected = block(x)
    assert_equal(torch.jit.script(block)(x), expected)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), expected)
    assert_equal(copy.deepcopy(block)(x), expected)
    if track:
        assert int(block.experts.runner.routing_stats.num_tokens) == 3 * x.shape[0]


@torch.no_grad()
def test_a_controller_moves_the_bias_that_routing_reads() -> None:
    config = hf_config()
    block = LongcatFlashMoE.from_state_dict(LongcatFlashConfig.from_hf(config), hf_block(config).state_dict())
    stats = track_routing(block)["experts"]
    controller = LongCatBiasController(0.3, target_ffn_experts=2.0)
    x = inputs(config, tokens=256)
    block(x)
    before = float(stats.mean_ffn_slots)
    for _ in range(40):
        block(x)
        controller.update(block)
    block(x)
    assert before > 2.5
    assert float(stats.mean_ffn_slots) == pytest.approx(2.0, rel=0.05)


def test_configuration() -> None:
    assert LongcatFlashConfig.from_hf(HfConfig()) == LongcatFlashConfig()
    published = {
        "hidden_size": 6144,
        "expert_ffn_hidden_size": 2048,
        "n_routed_experts": 512,
        "zero_expert_num": 256,
        "zero_expert_type": "identity",
        "moe_topk": 12,
        "routed_scaling_factor": 6.0,
        "router_bias": False,
    }
    assert LongcatFlashConfig.from_hf(published) == LongcatFlashConfig()
    assert LongcatFlashConfig().num_experts == 768
    assert LongcatFlashConfig.from_hf({**published, "zero_expert_num": None}).zero_expert_num == 0
    for wrong, message in (
        ({"router_bias": True}, "router_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"moe_topk": None}, "moe_topk"),
    ):
        with pytest.raises(ValueError, match=message):
            LongcatFlashConfig.from_hf({**published, **wrong})


def without(state_dict: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if name not in names}


def test_what_does_not_fit_is_told() -> None:
    config = hf_config()
    ours = LongcatFlashConfig.from_hf(config)
    state_dict = hf_block(config).state_dict()
    listed = as_module_list(state_dict)
    cases = [
        (
            {**state_dict, "experts.gate_up_proj": torch.zeros(20, 48, 64)},
            r"^experts.gate_up_proj must have shape \[16 or 24, 48, 64\], got \[20, 48, 64\]$",
        ),
        (
            {**state_dict, "experts.gate_up_proj": torch.zeros(24, 40, 64)},
            r"^experts.gate_up_proj must have shape \[16 or 24, 48, 64\], got \[24, 40, 64\]$",
        ),
        (
            {**state_dict, "experts.down_proj": torch.zeros(16, 64)},
            r"^experts.down_proj must have shape \[16 or 24, 64, 24\], got \[16, 64\]$",
        ),
        (
            {**state_dict, "router.e_score_correction_bias": torch.zeros(16)},
            r"^router.e_score_correction_bias must have shape \[24\], got \[16\]$",
        ),
        (
            {**state_dict, "router.classifier.weight": torch.zeros(16, 64)},
            r"^router.classifier.weight must have shape \[24, 64\], got \[16, 64\]$",
        ),
        ({**state_dict, "router.classifier.bias": torch.zeros(24)}, "Unexpected key.*router.classifier.bias"),
        (without(state_dict, "experts.down_proj"), r'Missing key\(s\) in state_dict: "experts.down_proj"\. $'),
        (without(state_dict, "router.e_score_correction_bias"), r'state_dict: "router.e_score_correction_bias"\. $'),
        (without(listed, "experts.5.up_proj.weight"), "^experts.5.up_proj.weight must be in the checkpoint, got none$"),
        (
            without(listed, "experts.5.gate_proj.weight"),
            "^experts.5.gate_proj.weight must be in the checkpoint",
        ),
        (
            {**listed, "experts.4.down_proj.weight": torch.zeros(3, 4)},
            r"^experts.4.down_proj.weight must have shape \[64, 24\], got \[3, 4\]$",
        ),
        ({**listed, "experts.16.up_proj.weight": torch.zeros(24, 64)}, "Unexpected key.*experts.16"),
    ]
    for wrong, message in cases:
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            LongcatFlashMoE.from_state_dict(ours, wrong)
    with pytest.raises(ValueError, match=r"names start with 'model\.'"):
        LongcatFlashMoE.from_state_dict(ours, state_dict, prefix="model.")
    with pytest.raises(ValueError, match=r"^config must be a zexpert.models.LongcatFlashConfig, .* got transformers"):
        LongcatFlashMoE(config)


def test_a_whole_model_tells_whole_names() -> None:
    model = nn.ModuleDict({"mlp": LongcatFlashMoE(LongcatFlashConfig.from_hf(hf_config())), "norm": nn.LayerNorm(4)})
    missing = model.load_state_dict({}, strict=False).missing_keys
    assert sorted(missing) == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.router.classifier.weight",
        "mlp.router.e_score_correction_bias",
        "norm.bias",
        "norm.weight",
    ]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_those_of_router_logits(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    classifier = Float32Linear(16, 6).to(weight_dtype)
    rows = torch.randn(2, 3, 16).to(dtype)
    logits = classifier(rows)
    if dtype == torch.float64:
        torch.testing.assert_close(logits, rows @ classifier.weight.double().t())
    else:
        assert torch.equal(logits, router_logits(rows, classifier.weight.float()))
        assert torch.equal(classifier(rows[1, 2]), logits[1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier(rows), logits)
    assert torch.equal(torch.jit.script(classifier)(rows), logits)


@torch.no_grad()
def test_autocast_leaves_the_routing_alone() -> None:
    config = hf_config()
    block = LongcatFlashMoE.from_state_dict(LongcatFlashConfig.from_hf(config), hf_block(config).state_dict())
    x = inputs(config)
    expected = block.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(block.router(x), expected)
        assert block(x).dtype == torch.bfloat16
        assert_equal(torch.compile(block.router, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_those_of_transformers(dtype: torch.dtype) -> None:
    config = hf_config()
    theirs = hf_block(config).to(dtype)
    with torch.no_grad():
        theirs.experts.gate_up_proj.nan_to_num_(0.0)
    ours = LongcatFlashMoE.from_state_dict(LongcatFlashConfig.from_hf(config), theirs.state_dict(), params_dtype=dtype)
    x = inputs(config, dtype)
    leaves = []
    for block in (theirs, ours):
        leaf = x.clone().requires_grad_()
        (block(leaf) * torch.arange(config.hidden_size)).sum().backward()
        leaves.append(leaf)
    expected = theirs.experts.gate_up_proj.grad[: config.n_routed_experts]
    # transformers routes in float32 whatever the dtype of x, so its gradients are float32's in both cases.
    tolerance = {"rtol": 1e-3, "atol": 1e-3 * float(expected.abs().max())}
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **tolerance)
    torch.testing.assert_close(ours.experts.w13_weight.grad, expected, **tolerance)
    torch.testing.assert_close(ours.experts.w2_weight.grad, theirs.experts.down_proj.grad, **tolerance)
    torch.testing.assert_close(
        ours.router.classifier.weight.grad.to(dtype), theirs.router.classifier.weight.grad, **tolerance
    )
