# SPDX-License-Identifier: Apache-2.0
"""Runners: the output's parts, the chunks, the experts backends."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from layer_cases import HIDDEN, LAYERS, NUM_EXPERTS, SharedExperts, expected_output, make_inputs, make_layer
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule
from zexpert import ConstantExperts, DispatchPlan, ExpertWeights, FusedMoE, RoutingResult, ops
from zexpert._loader import LoadedLibraries
from zexpert.experts import (
    AutoExperts,
    CpuExperts,
    FusedExperts,
    GroupedMMExperts,
    HopperExperts,
    MoEExperts,
    TorchLoopExperts,
    create_experts,
)
from zexpert.router import FusedMoERouter, FusedTopKRouter, ZeroExpertRouter
from zexpert.runner import ChunkingMoERunner, DefaultMoERunner, MoERunner, MoERunnerBase

BACKENDS = ("cpu", "torch")


def assert_output(layer: FusedMoE, out: Tensor, hidden_states: Tensor, router_logits: Tensor) -> None:
    plain = expected_output(layer, hidden_states, router_logits, out.dtype)
    assert out.dtype == hidden_states.dtype
    assert_error_rule(out, plain, expected_output(layer, hidden_states, router_logits))


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_agrees_with_the_reference(kind: str, backend: str, num_tokens: int) -> None:
    layer = make_layer(kind, shared_experts=SharedExperts(), experts_backend=backend)
    inputs = make_inputs(kind, num_tokens)
    out = layer.runner(*inputs, layer.expert_weights())
    assert out.shape == (num_tokens, HIDDEN)
    assert_output(layer, out.detach(), *inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    layer = make_layer("mixed", params_dtype=dtype, shared_experts=SharedExperts(dtype), experts_backend=backend)
    inputs = make_inputs("mixed", 21, dtype)
    assert_output(layer, layer.runner(*inputs, layer.expert_weights()).detach(), *inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_another_dtype(backend: str) -> None:
    for data, logits in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        layer = make_layer("identity", params_dtype=data, experts_backend=backend)
        hidden_states, router_logits = make_inputs("identity", 9)
        inputs = (hidden_states.to(data), router_logits.to(logits))
        assert_output(layer, layer.runner(*inputs, layer.expert_weights()).detach(), *inputs)
    layer = make_layer("identity", params_dtype=torch.float64, experts_backend=backend)
    hidden_states, router_logits = make_inputs("identity", 9)
    inputs = (hidden_states.double(), router_logits)
    out = layer.runner(*inputs, layer.expert_weights()).detach()
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected_output(layer, *inputs), rtol=1e-5, atol=1e-5)  # the weights are float32


# --- Parts of the output


class NoExperts(MoEExperts):
    """Gives rows of zeros, so that the output is everything but the real experts' part."""

    def __init__(self, reduces: bool) -> None:
        super().__init__("none", reduces)

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, weights: ExpertWeights
    ) -> Tensor:
        rows = hidden_states.size(0) if self.reduces else routing.topk_ids.numel()
        return hidden_states.new_zeros(rows, hidden_states.size(1))


class RouterOfAnotherKind(FusedMoERouter):
    """Leaves the choice to a router, and the plan to the interface."""

    def __init__(self, router: FusedMoERouter) -> None:
        super().__init__()
        self.router = router
        self.has_zero_experts = router.has_zero_experts

    def select_experts(self, hidden_states: Tensor, router_logits: Tensor) -> RoutingResult:
        return self.router.select_experts(hidden_states, router_logits)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("kind", LAYERS)
