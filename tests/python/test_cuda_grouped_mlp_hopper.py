# SPDX-License-Identifier: Apache-2.0
"""grouped_mlp's own kernels on a Hopper GPU: segments of every profile against float64, bits, graphs, streams, bad
input. grouped_mlp_hopper is the alias with a choice of tiles."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

import reference
from layer_cases import expected_output
from testing import assert_equal, assert_error_rule, unchanged
from zexpert import FusedMoE
from zexpert.ops import grouped_mlp, grouped_mlp_hopper

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch.ops.zexpert.is_hopper(torch.zeros(1, device="cuda")),
    reason="no GPU of compute capability 9.0, or no code for 9.0a",
)

DTYPES = (torch.bfloat16, torch.float16)
# Every kernel: tall tiles of up to 64 and up to 160 rows, and wide ones.
TILE_ROWS = (0, 8, 40, 64, 136, 160, 168, 288)
NUM_EXPERTS = 24
EDGES = [0, 1, 7, 8, 9, 63, 64, 65, 71, 72, 135, 136, 137, 159, 160, 161, 287, 288, 289, 576, 577, 640, 0, 5]
# Nobody has a row; one has all; every tile is a part of one; lengths around the edges of tiles.
PROFILES = {
    "empty": [0] * NUM_EXPERTS,
    "one row": [0] * 11 + [1] + [0] * 12,
    "one row each": [1] * NUM_EXPERTS,
    "one takes all": [0] * 5 + [1500] + [0] * 18,
    "few rows": [0, 3, 0, 0, 11, 1] + [0] * 18,
    "uniform": [random.Random(1).randrange(60) for _ in range(NUM_EXPERTS)],
    "zipf": random.Random(2).sample([900 // (e + 1) for e in range(NUM_EXPERTS)], NUM_EXPERTS),
    "edges": EDGES,
}


def offsets_of(segments: list[int]) -> Tensor:
    return torch.tensor([0, *segments], device="cuda").cumsum(0).int()


def weights(num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    w13_weight = torch.randn(num_experts, 2 * intermediate_size, hidden_size, device="cuda") / hidden_size**0.5
    w2_weight = torch.randn(num_experts, hidden_size, intermediate_size, device="cuda") / intermediate_size**0.5
    return w13_weight.to(dtype), w2_weight.to(dtype)


def assert_agrees(result: Tensor, rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> None:
    """By the error rule, expert by expert: a mistake with one must not hide behind the errors of another."""
    given = (rows, expert_offsets, w13_weight, w2_weight)
    plain, expected = (reference.grouped_mlp(*given, dtype=dtype) for dtype in (rows.dtype, torch.float64))
    offsets = expert_offsets.tolist()
    worst = (plain.double() - expected)[: offsets[-1]].abs()
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if end > begin:
            # A single row's own plain error says little: the largest over all experts stands in for it.
            allowance = expected[begin:end] + worst.max()
            assert_error_rule(result[begin:end], allowance, expected[begin:end], f"expert {expert}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
@pytest.mark.parametrize("profile", PROFILES)
def test_segments(profile: str, tile_rows: int, dtype: torch.dtype) -> None:
    expert_offsets = offsets_of(PROFILES[profile])
    rows = torch.randn(sum(PROFILES[profile]) + 5, 256, device="cuda").to(dtype)  # five do no work
    w13_weight, w2_weight = weights(NUM_EXPERTS, 256, 192, dtype)
    with unchanged(rows, expert_offsets, w13_weight, w2_weight):
        result = grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows)
    assert result.shape == rows.shape
    assert result.dtype == dtype
    assert_agrees(result, rows, expert_offsets, w13_weight, w2_weight)
    if tile_rows == 0:
        num_rows = int(expert_offsets[-1])
        forced = grouped_mlp(rows, expert_offsets, w13_weight, w2_weight, implementation="hopper")
        assert_equal(forced[:num_rows], result[:num_rows])


@pytest.mark.parametrize("tile_rows", [0, 64, 160, 288])
def test_long_segments(tile_rows: int) -> None:
    """So many rows for an expert that blocks take tiles in turn."""
    expert_offsets = offsets_of([900, 1100, 0, 1300, 700, 2001])
    rows = torch.randn(6001, 2048, device="cuda").bfloat16()
    w13_weight, w2_weight = weights(6, 2048, 768, torch.bfloat16)
    result = grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows)
    assert_agrees(result, rows, expert_offsets, w13_weight, w2_weight)
    for _ in range(5):
        assert_equal(grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows), result)


# Less than a weight tile, one and a part, many; depths of one step, fewer than the pipeline's, and many.
SIZES = [(64, 64), (128, 320), (320, 64), (192, 1024), (2048, 768), (6144, 2048)]


@pytest.mark.parametrize("tile_rows", [64, 160, 288])
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), SIZES)
def test_sizes(hidden_size: int, intermediate_size: int, tile_rows: int) -> None:
    segments = [1, 0, 333, 20]
    given = (
        torch.randn(sum(segments), hidden_size, device="cuda").bfloat16(),
        offsets_of(segments),
        *weights(len(segments), hidden_size, intermediate_size, torch.bfloat16),
    )
    assert_agrees(grouped_mlp_hopper(*given, tile_rows=tile_rows), *given)


def test_random_segments() -> None:
    """More tiles than multiprocessors, in tiles of every length."""
    choose = random.Random(3)
    for _ in range(10):
        num_experts = choose.choice([1, 3, 64, 200, 1024])
        segments = [choose.choice([0, 1, choose.randrange(40), choose.randrange(400)]) for _ in range(num_experts)]
        given = (
            torch.randn(sum(segments) + 1, 128, device="cuda").bfloat16(),
            offsets_of(segments),
            *weights(num_experts, 128, 64, torch.bfloat16),
        )
        assert_agrees(grouped_mlp_hopper(*given, tile_rows=8 * choose.randrange(37)), *given)


@pytest.mark.parametrize("tile_rows", [64, 160, 288])
def test_rows_of_others_do_not_reach_an_expert(tile_rows: int) -> None:
    """Tiles read on into the next segment, and past the last; what they find there must not count."""
    segments = [3, 130, 20, 9]
    expert_offsets = offsets_of(segments)
    rows = torch.randn(sum(segments) + 4, 128, device="cuda").bfloat16()
    w13_weight, w2_weight = weights(len(segments), 128, 64, torch.bfloat16)
    expected = grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows)
    rows[3:133] = torch.nan
    rows[162:] = torch.nan
    result = grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows)
    assert bool(result[3:133].isnan().all())
    assert_equal(result[:3], expected[:3])
    assert_equal(result[133:162], expected[133:162])


def test_slices_of_weights_and_strided_rows() -> None:
    segments = [5, 70, 0, 12]
    expert_offsets = offsets_of(segments)
    rows = torch.randn(sum(segments), 320, device="cuda").bfloat16()[:, 64:192]
    w13_weight, w2_weight = (tensor[2:6] for tensor in weights(9, 128, 64, torch.bfloat16))
    wide = torch.cat([w13_weight, w13_weight], dim=1)[:, : 2 * 64]
    given = (rows, expert_offsets, w13_weight, w2_weight)
    result = grouped_mlp_hopper(*given)
    assert_agrees(result, *given)
    assert_equal(grouped_mlp_hopper(rows, expert_offsets, wide, w2_weight), result)


@pytest.mark.parametrize("segments", [[0, 3, 0, 9], [40, 500, 0, 170]], ids=["split depth", "many tiles"])
@pytest.mark.parametrize("tile_rows", [64, 160, 288])
def test_the_same_bits_in_every_run(segments: list[int], tile_rows: int) -> None:
    given = (
        torch.randn(sum(segments), 1024, device="cuda").bfloat16(),
        offsets_of(segments),
        *weights(len(segments), 1024, 512, torch.bfloat16),
    )
    expected = grouped_mlp_hopper(*given, tile_rows=tile_rows)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differing += (grouped_mlp_hopper(*given, tile_rows=tile_rows) != expected).sum()
    assert int(differing) == 0


@pytest.mark.parametrize("tile_rows", [64, 160, 288])
def test_a_graph_that_replays_with_other_data(tile_rows: int) -> None:
    num_rows, num_experts = 300, 8
    rows = torch.randn(num_rows, 256, device="cuda").bfloat16()
    expert_offsets = offsets_of([0] * num_experts)
    w13_weight, w2_weight = weights(num_experts, 256, 128, torch.bfloat16)
    grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows)
    for segments in ([37] * num_experts, [0, 300, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 2]):
        expert_offsets.copy_(offsets_of(segments))
        rows.normal_()
        graph.replay()
        assert_agrees(out, rows, expert_offsets, w13_weight, w2_weight)


def test_side_stream() -> None:
    segments = [100, 3, 60]
    given = (
        torch.randn(163, 512, device="cuda").bfloat16(),
        offsets_of(segments),
        *weights(3, 512, 256, torch.bfloat16),
    )
    expected = grouped_mlp_hopper(*given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = grouped_mlp_hopper(*given)
    stream.synchronize()
    assert_equal(out, expected)


def test_bad_input_gets_a_sentence() -> None:
    expert_offsets = offsets_of([4, 4])

    def call(
        hidden_size: int, intermediate_size: int, dtype: torch.dtype = torch.bfloat16, tile_rows: int = 0
    ) -> Tensor:
        rows = torch.randn(8, hidden_size, device="cuda").to(dtype)
        return grouped_mlp_hopper(
            rows, expert_offsets, *weights(2, hidden_size, intermediate_size, dtype), tile_rows=tile_rows
        )

    with pytest.raises(RuntimeError, match=r'hidden_size must be a multiple of 64 for implementation "hopper", got 72'):
        call(72, 64)
    with pytest.raises(
        RuntimeError, match=r'intermediate_size must be a multiple of 64 for implementation "hopper", got 32'
    ):
        call(64, 32)
    with pytest.raises(
        RuntimeError, match=r'w13_weight must be bfloat16 or float16 for implementation "hopper", got float32'
    ):
        call(64, 64, torch.float32)
    for tile_rows in (-8, 12, 296):
        with pytest.raises(RuntimeError, match=rf"tile_rows must be a multiple of 8 from 0 to 288, got {tile_rows}"):
            call(64, 64, tile_rows=tile_rows)
    with pytest.raises(RuntimeError, match=r"begin at multiples of 16 bytes"):
        weight = weights(2, 64, 64, torch.bfloat16)
        grouped_mlp_hopper(torch.randn(8, 65, device="cuda").bfloat16()[:, 1:], expert_offsets, *weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 300])
def test_layer(num_tokens: int, dtype: torch.dtype) -> None:
    layer = FusedMoE(
        16, 6, 128, 64, zero_expert_type="identity", zero_expert_num=8, routed_scaling_factor=6.0,
        e_score_correction_bias=0.01 * torch.randn(24), params_dtype=dtype, experts_backend="hopper",
    )  # fmt: skip
    inputs = torch.randn(num_tokens, 128).to(dtype), torch.randn(num_tokens, 24)
    plain, expected = expected_output(layer, *inputs, dtype), expected_output(layer, *inputs)
    layer = layer.cuda()
    assert layer.experts_backend == "hopper"
    with torch.no_grad():
        out = layer(*(tensor.cuda() for tensor in inputs))
    assert_error_rule(out.cpu(), plain, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_the_layer_chooses_it() -> None:
    """In Python, scripted, compiled, and exported, unless gradients are wanted."""
    layer = FusedMoE(16, 6, 128, 64, params_dtype=torch.bfloat16, device="cuda")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(40, 128, device="cuda").bfloat16(), torch.randn(40, 16, device="cuda")
    assert layer.experts_backend == "grouped_mm"
    with torch.no_grad():
        assert layer.experts_backend == "hopper"
        assert torch.ops.zexpert.is_hopper(inputs[0]) is True
        expected = layer(*inputs)
        assert_equal(torch.jit.script(layer)(*inputs), expected)
        assert_equal(torch.compile(layer, fullgraph=True)(*inputs), expected)
        program = torch.export.export(layer, inputs)
        assert "fused_moe" in program.graph_module.code
        assert_equal(program.module()(*inputs), expected)


def test_the_layer_refuses_gradients() -> None:
    layer = FusedMoE(16, 6, 128, 64, params_dtype=torch.bfloat16, experts_backend="hopper").cuda()
    inputs = torch.randn(40, 128, device="cuda").bfloat16(), torch.randn(40, 16, device="cuda")
    with pytest.raises(RuntimeError, match=r'keep_gate_up must be False for implementation "hopper", got True'):
        layer(*inputs)
    with torch.no_grad():
        assert layer(*inputs).shape == (40, 128)


def test_gradients_come_from_grouped_mm() -> None:
    layers = []
    for backend in ("auto", "grouped_mm"):
        torch.manual_seed(0)
        layers.append(FusedMoE(16, 6, 128, 64, params_dtype=torch.bfloat16, experts_backend=backend).cuda())
    hidden_states = torch.randn(40, 128, device="cuda").bfloat16()
    router_logits = torch.randn(40, 16, device="cuda")
    gradients = []
    for layer in layers:
        out = layer(hidden_states, router_logits)
        gradients.append(torch.autograd.grad(out, [layer.w13_weight, layer.w2_weight], torch.ones_like(out)))
    for actual, expected in zip(*gradients, strict=True):
        assert_equal(actual, expected)
