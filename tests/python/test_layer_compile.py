# SPDX-License-Identifier: Apache-2.0
"""torch.compile(fullgraph=True) sees no break in the layer, and its graph gives the eager result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from layer_cases import LAYERS, NUM_EXPERTS, TOP_K, SharedExperts, make_inputs, make_layer
from testing import FLOAT_DTYPES, assert_equal
from zexpert import FusedMoE, RoutingResult
from zexpert.router import ZeroExpertRouter

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(module: Any, backend: Any = "aot_eager", *, dynamic: bool | None = True) -> Any:
    """aot_eager traces, functionalizes and runs fake kernels like inductor, and skips its code generation."""
    return torch.compile(module, fullgraph=True, dynamic=dynamic, backend=backend)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str) -> None:
    layer = make_layer(kind, shared_experts=SharedExperts())
    graph = compiled(layer)
    with torch.no_grad():
        for num_tokens in (7, 1, 0, 33):
            inputs = make_inputs(kind, num_tokens)
            assert_equal(graph(*inputs), layer(*inputs))
        batched = [tensor.reshape(2, 3, -1) for tensor in make_inputs(kind, 6)]
        assert_equal(graph(*batched), layer(*batched))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layer = make_layer("mixed", params_dtype=dtype)
    inputs = make_inputs("mixed", 7, dtype)
    with torch.no_grad():
        assert_equal(compiled(layer)(*inputs), layer(*inputs))


def test_autocast() -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts())
    graph = compiled(layer)
    inputs = make_inputs("mixed", 7)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(graph(*inputs), layer(*inputs))
    with torch.no_grad():
        assert_equal(graph(*inputs), layer(*inputs))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_experts_backends(backend: str) -> None:
    layer = make_layer("mixed", experts_backend=backend)
    graph = compiled(layer)
    with torch.no_grad():
        for num_tokens in (7, 5):
            inputs = make_inputs("mixed", num_tokens)
            torch.testing.assert_close(graph(*inputs), layer(*inputs))


@pytest.mark.parametrize("kind", LAYERS)
def test_one_graph_serves_every_number_of_tokens(kind: str) -> None:
    layer = make_layer(kind, shared_experts=SharedExperts())
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(layer, counter)
    with torch.no_grad():
        graph(*make_inputs(kind, 2))
        num_compiled = counter.frame_count
        for num_tokens in (7, 1000, 33):
            inputs = make_inputs(kind, num_tokens)
            assert_equal(graph(*inputs), layer(*inputs))
    assert counter.frame_count == num_compiled


def test_a_second_number_of_tokens_is_the_last_to_compile() -> None:
    """Without dynamic=True the first graph is for its number of tokens, the second for all."""
    layer = make_layer("identity")
    counter = CompileCounterWithBackend("eager")
    graph = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        graph(*make_inputs("identity", 5))
        graph(*make_inputs("identity", 7))
        num_compiled = counter.frame_count
        for num_tokens in (1000, 33):
            graph(*make_inputs("identity", num_tokens))
    assert counter.frame_count == num_compiled


def test_one_graph_for_each_number_of_chunks() -> None:
    layer = make_layer("identity", chunk_size=8)
    counter = CompileCounterWithBackend("aot_eager")
    graph = compiled(layer, counter)
    with torch.no_grad():
        for num_tokens in (11, 13, 16, 10):
            inputs = make_inputs("identity", num_tokens)
            assert_equal(graph(*inputs), layer(*inputs))
            if num_tokens == 11:
                num_compiled = counter.frame_count
    assert counter.frame_count == num_compiled


def test_chunks() -> None:
    layer = make_layer("identity", chunk_size=4)
    graph = compiled(layer)
    with torch.no_grad():
        for num_tokens in (3, 9, 0):
            inputs = make_inputs("identity", num_tokens)
            assert_equal(graph(*inputs), layer(*inputs))


@pytest.mark.parametrize("routing_simulation", ["uniform_random", "round_robin", "normal"])
def test_simulated_routing(routing_simulation: str) -> None:
    layer = make_layer("mixed", routing_simulation=routing_simulation)
    graph = compiled(layer)
    with torch.no_grad():
        for num_tokens in (7, 5):
            inputs = make_inputs("mixed", num_tokens)
            assert_equal(graph(*inputs), layer(*inputs))


def test_custom_routing_function() -> None:
    def route(*, gating_output: Tensor, topk: int, **_: Any) -> tuple[Tensor, Tensor]:
        values, ids = torch.topk(gating_output.sigmoid(), topk, dim=1)
        return values, ids

    layer = FusedMoE(NUM_EXPERTS, TOP_K, 24, 20, custom_routing_function=route)
    inputs = make_inputs("plain", 7)
    with torch.no_grad():
        assert_equal(compiled(layer)(*inputs), layer(*inputs))


def test_expert_map_records_the_load() -> None:
    layer = make_layer("identity")
    expert_load = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    layer.router.set_expert_map(torch.arange(NUM_EXPERTS)[:, None], expert_load)
    inputs = make_inputs("identity", 7)
    with torch.no_grad():
        expected = layer(*inputs)
        once = expert_load.clone()
        graph = compiled(layer)
        assert_equal(graph(*inputs), expected)
        assert_equal(graph(*inputs), expected)
    assert_equal(expert_load, 3 * once)


def test_bias_update_is_seen_without_recompiling() -> None:
    bias = torch.zeros(9)
    layer = make_layer("identity", e_score_correction_bias=bias)
    graph = compiled(layer)
    inputs = make_inputs("identity", 7)
    with torch.no_grad():
        before = graph(*inputs)
        bias[NUM_EXPERTS:] = 100.0
        after = graph(*inputs)
        assert not torch.equal(before, after)
        assert_equal(after, layer(*inputs))


def test_router_on_its_own_keeps_no_state() -> None:
    router = ZeroExpertRouter(2, 6, "identity", 3)
    inputs = torch.randn(5, 4), torch.randn(5, 9)
    routing: RoutingResult = compiled(router)(*inputs)
    assert router.zero_expert_output is None
    for actual, expected in zip(routing, router(*inputs), strict=True):
        assert_equal(actual, expected)


def test_inductor() -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts())
    graph = compiled(layer, "inductor")
    with torch.no_grad():
        for num_tokens in (7, 12):
            inputs = make_inputs("mixed", num_tokens)
            torch.testing.assert_close(graph(*inputs), layer(*inputs))