def test_plan_made_with_the_routing_changes_nothing(kind: str, num_tokens: int) -> None:
    layer = make_layer(kind)
    inputs = make_inputs(kind, num_tokens)
    expected = layer(*inputs)
    layer.runner.router = RouterOfAnotherKind(layer.runner.router)
    assert_equal(layer(*inputs).detach(), expected.detach())


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_is_the_sum_of_its_parts(backend: str, num_tokens: int) -> None:
    shared = SharedExperts(torch.float64)
    layer = make_layer("mixed", params_dtype=torch.float64, shared_experts=shared, experts_backend=backend)
    hidden_states, router_logits = make_inputs("mixed", num_tokens, torch.float64)
    weights = layer.expert_weights()
    whole = layer.runner(hidden_states, router_logits, weights)

    routing = layer.router.select_experts(hidden_states, router_logits)
    plan = ops.moe_plan(routing.topk_ids, NUM_EXPERTS)
    tokens = ops.moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, layer.router.top_k)
    rows = ops.grouped_mlp(tokens, plan.expert_offsets, layer.w13_weight, layer.w2_weight)
    nothing = torch.zeros(num_tokens, dtype=torch.float64)
    real_part = ops.moe_finalize(rows, plan.slot_rows, routing.topk_weights, hidden_states, nothing)
    zero_part = ops.zero_expert_accumulate(hidden_states, routing.zero_weight)
    assert layer.constant_gate_weight is not None
    assert layer.constant_vectors is not None
    constant_part = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64)
    for c in range(2):
        mix = torch.softmax(hidden_states @ layer.constant_gate_weight[c].T, dim=1)
        constant = mix[:, :1] * hidden_states + mix[:, 1:] * layer.constant_vectors[c]
        constant_part += (routing.constant_weight[:, c, None] * constant).detach()

    torch.testing.assert_close(whole, real_part + zero_part + constant_part + shared(hidden_states))
    remainder = DefaultMoERunner(layer.router, NoExperts(backend == "torch"), shared)
    torch.testing.assert_close(
        remainder(hidden_states, router_logits, weights), zero_part + constant_part + shared(hidden_states)
    )
    if num_tokens == 7:
        assert all(float(part.detach().abs().max()) > 1e-3 for part in (real_part, zero_part, constant_part))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_zero_experts_chosen(backend: str) -> None:
    layer = make_layer("identity", experts_backend=backend, with_bias=False)
    hidden_states, router_logits = make_inputs("identity", 5)
    router_logits[:, :NUM_EXPERTS] = -200.0
    out = layer.runner(hidden_states, router_logits, layer.expert_weights())
    torch.testing.assert_close(out, 6.0 * hidden_states)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_expert_chosen(backend: str) -> None:
    layer = make_layer("identity", experts_backend=backend)
    hidden_states, router_logits = make_inputs("identity", 5)
    out = layer.runner(hidden_states, torch.full_like(router_logits, torch.nan), layer.expert_weights())
    assert_equal(out.detach(), torch.zeros_like(hidden_states))


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_rows_that_pad_a_batch_may_hold_anything(kind: str, backend: str, chunk_size: int | None) -> None:
    layer = make_layer(kind, experts_backend=backend, chunk_size=chunk_size, shared_experts=SharedExperts())
    hidden_states, router_logits = make_inputs(kind, 12)
    expected = layer(hidden_states[:7], router_logits[:7])
    hidden_states[7:9], hidden_states[9:] = torch.nan, torch.inf
    router_logits[7], router_logits[8], router_logits[9] = torch.nan, torch.inf, -torch.inf
    torch.testing.assert_close(layer(hidden_states, router_logits)[:7], expected)


def test_zero_part_is_added_only_where_there_may_be_one() -> None:
    runner = MoERunnerBase(FusedTopKRouter(1, 2), TorchLoopExperts())
    summed, hidden_states = torch.zeros(2, 3), torch.ones(2, 3)
    out = runner._maybe_add_zero_expert_output(summed, hidden_states, torch.ones(2))
    assert float(out.abs().max()) == 0.0
    runner = MoERunnerBase(ZeroExpertRouter(1, 2, "identity", 1), TorchLoopExperts())
    out = runner._maybe_add_zero_expert_output(summed, hidden_states, torch.tensor([2.0, 3.0]))
    assert_equal(out, torch.tensor([[2.0] * 3, [3.0] * 3]))
    assert out is summed


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_runner_leaves_no_routing_behind(chunk_size: int | None) -> None:
    layer = make_layer("identity", chunk_size=chunk_size)
    inputs = make_inputs("identity", 3)
    layer(*inputs)
    assert isinstance(layer.router, ZeroExpertRouter)
    assert layer.router.zero_expert_output is None
    routing = layer.router.select_experts(*inputs)  # by an engine
    assert_equal(layer.router.zero_expert_output, ops.zero_expert_accumulate(inputs[0], routing.zero_weight))


