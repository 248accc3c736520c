# SPDX-License-Identifier: Apache-2.0
"""zexpert's CUDA kernels beside vLLM's own: the same results from the same tensors on a GPU.

Apart from tests/vllm, which makes vLLM believe in a CPU. Needs a vLLM with its CUDA libraries, as it is installed. Each
test imports its part of vLLM, so that one that is missing fails that test alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))  # the reference

import reference
from testing import assert_equal, assert_error_rule
from zexpert import ops
from zexpert.integrations import vllm as plugin
from zexpert_tools.benchmark import vllm_peer
from zexpert_tools.benchmark.layer import Shape, make_weights, zexpert_layer
from zexpert_tools.benchmark.torch_routing import LONGCAT_FLASH, RoutingCase

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)

NUM_REAL, TOP_K = LONGCAT_FLASH.num_real_experts, LONGCAT_FLASH.top_k
TOKENS = (1, 33, 1024)


@pytest.fixture(autouse=True)
def vllm_for_cuda() -> None:
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform

    assert current_platform.is_cuda(), f"vLLM took this machine for {type(current_platform).__name__}"


def make_routing_inputs(num_tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    logits = 1.5 * torch.randn(num_tokens, LONGCAT_FLASH.num_experts, generator=generator)
    return logits, 1e-3 * torch.randn(LONGCAT_FLASH.num_experts, generator=generator)


def make_hidden_states(num_tokens: int, hidden_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, hidden_size, generator=generator).bfloat16()


def longcat_routing(logits: Tensor, bias: Tensor) -> ops.RoutingResult:
    return ops.biased_topk(
        logits, bias, TOP_K, num_real_experts=NUM_REAL, routed_scaling_factor=LONGCAT_FLASH.routed_scaling_factor
    )


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_topk_kernel(num_tokens: int) -> None:
    logits, bias = make_routing_inputs(num_tokens)
    decided = reference.decided_rows(logits, bias, TOP_K, num_real_experts=NUM_REAL)
    assert float(decided.float().mean()) >= 0.99, "the inputs leave rows to rounding"
    logits, bias, decided = logits.cuda(), bias.cuda(), decided.cuda()

    scores, all_ids = vllm_peer.topk(LONGCAT_FLASH, logits, bias)
    weights = scores * LONGCAT_FLASH.routed_scaling_factor
    is_zero = all_ids >= NUM_REAL
    routing = longcat_routing(logits, bias)
    assert_equal(routing.topk_ids[decided], all_ids.masked_fill(is_zero, -1)[decided], "topk_ids")
    torch.testing.assert_close(routing.topk_weights[decided], weights.masked_fill(is_zero, 0.0)[decided])
    torch.testing.assert_close(routing.zero_weight[decided], weights.masked_fill(~is_zero, 0.0).sum(1)[decided])


@pytest.mark.parametrize("hidden_size", [6144, 6200])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_zero_experts(num_tokens: int, hidden_size: int) -> None:
    """vLLM's kernel leaves the last hidden_size % 256 channels zero."""
    from vllm.model_executor.layers.fused_moe.fused_moe import zero_experts_compute_triton

    assert zero_experts_compute_triton is not plugin.zero_experts_compute, "vLLM is patched: nothing to compare with"
    logits, bias = (part.cuda() for part in make_routing_inputs(num_tokens))
    hidden_states = make_hidden_states(num_tokens, hidden_size).cuda()
    scores, ids = vllm_peer.topk(LONGCAT_FLASH, logits, bias)
    outputs, changed = [], []
    for compute in (zero_experts_compute_triton, plugin.zero_experts_compute):
        arguments = ids.clone(), scores.clone()
        outputs.append(compute(*arguments, NUM_REAL, "identity", hidden_states))
        changed.append(arguments)
    (theirs, ours), whole = outputs, hidden_size // 256 * 256

    zero_weight = scores.masked_fill(ids < NUM_REAL, 0.0).double().sum(1)
    exact = zero_weight[:, None] * hidden_states.double()
    plain = zero_weight.bfloat16()[:, None] * hidden_states
    assert_error_rule(ours, plain, exact)
    assert_error_rule(theirs[:, :whole], plain[:, :whole], exact[:, :whole])
    # Their sum is rounded in another order: a rounding of bfloat16 apart at most.
    torch.testing.assert_close(ours[:, :whole], theirs[:, :whole], rtol=2**-7, atol=0.0)
    assert not theirs[:, whole:].any()
    assert ours[:, whole:].any() == (whole < hidden_size)
    for their_argument, our_argument in zip(*changed, strict=True):
        assert_equal(our_argument, their_argument)


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_plugin_routes_as_vllm(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroExpertRouter as it is, and with the routing that the plugin puts in its place."""
    logits, bias = make_routing_inputs(num_tokens)
    decided = reference.decided_rows(logits, bias, TOP_K, num_real_experts=NUM_REAL).cuda()
    logits, bias = logits.cuda(), bias.cuda()
    hidden_states = make_hidden_states(num_tokens, 6144).cuda()
    router = vllm_peer.zero_expert_router(LONGCAT_FLASH, torch.nn.Parameter(bias))

    def route() -> tuple[Tensor, Tensor, Tensor]:
        topk_weights, topk_ids = router.select_experts(hidden_states, logits)
        return topk_weights[decided], topk_ids[decided], router.zero_expert_output[decided]

    theirs = route()
    monkeypatch.setattr(type(router), "_compute_routing", plugin._compute_routing)
    ours = route()
    assert_equal(ours[1], theirs[1], "topk_ids")
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[2], theirs[2], rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("hidden_size", [6144, 6200])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_moe_sum(num_tokens: int, hidden_size: int) -> None:
    """Sums of small integers, which bfloat16 holds exactly: the same bits."""
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    shape = (num_tokens, TOP_K, hidden_size)
    rows = torch.randint(-8, 9, shape, device="cuda", generator=generator).bfloat16()
    slot_rows = torch.arange(num_tokens * TOP_K, dtype=torch.int32, device="cuda").reshape(num_tokens, TOP_K)
    ours = ops.moe_finalize(
        rows.flatten(0, 1),
        slot_rows,
        torch.ones(num_tokens, TOP_K, device="cuda"),
        rows[:, 0],
        torch.zeros(num_tokens, device="cuda"),
    )
    assert_equal(ours, vllm_peer.moe_sum(rows))
    assert ours.any()


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_layer(num_tokens: int) -> None:
    """ZeroExpertRouter, the Triton experts and the sum against FusedMoE, both within the error rule."""
    routing = RoutingCase("small", 32, 16, 0, TOP_K, has_bias=True, routed_scaling_factor=6.0)
    shape = Shape(routing, 512, 256)
    weights = make_weights(shape, torch.bfloat16, torch.device("cuda"))
    assert weights.bias is not None
    hidden_states = make_hidden_states(num_tokens, shape.hidden_size)
    router_logits = torch.randn(num_tokens, routing.num_experts, generator=torch.Generator().manual_seed(num_tokens))
    theirs, ours = (
        make(shape, weights)(hidden_states.cuda(), router_logits.cuda()).cpu()
        for make in (vllm_peer.VllmLayer, zexpert_layer)
    )

    some = torch.linspace(0, num_tokens - 1, min(num_tokens, 33)).long()  # the reference takes a slot at a time
    decided = reference.decided_rows(
        router_logits[some], weights.bias.cpu(), TOP_K, num_real_experts=routing.num_real_experts
    )
    some = some[decided]
    assert len(some) > 0
    exact, plain = (
        reference.layer(
            hidden_states[some], router_logits[some], weights.w13.cpu(), weights.w2.cpu(), top_k=TOP_K,
            bias=weights.bias.cpu(), routed_scaling_factor=6.0, dtype=dtype,
        )
        for dtype in (torch.float64, torch.bfloat16)
    )  # fmt: skip
    assert_error_rule(ours[some], plain, exact, "FusedMoE")
    assert_error_rule(theirs[some], plain, exact, "vLLM's layer")
