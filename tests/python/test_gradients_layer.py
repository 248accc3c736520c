# SPDX-License-Identifier: Apache-2.0
"""Gradients of whole layers: by finite differences, against plain PyTorch, compiled, scripted, in chunks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reference
from gradients import assert_gradients, gradients_of
from layer_cases import (
    HIDDEN,
    LAYERS,
    NUM_EXPERTS,
    TOP_K,
    SharedExperts,
    make_inputs,
    make_layer,
    num_columns,
    reference_arguments,
)
from testing import assert_equal
from zexpert import FusedMoE

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")

T = 13


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(module: Any, layer: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Output of `module`, which is the layer in some form, and gradients of a loss to inputs and parameters."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    wanted = [*leaves, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    out: Tensor = module(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), wanted)
    return (out.detach(), *gradients)


def assert_same_step(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    assert len(one) == len(other)
    for i, (first, second) in enumerate(zip(one, other, strict=True)):
        assert_equal(first, second, "output" if i == 0 else f"gradient {i - 1}")


def parameters_of(layer: FusedMoE) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters() if "bias" not in name}


@pytest.mark.parametrize("kind", LAYERS)
def test_by_finite_differences(kind: str) -> None:
    layer = FusedMoE(NUM_EXPERTS, TOP_K, 5, 3, params_dtype=torch.float64, **LAYERS[kind])
    parameters = parameters_of(layer)

    def function(hidden_states: Tensor, router_logits: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(
            layer, dict(zip(parameters, values, strict=True)), (hidden_states, router_logits)
        )
        return out

    hidden_states = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    router_logits = torch.randn(4, num_columns(kind), dtype=torch.float64, requires_grad=True)
    values = [value.clone().requires_grad_() for value in parameters.values()]
    assert torch.autograd.gradcheck(function, (hidden_states, router_logits, *values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_by_the_error_rule(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, params_dtype=dtype)
    parameters = parameters_of(layer)
    router = layer.router
    bias = layer.e_score_correction_bias
    # So many tokens that the largest error of plain PyTorch is no matter of luck.
    hidden_states, router_logits = make_inputs(kind, 100, dtype)
    arguments = reference_arguments(router.spec)
    decided = reference.decided_rows(router_logits, bias, TOP_K, **arguments)

    def function(x: Tensor, logits: Tensor, *values: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x, logits))
        return out

    def plain(dtype: torch.dtype) -> Any:
        def run(x: Tensor, logits: Tensor, *values: Tensor) -> Tensor:
            routing = reference.biased_topk(
                logits, bias, TOP_K, dtype=torch.promote_types(dtype, torch.float32), **arguments
            )
            named = dict(zip(parameters, values, strict=True))
            return reference.layer(x, logits, top_k=TOP_K, routing=routing, dtype=dtype, **named)  # type: ignore[arg-type]

        return run

    inputs = [hidden_states[decided], router_logits[decided], *parameters.values()]
    assert_gradients(function, plain, inputs, dtype, ["hidden_states", "router_logits", *parameters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_compiled(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, params_dtype=dtype, shared_experts=SharedExperts(dtype))
    graph = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (7, 12):
        inputs = make_inputs(kind, num_tokens, dtype)
        assert_same_step(step(graph, layer, *inputs), step(layer, layer, *inputs))


def test_compiled_by_inductor() -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts())
    graph = torch.compile(layer, fullgraph=True)
    inputs = make_inputs("mixed", 7)
    for one, other in zip(step(graph, layer, *inputs), step(layer, layer, *inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", LAYERS)
def test_scripted(kind: str) -> None:
    layer = make_layer(kind)
    script = torch.jit.script(layer)
    for num_tokens in (7, 12):
        inputs = make_inputs(kind, num_tokens)
        for _ in range(3):  # the profiling executor specialises after its first runs
            assert_same_step(step(script, layer, *inputs), step(layer, layer, *inputs))


@pytest.mark.parametrize("kind", LAYERS)
def test_in_chunks(kind: str) -> None:
    layer = make_layer(kind, params_dtype=torch.float64)
    chunking = make_layer(kind, params_dtype=torch.float64, chunk_size=4)
    inputs = make_inputs(kind, T, torch.float64)
    for one, other in zip(step(chunking, chunking, *inputs), step(layer, layer, *inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", LAYERS)
def test_backends_agree(kind: str) -> None:
    layer = make_layer(kind, params_dtype=torch.float64)
    plain = make_layer(kind, params_dtype=torch.float64, experts_backend="torch")
    inputs = make_inputs(kind, T, torch.float64)
    for one, other in zip(step(plain, plain, *inputs), step(layer, layer, *inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_repeatable() -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts())
    inputs = make_inputs("mixed", 300)
    first = step(layer, layer, *inputs)
    for _ in range(3):
        assert_same_step(step(layer, layer, *inputs), first)


def test_no_tokens() -> None:
    layer = make_layer("mixed", shared_experts=SharedExperts())
    out, *gradients = step(layer, layer, *make_inputs("mixed", 0))
    assert out.shape == (0, HIDDEN)
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_frozen_parameters_cost_and_get_no_gradient() -> None:
    layer = make_layer("identity")
    inputs = make_inputs("identity", T)
    full = step(layer, layer, *inputs)
    layer.w13_weight.requires_grad_(False)
    layer.w2_weight.requires_grad_(False)
    assert_same_step(step(layer, layer, *inputs), full[:3])
    # The router alone: its logits still have a gradient, through the weights of every kind of slot.
    hidden_states, router_logits = inputs
    tracked = router_logits.clone().requires_grad_()
    out = layer(hidden_states, tracked)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    torch.testing.assert_close(torch.autograd.grad((out * weights).sum(), tracked)[0], full[2])


def test_anomaly_mode_finds_nothing() -> None:
    """It looks for NaN in every gradient, rows that do no work included."""
    layer = make_layer("mixed")
    inputs = make_inputs("mixed", T)
    expected = step(layer, layer, *inputs)
    garbage = [torch.full((T * TOP_K, HIDDEN), float("nan")) for _ in range(8)]
    del garbage  # what the allocator hands out next
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same_step(step(layer, layer, *inputs), expected)


def largest_kept(layer: nn.Module, *inputs: Tensor) -> int:
    """Elements of the largest tensor that is kept for the backward, parameters aside."""
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(0 if any(tensor is parameter for parameter in layer.parameters()) else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(*(tensor.requires_grad_() for tensor in inputs))
    return max(kept)


def test_nothing_as_large_as_tokens_times_slots_times_hidden_size_is_kept() -> None:
    layer = FusedMoE(NUM_EXPERTS, TOP_K, HIDDEN, 3, zero_expert_type="identity", zero_expert_num=3)
    inputs = make_inputs("identity", 50)
    assert largest_kept(layer, *inputs) == inputs[0].numel()


def test_activation_checkpointing() -> None:
    layer = make_layer("mixed")
    inputs = make_inputs("mixed", T)

    def checkpointed(*leaves: Tensor) -> Tensor:
        out: Tensor = checkpoint(layer, *leaves, use_reentrant=False)
        return out

    assert_same_step(step(checkpointed, layer, *inputs), step(layer, layer, *inputs))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("kind", LAYERS)
def test_recompute(kind: str, backend: str) -> None:
    """The same values to rounding, and nothing kept of the experts."""
    shared_experts = SharedExperts()
    layers = [
        make_layer(kind, experts_backend=backend, shared_experts=shared_experts, recompute=recompute)
        for recompute in (False, True)
    ]
    inputs = make_inputs(kind, 100)
    assert largest_kept(layers[1], *inputs) <= inputs[0].numel() < largest_kept(layers[0], *inputs)
    wide = [copy.deepcopy(layer).double() for layer in layers]
    steps = [step(layer, layer, *(tensor.double() for tensor in inputs)) for layer in wide]
    for actual, expected in zip(*steps, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_recompute_in_other_forms() -> None:
    layer = make_layer("mixed", recompute=True, chunk_size=8)
    inputs = make_inputs("mixed", 20)
    expected = step(layer, layer, *inputs)
    assert_same_step(step(torch.compile(layer, fullgraph=True, backend="aot_eager"), layer, *inputs), expected)
    assert_same_step(step(torch.jit.script(layer), layer, *inputs), expected)


def test_bias_parameter_gets_no_gradient() -> None:
    bias = nn.Parameter(0.1 * torch.randn(num_columns("identity")))
    layer = make_layer("identity", e_score_correction_bias=bias)
    layer(*make_inputs("identity", T)).sum().backward()
    assert bias.grad is None
    assert layer.w13_weight.grad is not None


def test_gradients_of_expanded_outputs() -> None:
    """The gradient of a sum is one number, spread by strides of 0."""
    layer = make_layer("mixed")
    inputs = make_inputs("mixed", T)
    summed = gradients_of(lambda *leaves: layer(*leaves).sum(), inputs, [torch.ones(())])
    dense = gradients_of(layer, inputs, [torch.ones(T, HIDDEN)])
    for one, other in zip(summed, dense, strict=True):
        assert_equal(one, other)


def test_one_optimizer_step_is_that_of_plain_pytorch() -> None:
    """A router and a layer, trained as in a model, against the same made of plain PyTorch, in float64."""
    torch.manual_seed(0)
    layer = make_layer("identity", params_dtype=torch.float64, with_bias=False)
    classifier = nn.Linear(HIDDEN, num_columns("identity"), bias=False, dtype=torch.float64)
    twins = [copy.deepcopy(parameter) for parameter in (layer.w13_weight, layer.w2_weight, classifier.weight)]
    x = torch.randn(T, HIDDEN, dtype=torch.float64)
    target = torch.randn(T, HIDDEN, dtype=torch.float64)
    arguments = reference_arguments(layer.router.spec)
    ours = torch.optim.SGD([layer.w13_weight, layer.w2_weight, classifier.weight], lr=0.1)
    theirs = torch.optim.SGD(twins, lr=0.1)
    for _ in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        nn.functional.mse_loss(layer(x, classifier(x)), target).backward()
        plain = reference.layer(x, x @ twins[2].T, twins[0], twins[1], top_k=TOP_K, **arguments)
        nn.functional.mse_loss(plain, target).backward()
        ours.step()
        theirs.step()
    for one, other in zip((layer.w13_weight, layer.w2_weight, classifier.weight), twins, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
@pytest.mark.parametrize("kind", LAYERS)
def test_on_a_gpu(kind: str) -> None:
    layer = make_layer(kind)
    inputs = make_inputs(kind, T)
    expected = step(layer, layer, *inputs)
    on_gpu = copy.deepcopy(layer).cuda()
    actual = step(on_gpu, on_gpu, *(tensor.cuda() for tensor in inputs))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)
