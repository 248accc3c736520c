# SPDX-License-Identifier: Apache-2.0
"""Models made on the meta device and materialised: what no checkpoint and no draw fills has values all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from layer_cases import make_inputs, make_layer
from testing import assert_equal
from zexpert import FusedMoE, models
from zexpert.telemetry import collect_routing_stats, track_routing
from zexpert.training import LongCatBiasController

LONGCAT = models.LongcatFlashConfig(
    hidden_size=16, expert_ffn_hidden_size=8, n_routed_experts=4, zero_expert_num=2, moe_topk=2
)
GLM4 = models.ZedaGlm4Config(
    hidden_size=16, moe_intermediate_size=8, n_routed_experts=4, num_zero_experts=2, num_experts_per_tok=2
)
QWEN3 = models.ZedaQwen3Config(
    hidden_size=16, moe_intermediate_size=8, num_experts=4, num_zero_experts=2, num_experts_per_tok=2
)
MOE_PLUS_PLUS = models.MoEPlusPlusConfig(hidden_size=16, intermediate_size=8, num_ffn_experts=4)
BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "longcat": lambda **options: models.LongcatFlashMoE(LONGCAT, **options),
    "glm4": lambda **options: models.ZedaGlm4MoE(GLM4, **options),
    "qwen3": lambda **options: models.ZedaQwen3MoE(QWEN3, **options),
    "moe++": lambda **options: models.MoEPlusPlusBlock(MOE_PLUS_PLUS, **options),
}


@pytest.fixture(autouse=True)
def memory_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN and large integers, where it would often hold zeros."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def reset_every_module(model: nn.Module) -> None:
    """As FSDP and training frameworks do after to_empty."""
    for module in model.modules():
        if isinstance(reset := getattr(module, "reset_parameters", None), Callable):  # type: ignore[arg-type]
            reset()


def as_argument(make: Callable[..., nn.Module]) -> nn.Module:
    return make(device="meta")


def as_context(make: Callable[..., nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("on_meta", [as_argument, as_context])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_from_the_meta_device_is_a_fresh_block(
    block: str, on_meta: Callable[[Callable[..., nn.Module]], nn.Module], tracked: bool
) -> None:
    model = on_meta(BLOCKS[block])
    if tracked:
        track_routing(model)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    reset_every_module(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert bool(tensor.isfinite().all()), name
        if not isinstance(tensor, nn.Parameter):
            assert_equal(tensor, torch.zeros_like(tensor), name)
    x = torch.randn(64, 16)
    out = model(x)
    out = out[0] if isinstance(out, tuple) else out
    assert bool(out.isfinite().all())
    assert bool(out.any())
    if tracked:
        (stats,) = collect_routing_stats(model).values()
        assert int(stats.num_tokens) == 64
        assert int((stats.expert_load > 0).sum()) == 4  # every expert is chosen by some token


def test_a_bias_needs_no_reset() -> None:
    """Frameworks that load a checkpoint call to_empty alone, and the counts are in no checkpoint."""
    block = models.LongcatFlashMoE(LONGCAT, device="meta")
    (stats,) = track_routing(block).values()
    block.to_empty(device="cpu")
    assert_equal(block.e_score_correction_bias, torch.zeros(6))
    block.load_state_dict(models.LongcatFlashMoE(LONGCAT).state_dict())
    block(torch.randn(8, 16))
    assert int(stats.num_tokens) == 8
    LongCatBiasController(0.1, 1.0).update(block)
    assert bool(block.e_score_correction_bias.isfinite().all())


@pytest.mark.parametrize("parameter", [False, True])
def test_a_bias_with_values_keeps_them(parameter: bool) -> None:
    """The weights are on the meta device, the caller's bias is not."""
    values = torch.randn(6)
    bias: Tensor = nn.Parameter(values.clone()) if parameter else values.clone()
    layer = FusedMoE(
        4, 2, 16, 8, zero_expert_type="drop", zero_expert_num=2, e_score_correction_bias=bias, device="meta"
    )
    (stats,) = track_routing(layer).values()
    layer.to_empty(device="cpu")
    reset_every_module(layer)
    assert layer.e_score_correction_bias is not None
    assert_equal(layer.e_score_correction_bias.detach(), values)
    assert isinstance(layer.e_score_correction_bias, nn.Parameter) == parameter
    assert int(stats.num_tokens) == 0
    layer.to(torch.float64)
    assert_equal(layer.e_score_correction_bias.detach(), values.double())


def test_counts_and_an_expert_map_keep_their_values() -> None:
    layer = make_layer("identity")
    replicas = torch.tensor([[0, 6], [1, -1], [2, -1], [3, -1], [4, -1], [5, -1]])
    layer.router.set_expert_map(replicas, torch.zeros(7, dtype=torch.int64))
    layer.w13_weight = nn.Parameter(torch.cat((layer.w13_weight, layer.w13_weight[:1])).detach())
    layer.w2_weight = nn.Parameter(torch.cat((layer.w2_weight, layer.w2_weight[:1])).detach())
    (stats,) = track_routing(layer).values()
    layer(*make_inputs("identity", 20))
    load, tokens = stats.expert_load.clone(), int(stats.num_tokens)
    layer.to_empty(device="cpu")
    assert_equal(layer.router.logical_to_physical_map, replicas)
    assert_equal(layer.router.expert_load, load)
    assert_equal(stats.expert_load, load)
    assert int(stats.num_tokens) == tokens == 20


def test_fsdp_materialises_a_block() -> None:
    """FSDP calls reset_parameters of every module that has tensors of its own, and fails where there is none."""
    for make in BLOCKS.values():
        model = make(device="meta")
        track_routing(model)
        for module in model.modules():
            if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                module.to_empty(device="cpu", recurse=False)
                module.reset_parameters()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert bool(tensor.isfinite().all()), name
