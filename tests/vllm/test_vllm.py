# SPDX-License-Identifier: Apache-2.0
"""zexpert inside vLLM: its contract with zexpert's routing and experts. Run by `make test-vllm`."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, fused_moe
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router import zero_expert_router
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

import reference
from testing import assert_error_rule
from zexpert.integrations.vllm import register, zero_experts_compute
from zexpert.ops import router_logits

NUM_EXPERTS, NUM_ZERO_EXPERTS, TOP_K = 6, 3, 4
BIAS = 0.1 * torch.randn(NUM_EXPERTS + NUM_ZERO_EXPERTS, generator=torch.Generator().manual_seed(0))


def make_router(**arguments: Any) -> ZeroExpertRouter:
    return create_fused_moe_router(
        top_k=TOP_K,
        global_num_experts=NUM_EXPERTS,
        num_logical_experts=NUM_EXPERTS,
        e_score_correction_bias=nn.Parameter(BIAS.clone()),
        **{"zero_expert_type": "identity", "renormalize": False, "routed_scaling_factor": 6.0, **arguments},
    )


def make_inputs(num_tokens: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    return hidden_states, torch.randn(num_tokens, NUM_EXPERTS + NUM_ZERO_EXPERTS, generator=generator)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("switch", "expected"), [("1", "zexpert.integrations.vllm"), ("0", "vllm")])
def test_entry_point_is_off_unless_asked_for(switch: str, expected: str) -> None:
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins(); load_general_plugins()\n"
        "from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter as Router\n"
        "print(Router._compute_routing.__module__)"
    )
    assert run_python(code, ZEXPERT_VLLM=switch).startswith(expected)


def test_registering_again_changes_nothing() -> None:
    before = RoutedExperts.forward_modular, ZeroExpertRouter._compute_routing
    register()
    assert before == (RoutedExperts.forward_modular, ZeroExpertRouter._compute_routing)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("hidden_size", [200, 257, 512])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_router_keeps_the_contract(num_tokens: int, hidden_size: int, renormalize: bool, scoring_func: str) -> None:
    router = make_router(renormalize=renormalize, scoring_func=scoring_func)
    hidden_states, router_logits = make_inputs(num_tokens, hidden_size)
    topk_weights, topk_ids = router.select_experts(hidden_states, router_logits)

    expected = reference.biased_topk(
        router_logits, BIAS, TOP_K, num_real_experts=NUM_EXPERTS, scoring_func=scoring_func, renormalize=renormalize,
        routed_scaling_factor=6.0,
    )  # fmt: skip
    assert torch.equal(topk_ids, expected.topk_ids.clamp_min(0).int())
    torch.testing.assert_close(topk_weights, expected.topk_weights.float())
    zero_expert_output = router.zero_expert_output
    torch.testing.assert_close(zero_expert_output, expected.zero_weight.float()[:, None] * hidden_states)
    assert router.zero_expert_output is None
    if num_tokens == 7:
        assert (expected.topk_ids < 0).any()


@pytest.mark.usefixtures("vllm_config")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_of_the_router(dtype: torch.dtype) -> None:
    from vllm.model_executor.models.longcat_flash import LongcatRouter

    config = SimpleNamespace(hidden_size=128, n_routed_experts=NUM_EXPERTS)
    hidden_states = torch.randn(5, 128).to(dtype)
    router = LongcatRouter(config, NUM_ZERO_EXPERTS, torch.float32)
    weight = torch.randn(NUM_EXPERTS + NUM_ZERO_EXPERTS, 128)
    router.classifier.weight.data.copy_(weight)
    assert torch.equal(router(hidden_states), router_logits(hidden_states, weight))
    lower = LongcatRouter(config, NUM_ZERO_EXPERTS, torch.bfloat16)
    lower.classifier.weight.data.copy_(weight)
    lower.classifier.quant_method.process_weights_after_loading(lower.classifier)
    assert lower(hidden_states.bfloat16()).dtype == torch.bfloat16  # vLLM's own


@pytest.mark.parametrize("indices_type", [None, torch.int32, torch.int64, torch.uint32])
def test_types_of_ids(indices_type: torch.dtype | None) -> None:
    _, topk_ids = make_router().select_experts(*make_inputs(7, 64), topk_indices_dtype=indices_type)
    assert topk_ids.dtype == (indices_type or torch.int32)
    assert int(topk_ids.long().max()) < NUM_EXPERTS


def test_rows_of_garbage_choose_nothing() -> None:
    router = make_router()
    hidden_states, router_logits = make_inputs(7, 64)
    topk_weights, topk_ids = router.select_experts(hidden_states, router_logits.fill_(torch.nan))
    assert not topk_weights.any()
    assert not topk_ids.any()
    assert not router.zero_expert_output.any()


@pytest.mark.parametrize("hidden_size", [200, 256, 300])
def test_zero_experts_compute(hidden_size: int) -> None:
    for module in (fused_moe, zero_expert_router):
        assert module.zero_experts_compute_triton is zero_experts_compute
    ids = torch.tensor([[0, 7, 5, 8], [1, 2, 3, 4]])
    scales = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    hidden_states = torch.randn(2, hidden_size)
    out = fused_moe.zero_experts_compute_triton(ids, scales, NUM_EXPERTS, "identity", hidden_states)
    torch.testing.assert_close(out, torch.stack([0.6 * hidden_states[0], 0 * hidden_states[1]]))
    assert ids.tolist() == [[0, 0, 5, 0], [1, 2, 3, 4]]
    torch.testing.assert_close(scales, torch.tensor([[0.1, 0.0, 0.3, 0.0], [0.5, 0.6, 0.7, 0.8]]))
    with pytest.raises(ValueError, match=r"^zero_expert_type must be \"identity\", got 'drop'$"):
        zero_experts_compute(ids, scales, NUM_EXPERTS, "drop", hidden_states)


def make_layer(dtype: torch.dtype, name: str) -> Any:
    """A whole MoE layer of vLLM's, with weights in the layout that its Triton kernels take."""
    layer = FusedMoEFactory(
        zero_expert_type="identity", e_score_correction_bias=nn.Parameter(BIAS.clone()), num_experts=NUM_EXPERTS,
        top_k=TOP_K, hidden_size=64, intermediate_size=32, params_dtype=dtype, renormalize=False,
        prefix=f"{name}.experts", routed_scaling_factor=6.0, router_logits_dtype=torch.float32,
    )  # fmt: skip
    torch.manual_seed(0)
    nn.init.normal_(layer.routed_experts.w13_weight, std=0.2)
    nn.init.normal_(layer.routed_experts.w2_weight, std=0.2)
    layer.routed_experts.quant_method.unquantized_backend = UnquantizedMoeBackend.TRITON
    return layer


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 33])
def test_layer(vllm_config: Any, num_tokens: int, dtype: torch.dtype) -> None:
    layer = make_layer(dtype, f"model.{num_tokens}.{dtype}")
    hidden_states, router_logits = make_inputs(num_tokens, 64, dtype)
    seen: list[Tensor] = []
    forward_modular = layer.routed_experts.forward_modular

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["topk_ids"])
        return forward_modular(*args, **kwargs)

    layer.routed_experts.forward_modular = spy
    with set_forward_context(None, vllm_config):
        out = layer(hidden_states, router_logits)
    exact, plain = (
        reference.layer(
            hidden_states, router_logits, layer.routed_experts.w13_weight, layer.routed_experts.w2_weight,
            top_k=TOP_K, bias=BIAS, num_real_experts=NUM_EXPERTS, routed_scaling_factor=6.0, dtype=reference_dtype,
        )
        for reference_dtype in (torch.float64, dtype)
    )  # fmt: skip
    assert_error_rule(out, plain, exact)
    (topk_ids,) = seen
    assert (topk_ids == -1).any() or num_tokens == 1  # no slot of a zero expert reached an expert


@torch.inference_mode()
def test_experts_that_are_not_zexperts(vllm_config: Any) -> None:
    """Weights in another layout stay with vLLM's kernels, and so do ids of 0 beside weights of 0."""
    layer = make_layer(torch.float32, "other")
    for attribute, value in (("apply_router_weight_on_input", True), ("swiglu_limit", 7.0)):
        kept = getattr(layer.routed_experts, attribute)
        setattr(layer.routed_experts, attribute, value)
        _, topk_ids = layer.router.select_experts(*make_inputs(7, 64))
        assert int(topk_ids.min()) == 0
        setattr(layer.routed_experts, attribute, kept)
    _, topk_ids = layer.router.select_experts(*make_inputs(7, 64))
    assert int(topk_ids.min()) == -1
    layer.router.set_capture_fn(lambda ids: None)
    _, topk_ids = layer.router.select_experts(*make_inputs(7, 64))
    assert int(topk_ids.min()) == 0
