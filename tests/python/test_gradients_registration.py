# SPDX-License-Identifier: Apache-2.0
"""Gradients of every op by way of every mode of PyTorch: opcheck, torch.compile, TorchScript; and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradients import as_tuple, random_like
from testing import UNWRITTEN_INTEGER, assert_equal, filled_memory
from zexpert import FusedMoE, ops

T, K, R, H, F = 5, 3, 4, 16, 8
ROUTING: dict[str, Any] = {
    "num_real_experts": R,
    "num_identity_experts": 2,
    "num_constant_experts": 2,
    "scoring_func": "sigmoid",
    "renormalize": True,
}

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def call_of(op: str, num_tokens: int = T, *, requires_grad: bool = True) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an op. Every slot does work, so that no row is left unspecified."""

    def data(*shape: int) -> Tensor:
        return torch.rand(*shape, requires_grad=requires_grad)

    plan = ops.moe_plan(torch.randint(0, R, (num_tokens, K)), R)
    rows = data(num_tokens * K, H)
    experts = (plan.expert_offsets, data(R, 2 * F, H), data(R, H, F))
    epilogue = (rows, plan.slot_rows, data(num_tokens, K), data(num_tokens, H), data(num_tokens))
    routing = (data(num_tokens, K), data(num_tokens))
    layer = (data(num_tokens, H), *routing, plan.expert_offsets, plan.row_slots, plan.slot_rows, *experts[1:])
    constants = {"constant_weight": data(num_tokens, 2), "constant_vectors": data(2, H)}
    gradients = (torch.rand(num_tokens, K), torch.rand(num_tokens), torch.rand(num_tokens, 2))
    logits = data(num_tokens, R + 5)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "biased_topk": ((logits, torch.rand(R + 5), K), ROUTING),
        "biased_topk_and_plan": ((logits, torch.rand(R + 5), K), ROUTING),
        "route": ((data(num_tokens, H), data(R + 5, H), torch.rand(R + 5), K), ROUTING),
        "biased_topk_backward": ((*gradients, logits, torch.rand(R + 5), K), ROUTING),
        "zero_expert_accumulate": ((data(num_tokens, H), data(num_tokens)), {}),
        "zero_expert_accumulate_backward": ((data(num_tokens, H), data(num_tokens, H), data(num_tokens)), {}),
        "moe_permute": ((data(num_tokens, H), plan.row_slots, plan.expert_offsets, K, plan.slot_rows), {}),
        "moe_permute_backward": ((rows, plan.row_slots, plan.expert_offsets, num_tokens, K, plan.slot_rows), {}),
        "silu_and_mul": ((data(num_tokens, 2 * F), None), {}),
        "silu_and_mul_backward": ((data(num_tokens, F), data(num_tokens, 2 * F), None), {}),
        "grouped_mlp": ((data(num_tokens, H), *experts, plan.row_slots, K), {}),
        "grouped_mlp_with_gate_up": ((rows, *experts), {}),
        "grouped_mlp_backward": ((data(num_tokens * K, H), rows, *experts, None), {"needs_w2_weight": False}),
        "moe_finalize": (epilogue, {"residual": data(num_tokens, H), **constants}),
        "moe_finalize_backward": ((data(num_tokens, H), *epilogue), {}),
        "fused_moe": (layer, {"residual": data(num_tokens, H), **constants}),
        "fused_moe_backward": (
            (data(num_tokens, H), *layer, torch.rand(num_tokens * K, 2 * F)),
            {"needs_w13_weight": False},
        ),
    }
    return calls[op]


FORWARD = [
    "biased_topk",
    "biased_topk_and_plan",
    "route",
    "zero_expert_accumulate",
    "moe_permute",
    "silu_and_mul",
    "grouped_mlp",
    "grouped_mlp_with_gate_up",
    "moe_finalize",
    "fused_moe",
]
OF_OTHERS = ("biased_topk_and_plan", "route", "grouped_mlp_with_gate_up")  # they share the backwards of others
BACKWARD = [f"{op}_backward" for op in FORWARD if op not in OF_OTHERS]