def test_expert_map_picks_the_physical_experts_weights() -> None:
    layer = make_layer("identity")
    inputs = make_inputs("identity", 11)
    expected = layer.runner(*inputs, layer.expert_weights())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    expert_load = torch.zeros(NUM_EXPERTS, dtype=torch.int32)
    layer.router.set_expert_map(order[:, None], expert_load)
    inverse = order.argsort()
    out = layer.runner(*inputs, ExpertWeights(layer.w13_weight[inverse], layer.w2_weight[inverse]))
    torch.testing.assert_close(out, expected)
    layer.router.set_expert_map(None)
    assert int(expert_load.sum()) == int((layer.router(*inputs).topk_ids >= 0).sum())


# --- Chunks


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 23])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 8, 100])
@pytest.mark.parametrize("kind", ["identity", "mixed"])
def test_chunks(kind: str, chunk_size: int, num_tokens: int) -> None:
    shared = SharedExperts()
    default = make_layer(kind, shared_experts=shared)
    layer = make_layer(kind, shared_experts=shared, chunk_size=chunk_size)
    assert isinstance(layer.runner, ChunkingMoERunner)
    assert layer.runner.chunk_size == chunk_size
    inputs = make_inputs(kind, num_tokens)
    seen: list[RoutingResult] = []
    for each in (default, layer):
        each.router.set_expert_map(torch.tensor([[0, 1]] + [[e, -1] for e in range(1, NUM_EXPERTS)]))
        each.router.set_capture_fn(seen.append)

    out = layer.runner(*inputs, layer.expert_weights())

    expected = default.runner(*inputs, default.expert_weights())
    assert len(seen) == 2
    for actual_tensor, expected_tensor in zip(*seen, strict=True):
        assert_equal(actual_tensor, expected_tensor)
    torch.testing.assert_close(out, expected)
    for each in (default, layer):
        each.router.set_expert_map(None)
    assert_output(layer, layer.runner(*inputs, layer.expert_weights()).detach(), *inputs)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_chunks_in_every_dtype(dtype: torch.dtype) -> None:
    layer = make_layer("mixed", chunk_size=5, params_dtype=dtype)
    inputs = make_inputs("mixed", 17, dtype)
    assert_output(layer, layer.runner(*inputs, layer.expert_weights()).detach(), *inputs)


def test_chunks_of_strided_hidden_states() -> None:
    layer = make_layer("identity", chunk_size=4)
    hidden_states, router_logits = make_inputs("identity", 10)
    transposed = hidden_states.t().contiguous().t()
    out = layer.runner(transposed, router_logits, layer.expert_weights())
    assert out.is_contiguous()
    assert_equal(out.detach(), layer.runner(hidden_states, router_logits, layer.expert_weights()).detach())


class Operators(TorchDispatchMode):
    """Notes which operators of zexpert run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "zexpert":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_inference_is_two_operators(num_tokens: int, chunk_size: int | None) -> None:
    layer = make_layer("identity", chunk_size=chunk_size)
    with torch.no_grad(), Operators() as operators:
        layer(*make_inputs("identity", num_tokens))
    assert operators.names == ["biased_topk_and_plan", "fused_moe"]


def test_chunks_are_planned_one_by_one() -> None:
    layer = make_layer("identity", chunk_size=3)
    with torch.no_grad(), Operators() as operators:
        layer(*make_inputs("identity", 7))
    assert operators.names == ["biased_topk", *3 * ["moe_plan", "fused_moe"]]


class CountedCalls(nn.Module):
    """Stands for telemetry."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, topk_ids: Tensor, expert_offsets: Tensor) -> None:
        self.calls.append((topk_ids, expert_offsets))


