# SPDX-License-Identifier: Apache-2.0
"""FusedMoE on a CUDA device: its backends against the reference, graphs, streams, training, many tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from layer_cases import LAYERS, SharedExperts, expected_output, make_inputs, make_layer
from testing import assert_equal, assert_error_rule
from zexpert import FusedMoE, ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wide_layer(dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> FusedMoE:
    """A layer whose sizes grouped_mm takes, on the device."""
    torch.manual_seed(0)
    layer = FusedMoE(
        16,
        6,
        128,
        64,
        **{
            "zero_expert_type": "identity",
            "zero_expert_num": 8,
            "e_score_correction_bias": 0.01 * torch.randn(24),
            "routed_scaling_factor": 6.0,
            "params_dtype": dtype,
            **arguments,
        },
    )
    return layer.cuda()


def wide_inputs(num_tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden_states = torch.randn(num_tokens, 128, device="cuda", generator=generator).to(dtype)
    return hidden_states, torch.randn(num_tokens, 24, device="cuda", generator=generator)


def assert_output(layer: FusedMoE, out: Tensor, *inputs: Tensor) -> None:
    on_cpu = copy.deepcopy(layer).cpu()
    given = [tensor.cpu() for tensor in inputs]
    plain = expected_output(on_cpu, *given, out.dtype)
    assert_error_rule(out.detach().cpu(), plain, expected_output(on_cpu, *given))


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer(kind: str, dtype: torch.dtype, chunk_size: int | None) -> None:
    layer = make_layer(kind, params_dtype=dtype, shared_experts=SharedExperts(dtype), chunk_size=chunk_size).cuda()
    assert layer.experts_backend == "torch"  # an intermediate size of 20 is no multiple of 8
    for num_tokens in (0, 1, 7, 33):
        inputs = [tensor.cuda() for tensor in make_inputs(kind, num_tokens, dtype)]
        assert_output(layer, layer(*inputs), *inputs)


@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 300])
def test_grouped_mm(num_tokens: int, chunk_size: int | None) -> None:
    layer = wide_layer(chunk_size=chunk_size)
    assert layer.experts_backend == "grouped_mm"
    inputs = wide_inputs(num_tokens)
    assert_output(layer, layer(*inputs), *inputs)


def test_only_zero_experts_chosen() -> None:
    layer = wide_layer(e_score_correction_bias=None)
    hidden_states, router_logits = wide_inputs(9)
    router_logits[:, :16], router_logits[:, 16:] = -200.0, 0.0
    torch.testing.assert_close(layer(hidden_states, router_logits), 4.5 * hidden_states)  # 6 of 8 zero experts, times 6


@pytest.mark.parametrize("experts_backend", ["auto", "grouped_mm"])  # on Hopper two
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_no_host_synchronisation_and_a_graph_that_replays_with_other_data(
    compile_it: bool, experts_backend: str
) -> None:
    layer = wide_layer(experts_backend=experts_backend)
    run = torch.compile(layer, fullgraph=True, dynamic=False) if compile_it else layer
    inputs = wide_inputs(64)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(*inputs)
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(*inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(*inputs)
        for seed in range(1, 4):
            fresh = wide_inputs(64, seed=seed)
            for static, new in zip(inputs, fresh, strict=True):
                static.copy_(new)
            graph.replay()
            assert_output(layer, out, *fresh)


@pytest.mark.parametrize("experts_backend", ["auto", "grouped_mm"])
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 256])
def test_captured_decoding_with_garbage_in_the_rows_that_pad(num_tokens: int, experts_backend: str) -> None:
    layer = wide_layer(experts_backend=experts_backend)
    inputs = wide_inputs(num_tokens)
    with torch.no_grad():
        out = layer(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(*inputs)
        for num_real in (num_tokens, num_tokens // 2):
            fresh = wide_inputs(num_tokens, seed=num_real + 1)
            for static, new in zip(inputs, fresh, strict=True):
                static.fill_(torch.nan)
                static[:num_real] = new[:num_real]
            graph.replay()
            assert_output(layer, out[:num_real], *(tensor[:num_real] for tensor in fresh))


def test_reduce_overhead() -> None:
    layer = wide_layer()
    run = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for num_tokens in (16, 8):
            for seed in range(4):
                inputs = wide_inputs(num_tokens, seed=seed)
                assert_output(layer, run(*inputs).clone(), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exported_and_compiled_ahead_of_time(
    dtype: torch.dtype, compiled_ahead_of_time: Callable[[torch.export.ExportedProgram], Any]
) -> None:
    layer = wide_layer(dtype)
    tokens = torch.export.Dim("tokens", min=0, max=4096)
    with torch.no_grad():
        program = torch.export.export(layer, wide_inputs(7, dtype), dynamic_shapes=({0: tokens}, {0: tokens}))
        for run in (program.module(), compiled_ahead_of_time(program)):
            for num_tokens in (1, 7, 300):
                inputs = wide_inputs(num_tokens, dtype)
                assert_output(layer, run(*inputs), *inputs)


@pytest.mark.parametrize("num_tokens", [50, 500])  # routing and plan in one launch, and not
def test_side_stream(num_tokens: int) -> None:
    layer = wide_layer()
    inputs = wide_inputs(num_tokens)
    expected = layer(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = layer(*inputs)
    stream.synchronize()
    assert_equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device: torch.cuda.device_count() < 2")
def test_second_device() -> None:
    layer = wide_layer()
    inputs = wide_inputs(50)
    expected = layer(*inputs)
    there = copy.deepcopy(layer).to("cuda:1")
    out = there(*(tensor.to("cuda:1") for tensor in inputs))
    assert out.device == torch.device("cuda:1")
    assert_equal(out.cpu(), expected.cpu())


def test_scripted() -> None:
    layer = wide_layer()
    scripted = torch.jit.script(layer)
    with torch.no_grad():
        for twin in (scripted, torch.jit.freeze(scripted.eval()), torch.jit.trace(layer, wide_inputs(5))):
            for num_tokens in (33, 7, 0):
                inputs = wide_inputs(num_tokens)
                assert_equal(twin(*inputs), layer(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    """Both backends against plain PyTorch in float64, with plain PyTorch in the same dtype for the allowance."""
    layer = wide_layer(dtype)
    hidden_states, router_logits = wide_inputs(40, dtype)
    upstream = torch.randn_like(hidden_states)

    def gradients(run: Any, given: list[Tensor], upstream: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
        out = run(*leaves)
        return list(torch.autograd.grad(out, leaves, upstream))

    def run_layer(x: Tensor, logits: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        parameters = {"w13_weight": w13, "w2_weight": w2}
        out: Tensor = torch.func.functional_call(layer, parameters, (x, logits))
        return out

    def plain(dtype: torch.dtype) -> Any:
        def run(x: Tensor, logits: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
            return reference.layer(
                x, logits, w13, w2, top_k=6, bias=layer.e_score_correction_bias.cpu(), num_real_experts=16,
                routed_scaling_factor=6.0, dtype=dtype,
            )  # fmt: skip

        return run

    given = [hidden_states, router_logits, layer.w13_weight, layer.w2_weight]
    actual = gradients(run_layer, given, upstream)
    on_cpu = [tensor.detach().cpu() for tensor in given]
    same = gradients(plain(dtype), on_cpu, upstream.cpu())
    wide = [tensor.double() for tensor in on_cpu]
    expected = gradients(plain(torch.float64), wide, upstream.cpu().double())
    names = ("hidden_states", "router_logits", "w13_weight", "w2_weight")
    for name, one, allowance, exact in zip(names, actual, same, expected, strict=True):
        assert_error_rule(one.cpu(), allowance, exact, f"gradient of {name}")


@pytest.mark.parametrize("num_tokens", [1 << 17, 1 << 20])
def test_many_tokens(num_tokens: int) -> None:
    """Every kernel but the experts, with more rows than a launch dimension of 16 bits could number."""
    top_k, hidden_size = 3, 8
    topk_ids = torch.randint(-1, 5, (num_tokens, top_k), device="cuda")
    hidden_states = torch.randn(num_tokens, hidden_size, device="cuda", requires_grad=True)
    weights = torch.rand(num_tokens, top_k, device="cuda")
    zero_weight = torch.rand(num_tokens, device="cuda")
    plan = ops.moe_plan(topk_ids, 5)
    rows = ops.moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, top_k)
    gate_up = torch.cat([rows, rows], dim=1)
    rows = ops.silu_and_mul(gate_up, plan.expert_offsets)
    out = ops.moe_finalize(rows, plan.slot_rows, weights, hidden_states, zero_weight)
    factor = (weights * (topk_ids >= 0)).sum(1)
    expected = factor[:, None] * nn.functional.silu(hidden_states) * hidden_states
    expected = expected + zero_weight[:, None] * hidden_states
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, hidden_states, upstream)
    (wanted,) = torch.autograd.grad(expected, hidden_states, upstream)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_indices_out_of_range_read_nothing() -> None:
    """On the CPU they are refused; a kernel cannot raise, and skips them."""
    hidden_states = torch.randn(3, 16, device="cuda")
    weights = torch.rand(3, 2, device="cuda")
    zero_weight = torch.rand(3, device="cuda")
    slot_rows = torch.tensor([[0, 99], [-7, 1], [2, 6]], dtype=torch.int32, device="cuda")
    rows = torch.randn(6, 16, device="cuda")
    out = ops.moe_finalize(rows, slot_rows, weights, hidden_states, zero_weight)
    valid = torch.where((slot_rows >= 0) & (slot_rows < 6), slot_rows, -1)
    assert_equal(out, ops.moe_finalize(rows, valid, weights, hidden_states, zero_weight))
    offsets = torch.tensor([0, 6], dtype=torch.int32, device="cuda")
    ops.moe_permute(hidden_states, slot_rows.flatten(), offsets, 2)
    permuted = ops.moe_permute(hidden_states, slot_rows.flatten(), offsets, 2, slot_rows)
    assert_equal(permuted[[0, 1, 2]], hidden_states[[0, 1, 2]])
    torch.cuda.synchronize()
