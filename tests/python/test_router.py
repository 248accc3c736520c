# SPDX-License-Identifier: Apache-2.0
"""What all routers share: agreement with the reference, checks, the bias, the expert map, the capture callback."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from layer_cases import reference_arguments
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule, weight_dtype
from zexpert import RoutingMethodType, RoutingResult, RoutingSpec
from zexpert.ops import moe_plan
from zexpert.router import (
    BaseRouter,
    CustomRoutingRouter,
    FusedMoERouter,
    FusedTopKBiasRouter,
    FusedTopKRouter,
    GroupedTopKRouter,
    ZeroExpertRouter,
)

NUM_REAL = 8
HIDDEN = 5


def make_router(kind: str, **arguments: Any) -> BaseRouter:
    bias = 0.2 * torch.randn(NUM_REAL, generator=torch.Generator().manual_seed(3))
    if kind == "plain":
        return FusedTopKRouter(3, NUM_REAL, **arguments)
    if kind == "bias":
        return FusedTopKBiasRouter(3, NUM_REAL, bias, **arguments)
    if kind == "grouped":
        return GroupedTopKRouter(3, NUM_REAL, 4, 2, **arguments)
    if kind == "grouped_bias":
        return GroupedTopKRouter(3, NUM_REAL, 4, 2, e_score_correction_bias=bias, **arguments)
    if kind == "zero":
        return ZeroExpertRouter(3, NUM_REAL, {"identity": 2, "constant": 1, "drop": 1}, **arguments)
    assert kind == "zero_bias"
    bias = torch.cat([bias, bias[:4]])
    return ZeroExpertRouter(3, NUM_REAL, "identity", e_score_correction_bias=bias, **arguments)


KINDS = ("plain", "bias", "grouped", "grouped_bias", "zero", "zero_bias")


def make_inputs(router: BaseRouter, num_tokens: int = 33, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    width = router.spec.num_logits
    assert width is not None
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator)
    return hidden_states.to(dtype), torch.randn(num_tokens, width, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(kind: str, scoring_func: str, dtype: torch.dtype) -> None:
    router = make_router(kind, scoring_func=scoring_func, renormalize=kind == "zero", routed_scaling_factor=2.5)
    hidden_states, router_logits = make_inputs(router, dtype=dtype)
    arguments = {**reference_arguments(router.spec), "indices_dtype": torch.int32}
    bias = router.e_score_correction_bias
    expected = reference.biased_topk(router_logits, bias, 3, **arguments)
    plain = reference.biased_topk(router_logits, bias, 3, **arguments, dtype=weight_dtype(dtype))
    decided = reference.decided_rows(router_logits, bias, 3, **arguments)
    assert int(decided.sum()) >= 30

    routing = router.select_experts(hidden_states, router_logits)

    assert_equal(routing.topk_ids[decided], expected.topk_ids[decided], "topk_ids")
    for field in ("topk_weights", "zero_weight", "constant_weight"):
        actual = getattr(routing, field)
        assert actual.dtype == weight_dtype(dtype)
        assert_error_rule(actual[decided], getattr(plain, field)[decided], getattr(expected, field)[decided], field)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_select_experts(kind: str) -> None:
    router = make_router(kind)
    inputs = make_inputs(router)
    for actual, expected in zip(router(*inputs), router.select_experts(*inputs), strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("plain", RoutingMethodType.TOPK),
        ("bias", RoutingMethodType.TOPK_BIAS),
        ("grouped", RoutingMethodType.GROUPED_TOPK),
        ("zero", RoutingMethodType.ZERO_EXPERT),
    ],
)
def test_routing_method_type_and_spec(kind: str, method: RoutingMethodType) -> None:
    router = make_router(kind)
    assert router.routing_method_type == method
    assert isinstance(router.spec, RoutingSpec)
    assert router.spec.top_k == router.top_k == 3
    assert router.has_zero_experts == kind.startswith("zero")
    assert "top_k=3" in repr(router)


@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", KINDS)
def test_indices_dtype(kind: str, indices_dtype: torch.dtype) -> None:
    router = make_router(kind, indices_dtype=indices_dtype)
    assert router.select_experts(*make_inputs(router)).topk_ids.dtype == indices_dtype
    with pytest.raises(ValueError, match=r"^indices_dtype must be torch.int32 or torch.int64, got torch.int16$"):
        make_router(kind, indices_dtype=torch.int16)


def test_ids_of_a_router_of_ones_own_are_converted() -> None:
    class FirstExpert(BaseRouter):
        def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
            ones = torch.ones(router_logits.size(0), 1)
            return RoutingResult(ones, torch.zeros_like(ones, dtype=torch.int64), ones[:, 0], ones[:, :0])

    router, seen = FirstExpert(RoutingSpec(top_k=1, num_real_experts=2)), []
    router.set_capture_fn(lambda routing: seen.append(routing.topk_ids.dtype))
    assert router.select_experts(torch.zeros(3, 4), torch.zeros(3, 2)).topk_ids.dtype == torch.int32
    assert seen == [torch.int32]


class WideIdsRouter(BaseRouter):
    """The logit of the first column is the expert's id."""

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        ones = torch.ones(router_logits.size(0), 1)
        return RoutingResult(ones, router_logits[:, :1].to(torch.int64), ones[:, 0], ones[:, :0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("scripted", [False, True])
def test_ids_are_converted_as_integers(scripted: bool) -> None:
    router: Any = WideIdsRouter(RoutingSpec(top_k=1, num_real_experts=2))
    if scripted:
        router = torch.jit.script(router)
    ids = torch.tensor([2**24 + 1, 2**31 - 1, 2**33 + 1, -1, -(2**32)])  # of which float32 holds the last two alone
    logits = torch.stack([ids, ids], dim=1).double()
    expected = torch.tensor([[2**24 + 1], [2**31 - 1], [2**31 - 1], [-1], [-2]], dtype=torch.int32)
    assert_equal(router(torch.zeros(5, 4), logits).topk_ids, expected)


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens(kind: str, num_tokens: int) -> None:
    router = make_router(kind)
    routing = router.select_experts(*make_inputs(router, num_tokens))
    assert routing.topk_ids.shape == routing.topk_weights.shape == (num_tokens, 3)
    assert routing.zero_weight.shape == (num_tokens,)
    assert routing.constant_weight.shape == (num_tokens, router.num_constant_experts)


# --- Checks of the inputs


def test_rejects_bad_inputs() -> None:
    router = make_router("bias")
    hidden_states, router_logits = make_inputs(router, 7)
    cases: list[tuple[Tensor, Tensor, str]] = [
        (hidden_states[0], router_logits, r"^hidden_states must have 2 dimensions .*, got shape \[5\]$"),
        (hidden_states[None], router_logits, r"^hidden_states must have 2 dimensions .*, got shape \[1, 7, 5\]$"),
        (hidden_states, router_logits[0], r"^router_logits must have 2 dimensions .*, got shape \[8\]$"),
        (hidden_states, router_logits[None], r"^router_logits must have 2 dimensions .*, got shape \[1, 7, 8\]$"),
        (hidden_states, router_logits[:6], r"^router_logits must have one row per token .*\(7\), got 6$"),
        (hidden_states, router_logits[:, :7], r"^router_logits must have one column per expert \(8\), got 7$"),
        (hidden_states, router_logits.long(), r"^router_logits must be of a floating-point dtype, got torch.int64$"),
        (
            hidden_states.to("meta"),
            router_logits,
            r"^hidden_states must be on the device of router_logits \(cpu\), got meta$",
        ),
        (
            hidden_states.to("meta"),
            router_logits.to("meta"),
            r"^e_score_correction_bias must be on the device of router_logits \(meta\), got cpu$",
        ),
    ]
    for bad_hidden_states, bad_router_logits, message in cases:
        with pytest.raises(ValueError, match=message):
            router.select_experts(bad_hidden_states, bad_router_logits)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(7), r"^e_score_correction_bias must have shape \[8\], one entry per expert, got \[7\]$"),
        (torch.zeros(1, 8), r"^e_score_correction_bias must have shape \[8\], one entry per expert, got \[1, 8\]$"),
        (torch.zeros(8, dtype=torch.int32), r"^e_score_correction_bias must be of a floating-point dtype, got"),
        (None, r"^e_score_correction_bias must be a tensor, got None$"),
        ([0.0] * 8, r"^e_score_correction_bias must be a tensor or None, got list$"),
    ],
)
def test_rejects_bad_bias(bias: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedTopKBiasRouter(3, NUM_REAL, bias)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, r"^top_k must be at most the number of experts \(8\), got 9$"),
        ({"top_k": 0}, r"^top_k must be between 1 and 64, got 0$"),
        ({"num_real_experts": 0}, r"^num_real_experts must be at least 1, got 0$"),
        ({"scoring_func": "relu"}, r'^scoring_func must be .*, got "relu"$'),
        ({"routed_scaling_factor": float("nan")}, r"^routed_scaling_factor must be finite, got nan$"),
    ],
)
def test_rejects_a_bad_spec(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedTopKRouter(**{"top_k": 3, "num_real_experts": NUM_REAL, **arguments})


def test_rejects_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"^num_expert_group must divide the number of real experts \(8\), got 3$"):
        GroupedTopKRouter(2, 8, 3, 1)
    with pytest.raises(ValueError, match=r"^topk_group must be between 1 and num_expert_group \(4\), got 5$"):
        GroupedTopKRouter(2, 8, 4, 5)


