# SPDX-License-Identifier: Apache-2.0
"""zexpert inside SGLang: LongcatFlashMoE with zexpert's routing. Run by `make test-sglang`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pybase64
import pytest
import torch
from sglang.srt.layers.moe import topk
from sglang.srt.layers.moe.topk import TopKConfig
from sglang.srt.models.longcat_flash import LongcatFlashMoE
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.state_capturer import routed_experts
from sglang.srt.state_capturer.base import BaseDeviceCache
from torch import Tensor, nn

import reference
import zexpert
import zexpert_plugins
from testing import assert_error_rule
from zexpert.integrations import sglang as plugin
from zexpert.integrations.sglang import register
from zexpert.ops import biased_topk_choices

NUM_EXPERTS, NUM_ZERO_EXPERTS, TOP_K = 6, 3, 4
SGLANG_FORWARD = LongcatFlashMoE.forward


@pytest.fixture(autouse=True)
def _hooks() -> Any:
    yield
    HookRegistry.reset()
    LongcatFlashMoE.forward = SGLANG_FORWARD


class PlainExperts(nn.Module):
    """What SGLang's experts compute from a StandardTopKOutput, written out."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(0.2 * torch.randn(NUM_EXPERTS, 64, hidden_size, dtype=dtype))
        self.w2_weight = nn.Parameter(0.2 * torch.randn(NUM_EXPERTS, hidden_size, 32, dtype=dtype))
        self.seen: Any = None

    def forward(self, hidden_states: Tensor, chosen: Any) -> Tensor:
        self.seen = chosen
        out = torch.zeros_like(hidden_states, dtype=torch.float64)
        for token, (weights, ids) in enumerate(zip(chosen.topk_weights, chosen.topk_ids, strict=True)):
            for weight, expert in zip(weights, ids.tolist(), strict=True):
                gate, up = (self.w13_weight[expert].double() @ hidden_states[token].double()).chunk(2)
                out[token] += weight * (self.w2_weight[expert].double() @ (nn.functional.silu(gate) * up))
        return out.to(hidden_states.dtype)


def make_layer(hidden_size: int, dtype: torch.dtype) -> LongcatFlashMoE:
    """SGLang's module without what its constructor wants of a running server."""
    torch.manual_seed(0)
    layer = LongcatFlashMoE.__new__(LongcatFlashMoE)
    nn.Module.__init__(layer)
    layer.num_experts, layer.top_k, layer.routed_scaling_factor = NUM_EXPERTS, TOP_K, 6.0
    layer.zero_expert_type = "identity"
    layer.experts = PlainExperts(hidden_size, dtype)
    layer.router = nn.Linear(hidden_size, NUM_EXPERTS + NUM_ZERO_EXPERTS, bias=False)
    layer.router.e_score_correction_bias = nn.Parameter(0.1 * torch.randn(NUM_EXPERTS + NUM_ZERO_EXPERTS))
    layer.router.forward = lambda x: nn.functional.linear(x.float(), layer.router.weight)
    return layer


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZEXPERT_SGLANG", raising=False)
    zexpert_plugins.sglang()
    HookRegistry.apply_hooks()
    assert LongcatFlashMoE.forward is SGLANG_FORWARD


def test_entry_point() -> None:
    from importlib.metadata import entry_points

    (plugin,) = [entry for entry in entry_points(group="sglang.srt.plugins") if entry.name == "zexpert"]
    assert plugin.load() is zexpert_plugins.sglang


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [64, 200, 300])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_layer(monkeypatch: pytest.MonkeyPatch, num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    monkeypatch.setenv("ZEXPERT_SGLANG", "1")
    zexpert_plugins.sglang()
    register()
    HookRegistry.apply_hooks()
    layer = make_layer(hidden_size, dtype)
    hidden_states = torch.randn(num_tokens, hidden_size).to(dtype)
    out = layer(hidden_states)
    exact, plain = (
        reference.layer(
            hidden_states, layer.router(hidden_states), layer.experts.w13_weight, layer.experts.w2_weight,
            top_k=TOP_K, bias=layer.router.e_score_correction_bias, num_real_experts=NUM_EXPERTS,
            routed_scaling_factor=6.0, dtype=reference_dtype,
        )
        for reference_dtype in (torch.float64, dtype)
    )  # fmt: skip
    assert_error_rule(out, plain, exact)
    assert isinstance(layer.experts.seen, tuple | SimpleNamespace)
    assert (layer.experts.seen.topk_ids >= 0).all()


@torch.inference_mode()
def test_captured_choices_become_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """By SGLang's own caches and in the text that its server returns: zero experts by their own number."""
    monkeypatch.setenv("ZEXPERT_SGLANG", "1")
    zexpert_plugins.sglang()
    HookRegistry.apply_hooks()
    layer = make_layer(64, torch.float32)
    layer.layer_id = 1
    layer.topk = SimpleNamespace(topk_config=TopKConfig(top_k=TOP_K))
    hidden_states = torch.randn(7, 64)
    plain = layer(hidden_states)

    cache = BaseDeviceCache(max_batch_size=9, num_layers=2, topk_size=TOP_K, device="cpu", name="routed_experts")
    monkeypatch.setattr(topk, "get_global_experts_capturer", lambda: cache)
    monkeypatch.setattr(routed_experts, "get_global_experts_capturer", lambda: cache)
    assert torch.equal(layer(hidden_states), plain)
    bias, router_logits = layer.router.e_score_correction_bias, layer.router(hidden_states)
    choices = biased_topk_choices(router_logits, bias, TOP_K, num_real_experts=NUM_EXPERTS)
    assert torch.equal(cache.buffer[:7, 1], choices)
    assert int(choices.max()) >= NUM_EXPERTS

    text = pybase64.b64encode(cache.buffer[:7].numpy().tobytes()).decode()
    array = plugin.routed_experts({"meta_info": {"routed_experts": text}}, num_layers=2, top_k=TOP_K)
    trained = zexpert.FusedMoE(
        NUM_EXPERTS, TOP_K, 64, 32, zero_expert_type="identity", zero_expert_num=NUM_ZERO_EXPERTS
    )
    record = zexpert.choices.record_of_routed_experts([array], trained, layers={"": 1})
    assert torch.equal(record[""].int(), choices)

    layer.topk.topk_config.allow_routed_experts_capture = False  # a draft model's
    cache.buffer.zero_()
    layer(hidden_states)
    assert not cache.buffer.any()