@pytest.mark.parametrize("num_tokens", [0, 1, 4, 11])
def test_chunks_are_counted_once(num_tokens: int) -> None:
    layer = make_layer("identity", chunk_size=4)
    stats = layer.runner.routing_stats = CountedCalls()
    inputs = make_inputs("identity", num_tokens)
    layer(*inputs)
    ((topk_ids, expert_offsets),) = stats.calls
    routing, plan = layer.router.select_experts_and_plan(*inputs, NUM_EXPERTS)
    assert_equal(topk_ids, routing.topk_ids)
    assert_equal(expert_offsets, plan.expert_offsets)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True, "8"])
def test_rejects_a_bad_chunk_size(chunk_size: Any) -> None:
    with pytest.raises(ValueError, match=r"^chunk_size must be an integer of at least 1, got "):
        ChunkingMoERunner(FusedTopKRouter(1, 2), CpuExperts(), chunk_size=chunk_size)


# --- Checks


def test_rejects_bad_inputs() -> None:
    layer = make_layer("mixed")
    hidden_states, router_logits = make_inputs("mixed", 4)
    weights = layer.expert_weights()
    assert weights.constants is not None
    gates, vectors = weights.constants
    one_gate = weights._replace(constants=ConstantExperts(gates[:1], vectors))
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((hidden_states.half(), router_logits, weights), r"^hidden_states must be of the weights' dtype"),
        ((hidden_states[:, :7], router_logits, weights), r"^hidden_states must have .* \(24\), got 7$"),
        ((hidden_states, router_logits[:3], weights), r"^router_logits must have one row per token"),
        (
            (hidden_states, router_logits, one_gate),
            r"^constant_gate_weight must have shape \[2, 2, 24\], got \[1, 2, 24\]$",
        ),
        (
            (hidden_states, router_logits, weights._replace(constants=None)),
            r"^constant_gate_weight and constant_vectors are required with",
        ),
        (
            (hidden_states, router_logits, weights._replace(w2_scale_inv=torch.ones(1))),
            r"^w13_scale_inv and w2_scale_inv must be given both or neither$",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            layer.runner(*arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_experts_that_do_not_exist(backend: str) -> None:
    def route(*, hidden_states: Tensor, topk: int, **_: Any) -> tuple[Tensor, Tensor]:
        shape = (hidden_states.shape[0], topk)
        return torch.ones(shape), torch.full(shape, NUM_EXPERTS)

    layer = make_layer("plain", with_bias=False, custom_routing_function=route, experts_backend=backend)
    with pytest.raises(RuntimeError, match=r"topk_ids must be in \[-1, 6\), got 6"):
        layer(*make_inputs("plain", 4))


def test_rejects_shared_experts_of_another_shape() -> None:
    layer = make_layer("plain", shared_experts=nn.Linear(HIDDEN, HIDDEN + 1))
    with pytest.raises(ValueError, match=r"^shared_experts must return the shape .*\[4, 24\].*, got \[4, 25\]$"):
        layer(*make_inputs("plain", 4))


def test_shared_experts_of_another_dtype_are_cast() -> None:
    class Double(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states.double() * 2

    with_shared = make_layer("plain", shared_experts=Double())
    inputs = make_inputs("plain", 4)
    out = with_shared(*inputs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, make_layer("plain")(*inputs) + 2 * inputs[0])


# --- Experts backends


@pytest.mark.parametrize("name", ["auto", "cpu", "grouped_mm", "hopper", "torch"])
def test_create_experts(name: str) -> None:
    experts = create_experts(name)
    assert isinstance(experts, FusedExperts)
    assert experts.name == name
    with pytest.raises(
        ValueError,
        match=r"^experts_backend must be \"auto\", \"cpu\", \"grouped_mm\", \"hopper\" or \"torch\", got 'cuda'$",
    ):
        create_experts("cuda")


def test_names_before_fused_experts() -> None:
    aliases = (AutoExperts, CpuExperts, GroupedMMExperts, HopperExperts, TorchLoopExperts)
    assert [alias().name for alias in aliases] == ["auto", "cpu", "grouped_mm", "hopper", "torch"]
    assert all(alias().fuses_epilogue for alias in aliases)


def test_a_subclass_of_the_experts_gives_rows() -> None:
    class Doubled(CpuExperts):
        def forward(
            self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, weights: ExpertWeights
        ) -> Tensor:
            return 2 * super().forward(hidden_states, routing, plan, weights)

    layer = make_layer("identity")
    inputs = make_inputs("identity", 7)
    zero_part = ops.zero_expert_accumulate(inputs[0], layer.router.select_experts(*inputs).zero_weight)
    doubled = DefaultMoERunner(layer.router, Doubled())(*inputs, layer.expert_weights())
    torch.testing.assert_close(doubled - zero_part, 2 * (layer(*inputs) - zero_part))


def test_auto_is_the_cpu_backend_on_a_cpu() -> None:
    inputs = make_inputs("mixed", 6)
    auto, cpu = make_layer("mixed"), make_layer("mixed", experts_backend="cpu")
    assert_equal(auto(*inputs).detach(), cpu(*inputs).detach())
    assert auto.experts_backend == "cpu"
    assert not auto.runner.experts.reduces


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "intermediate_size", "on_hopper", "backend"),
    [
        (torch.bfloat16, 128, 64, True, "hopper"),
        (torch.float16, 128, 64, True, "hopper"),
        (torch.bfloat16, 128, 64, False, "grouped_mm"),
        (torch.bfloat16, 72, 64, True, "grouped_mm"),
        (torch.bfloat16, 128, 96, True, "grouped_mm"),
        (torch.float32, 128, 64, True, "torch"),
    ],
)
def test_auto_on_a_gpu(
    dtype: torch.dtype,
    hidden_size: int,
    intermediate_size: int,
    on_hopper: bool,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0) if on_hopper else (10, 0))
    with FakeTensorMode(), torch.no_grad():
        hidden_states = torch.empty(3, hidden_size, dtype=dtype, device="cuda")
        w2_weight = torch.empty(8, hidden_size, intermediate_size, dtype=dtype, device="cuda")
        assert create_experts().backend_for(hidden_states, w2_weight) == backend
        assert create_experts("hopper").backend_for(hidden_states, w2_weight) == "hopper"