def test_interface_leaves_the_choice_to_subclasses() -> None:
    with pytest.raises(NotImplementedError):
        FusedMoERouter().select_experts(torch.zeros(1, 1), torch.zeros(1, 1))
    router = BaseRouter(RoutingSpec(top_k=1, num_real_experts=2))
    with pytest.raises(NotImplementedError):
        router.select_experts(torch.zeros(1, 1), torch.zeros(1, 2))


# --- The bias


def test_bias_is_kept_by_reference() -> None:
    bias = torch.zeros(NUM_REAL)
    router = FusedTopKBiasRouter(1, NUM_REAL, bias)
    inputs = make_inputs(router, 4)
    assert router.e_score_correction_bias is bias
    assert "e_score_correction_bias" in dict(router.named_buffers())
    for expert in (6, 2):
        bias.zero_()
        bias[expert] = 100.0
        assert router.select_experts(*inputs).topk_ids.flatten().tolist() == [expert] * 4


def test_bias_parameter_stays_a_parameter() -> None:
    bias = nn.Parameter(torch.zeros(NUM_REAL), requires_grad=False)
    router = FusedTopKBiasRouter(1, NUM_REAL, bias)
    assert dict(router.named_parameters())["e_score_correction_bias"] is bias
    assert not list(router.named_buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_saved_routers_route_alike(kind: str) -> None:
    router = make_router(kind)
    inputs = make_inputs(router)
    file = io.BytesIO()
    torch.save(router, file)
    file.seek(0)
    expected = router.select_experts(*inputs)
    for twin in (copy.deepcopy(router), torch.load(file, weights_only=False)):
        assert twin.spec == router.spec
        for actual_tensor, expected_tensor in zip(twin.select_experts(*inputs), expected, strict=True):
            assert_equal(actual_tensor, expected_tensor)


# --- The expert map


@pytest.mark.parametrize("map_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["bias", "zero"])
def test_expert_map_and_load_record(kind: str, map_dtype: torch.dtype) -> None:
    router = make_router(kind)
    inputs = make_inputs(router)
    logical = router.select_experts(*inputs)
    # Expert e is stored as physical expert 7 - e; experts 1 and 4 have replicas too.
    expert_map = torch.full((NUM_REAL, 3), -1)
    expert_map[:, 0] = torch.arange(NUM_REAL).flip(0)
    expert_map[1, 1] = 8
    expert_map[4, 1:] = torch.tensor([9, 10])
    expert_load = torch.zeros(11, dtype=map_dtype)
    router.set_expert_map(expert_map.to(map_dtype), expert_load)

    physical = router.select_experts(*inputs)

    replicas = [[p for p in row if p >= 0] for row in expert_map.tolist()]
    expected = [
        [replicas[e][t % len(replicas[e])] if e >= 0 else -1 for e in row]
        for t, row in enumerate(logical.topk_ids.tolist())
    ]
    assert physical.topk_ids.tolist() == expected
    assert physical.topk_ids.dtype == torch.int32
    for field in ("topk_weights", "zero_weight", "constant_weight"):
        assert_equal(getattr(physical, field), getattr(logical, field), field)
    counts = [sum(row.count(p) for row in expected) for p in range(11)]
    assert expert_load.tolist() == counts
    assert counts[9] > 0

    router.select_experts(*inputs)
    assert expert_load.tolist() == [2 * count for count in counts]
    router.set_expert_map(None)
    assert_equal(router.select_experts(*inputs).topk_ids, logical.topk_ids)


def test_expert_map_update_in_place_is_seen() -> None:
    router = make_router("plain")
    inputs = make_inputs(router)
    logical = router.select_experts(*inputs).topk_ids
    expert_map = torch.arange(NUM_REAL)[:, None]
    router.set_expert_map(expert_map)
    assert_equal(router.select_experts(*inputs).topk_ids, logical)
    expert_map.copy_(expert_map.flip(0))
    assert_equal(router.select_experts(*inputs).topk_ids, NUM_REAL - 1 - logical)
    assert not router.state_dict()
    router.to("meta")
    assert router.logical_to_physical_map is not None
    assert router.logical_to_physical_map.device.type == "meta"


@pytest.mark.parametrize(
    ("expert_map", "expert_load", "message"),
    [
        (torch.zeros(8, 1), None, r"^logical_to_physical_map must be of dtype int32 or int64, got torch.float32$"),
        (
            torch.zeros(7, 1).long(),
            None,
            r"^logical_to_physical_map must have shape \[8, max_replicas\], got \[7, 1\]$",
        ),
        (torch.zeros(8).long(), None, r"^logical_to_physical_map must have shape \[8, max_replicas\], got \[8\]$"),
        (torch.zeros(8, 0).long(), None, r"^logical_to_physical_map must have shape .*, got \[8, 0\]$"),
        (torch.tensor([[0]] * 5 + [[-1]] * 3), None, r"^logical_to_physical_map must name .*, got none for expert 5$"),
        (torch.tensor([[0, -1, 1]] * 8), None, r"^logical_to_physical_map must be padded with -1 after the replicas"),
        (torch.tensor([[0, -2]] * 8), None, r"^logical_to_physical_map must be padded with -1 after the replicas"),
        (
            torch.arange(8)[:, None] + 2**32,
            None,
            r"^logical_to_physical_map must hold values below 2\*\*31, got 4294967303$",
        ),
        ([[0]] * 8, None, r"^logical_to_physical_map must be a tensor, got list$"),
        (torch.zeros(8, 1).long(), [0] * 8, r"^expert_load must be a tensor, got list$"),
        (torch.zeros(8, 1).long(), torch.zeros(8), r"^expert_load must be a vector of dtype int32 or int64, got"),
        (torch.full((8, 1), 8), torch.zeros(8).int(), r"^expert_load must have an entry .* is 8, got 8 entries$"),
        (None, torch.zeros(8).int(), r"^expert_load needs a logical_to_physical_map, got None$"),
    ],
)
def test_rejects_a_bad_expert_map(expert_map: Tensor | None, expert_load: Tensor | None, message: str) -> None:
    router = make_router("plain")
    with pytest.raises(ValueError, match=message):
        router.set_expert_map(expert_map, expert_load)
    assert router.logical_to_physical_map is None
    assert router.expert_load is None


# --- The capture callback


@pytest.mark.parametrize("kind", KINDS)
def test_capture_callback_sees_every_choice(kind: str) -> None:
    router = make_router(kind)
    inputs = make_inputs(router)
    expected = router.select_experts(*inputs)
    router.set_expert_map(torch.arange(NUM_REAL).flip(0)[:, None])
    seen: list[RoutingResult] = []
    router.set_capture_fn(seen.append)
    router.select_experts(*inputs)
    router.set_capture_fn(None)
    router.select_experts(*inputs)
    (captured,) = seen
    for actual_tensor, expected_tensor in zip(captured, expected, strict=True):
        assert_equal(actual_tensor, expected_tensor)
    assert bool((captured.topk_ids < 0).any()) == kind.startswith("zero")


# --- Routing and plan


class RecordOperators(TorchDispatchMode):
    """Notes which operators of zexpert are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zexpert":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def assert_plans_its_choice(router: FusedMoERouter, inputs: tuple[Tensor, Tensor], num_experts: int) -> list[str]:
    """Passes if select_experts_and_plan gives what select_experts and moe_plan give; returns its operators."""
    expected = router.select_experts(*inputs)
    with RecordOperators() as operators:
        routing, plan = router.select_experts_and_plan(*inputs, num_experts)
    assert isinstance(routing, RoutingResult)
    for field, actual, tensor in zip(RoutingResult._fields, routing, expected, strict=True):
        assert_equal(actual, tensor, field)
    for field, actual, tensor in zip(plan._fields, plan, moe_plan(expected.topk_ids, num_experts), strict=True):
        assert_equal(actual, tensor, field)
    return operators.names


@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", KINDS)
def test_routing_and_plan_are_one_operator(kind: str, indices_dtype: torch.dtype) -> None:
    router = make_router(kind, indices_dtype=indices_dtype)
    for num_tokens in (0, 1, 33):
        inputs = make_inputs(router, num_tokens)
        assert assert_plans_its_choice(router, inputs, NUM_REAL) == ["biased_topk_and_plan"]


def test_plan_of_physical_experts() -> None:
    """Of an expert map's, and where there are weights for more experts than the router chooses among."""
    router = make_router("zero")
    inputs = make_inputs(router)
    assert assert_plans_its_choice(router, inputs, NUM_REAL + 3) == ["biased_topk", "moe_plan"]
    expert_map = torch.arange(NUM_REAL).flip(0)[:, None] + 1
    expert_load = torch.zeros(NUM_REAL + 1, dtype=torch.int64)
    router.set_expert_map(expert_map, expert_load)
    assert assert_plans_its_choice(router, inputs, NUM_REAL + 1) == ["biased_topk", "moe_plan"]
    assert int(expert_load.sum()) == 2 * int((router.select_experts(*inputs).topk_ids >= 0).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_capture_callback_sees_a_choice_with_plan(kind: str) -> None:
    router = make_router(kind)
    inputs = make_inputs(router)
    expected = router.select_experts(*inputs)
    seen: list[RoutingResult] = []
    router.set_capture_fn(seen.append)
    router.select_experts_and_plan(*inputs, NUM_REAL)
    (captured,) = seen
    for actual_tensor, expected_tensor in zip(captured, expected, strict=True):
        assert_equal(actual_tensor, expected_tensor)


def test_inputs_are_checked_before_a_plan() -> None:
    router = make_router("bias")
    hidden_states, router_logits = make_inputs(router, 7)
    with pytest.raises(ValueError, match=r"^router_logits must have one column per expert \(8\), got 7$"):
        router.select_experts_and_plan(hidden_states, router_logits[:, :7], NUM_REAL)


@pytest.mark.parametrize("kind", ["zero", "custom"])
def test_too_few_experts_for_a_plan_are_told_before_anything_is_counted(kind: str) -> None:
    router: BaseRouter = make_router("zero")
    if kind == "custom":
        router = CustomRoutingRouter(3, NUM_REAL, lambda gating_output, **_: first_experts(gating_output)[:2])
    inputs = make_inputs(router)
    expert_load = torch.zeros(NUM_REAL + 1, dtype=torch.int64)
    seen: list[RoutingResult] = []
    router.set_capture_fn(seen.append)
    router.set_expert_map(torch.arange(NUM_REAL)[:, None] + 1, expert_load)
    with pytest.raises(ValueError, match=r"^num_experts must be at least the 9 physical experts of .*, got 8$"):
        router.select_experts_and_plan(*inputs, NUM_REAL)
    assert not seen
    assert not expert_load.any()
    router.set_expert_map(None)
    router.select_experts_and_plan(*inputs, NUM_REAL)
    assert len(seen) == 1


def first_experts(router_logits: Tensor) -> RoutingResult:
    """A choice that biased_topk would not make."""
    num_tokens = router_logits.size(0)
    ids = torch.arange(3, dtype=torch.int32).repeat(num_tokens, 1)
    return RoutingResult(ids + 0.5, ids, torch.zeros(num_tokens), torch.zeros(num_tokens, 1))


class SelectsFirst(ZeroExpertRouter):
    def select_experts(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        return first_experts(router_logits)


class ComputesFirst(ZeroExpertRouter):
    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        return first_experts(router_logits)


class OnlySelects(FusedMoERouter):
    def select_experts(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        return first_experts(router_logits)


@pytest.mark.parametrize("way", ["select_experts", "_compute_routing", "interface", "function", "instance", "patch"])
def test_plan_is_of_a_choice_of_ones_own(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (3, NUM_REAL, {"identity": 2, "constant": 1, "drop": 1})
    router: FusedMoERouter
    if way == "select_experts":
        router = SelectsFirst(*arguments)
    elif way == "_compute_routing":
        router = ComputesFirst(*arguments)
    elif way == "interface":
        router = OnlySelects()
    elif way == "function":
        router = CustomRoutingRouter(3, 12, lambda gating_output, **_: first_experts(gating_output)[:2])
    elif way == "patch":
        monkeypatch.setattr(ZeroExpertRouter, "_compute_routing", lambda *inputs: first_experts(inputs[2]))
        router = ZeroExpertRouter(*arguments)
    else:
        router = ZeroExpertRouter(*arguments)
        router._compute_routing = lambda _, router_logits: first_experts(router_logits)  # type: ignore[method-assign]
    inputs = make_inputs(make_router("zero"))
    assert assert_plans_its_choice(router, inputs, NUM_REAL) == ["moe_plan"]
    assert router.select_experts_and_plan(*inputs, NUM_REAL)[0].topk_ids[0].tolist() == [0, 1, 2]