@pytest.mark.parametrize("num_tokens", [0, T])
@pytest.mark.parametrize("op", FORWARD + BACKWARD)
def test_every_output_is_written(op: str, num_tokens: int) -> None:
    arguments, keywords = call_of(op, num_tokens, requires_grad=False)
    with filled_memory():
        outputs = as_tuple(packet(op)(*arguments, **keywords))
    for output in outputs:
        assert not bool((output == UNWRITTEN_INTEGER).any() or output.isnan().any())


def packet(op: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(torch.ops.zexpert, op)
    return found


def gradients_through(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> list[Tensor | None]:
    """Gradients, from upstream gradients that depend on shapes alone, to every argument that wants one."""
    wanted = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor) and value.requires_grad]
    outputs = [output for output in as_tuple(function(*arguments, **keywords)) if output.requires_grad]
    torch.manual_seed(0)
    return list(torch.autograd.grad(outputs, wanted, random_like(outputs), allow_unused=True))


@pytest.mark.parametrize("op", FORWARD)
def test_opcheck(op: str) -> None:
    arguments, keywords = call_of(op)
    torch.library.opcheck(getattr(torch.ops.zexpert, op).default, arguments, keywords)


@pytest.mark.parametrize("op", BACKWARD)
def test_opcheck_of_backward_ops(op: str) -> None:
    arguments, keywords = call_of(op, requires_grad=False)
    torch.library.opcheck(getattr(torch.ops.zexpert, op).default, arguments, keywords)


@pytest.mark.parametrize("op", FORWARD)
def test_no_tokens(op: str) -> None:
    arguments, keywords = call_of(op, 0)
    if op == "silu_and_mul":
        keywords = {"expert_offsets": torch.zeros(R + 1, dtype=torch.int32)}
        arguments = arguments[:1]
    wanted = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor) and value.requires_grad]
    for tensor, gradient in zip(wanted, gradients_through(packet(op), arguments, keywords), strict=True):
        assert gradient is not None
        assert_equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("op", FORWARD)
