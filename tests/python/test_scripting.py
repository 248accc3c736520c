# SPDX-License-Identifier: Apache-2.0
"""torch.jit.script takes routers, experts, runners and the layer as they are and gives the eager result bitwise."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from layer_cases import LAYERS, NUM_EXPERTS, SharedExperts, make_inputs, make_layer, num_columns
from testing import FLOAT_DTYPES, assert_equal
from zexpert import FusedMoE
from zexpert.experts import create_experts
from zexpert.models import LongcatFlashConfig, LongcatFlashMoE
from zexpert.router import (
    BaseRouter,
    CustomRoutingRouter,
    FusedTopKBiasRouter,
    FusedTopKRouter,
    GroupedTopKRouter,
    RoutingSimulatorRouter,
    ZeroExpertRouter,
)
from zexpert.runner import ChunkingMoERunner, DefaultMoERunner

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

#: What makes a module ready for inference.
Prepare = Callable[[nn.Module], torch.jit.ScriptModule]

BIAS = 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(0))
ROUTERS = {
    "plain": lambda: FusedTopKRouter(2, 8, renormalize=True),
    "bias": lambda: FusedTopKBiasRouter(2, 8, BIAS, scoring_func="sigmoid"),
    "bias_parameter": lambda: FusedTopKBiasRouter(2, 8, nn.Parameter(BIAS), indices_dtype=torch.int64),
    "grouped": lambda: GroupedTopKRouter(2, 8, 4, 2),
    "grouped_bias": lambda: GroupedTopKRouter(2, 8, 4, 2, e_score_correction_bias=BIAS),
    "zero": lambda: ZeroExpertRouter(2, 5, "identity"),
    "zero_bias": lambda: ZeroExpertRouter(
        2, 4, {"identity": 2, "constant": 1, "drop": 1}, e_score_correction_bias=BIAS, routed_scaling_factor=6.0
    ),
    "uniform_random": lambda: RoutingSimulatorRouter(2, 8, "uniform_random", seed=3),
    "round_robin": lambda: RoutingSimulatorRouter(2, 5, "round_robin", zero_expert_type="drop"),
    "normal": lambda: RoutingSimulatorRouter(2, 5, "normal", zero_expert_type={"constant": 2, "identity": 1}),
}


def saved_and_loaded(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("expert_map", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name: str, expert_map: bool) -> None:
    router = ROUTERS[name]()
    expert_load = torch.zeros(9, dtype=torch.int32)
    if expert_map:
        replicas = torch.arange(router.num_real_experts)[:, None].repeat(1, 2)
        replicas[:, 1] = -1
        replicas[1, 1] = 8
        router.set_expert_map(replicas, expert_load)
    script = torch.jit.script(router)
    for twin in (script, saved_and_loaded(script)):
        for num_tokens in (0, 1, 33):
            inputs = torch.randn(num_tokens, 3), torch.randn(num_tokens, 8)
            expected = router(*inputs)
            for actual_tensor, expected_tensor in zip(twin(*inputs), expected, strict=True):
                assert_equal(actual_tensor, expected_tensor)
            for actual_tensor, expected_tensor in zip(twin.select_experts(*inputs), expected, strict=True):
                assert_equal(actual_tensor, expected_tensor)
    if expert_map:
        assert_equal(script.expert_load, expert_load)
        assert int(expert_load.sum()) > 0


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str, chunk_size: int | None, backend: str) -> None:
    layer = make_layer(kind, shared_experts=SharedExperts(), chunk_size=chunk_size, experts_backend=backend)
    script = torch.jit.script(layer)
    for twin in (script, saved_and_loaded(script)):
        for num_tokens in (0, 1, 7):
            inputs = make_inputs(kind, num_tokens)
            assert_equal(twin(*inputs).detach(), layer(*inputs).detach())
    hidden_states, router_logits = make_inputs(kind, 6)
    batched = hidden_states.reshape(2, 3, -1), router_logits.reshape(2, 3, -1)
    assert_equal(script(*batched).detach(), layer(*batched).detach())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layer = make_layer("mixed", params_dtype=dtype)
    inputs = make_inputs("mixed", 7, dtype)
    assert_equal(torch.jit.script(layer)(*inputs).detach(), layer(*inputs).detach())


def test_layer_without_options() -> None:
    layer = FusedMoE(4, 2, 8, 6)
    inputs = torch.randn(3, 8), torch.randn(3, 4)
    assert_equal(torch.jit.script(layer)(*inputs).detach(), layer(*inputs).detach())


@pytest.mark.parametrize("runner_class", [DefaultMoERunner, ChunkingMoERunner])
def test_runners(runner_class: Any) -> None:
    options = {"chunk_size": 2} if runner_class is ChunkingMoERunner else {}
    layer = make_layer("constant")
    for experts in (create_experts("cpu"), create_experts("torch")):
        runner = runner_class(layer.router, experts, None, **options)
        inputs = (*make_inputs("constant", 5), layer.expert_weights())
        assert_equal(torch.jit.script(runner)(*inputs).detach(), runner(*inputs).detach())


def frozen(module: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.freeze(torch.jit.script(module))


def optimized(module: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.optimize_for_inference(torch.jit.script(module))


@torch.no_grad()
@pytest.mark.parametrize("prepare", [frozen, optimized])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_and_optimized_layers(kind: str, chunk_size: int | None, prepare: Prepare) -> None:
    """Without shared experts: optimize_for_inference gives their linear modules to another library, which rounds
    otherwise."""
    layer = make_layer(kind, chunk_size=chunk_size).eval()
    prepared = prepare(layer)
    for twin in (prepared, saved_and_loaded(prepared)):
        for num_tokens in (0, 1, 7, 33):
            inputs = make_inputs(kind, num_tokens)
            # The first calls profile, the later ones run what was optimised for these shapes.
            for _ in range(3):
                assert_equal(twin(*inputs), layer(*inputs))


@pytest.mark.parametrize("prepare", [frozen, optimized])
@pytest.mark.parametrize("name", ROUTERS)
def test_frozen_and_optimized_routers(name: str, prepare: Prepare) -> None:
    router = ROUTERS[name]().eval()
    prepared = prepare(router)
    for num_tokens in (0, 1, 33):
        inputs = torch.randn(num_tokens, 3), torch.randn(num_tokens, 8)
        for actual, expected in zip(prepared(*inputs), router(*inputs), strict=True):
            assert_equal(actual, expected)


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("kind", LAYERS)
def test_traced_with_gradients_wanted(kind: str, backend: str) -> None:
    """trace itself compares calls with and without gradients."""
    layer = make_layer(kind, shared_experts=SharedExperts(), experts_backend=backend)
    traced = torch.jit.trace(layer, make_inputs(kind, 5))
    for num_tokens in (0, 1, 5, 33):
        inputs = make_inputs(kind, num_tokens, seed=2)
        torch.testing.assert_close(traced(*inputs), layer(*inputs))
    traced(*inputs).sum().backward()
    traced_grad, layer.w13_weight.grad = layer.w13_weight.grad, None
    layer(*inputs).sum().backward()
    torch.testing.assert_close(traced_grad, layer.w13_weight.grad)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_traced_layers(kind: str) -> None:
    """A trace serves every number of tokens and keeps the number of dimensions; with chunks, it keeps their number."""
    layer = make_layer(kind, shared_experts=SharedExperts()).eval()
    chunks = make_layer(kind, shared_experts=SharedExperts(), chunk_size=4).eval()
    traced = torch.jit.trace(layer, make_inputs(kind, 5))
    traced_chunks = torch.jit.trace(chunks, make_inputs(kind, 10))
    for twin in (traced, torch.jit.freeze(traced), saved_and_loaded(traced)):
        for num_tokens in (0, 1, 7, 33):
            inputs = make_inputs(kind, num_tokens)
            assert_equal(twin(*inputs), layer(*inputs))
    inputs = make_inputs(kind, 10, seed=2)
    assert_equal(traced_chunks(*inputs), chunks(*inputs))


@torch.no_grad()
@pytest.mark.parametrize("prepare", [torch.jit.script, frozen, optimized])
def test_longcat_block(prepare: Prepare) -> None:
    config = LongcatFlashConfig(
        hidden_size=24, expert_ffn_hidden_size=20, n_routed_experts=6, zero_expert_num=3, moe_topk=3,
        routed_scaling_factor=6.0,
    )  # fmt: skip
    block = LongcatFlashMoE(config).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    block.e_score_correction_bias.normal_(std=0.02)
    prepared = prepare(block)
    traced = torch.jit.trace(block, torch.randn(2, 5, 24))
    for twin in (prepared, saved_and_loaded(prepared), traced):
        for shape in ((2, 5, 24), (1, 1, 24), (3, 0, 24)):
            hidden_states = torch.randn(shape)
            assert_equal(twin(hidden_states), block(hidden_states))


def test_parameters_and_bias_are_shared_with_the_script() -> None:
    bias = torch.zeros(num_columns("identity"))
    layer = make_layer("identity", e_score_correction_bias=bias)
    script = torch.jit.script(layer)
    inputs = make_inputs("identity", 5)
    bias[NUM_EXPERTS:] = 100.0
    with torch.no_grad():
        layer.w13_weight.mul_(2)
    assert_equal(script(*inputs).detach(), layer(*inputs).detach())


def test_script_inside_a_users_module() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(24, num_columns("identity"), bias=False)
            self.mlp = make_layer("identity")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.mlp(x, self.gate(x))
            return out

    block = Block()
    hidden_states = torch.randn(2, 3, 24)
    assert_equal(torch.jit.script(block)(hidden_states).detach(), block(hidden_states).detach())


def test_errors_of_a_script_say_the_same() -> None:
    script = torch.jit.script(make_layer("identity"))
    hidden_states, router_logits = make_inputs("identity", 6)
    for arguments, message in (
        ((hidden_states[:, :5], router_logits), r"hidden_states must have shape \[..., 24\], got \[6, 5\]"),
        ((hidden_states, router_logits[:5]), r"router_logits must have one row per token .*\(6\), got 5"),
        ((hidden_states, router_logits[:, :8]), r"router_logits must have one column per expert \(9\), got 8"),
    ):
        with pytest.raises(torch.jit.Error, match=message):
            script(*arguments)


def test_a_script_has_no_capture_callback_and_no_stash() -> None:
    router = ZeroExpertRouter(1, 2, "identity", 1)
    seen: list[object] = []
    router.set_capture_fn(seen.append)
    torch.jit.script(router)(torch.ones(2, 3), torch.ones(2, 3))
    assert not seen
    assert router.zero_expert_output is None


def test_custom_routing_is_refused() -> None:
    router: BaseRouter = CustomRoutingRouter(1, 4, lambda **_: (torch.zeros(1, 1), torch.zeros(1, 1).int()))
    layer = make_layer("plain", custom_routing_function=lambda **_: None)
    for module in (router, layer):
        with pytest.raises(RuntimeError, match=r"^CustomRoutingRouter cannot be scripted: "):
            torch.jit.script(module)
