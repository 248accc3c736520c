# SPDX-License-Identifier: Apache-2.0
"""Experts with float8 weights: operators, layers, checkpoints, ranks, bad input."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import reference
import zexpert
from gradients import assert_gradients
from layer_cases import LAYERS
from model_cases import as_module_list
from ranks import Ranks
from testing import FLOAT_DTYPES, assert_equal, assert_error_rule, unchanged
from zexpert import ExpertWeights, FusedMoE, ops
from zexpert.models import LongcatFlashConfig, LongcatFlashMoE

# One row, a group of rows, several groups, and enough for torch's matrix product.
SEGMENTS = [1, 0, 3, 25, 200]
# Blocks that end early, whole blocks, more than one block of depth, and less than a vector.
SIZES = [(200, 130), (128, 256), (1300, 16), (7, 3)]
NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 3, 160, 200

grouped_mlp = ops.grouped_mlp


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


class Experts:
    """Quantised weights, and their values in float64."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        gate_up = torch.randn(num_experts, 2, intermediate_size, hidden_size) / hidden_size**0.5
        down = torch.randn(num_experts, hidden_size, intermediate_size) / intermediate_size**0.5
        w13, w13_scale_inv = ops.quantize_blockwise(gate_up)
        self.w2, self.w2_scale_inv = ops.quantize_blockwise(down)
        self.w13, self.w13_scale_inv = w13.flatten(1, 2), w13_scale_inv.flatten(1, 2)
        self.w13_values = reference.dequantize_blockwise(w13, w13_scale_inv).flatten(1, 2)
        self.w2_values = reference.dequantize_blockwise(self.w2, self.w2_scale_inv)

    def weights(self) -> dict[str, Tensor]:
        return {
            "w13_weight": self.w13,
            "w2_weight": self.w2,
            "w13_scale_inv": self.w13_scale_inv,
            "w2_scale_inv": self.w2_scale_inv,
        }


def offsets_of(segments: list[int]) -> Tensor:
    return torch.tensor([0, *segments]).cumsum(0).int()


# ---- Operators ----