def test_compiled(op: str) -> None:
    """Without a break, for any number of tokens in one graph."""

    def function(*arguments: Any, **keywords: Any) -> Any:
        return packet(op)(*arguments, **keywords)

    graph = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (7, 11):
        arguments, keywords = call_of(op, num_tokens)
        expected = gradients_through(function, arguments, keywords)
        for one, other in zip(gradients_through(graph, arguments, keywords), expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert_equal(one, other)


def test_one_graph_for_every_number_of_tokens() -> None:
    def function(hidden_states: Tensor, row_slots: Tensor, expert_offsets: Tensor) -> Tensor:
        rows: Tensor = torch.ops.zexpert.moe_permute(hidden_states, row_slots, expert_offsets, K)
        return rows.sin()

    graph = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        for num_tokens in (7, 9):
            arguments, _ = call_of("moe_permute", num_tokens)
            gradients_through(graph, arguments[:3], {})
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_tokens in (11, 13, 40):
            arguments, _ = call_of("moe_permute", num_tokens)
            gradients_through(graph, arguments[:3], {})


def test_scripted() -> None:
    def function(logits: Tensor, hidden_states: Tensor) -> Tensor:
        weights, ids, zero_weight, _ = torch.ops.zexpert.biased_topk(logits, None, 3, num_real_experts=4)
        offsets, row_slots, slot_rows = torch.ops.zexpert.moe_plan(ids, 4)
        rows = torch.ops.zexpert.moe_permute(hidden_states, row_slots, offsets, 3)
        out: Tensor = torch.ops.zexpert.moe_finalize(rows, slot_rows, weights, hidden_states, zero_weight)
        return out

    arguments = (torch.randn(T, R + 5, requires_grad=True), torch.randn(T, H, requires_grad=True))
    expected = gradients_through(function, arguments, {})
    for one, other in zip(gradients_through(torch.jit.script(function), arguments, {}), expected, strict=True):
        assert one is not None
        assert other is not None
        assert_equal(one, other)


@pytest.mark.parametrize("op", FORWARD)
def test_second_derivatives_are_refused(op: str) -> None:
    arguments, keywords = call_of(op)
    wanted = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
    outputs = [output for output in as_tuple(packet(op)(*arguments, **keywords)) if output.requires_grad]
    # Upstream gradients that are part of a graph, as those of a loss that is no sum would be.
    upstream = [torch.rand_like(output, requires_grad=True) for output in outputs]
    gradients = torch.autograd.grad(outputs, wanted, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated: second derivatives are not available"):
        gradients[0].sum().backward()


FORWARD_MODE = r"cannot be differentiated in forward mode .*: use backward or torch\.autograd\.grad$"


def floating(arguments: tuple[Any, ...]) -> list[int]:
    return [i for i, value in enumerate(arguments) if isinstance(value, Tensor) and value.is_floating_point()]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", [*FORWARD, *BACKWARD])
def test_forward_mode_is_refused(op: str, requires_grad: bool) -> None:
    """Whatever argument has the tangent, frozen or not; without a tangent nothing is refused."""
    arguments, keywords = call_of(op, requires_grad=requires_grad)
    for position in floating(arguments):
        with forward_ad.dual_level():
            packet(op)(*arguments, **keywords)
            dual = list(arguments)
            dual[position] = forward_ad.make_dual(arguments[position].detach(), torch.ones_like(arguments[position]))
            with pytest.raises(RuntimeError, match=rf"^zexpert::{op} {FORWARD_MODE}"):
                packet(op)(*dual, **keywords)

            def function(value: Tensor, position: int = position) -> Any:
                return packet(op)(*arguments[:position], value, *arguments[position + 1 :], **keywords)

        with pytest.raises(RuntimeError, match=rf"^zexpert::{op} {FORWARD_MODE}"):
            torch.func.jvp(function, (arguments[position].detach(),), (torch.ones_like(arguments[position]),))


def test_forward_mode_is_refused_for_keywords_and_out() -> None:
    arguments, keywords = call_of("moe_finalize", requires_grad=False)
    with forward_ad.dual_level():
        keywords["residual"] = forward_ad.make_dual(keywords["residual"], torch.ones(T, H))
        with pytest.raises(RuntimeError, match=FORWARD_MODE):
            packet("moe_finalize")(*arguments, **keywords)
        for position in range(3):
            tensors = [torch.rand(T, H), torch.rand(T), torch.rand(T, H)]
            before = tensors[2].clone()
            tensors[position] = forward_ad.make_dual(tensors[position], torch.ones_like(tensors[position]))
            with pytest.raises(RuntimeError, match=FORWARD_MODE):
                torch.ops.zexpert.zero_expert_accumulate(*tensors[:2], out=tensors[2])
            assert_equal(forward_ad.unpack_dual(tensors[2]).primal, before)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_forward_mode_through_a_layer_is_refused(backend: str) -> None:
    """The layer is frozen, so that nothing requires gradients."""
    layer = FusedMoE(R, K, H, F, zero_expert_type="identity", zero_expert_num=2, experts_backend=backend)
    layer.requires_grad_(False)
    x, logits = torch.randn(T, H), torch.randn(T, R + 2)
    layer(x, logits)
    for function, value in ((lambda x: layer(x, logits), x), (lambda logits: layer(x, logits), logits)):
        with pytest.raises(RuntimeError, match=FORWARD_MODE):
            torch.func.jvp(function, (value,), (torch.ones_like(value),))
        with pytest.raises(RuntimeError, match=r"setup_context|" + FORWARD_MODE):
            torch.func.grad(lambda value, function=function: function(value).sum())(value)
        with pytest.raises(RuntimeError, match=r"setup_context|forward mode|second derivatives"):
            torch.autograd.functional.hessian(lambda value, function=function: function(value).square().sum(), value)


@pytest.mark.parametrize("op", BACKWARD)
def test_fake_kernels_refuse_other_devices(op: str) -> None:
    arguments, keywords = call_of(op, requires_grad=False)
    with pytest.raises(RuntimeError, match=r"must be on (cpu|meta) like \w+, got (cpu|meta)"):
        packet(op)(arguments[0].to("meta"), *arguments[1:], **keywords)


@pytest.mark.parametrize(
    ("op", "position", "message"),
    [
        ("biased_topk_backward", 0, r"grad_topk_weights must have shape \[5, 3\] \[tokens, top_k\], got \[5, 4\]"),
        ("zero_expert_accumulate_backward", 0, r"grad_out must have shape \[5, 16\] \[tokens, hidden_size\], got"),
        ("silu_and_mul_backward", 0, r"grad_out must have shape \[5, 8\] \[rows, intermediate_size\], got"),
        ("grouped_mlp_backward", 0, r"grad_out must have shape \[15, 16\] \[rows, hidden_size\], got"),
        ("moe_finalize_backward", 0, r"grad_out must have shape \[5, 16\] \[tokens, hidden_size\], got"),
        ("fused_moe_backward", 0, r"grad_out must have shape \[5, 16\] \[tokens, hidden_size\], got"),
        ("fused_moe_backward", 9, r"gate_up must have shape \[15, 16\] \[rows, 2 \* intermediate_size\]"),
        ("fused_moe", 1, r"slot_rows must have shape \[5, 4\] \[tokens, top_k\], got \[5, 3\]"),
        ("fused_moe", 4, r"row_slots must have at most 3 elements for each of the 5 tokens, got shape \[16\]"),
        ("fused_moe", 6, r"w13_weight must have shape \[4, 16, 16\] \[experts, 2 \* intermediate_size, hidden_size\]"),
    ],
)
def test_wrong_shapes(op: str, position: int, message: str) -> None:
    arguments, keywords = call_of(op, requires_grad=False)
    wrong = list(arguments)
    shape = (*wrong[position].shape[:-1], wrong[position].shape[-1] + 1)
    wrong[position] = torch.zeros(shape, dtype=wrong[position].dtype)
    with pytest.raises(RuntimeError, match=message):
        packet(op)(*wrong, **keywords)


@pytest.mark.parametrize("op", [op for op in BACKWARD if op != "moe_permute_backward"])
def test_wrong_dtypes(op: str) -> None:
    arguments, keywords = call_of(op, requires_grad=False)
    with pytest.raises(RuntimeError, match=r"^grad_\w+ must be float32 with float32 \w+, got float64"):
        packet(op)(arguments[0].double(), *arguments[1:], **keywords)


@pytest.mark.parametrize("op", FORWARD)
def test_what_is_kept_for_the_backward(op: str) -> None:
    """Inputs that the backward reads, by reference, and gate_up; of biased_topk's bias a copy."""
    arguments, keywords = call_of(op)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = as_tuple(packet(op)(*arguments, **keywords))
    inputs = {value.data_ptr() for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)}
    new = [tensor for tensor in kept if tensor.data_ptr() not in inputs]
    if op.startswith("biased_topk"):
        assert [tensor.shape for tensor in new] == [(R + 5,)]
    elif op == "route":  # a copy of the bias, and the logits
        assert [tensor.shape for tensor in new] == [(R + 5,), (T, R + 5)]
    elif op in ("grouped_mlp_with_gate_up", "fused_moe"):
        assert [tensor.data_ptr() for tensor in new] == [outputs[1].data_ptr()]
    else:
        assert new == []
    if op == "moe_permute":
        assert all(not tensor.is_floating_point() for tensor in kept)