@pytest.mark.parametrize(("dtype", "backend"), [(torch.bfloat16, "grouped_mm"), (torch.float16, "torch")], ids=str)
def test_auto_on_a_gpu_for_training(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with FakeTensorMode():
        hidden_states = torch.empty(3, 128, dtype=dtype, device="cuda")
        w2_weight = torch.empty(8, 128, 64, dtype=dtype, device="cuda", requires_grad=True)
        assert create_experts().backend_for(hidden_states, w2_weight) == backend
        with torch.no_grad():
            assert create_experts().backend_for(hidden_states, w2_weight) == "hopper"
        # In grad mode, and nothing requires gradients.
        assert create_experts().backend_for(hidden_states, w2_weight.detach()) == "hopper"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["8.0", "9.0a", "10.0+PTX"], (9, 0), True),
        (["9.0a"], (10, 0), False),
        (["9.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_where_the_kernels_for_hopper_run(
    archs: list[str], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zexpert._info.load_libraries", lambda: LoadedLibraries(True, "loaded"))
    monkeypatch.setattr("zexpert._info.cuda_library_info", lambda: ("13.0", archs))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with FakeTensorMode(), torch.no_grad():
        hidden_states = torch.empty(3, 128, dtype=torch.bfloat16, device="cuda")
        w2_weight = torch.empty(8, 128, 64, dtype=torch.bfloat16, device="cuda")
        assert (create_experts().backend_for(hidden_states, w2_weight) == "hopper") is runs


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_hopper_experts_script_and_give_shapes() -> None:
    layer = FusedMoE(16, 6, 128, 64, params_dtype=torch.bfloat16, device="meta", experts_backend="hopper")
    assert layer.experts_backend == "hopper"
    inputs = torch.empty(5, 128, dtype=torch.bfloat16, device="meta"), torch.empty(5, 16, device="meta")
    with torch.no_grad():
        assert layer(*inputs).shape == (5, 128)
        assert torch.jit.script(layer)(*inputs).shape == (5, 128)


@pytest.mark.parametrize("backend", ["hopper", "grouped_mm"])
def test_forced_experts_of_a_gpu_refuse_the_cpu(backend: str) -> None:
    layer = FusedMoE(16, 6, 128, 64, params_dtype=torch.bfloat16, experts_backend=backend)
    sentence = rf'^implementation must be "auto", "cpu" or "torch" on the CPU, got "{backend}"$'
    with torch.no_grad(), pytest.raises(RuntimeError, match=sentence):
        layer(torch.zeros(5, 128, dtype=torch.bfloat16), torch.zeros(5, 16))


def test_forced_hopper_experts_refuse_to_train() -> None:
    layer = FusedMoE(16, 6, 128, 64, params_dtype=torch.bfloat16, experts_backend="hopper", device="meta")
    sentence = r'^implementation must be "auto", "grouped_mm" or "torch" where gradients are wanted, got "hopper"$'
    inputs = torch.empty(5, 128, dtype=torch.bfloat16, device="meta"), torch.empty(5, 16, device="meta")
    with pytest.raises(RuntimeError, match=sentence):
        layer(*inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_experts(backend: str) -> None:
    experts = create_experts(backend)
    generator = torch.Generator().manual_seed(0)
    hidden_states, topk_weights, w13, w2 = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((4, 3), (4, 2), (3, 4, 3), (3, 3, 2))
    )
    topk_ids = torch.tensor([[0, 2], [-1, 1], [2, 1], [-1, -1]])
    plan = ops.moe_plan(topk_ids, 3)
    unused = torch.zeros(4, dtype=torch.float64)

    def run(keep_gate_up: bool, *inputs: Tensor) -> Tensor:
        routing = RoutingResult(inputs[1], topk_ids, unused, unused[:, None])
        return experts.with_epilogue(inputs[0], routing, plan, ExpertWeights(*inputs[2:]), None, keep_gate_up)

    for keep_gate_up in (True, False):
        torch.autograd.gradcheck(partial(run, keep_gate_up), (hidden_states, topk_weights, w13, w2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_rows_of_slots_without_work_need_no_memory(with_gradients: bool, backend: str) -> None:
    """As in expert parallelism, where other ranks do the work of most slots."""
    layer = make_layer("identity", experts_backend=backend)
    hidden_states, router_logits = make_inputs("identity", 9)
    hidden_states.requires_grad_(with_gradients)
    routing, plan = layer.router.select_experts_and_plan(hidden_states, router_logits, NUM_EXPERTS)
    cut = plan._replace(row_slots=plan.row_slots[: int(plan.expert_offsets[-1])])
    assert cut.row_slots.numel() < plan.row_slots.numel()
    results = []
    for each in (plan, cut):
        out = layer.runner.experts.with_epilogue(
            hidden_states, routing, each, layer.expert_weights(), None, with_gradients
        )
        results.append([out.detach()])
        if with_gradients:
            results[-1] += torch.autograd.grad(out.square().sum(), [hidden_states, layer.w13_weight, layer.w2_weight])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_equal(actual, expected)


def test_interfaces_leave_the_work_to_subclasses() -> None:
    hidden_states, router_logits = make_inputs("plain", 1)
    layer = make_layer("plain")
    with pytest.raises(NotImplementedError):
        MoERunner(layer.router, CpuExperts())(hidden_states, router_logits, layer.expert_weights())
    experts = MoEExperts("none", False)
    with pytest.raises(NotImplementedError):
        MoERunnerBase(layer.router, experts)(hidden_states, router_logits, layer.expert_weights())
    experts.fuses_epilogue = True
    with pytest.raises(NotImplementedError):
        MoERunnerBase(layer.router, experts)(hidden_states, router_logits, layer.expert_weights())
