# SPDX-License-Identifier: Apache-2.0
"""FusedMoE: arguments, parameters, inputs of every shape, copies and conversions."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layer_cases import (
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    NUM_EXPERTS,
    TOP_K,
    SharedExperts,
    expected_output,
    make_inputs,
    make_layer,
    num_columns,
)
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule
from zexpert import FusedMoE, RoutingMethodType, RoutingResult, ZeroExpertType
from zexpert.router import ZeroExpertRouter
from zexpert.runner import ChunkingMoERunner, DefaultMoERunner


def assert_output(layer: FusedMoE, hidden_states: Tensor, router_logits: Tensor) -> None:
    out = layer(hidden_states, router_logits).detach()
    plain = expected_output(layer, hidden_states, router_logits, out.dtype)
    assert_error_rule(out, plain, expected_output(layer, hidden_states, router_logits))


# --- Output


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_agrees_with_the_reference(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, params_dtype=dtype, shared_experts=SharedExperts(dtype))
    for num_tokens in (0, 1, 7, 33):
        assert_output(layer, *make_inputs(kind, num_tokens, dtype))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 0, 4), (1, 2, 1, 3)])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_leading_dimensions(leading: tuple[int, ...], chunk_size: int | None) -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts(), chunk_size=chunk_size)
    num_tokens = torch.Size(leading).numel()
    hidden_states, router_logits = make_inputs("mixed", num_tokens)
    out = layer(hidden_states.reshape(*leading, HIDDEN), router_logits.reshape(*leading, num_columns("mixed")))
    assert out.shape == (*leading, HIDDEN)
    assert_equal(out.reshape(num_tokens, HIDDEN).detach(), layer(hidden_states, router_logits).detach())


def test_strided_inputs() -> None:
    layer = make_layer("identity")
    hidden_states, router_logits = make_inputs("identity", 6)
    expected = layer(hidden_states, router_logits).detach()
    transposed = layer(hidden_states.t().contiguous().t(), router_logits.t().contiguous().t())
    assert_equal(transposed.detach(), expected)
    batch_second = hidden_states.reshape(2, 3, HIDDEN).transpose(0, 1)
    out = layer(batch_second, router_logits.reshape(2, 3, -1).transpose(0, 1))
    assert_equal(out.transpose(0, 1).reshape(6, HIDDEN).detach(), expected)


def test_repeats_bitwise() -> None:
    layer = make_layer("mixed", params_dtype=torch.bfloat16)
    inputs = make_inputs("mixed", 33, torch.bfloat16)
    assert_equal(layer(*inputs).detach(), layer(*inputs).detach())


def test_meta_device_gives_shapes() -> None:
    bias = torch.zeros(num_columns("mixed"), device="meta")
    layer = make_layer("mixed", device="meta", e_score_correction_bias=bias)
    out = layer(torch.empty(5, HIDDEN, device="meta"), torch.empty(5, num_columns("mixed"), device="meta"))
    assert out.device.type == "meta"
    assert out.shape == (5, HIDDEN)


# --- Autocast


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_converts_the_experts_and_not_the_routing(kind: str, backend: str) -> None:
    layer = make_layer(kind, shared_experts=SharedExperts(), experts_backend=backend)
    routings: list[RoutingResult] = []
    layer.router.set_capture_fn(routings.append)
    hidden_states, router_logits = make_inputs(kind, 33)
    layer(hidden_states, router_logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(hidden_states, router_logits)
        assert_equal(layer(hidden_states.bfloat16(), router_logits), out)
    assert out.dtype == torch.bfloat16
    for under_autocast, expected in zip(routings[1], routings[0], strict=True):
        assert_equal(under_autocast, expected)

    converted = copy.deepcopy(layer)
    for name in ("w13_weight", "w2_weight", "constant_vectors"):
        if getattr(converted, name) is not None:
            setattr(converted, name, nn.Parameter(getattr(converted, name).bfloat16()))
    converted.runner.shared_experts = SharedExperts(torch.bfloat16)
    converted.runner.shared_experts.load_state_dict(layer.runner.shared_experts.state_dict())
    assert_equal(out, converted(hidden_states.bfloat16(), router_logits))

    out.sum().backward()
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    assert layer.w13_weight.grad is not None


def test_autocast_leaves_float64_alone() -> None:
    layer = make_layer("mixed", params_dtype=torch.float64)
    inputs = make_inputs("mixed", 7, torch.float64)
    expected = layer(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(layer(*inputs).detach(), expected.detach())


# --- Bias


def test_bias_update_is_seen_by_the_next_call() -> None:
    bias = torch.zeros(num_columns("identity"))
    layer = make_layer("identity", e_score_correction_bias=bias)
    assert layer.e_score_correction_bias is bias
    hidden_states, router_logits = make_inputs("identity", 5)
    before = layer(hidden_states, router_logits)
    bias[NUM_EXPERTS:] = 100.0  # three zero experts take all three slots
    after = layer(hidden_states, router_logits)
    weight = torch.softmax(router_logits, dim=1)[:, NUM_EXPERTS:].sum(dim=1, keepdim=True) * 6.0
    torch.testing.assert_close(after, weight * hidden_states)
    assert float((before - after).detach().abs().max()) > 1e-3


def test_bias_parameter_and_buffer() -> None:
    parameter = nn.Parameter(torch.zeros(num_columns("identity")))
    layer = make_layer("identity", e_score_correction_bias=parameter)
    assert any(each is parameter for each in layer.parameters())
    buffer = torch.zeros(num_columns("identity"))
    layer = make_layer("identity", e_score_correction_bias=buffer)
    assert any(each is buffer for each in layer.buffers())
    assert "runner.router.e_score_correction_bias" in layer.state_dict()
    assert make_layer("identity", with_bias=False).e_score_correction_bias is None


# --- Arguments


def test_attributes() -> None:
    shared = SharedExperts()
    layer = make_layer("mixed", shared_experts=shared, params_dtype=torch.bfloat16)
    assert layer.w13_weight.shape == (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    assert layer.w2_weight.shape == (NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    assert layer.constant_gate_weight is not None
    assert layer.constant_gate_weight.shape == (2, 2, HIDDEN)
    assert layer.constant_vectors is not None
    assert layer.constant_vectors.shape == (2, HIDDEN)
    own = (layer.w13_weight, layer.w2_weight, layer.constant_gate_weight, layer.constant_vectors)
    assert all(parameter.dtype == torch.bfloat16 and parameter.requires_grad for parameter in own)
    assert isinstance(layer.runner, DefaultMoERunner)
    assert isinstance(make_layer("mixed", chunk_size=4).runner, ChunkingMoERunner)
    assert layer.runner.router is layer.router
    assert layer.runner.shared_experts is layer.shared_experts is shared
    assert isinstance(layer.router, ZeroExpertRouter)
    assert layer.experts_backend == "cpu"
    assert make_layer("mixed", experts_backend="torch").experts_backend == "torch"
    text = repr(layer)
    for part in ("num_experts=6", "hidden_size=24", "intermediate_size=20", "torch.bfloat16", "top_k=3"):
        assert part in text


def test_no_constants_no_constant_parameters() -> None:
    layer = make_layer("identity", with_bias=False)
    assert layer.constant_gate_weight is None
    assert layer.constant_vectors is None
    assert set(layer.state_dict()) == {"w13_weight", "w2_weight"}


def test_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert FusedMoE(2, 1, 4, 3).w13_weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_parameters_are_drawn_as_by_linear(dtype: torch.dtype) -> None:
    layer = FusedMoE(8, 1, 64, 16, zero_expert_type="constant", zero_expert_num=3, params_dtype=dtype)
    for name, parameter in layer.named_parameters():
        bound = (16 if name == "w2_weight" else 64) ** -0.5
        largest = float(parameter.detach().abs().max())
        assert 0.9 * bound < largest <= bound * (1 + torch.finfo(dtype).eps), name
    before = layer.w2_weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.w2_weight.detach(), before)


def test_custom_routing_function_and_simulation() -> None:
    def one_expert(*, hidden_states: Tensor, topk: int, **_: Any) -> tuple[Tensor, Tensor]:
        num_tokens = hidden_states.shape[0]
        return torch.ones(num_tokens, topk), torch.arange(topk).expand(num_tokens, topk)

    layer = FusedMoE(4, 2, HIDDEN, INTERMEDIATE, custom_routing_function=one_expert)
    assert layer.router.routing_method_type == RoutingMethodType.CUSTOM
    hidden_states = torch.randn(3, HIDDEN)
    expected = torch.zeros(3, HIDDEN)
    for expert in range(2):
        gate, up = (hidden_states @ layer.w13_weight[expert].T).chunk(2, dim=1)
        expected += ((nn.functional.silu(gate) * up) @ layer.w2_weight[expert].T).detach()
    torch.testing.assert_close(layer(hidden_states, torch.zeros(3, 4)).detach(), expected)

    simulated = make_layer("mixed", routing_simulation="round_robin")
    assert simulated.router.routing_method_type == RoutingMethodType.SIMULATED
    assert simulated(*make_inputs("mixed", 5)).shape == (5, HIDDEN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, r"^top_k must be between 1 and 64, got 0$"),
        ({"top_k": 7}, r"^top_k must be at most the number of experts \(6\), got 7$"),
        ({"num_experts": 0}, r"^num_real_experts must be at least 1, got 0$"),
        ({"hidden_size": 16.0}, r"^hidden_size must be an integer, got 16.0$"),
        ({"params_dtype": "float32"}, r"^params_dtype must be a floating-point dtype, got 'float32'$"),
        ({"hidden_size": 0}, r"^hidden_size and intermediate_size must be at least 1, got 0 and 20$"),
        ({"intermediate_size": -1}, r"^hidden_size and intermediate_size must be at least 1, got 24 and -1$"),
        ({"zero_expert_type": "identity"}, r'^zero_expert_num is required with zero_expert_type "identity"$'),
        (
            {"zero_expert_type": ZeroExpertType.DROP},
            r'^zero_expert_num is required with zero_expert_type "drop"$',
        ),
        (
            {"zero_expert_type": "identity", "e_score_correction_bias": torch.zeros(6)},
            r"^e_score_correction_bias must have an entry per expert, more than the 6 real ones, got 6$",
        ),
        (
            {"zero_expert_type": "identity", "e_score_correction_bias": [0.0] * 9},
            r"^e_score_correction_bias must be a tensor or None, got list$",
        ),
        ({"zero_expert_num": 3}, r"^zero_expert_num is 3 but zero_expert_type is missing$"),
        ({"zero_expert_type": "swap", "zero_expert_num": 3}, r'^zero_expert_type must be "identity" .*, got "swap"$'),
        (
            {"zero_expert_type": "drop", "zero_expert_num": 0},
            r"^zero_expert_num must be an integer of at least 1, got 0$",
        ),
        ({"scoring_func": "tanh"}, r'^scoring_func must be .*, got "tanh"$'),
        ({"params_dtype": torch.int8}, r"^params_dtype must be a floating-point dtype, got torch.int8$"),
        ({"shared_experts": len}, r"^shared_experts must be a torch.nn.Module, got builtin_function_or_method$"),
        ({"chunk_size": 0}, r"^chunk_size must be an integer of at least 1, got 0$"),
        ({"recompute": "no"}, r"^recompute must be True or False, got 'no'$"),
        ({"expert_parallel_group": object()}, r"^expert_parallel_group needs torch.distributed.init_process_group .*$"),
        ({"use_grouped_topk": True}, r"^num_expert_group and topk_group are required when use_grouped_topk is set"),
        ({"num_expert_group": 4}, r"^num_expert_group and topk_group must be None or 1 when .*, got 4 and None$"),
        ({"top_k": 2.5}, r"^top_k must be an integer, got 2.5$"),
        (
            {"e_score_correction_bias": torch.zeros(7)},
            r"^e_score_correction_bias must have shape \[6\], .*, got \[7\]$",
        ),
        ({"routing_simulation": "zipf"}, r"^routing_simulation must be .*, got 'zipf'$"),
        (
            {"experts_backend": "gpu"},
            r"^experts_backend must be \"auto\", .* or \"torch\", got 'gpu'$",
        ),
    ],
)
def test_rejects_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    sizes = {
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
    }
    with pytest.raises(ValueError, match=message):
        FusedMoE(**{**sizes, **arguments})


def test_length_of_the_bias_tells_the_number_of_zero_experts() -> None:
    layer = FusedMoE(6, 2, 8, 4, zero_expert_type="constant", e_score_correction_bias=torch.zeros(9))
    assert layer.router.num_logits == layer.router.num_experts == 9
    assert layer.constant_gate_weight is not None
    assert layer.constant_gate_weight.shape == (3, 2, 8)


def test_rejects_bad_inputs() -> None:
    layer = make_layer("identity")
    hidden_states, router_logits = make_inputs("identity", 6)
    cases: list[tuple[Any, Any, str]] = [
        (hidden_states.tolist(), router_logits, r"^hidden_states must be a tensor, got list$"),
        (hidden_states, router_logits.tolist(), r"^router_logits must be a tensor, got list$"),
        (hidden_states[:, :5], router_logits, r"^hidden_states must have shape \[..., 24\], got \[6, 5\]$"),
        (torch.tensor(1.0), router_logits, r"^hidden_states must have shape \[..., 24\], got \[\]$"),
        (
            hidden_states,
            router_logits[:5],
            r"^router_logits must have one row per token of hidden_states \(6\), got 5$",
        ),
        (
            hidden_states.reshape(2, 3, 24),
            router_logits,
            r"^router_logits must have the leading .*\(\[2, 3\]\), got shape \[6, 9\]$",
        ),
        (
            hidden_states,
            router_logits.reshape(2, 3, 9),
            r"^router_logits must have the leading .*, got shape \[2, 3, 9\]$",
        ),
        (hidden_states, torch.tensor(1.0), r"^router_logits must have the leading .*, got shape \[\]$"),
        (hidden_states, router_logits[:, :8], r"^router_logits must have one column per expert \(9\), got 8$"),
        (hidden_states, router_logits.int(), r"^router_logits must be of a floating-point dtype, got torch.int32$"),
        (hidden_states.double(), router_logits, r"^hidden_states must be of the weights' dtype \(torch.float32\), got"),
    ]
    for bad_hidden_states, bad_router_logits, message in cases:
        with pytest.raises(ValueError, match=message):
            layer(bad_hidden_states, bad_router_logits)
    with pytest.raises(ValueError, match=r"^router_logits must be a tensor, got list$"):
        layer.router.select_experts(hidden_states, router_logits.tolist())


# --- State


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dict_round_trip(kind: str) -> None:
    layer, other = (make_layer(kind, seed=seed, shared_experts=SharedExperts()) for seed in (0, 1))
    inputs = make_inputs(kind, 9)
    assert not torch.equal(layer(*inputs).detach(), other(*inputs).detach())
    other.load_state_dict(layer.state_dict())
    assert_equal(other(*inputs).detach(), layer(*inputs).detach())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "key",
    [
        "w13_weight",
        "w2_weight",
        "constant_gate_weight",
        "constant_vectors",
        "runner.router.e_score_correction_bias",
        "runner.shared_experts.down.weight",
    ],
)
def test_state_dict_of_another_shape_changes_nothing(key: str, nested: bool) -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts())
    module: nn.Module = nn.Sequential(nn.Identity(), layer) if nested else layer
    prefix = "1." if nested else ""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    bad = {name: tensor + 1 for name, tensor in before.items()}
    shape = list(bad[prefix + key].shape)
    bad[prefix + key] = torch.zeros(*shape[:-1], shape[-1] + 1)
    given = [*shape[:-1], shape[-1] + 1]

    for strict in (True, False):
        with pytest.raises(RuntimeError) as error:
            module.load_state_dict(bad, strict=strict)
        assert str(error.value) == f"{prefix}{key} must have shape {shape}, got {given}"
    for name, tensor in module.state_dict().items():
        assert_equal(tensor, before[name], name)


def test_state_dict_of_another_layer_names_the_shape() -> None:
    with pytest.raises(RuntimeError, match=r"^w13_weight must have shape \[6, 40, 24\], got \[7, 40, 24\]$"):
        make_layer("plain").load_state_dict(FusedMoE(7, TOP_K, HIDDEN, INTERMEDIATE).state_dict())


def test_shared_experts_that_load_by_their_own_rules_are_left_to_them() -> None:
    class Doubling(nn.Linear):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
            state_dict[prefix + "bias"] = state_dict[prefix + "bias"].repeat(2)
            super()._load_from_state_dict(state_dict, prefix, *arguments)

    layer = make_layer("plain", with_bias=False, shared_experts=Doubling(HIDDEN, HIDDEN))
    state = layer.state_dict()
    state["runner.shared_experts.bias"] = torch.arange(HIDDEN / 2)
    layer.load_state_dict(state)
    assert layer.shared_experts is not None
    assert_equal(layer.shared_experts.bias.detach(), torch.arange(HIDDEN / 2).repeat(2))


# --- Copies and conversions


def ignore(_: RoutingResult) -> None:
    """A capture callback."""


def test_deepcopy_is_independent() -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts())
    layer.router.set_capture_fn(ignore)
    inputs = make_inputs("mixed", 5)
    twin = copy.deepcopy(layer)
    assert_equal(twin(*inputs).detach(), layer(*inputs).detach())
    assert twin.e_score_correction_bias is not None
    twin.e_score_correction_bias.add_(torch.randn(num_columns("mixed")))
    assert not torch.equal(twin(*inputs).detach(), layer(*inputs).detach())
    bad = {**layer.state_dict(), "w2_weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"^w2_weight must have shape"):
        twin.load_state_dict(bad)


def test_save_and_load() -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts(), chunk_size=2)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    inputs = make_inputs("mixed", 5)
    assert_equal(loaded(*inputs).detach(), layer(*inputs).detach())
    assert loaded.router.spec == layer.router.spec


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_conversions(dtype: torch.dtype) -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts()).to(dtype)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    assert_output(layer, *make_inputs("mixed", 9, dtype))
    assert layer.half().w13_weight.dtype == torch.float16
    assert_output(layer, *make_inputs("mixed", 9, torch.float16))


def test_moves_to_another_device() -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts()).to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    hidden_states, router_logits = make_inputs("mixed", 3)
    assert layer(hidden_states.to("meta"), router_logits.to("meta")).shape == (3, HIDDEN)