@pytest.mark.every_device("grouped_mlp")
@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), SIZES)
@pytest.mark.parametrize("implementation", ["auto", "torch"])
def test_against_reference(implementation: str, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
    """Against the float64 product of the dequantised weights: at most twice the error of plain PyTorch, which rounds
    those to the rows' type first."""
    experts = Experts(len(SEGMENTS), hidden_size, intermediate_size)
    expert_offsets = offsets_of(SEGMENTS)
    rows = torch.randn(int(expert_offsets[-1]), hidden_size).to(dtype)
    if rows.is_cuda and implementation == "auto" and dtype == torch.bfloat16 and hidden_size % 64 == 0:
        pytest.skip("on a Hopper GPU rows are quantised too: test_cuda_grouped_mlp_fp8.py")
    with unchanged(rows, experts.w13_scale_inv, experts.w2_scale_inv):
        result = grouped_mlp(rows, expert_offsets, implementation=implementation, **experts.weights())
    values = (experts.w13_values, experts.w2_values)
    expected = reference.grouped_mlp(rows, expert_offsets, *values)
    # float64's plain product is the reference itself: float32's rounding would be too kind, so add in another order.
    flipped = (rows.flip(1), expert_offsets, experts.w13_values.flip(2), experts.w2_values)
    plain = reference.grouped_mlp(
        *(flipped if dtype == torch.float64 else (rows, expert_offsets, *values)), dtype=dtype
    )
    assert result.dtype == dtype
    assert_error_rule(result, plain, expected)


@pytest.mark.cpu_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_depends_on_no_other(dtype: torch.dtype) -> None:
    """As long as zexpert's kernel computes the segment: up to 32 rows on any processor."""
    experts = Experts(1, 1300, 140)
    rows = torch.randn(32, 1300).to(dtype)
    rows[7] = torch.nan
    rows[8, 0] = torch.inf
    rows[9] *= 1e6  # beyond what the quickest loads serve
    whole = grouped_mlp(rows, offsets_of([32]), **experts.weights())
    for row in range(32):
        alone = grouped_mlp(rows[row : row + 1], offsets_of([1]), **experts.weights())
        assert_equal(whole[row : row + 1], alone, f"row {row}")
    assert whole[7].isnan().all()
    assert whole[[*range(7), *range(9, 32)]].isfinite().all()


@pytest.mark.cpu_paths
@pytest.mark.parametrize("implementation", ["auto", "torch"])
@pytest.mark.parametrize("place", [0, 100, 255, 256, 299])
def test_nan_weights_make_nan(place: int, implementation: str) -> None:
    experts = Experts(2, 300, 64)
    experts.w2.view(torch.uint8)[1, 17, 5] = 0xFF
    experts.w13.view(torch.uint8)[0, 3, place] = 0x7F
    rows = torch.randn(4, 300)
    result = grouped_mlp(rows, offsets_of([2, 2]), implementation=implementation, **experts.weights())
    assert result[:2].isnan().all()  # gate's row 3 enters every output of the expert
    assert result[2:].isnan().nonzero()[:, 1].unique().tolist() == [17]


@pytest.mark.cpu_paths
def test_every_weight_and_scale() -> None:
    """Every code but NaN, at scales from the smallest to the largest, exactly: one weight is not 0."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    identity = torch.zeros(1, 2 * 254, 1)
    identity[0, :254] = 60.0  # silu(60) is 60 in float32
    w13 = identity.to(torch.float8_e4m3fn)
    w13.view(torch.uint8)[0, 254:, 0] = codes
    w2 = torch.eye(254)[None].to(torch.float8_e4m3fn)[:, :1].repeat(1, 1, 1)
    for scale in (2.0**-126, 2.0**-100, 1.0, 2.0**20, 2.0**100):
        w13_scale_inv = torch.ones(1, 4, 1)
        w13_scale_inv[0, 2:] = scale
        w2_scale_inv = torch.ones(1, 1, 2)
        for k in (0, 7, 20, 100, 127, 200, 253):
            w2.view(torch.uint8).zero_()
            w2.view(torch.uint8)[0, 0, k] = 0x38
            out = grouped_mlp(torch.ones(1, 1), offsets_of([1]), w13, w2, None, 1, "auto", w13_scale_inv, w2_scale_inv)
            expected = 60.0 * codes.view(torch.float8_e4m3fn)[k].double() * scale
            assert_equal(out, expected.float().reshape(1, 1), f"code {int(codes[k])}, scale {scale}")


def test_subnormal_weights_where_the_processor_flushes_them() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        w13 = torch.zeros(1, 2, 16)
        w13[0, 0] = 60.0
        w13[0, 1] = 2.0**-9  # the smallest float8
        w2 = torch.ones(1, 16, 1)
        given = (w13.to(torch.float8_e4m3fn), w2.to(torch.float8_e4m3fn), None, 1, "auto")
        scales = (torch.ones(1, 2, 1), torch.ones(1, 1, 1))
        out = grouped_mlp(torch.eye(16)[:1], offsets_of([1]), *given, *scales)
    finally:
        torch.set_flush_denormal(False)
    assert_equal(out, torch.full((1, 16), 60.0 * 2.0**-9))


def fused_moe_call(dtype: torch.dtype, num_zero_experts: int = 2) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    experts = Experts(NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    hidden_states = torch.randn(9, HIDDEN).to(dtype)
    logits = torch.randn(9, NUM_EXPERTS + num_zero_experts).to(dtype)
    routing = ops.biased_topk(logits, None, TOP_K, num_real_experts=NUM_EXPERTS)
    plan = ops.moe_plan(routing.topk_ids, NUM_EXPERTS)
    given = (hidden_states, routing.topk_weights, routing.zero_weight, *plan)
    return given, experts.weights()


@pytest.mark.parametrize("op", ["grouped_mlp", "fused_moe", "grouped_mlp_backward", "fused_moe_backward"])
def test_opcheck(op: str) -> None:
    given, weights = fused_moe_call(torch.float32, 0)  # all rows do work: the others would hold anything
    hidden_states, _topk_weights, _zero_weight, expert_offsets, row_slots, _slot_rows = given
    w13, w2, w13_scale_inv, w2_scale_inv = weights.values()
    scales = {"w13_scale_inv": w13_scale_inv, "w2_scale_inv": w2_scale_inv}
    frozen = {"needs_w13_weight": False, "needs_w2_weight": False}
    hidden_states = hidden_states.requires_grad_(not op.endswith("_backward"))
    rows = torch.randn(row_slots.numel(), HIDDEN)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "grouped_mlp": ((hidden_states, expert_offsets, w13, w2, row_slots, TOP_K), scales),
        "fused_moe": ((*(hidden_states, *given[1:]), w13, w2), scales),
        "grouped_mlp_backward": ((rows, rows, expert_offsets, w13, w2, None), {**scales, **frozen}),
        "fused_moe_backward": (
            (torch.randn(9, HIDDEN), *given, w13, w2, torch.randn(row_slots.numel(), 2 * INTERMEDIATE)),
            {**scales, **frozen},
        ),
    }
    arguments, keywords = calls[op]
    # Not test_schema: PyTorch compares no float8 tensors on the CPU.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.zexpert, op).default, arguments, keywords, test_utils=checks)


@pytest.mark.parametrize("keep_gate_up", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_gradients(dtype: torch.dtype, keep_gate_up: bool) -> None:
    given, weights = fused_moe_call(dtype)
    w13, w2, w13_scale_inv, w2_scale_inv = weights.values()
    gate_up, hidden = w13.unflatten(1, (2, -1)), given[0]
    values = (
        reference.dequantize_blockwise(gate_up, w13_scale_inv.unflatten(1, (2, -1))).flatten(1, 2),
        reference.dequantize_blockwise(w2, w2_scale_inv),
    )

    def function(hidden_states: Tensor, topk_weights: Tensor, zero_weight: Tensor) -> Tensor:
        keywords = {**weights, "keep_gate_up": keep_gate_up}
        return ops.fused_moe(hidden_states, topk_weights, zero_weight, *given[3:], **keywords)[0]

    def plain(dtype: torch.dtype) -> Callable[..., Tensor]:
        w13_values, w2_values = (value.to(dtype) for value in values)

        def layer(hidden_states: Tensor, topk_weights: Tensor, zero_weight: Tensor) -> Tensor:
            x = hidden_states.to(dtype)
            out = zero_weight[:, None].to(dtype) * x
            slot_rows, offsets = given[5], given[3]
            for token, slot in (slot_rows >= 0).nonzero().tolist():
                expert = int((offsets <= slot_rows[token, slot]).sum()) - 1
                row = reference.silu_and_mul(x[token : token + 1] @ w13_values[expert].T, dtype=dtype)
                weighted = topk_weights[token, slot].to(dtype) * (row @ w2_values[expert].T)[0]
                out = out + torch.nn.functional.one_hot(torch.tensor(token), 9).to(dtype)[:, None] * weighted
            return out.to(hidden_states.dtype)

        return layer

    assert_gradients(function, plain, [hidden, *given[1:3]], dtype, ["hidden_states", "topk_weights", "zero_weight"])


def test_bad_operands() -> None:
    experts = Experts(2, 150, 40)
    rows, expert_offsets = torch.randn(4, 150), offsets_of([2, 2])
    plain = (experts.w13_values.float(), experts.w2_values.float())

    def error_with(rows: Tensor = rows, **changes: Any) -> str:
        with pytest.raises(RuntimeError) as caught:
            grouped_mlp(rows, expert_offsets, **{**experts.weights(), **changes})
        return str(caught.value).splitlines()[0]

    none = {"w13_scale_inv": None, "w2_scale_inv": None}
    assert error_with(**none) == (
        "w13_scale_inv must be given with float8_e4m3fn w13_weight, whose values need a scale, got None"
    )
    assert error_with(w2_scale_inv=None) == (
        "w2_scale_inv must be given with float8_e4m3fn w2_weight, whose values need a scale, got None"
    )
    assert error_with(w13_weight=plain[0]) == "w13_weight must be float8_e4m3fn with w13_scale_inv, got float32"
    e5m2 = plain[0].to(torch.float8_e5m2)
    assert error_with(w13_weight=e5m2) == "w13_weight must be float8_e4m3fn with w13_scale_inv, got float8_e5m2"
    assert error_with(w13_weight=e5m2, **none) == "w13_weight must be float32 with float32 rows, got float8_e5m2"
    assert error_with(w2_weight=plain[1], w2_scale_inv=None) == (
        "w13_scale_inv and w2_scale_inv must be given both or neither, got w13_scale_inv alone"
    )
    assert error_with(rows.to(torch.float8_e4m3fn)) == (
        "rows must be float32, float64, bfloat16 or float16, got float8_e4m3fn"
    )
    assert error_with(w13_scale_inv=experts.w13_scale_inv.half()) == "w13_scale_inv must be float32, got float16"
    assert error_with(w13_scale_inv=experts.w13_scale_inv[:, :1]).startswith(
        "w13_scale_inv must have shape [2, 2, 2] [experts, 2 * ceil(intermediate_size / 128), "
    )
    assert error_with(w2_scale_inv=experts.w2_scale_inv[0]).startswith("w2_scale_inv must have 3 dimensions ")
    for value, shown in ((torch.nan, "nan"), (torch.inf, "inf"), (-1.0, "-1")):
        scale_inv = experts.w2_scale_inv.clone()
        scale_inv[1, 1, 0] = value
        assert error_with(w2_scale_inv=scale_inv) == f"w2_scale_inv must be finite and not negative, got {shown}"
    wants_gradients = experts.w13.detach().requires_grad_()
    assert error_with(w13_weight=wants_gradients) == (
        "w13_weight must not require gradients: it is quantised, got requires_grad=True"
    )
    with pytest.raises(RuntimeError, match=r"^needs_w2_weight must be False with float8_e4m3fn weights"):
        torch.ops.zexpert.grouped_mlp_backward(
            rows,
            rows,
            expert_offsets,
            experts.w13,
            experts.w2,
            None,
            *list(experts.weights().values())[2:],
            needs_w13_weight=False,
        )


# ---- Layers ----


def make_layer(kind: str = "identity", *, seed: int = 0, **arguments: Any) -> FusedMoE:
    torch.manual_seed(seed)
    sizes = {"params_dtype": torch.bfloat16, **arguments}
    return FusedMoE(NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, **{**LAYERS[kind], **sizes})


def make_inputs(layer: FusedMoE, num_tokens: int = 11, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    num_experts = layer.router.num_experts or NUM_EXPERTS
    return (
        torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype),
        torch.randn(num_tokens, num_experts, generator=generator),
    )


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("kind", ["plain", "identity", "drop", "constant", "mixed"])
def test_a_layer_by_the_error_rule(kind: str, chunk_size: int | None) -> None:
    layer = make_layer(kind, quantization="fp8_block", chunk_size=chunk_size)
    hidden_states, logits = make_inputs(layer)
    expert_weights = layer.expert_weights()
    gate_up = layer.w13_weight.unflatten(1, (2, -1)), layer.w13_weight_scale_inv.unflatten(1, (2, -1))
    values = {
        "w13_weight": reference.dequantize_blockwise(*gate_up).flatten(1, 2),
        "w2_weight": reference.dequantize_blockwise(layer.w2_weight, layer.w2_weight_scale_inv),
    }
    assert isinstance(expert_weights, ExpertWeights)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        plain = make_layer(kind, params_dtype=dtype, experts_backend="torch")
        same = {name: tensor for name, tensor in layer.state_dict().items() if name in plain.state_dict()}
        plain.load_state_dict({**same, **values})
        results.append(plain(hidden_states.to(dtype), logits))
    assert_error_rule(layer(hidden_states, logits), results[0], results[1])


def test_quantize_makes_what_a_quantised_layer_draws() -> None:
    layer = make_layer(quantization="fp8_block")
    quantised = zexpert.quantize(make_layer())
    for name, tensor in layer.state_dict().items():
        assert_equal(as_bytes(tensor), as_bytes(quantised.state_dict()[name]), name)
    assert layer.w13_weight.shape == (NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    assert layer.w13_weight.dtype == layer.w2_weight.dtype == torch.float8_e4m3fn
    assert layer.w13_weight_scale_inv.shape == (NUM_EXPERTS, 4, 2)
    assert layer.w2_weight_scale_inv.shape == (NUM_EXPERTS, 2, 2)
    assert layer.w13_weight_scale_inv.dtype == layer.w2_weight_scale_inv.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert "quantization='fp8_block'" in repr(layer)
    assert layer.experts_backend == "cpu"


def test_quantize_a_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), make_layer(), nn.ModuleList([make_layer("constant")]))
    expected = [zexpert.quantize(copy.deepcopy(layer)) for layer in (model[1], model[2][0])]
    linear = model[0].weight.clone()
    assert zexpert.quantize(model) is model
    for layer, other in zip((model[1], model[2][0]), expected, strict=True):
        for name, tensor in layer.state_dict().items():
            assert_equal(as_bytes(tensor), as_bytes(other.state_dict()[name]), name)
    assert_equal(model[0].weight, linear)
    assert model[2][0].constant_vectors.requires_grad


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_hidden_states_of_every_dtype(dtype: torch.dtype) -> None:
    layer = make_layer(quantization="fp8_block")
    out = layer(*make_inputs(layer, dtype=dtype))
    assert out.dtype == dtype
    exact = layer(*make_inputs(layer, dtype=torch.float64))
    assert (out.double() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.half,
        nn.Module.double,
        lambda layer: layer.to(torch.float32),
        lambda layer: layer.to("meta").to_empty(device="cpu"),
        lambda layer: nn.Sequential(layer).bfloat16()[0],
        copy.deepcopy,
    ],
)
def test_conversions_keep_the_format(convert: Callable[[FusedMoE], FusedMoE]) -> None:
    layer = make_layer("mixed", quantization="fp8_block")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    converted = convert(layer)
    assert converted.w13_weight.dtype == converted.w2_weight.dtype == torch.float8_e4m3fn
    assert converted.w13_weight_scale_inv.dtype == converted.w2_weight_scale_inv.dtype == torch.float32
    converted.load_state_dict(before)
    for name in ("w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv"):
        assert_equal(as_bytes(converted.state_dict()[name]), as_bytes(before[name]), name)
    assert converted.constant_vectors is not None
    inputs = make_inputs(converted, dtype=converted.constant_vectors.dtype)
    assert converted(*inputs).dtype == converted.constant_vectors.dtype


def test_autocast() -> None:
    layer = make_layer(params_dtype=torch.float32, quantization="fp8_block")
    hidden_states, logits = make_inputs(layer, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(hidden_states, logits)
    assert out.dtype == torch.bfloat16
    assert_equal(out, copy.deepcopy(layer).bfloat16()(hidden_states.bfloat16(), logits))


def test_scripted_compiled_and_exported(
    compiled_ahead_of_time: Callable[[torch.export.ExportedProgram], Any],
) -> None:
    layer = make_layer("mixed", quantization="fp8_block").eval()
    inputs = make_inputs(layer)
    with torch.no_grad():
        expected = layer(*inputs)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(layer), file)
        file.seek(0)
        assert_equal(torch.jit.load(file)(*inputs), expected, "scripted")
        assert_equal(torch.compile(layer, fullgraph=True)(*inputs), expected, "compiled")
        program = torch.export.export(layer, inputs)
        assert_equal(program.module()(*inputs), expected, "exported")
        assert_equal(compiled_ahead_of_time(program)(*inputs), expected, "AOTInductor")


def test_gradients_reach_hidden_states_and_logits() -> None:
    layer = make_layer(quantization="fp8_block", params_dtype=torch.float32)
    hidden_states, logits = (tensor.requires_grad_() for tensor in make_inputs(layer, dtype=torch.float32))
    layer(hidden_states, logits).square().sum().backward()
    assert hidden_states.grad is not None
    assert logits.grad is not None
    assert hidden_states.grad.norm() > 0
    assert logits.grad.norm() > 0
    layer.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"^w13_weight must not require gradients: it is quantised"):
        layer(hidden_states, logits)


def test_state_dicts() -> None:
    layer = make_layer(quantization="fp8_block")
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    other = make_layer(seed=1, quantization="fp8_block")
    other.load_state_dict(torch.load(saved))
    inputs = make_inputs(layer)
    assert_equal(other(*inputs), layer(*inputs))
    plain = make_layer(seed=2)
    other.load_state_dict(plain.state_dict())  # quantises
    assert_equal(other(*inputs), zexpert.quantize(plain)(*inputs))


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer = make_layer("mixed", quantization="fp8_block")
    safetensors.save_model(layer, str(tmp_path / "layer.safetensors"))
    other = make_layer("mixed", seed=1, quantization="fp8_block")
    safetensors.load_model(other, str(tmp_path / "layer.safetensors"))
    inputs = make_inputs(layer)
    assert_equal(other(*inputs), layer(*inputs))


def test_what_cannot_be_quantised() -> None:
    layer = make_layer()
    before = layer.state_dict()
    with pytest.raises(ValueError, match=r'^quantization must be "fp8_block", got \'int4\'$'):
        zexpert.quantize(layer, "int4")
    with pytest.raises(ValueError, match=r'^quantization must be "fp8_block", got \'fp8\'$'):
        make_layer(quantization="fp8")
    with pytest.raises(ValueError, match=r"^params_dtype must be that of hidden_states with quantization"):
        make_layer(quantization="fp8_block", params_dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"^module must be a FusedMoE or contain one, got Linear without one$"):
        zexpert.quantize(nn.Linear(2, 2))
    broken = make_layer(seed=1)
    with torch.no_grad():
        broken.w2_weight[3, 5, 7] = torch.inf
    model = nn.ModuleDict({"first": layer, "second": broken})
    with pytest.raises(ValueError, match=r"^second must have finite weights, got NaN or infinity in w2_weight$"):
        zexpert.quantize(model)
    quantised = make_layer(quantization="fp8_block")
    with pytest.raises(ValueError, match=r'^1 must not be quantised already, got quantization="fp8_block"$'):
        zexpert.quantize(nn.Sequential(layer, quantised))
    for name, tensor in layer.state_dict().items():
        assert tensor.data_ptr() == before[name].data_ptr()


def test_hidden_states_and_weights_of_a_runner() -> None:
    layer = make_layer(quantization="fp8_block")
    hidden_states, logits = make_inputs(layer)
    with pytest.raises(ValueError, match=r"^hidden_states must be float32, .* got torch.float8_e4m3fn$"):
        layer(hidden_states.to(torch.float8_e4m3fn), logits)
    with pytest.raises(ValueError, match=r"^w13_scale_inv must be given with .* weights, whose values need a scale$"):
        layer.runner(hidden_states, logits, ExpertWeights(layer.w13_weight, layer.w2_weight))
    with pytest.raises(ValueError, match=r"^w13_scale_inv and w2_scale_inv must be given both or neither$"):
        layer.runner(hidden_states, logits, layer.expert_weights()._replace(w2_scale_inv=None))


BAD_ENTRIES: dict[str, tuple[dict[str, Callable[[Tensor], Tensor] | None], str]] = {
    "no scales": ({"w13_weight_scale_inv": None}, r"^w13_weight_scale_inv must be given with w13_weight, whose values"),
    "few scales": (
        {"w13_weight_scale_inv": lambda scales: scales[:, :2]},
        r"^w13_weight_scale_inv must have shape \[6, 4, 2\], got \[6, 2, 2\]$",
    ),
    "float16 scales": (
        {"w2_weight_scale_inv": Tensor.half},
        r"^w2_weight_scale_inv must be torch.float32 in a quantised layer, got torch.float16$",
    ),
    "NaN": ({"w2_weight_scale_inv": lambda scales: scales * torch.nan}, r"^w2_weight_scale_inv must be finite .* nan$"),
    "infinity": (
        {"w2_weight_scale_inv": lambda scales: scales * torch.inf},
        r"^w2_weight_scale_inv must be finite .* inf$",
    ),
    "negative": ({"w2_weight_scale_inv": Tensor.neg}, r"^w2_weight_scale_inv must be finite and not negative, got -"),
    "e5m2": (
        {"w2_weight": lambda weight: weight.float().to(torch.float8_e5m2)},
        r"^w2_weight must be torch.float8_e4m3fn in a quantised layer, got torch.float8_e5m2$",
    ),
    "scales of float32": (
        {"w2_weight": Tensor.float},
        r"^w2_weight must be torch.float8_e4m3fn with w2_weight_scale_inv, got torch.float32$",
    ),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_bad_entries_of_a_state_dict(name: str) -> None:
    changes, message = BAD_ENTRIES[name]
    layer, other = make_layer(quantization="fp8_block"), make_layer(seed=1, quantization="fp8_block")
    entries = other.state_dict()
    for key, change in changes.items():
        entry = entries.pop(key)
        if change is not None:
            entries[key] = change(entry)
    before = {key: as_bytes(tensor).clone() for key, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(entries)
    for key, tensor in layer.state_dict().items():
        assert_equal(as_bytes(tensor), before[key], key)


def test_quantised_entries_for_a_layer_that_is_not() -> None:
    with pytest.raises(RuntimeError, match=r"^w13_weight must be of a floating-point dtype that needs no scale, got"):
        make_layer().load_state_dict(make_layer(quantization="fp8_block").state_dict())


# ---- Checkpoints ----

CONFIG = LongcatFlashConfig(
    hidden_size=HIDDEN,
    expert_ffn_hidden_size=INTERMEDIATE,
    n_routed_experts=4,
    zero_expert_num=2,
    moe_topk=3,
    routed_scaling_factor=2.0,
)


def published(prefix: str = "") -> dict[str, Tensor]:
    """A block of a checkpoint as LongCat-Flash-Chat-FP8 has them: router and bias in float32."""
    torch.manual_seed(7)
    tensors = {
        "router.classifier.weight": torch.randn(CONFIG.num_experts, HIDDEN),
        "router.e_score_correction_bias": torch.randn(CONFIG.num_experts),
    }
    for expert in range(CONFIG.n_routed_experts):
        for projection, shape in (
            ("gate_proj", (INTERMEDIATE, HIDDEN)),
            ("up_proj", (INTERMEDIATE, HIDDEN)),
            ("down_proj", (HIDDEN, INTERMEDIATE)),
        ):
            weight, scale_inv = ops.quantize_blockwise(torch.randn(shape) / 16)
            tensors[f"experts.{expert}.{projection}.weight"] = weight
            tensors[f"experts.{expert}.{projection}.weight_scale_inv"] = scale_inv
    return {prefix + name: tensor for name, tensor in tensors.items()}


def assert_is_published(block: LongcatFlashMoE) -> None:
    for name, tensor in published().items():
        assert_equal(as_bytes(block.checkpoint_state_dict()[name]), as_bytes(tensor), name)


@pytest.mark.parametrize("assign", [False, True])
def test_a_published_checkpoint(assign: bool) -> None:
    checkpoint = published("model.layers.0.mlp.")
    block = LongcatFlashMoE.from_state_dict(
        CONFIG, checkpoint, prefix="model.layers.0.mlp.", assign=assign, params_dtype=torch.bfloat16
    )
    assert block.experts.quantization == "fp8_block"
    assert block.experts.w13_weight.dtype == torch.float8_e4m3fn
    assert not block.experts.w13_weight.requires_grad
    assert block.router.classifier.weight.dtype == block.e_score_correction_bias.dtype == torch.float32
    assert_is_published(block)
    assert set(block.checkpoint_state_dict()) == set(published())
    hidden_states = torch.randn(5, HIDDEN).bfloat16()
    again = LongcatFlashMoE.from_state_dict(CONFIG, block.checkpoint_state_dict(), params_dtype=torch.bfloat16)
    assert_equal(again(hidden_states), block(hidden_states))
    own = LongcatFlashMoE(CONFIG, params_dtype=torch.bfloat16, quantization="fp8_block")
    own.load_state_dict(block.state_dict())
    assert_equal(own(hidden_states), block(hidden_states))


def test_a_published_checkpoint_in_shards() -> None:
    block = LongcatFlashMoE(CONFIG, params_dtype=torch.bfloat16, quantization="fp8_block")
    checkpoint = published()
    names = sorted(checkpoint, key=lambda name: (sum(map(ord, name)) % 3, name))
    for first in range(3):
        missing = block.load_state_dict({name: checkpoint[name] for name in names[first::3]}, strict=False).missing_keys
    assert missing == [name for name in missing if not name.startswith("experts.")]
    assert_is_published(block)


def test_a_checkpoint_that_is_not_quantised() -> None:
    """Experts in a module list and in one tensor are quantised where they are loaded."""
    plain = LongcatFlashMoE(CONFIG, params_dtype=torch.bfloat16)
    stacked = plain.checkpoint_state_dict()
    expected = zexpert.quantize(copy.deepcopy(plain))
    for checkpoint in (stacked, as_module_list(stacked)):
        block = LongcatFlashMoE.from_state_dict(
            CONFIG, checkpoint, params_dtype=torch.bfloat16, quantization="fp8_block"
        )
        for name, tensor in expected.state_dict().items():
            assert_equal(as_bytes(block.state_dict()[name]), as_bytes(tensor), name)


def test_stacked_experts_with_scales() -> None:
    """transformers' layout, with rows of zero experts: its blocks are ours where the sizes are whole blocks."""
    config = LongcatFlashConfig(**{**CONFIG.__dict__, "expert_ffn_hidden_size": 256})
    block = LongcatFlashMoE(config, params_dtype=torch.bfloat16, quantization="fp8_block")
    checkpoint = {name: tensor for name, tensor in block.state_dict().items() if name.startswith("router.")}
    checkpoint["router.e_score_correction_bias"] = block.e_score_correction_bias
    for ours, theirs in (("w13_weight", "gate_up_proj"), ("w2_weight", "down_proj")):
        for end in ("", "_scale_inv"):
            whole = as_bytes(block.experts.get_parameter(ours + end).detach())
            padded = torch.cat((whole, whole.new_zeros(2, *whole.shape[1:])))
            dtype = torch.float32 if end else torch.float8_e4m3fn
            checkpoint[f"experts.{theirs}{end}"] = padded.view(dtype)
    again = LongcatFlashMoE.from_state_dict(config, checkpoint, params_dtype=torch.bfloat16)
    hidden_states = torch.randn(5, HIDDEN).bfloat16()
    assert_equal(again(hidden_states), block(hidden_states))


def test_bad_checkpoints() -> None:
    scale, weight = "experts.2.up_proj.weight_scale_inv", "experts.2.up_proj.weight"

    def error_with(changes: dict[str, Tensor | None], **options: Any) -> str:
        entries = {**published(), **changes}
        given = {name: tensor for name, tensor in entries.items() if tensor is not None}
        with pytest.raises(RuntimeError) as caught:
            LongcatFlashMoE.from_state_dict(CONFIG, given, params_dtype=torch.bfloat16, **options)
        return str(caught.value)

    assert error_with({scale: None}) == f"{scale} must be in the checkpoint, got none"
    assert error_with({scale: torch.ones(2, 1)}) == f"{scale} must have shape [2, 2], got [2, 1]"
    half = published()[scale].half()
    assert error_with({scale: half}) == f"{scale} must be torch.float32 in a quantised layer, got torch.float16"
    assert error_with({scale: -published()[scale]}).startswith(f"{scale} must be finite and not negative, got -")
    e5m2 = published()[weight].float().to(torch.float8_e5m2)
    assert error_with({weight: e5m2}).startswith(f"{weight} must be torch.float8_e4m3fn in a quantised layer, got")
    bf16 = published()[weight].bfloat16()
    assert error_with({weight: bf16}) == f"{weight} must be torch.float8_e4m3fn with {scale}, got torch.bfloat16"
    no_scales: dict[str, Tensor | None] = dict.fromkeys(name for name in published() if name.endswith("_scale_inv"))
    assert "needs no scale, got torch.float8_e4m3fn" in error_with(no_scales)
    block = LongcatFlashMoE(CONFIG, params_dtype=torch.bfloat16, quantization="fp8_block")
    before = {name: as_bytes(tensor).clone() for name, tensor in block.state_dict().items()}
    entries = published()
    del entries[scale]
    with pytest.raises(
        RuntimeError, match=rf"^{scale} must be given with {weight}, whose values need a scale, got none"
    ):
        block.load_state_dict(entries)
    for name, tensor in block.state_dict().items():
        assert_equal(as_bytes(tensor), before[name], name)


# ---- Ranks ----

needs_ranks = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


def shared_out(group: Any, argument: str) -> None:
    """The same results as one process, from one state dict, which the ranks write again."""
    torch.manual_seed(0)
    sizes = (4, 2, 160, 256)
    options: dict[str, Any] = {**LAYERS["mixed"], "params_dtype": torch.float32, "quantization": "fp8_block"}
    whole = FusedMoE(*sizes, **options)
    layer = FusedMoE(*sizes, **options, **{argument: group})
    for name, tensor in layer.state_dict().items():
        if name.startswith("w"):
            assert tensor.dtype == whole.state_dict()[name].dtype
    layer.load_state_dict(whole.state_dict())
    for name in layer.placement.whole_shapes:
        gathered = layer.placement.whole(name, layer.get_parameter(name).detach())
        assert_equal(as_bytes(gathered), as_bytes(whole.get_parameter(name).detach()), name)
    hidden_states = torch.randn(9, 160)
    logits = torch.randn(9, 8)
    expected = whole(hidden_states, logits)
    actual = layer(hidden_states, logits)
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    plain = FusedMoE(*sizes, **{**options, "quantization": None})
    layer.load_state_dict(plain.state_dict())
    expected = zexpert.quantize(plain)(hidden_states, logits)
    assert (layer(hidden_states, logits) - expected).norm() <= 1e-5 * expected.norm()


@needs_ranks
@pytest.mark.parametrize("argument", ["expert_parallel_group", "tensor_parallel_group"])
def test_ranks(argument: str, ranks: Ranks) -> None:
    ranks.run(shared_out, 2, argument)


def slices_that_cut_blocks(group: Any) -> None:
    options: dict[str, Any] = {"tensor_parallel_group": group, "params_dtype": torch.float32}
    message = (
        "intermediate_size must be a multiple of 128 for each rank of tensor_parallel_group with quantised weights, "
        "which have blocks of 128 with one scale, got 192 for each of 2"
    )
    with pytest.raises(ValueError) as caught:
        FusedMoE(4, 2, 160, 384, quantization="fp8_block", **options)
    assert str(caught.value) == message
    layer = FusedMoE(4, 2, 160, 384, **options)
    with pytest.raises(ValueError) as caught:
        zexpert.quantize(layer)
    assert str(caught.value) == message
    assert layer.w13_weight.dtype == torch.float32


@needs_ranks
def test_slices_that_cut_blocks(ranks: Ranks) -> None:
    ranks.run(slices_that_cut_blocks, 2)
