# SPDX-License-Identifier: Apache-2.0
"""grouped_mlp with float8 weights on a Hopper GPU, where rows and activations are quantised too: segments of every
profile against float64, bits, graphs, bad rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import reference
from test_cuda_grouped_mlp_hopper import NUM_EXPERTS, PROFILES, offsets_of
from testing import assert_equal, unchanged
from zexpert import FusedMoE, ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch.ops.zexpert.is_hopper(torch.zeros(1, device="cuda")),
    reason="no GPU of compute capability 9.0, or no code for 9.0a",
)

# Less than a block, one and a part, many; depths of one step, fewer than the pipeline's, and many.
SIZES = [(64, 64), (128, 320), (320, 64), (192, 1024), (2048, 768), (6144, 2048)]


class Experts:
    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        gate_up = torch.randn(num_experts, 2, intermediate_size, hidden_size, device="cuda") / hidden_size**0.5
        down = torch.randn(num_experts, hidden_size, intermediate_size, device="cuda") / intermediate_size**0.5
        w13, w13_scale_inv = ops.quantize_blockwise(gate_up)
        w2, w2_scale_inv = ops.quantize_blockwise(down)
        self.values = (
            reference.dequantize_blockwise(w13, w13_scale_inv).flatten(1, 2),
            reference.dequantize_blockwise(w2, w2_scale_inv),
        )
        self.weights = {
            "w13_weight": w13.flatten(1, 2),
            "w2_weight": w2,
            "w13_scale_inv": w13_scale_inv.flatten(1, 2),
            "w2_scale_inv": w2_scale_inv,
        }

    def run(self, rows: Tensor, expert_offsets: Tensor, row_slots: Tensor | None = None, top_k: int = 1) -> Tensor:
        return ops.grouped_mlp(
            rows, expert_offsets, row_slots=row_slots, top_k=top_k, implementation="hopper", **self.weights
        )


def make_rows(num_rows: int, hidden_size: int) -> Tensor:
    """Rows of very different magnitudes."""
    magnitude = torch.exp2(torch.randint(-6, 6, (num_rows, 1), device="cuda"))
    return (torch.randn(num_rows, hidden_size, device="cuda") * magnitude).bfloat16()


def assert_agrees(result: Tensor, rows: Tensor, expert_offsets: Tensor, experts: Experts) -> None:
    """Expert by expert: against the float64 product of the dequantised weights, at most 1.2 times the error of plain
    PyTorch that quantises the same. The error is the root mean square, relative to a row's largest element."""
    expected = reference.grouped_mlp(rows, expert_offsets, *experts.values)
    plain = reference.grouped_mlp_quantising_rows(rows, expert_offsets, *experts.values).bfloat16()
    for expert, (begin, end) in enumerate(itertools.pairwise(expert_offsets.tolist())):
        if end > begin:
            scale = expected[begin:end].abs().amax(1, keepdim=True)
            errors = [
                float(((value[begin:end].double() - expected[begin:end]) / scale).square().mean().sqrt())
                for value in (result, plain)
            ]
            assert errors[0] <= 1.2 * errors[1], f"expert {expert} with {end - begin} rows: {errors}"


@pytest.mark.parametrize("profile", PROFILES)
def test_segments(profile: str) -> None:
    expert_offsets = offsets_of(PROFILES[profile])
    experts = Experts(NUM_EXPERTS, 512, 384)
    rows = make_rows(sum(PROFILES[profile]) + 5, 512)  # five do no work
    with unchanged(rows, expert_offsets, experts.weights["w13_scale_inv"], experts.weights["w2_scale_inv"]):
        result = experts.run(rows, expert_offsets)
    assert result.shape == rows.shape
    assert result.dtype == torch.bfloat16
    assert_agrees(result, rows, expert_offsets, experts)
    num_rows = int(expert_offsets[-1])
    for _ in range(3):
        assert_equal(experts.run(rows, expert_offsets)[:num_rows], result[:num_rows])


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), SIZES)
def test_sizes(hidden_size: int, intermediate_size: int) -> None:
    segments = [1, 0, 333, 20]
    experts = Experts(len(segments), hidden_size, intermediate_size)
    rows = make_rows(sum(segments), hidden_size)
    assert_agrees(experts.run(rows, offsets_of(segments)), rows, offsets_of(segments), experts)


def test_long_segments() -> None:
    """So many rows for an expert that blocks take tiles in turn."""
    segments = [900, 1100, 0, 1300, 700, 2001]
    experts = Experts(len(segments), 2048, 768)
    rows = make_rows(sum(segments), 2048)
    assert_agrees(experts.run(rows, offsets_of(segments)), rows, offsets_of(segments), experts)


def test_tokens_are_gathered() -> None:
    experts = Experts(8, 256, 128)
    tokens = make_rows(40, 256)
    topk_ids = torch.randint(-1, 8, (40, 3), device="cuda", dtype=torch.int32)
    plan = ops.moe_plan(topk_ids, 8)
    num_rows = int(plan.expert_offsets[-1])
    rows = ops.moe_permute(tokens, plan.row_slots, plan.expert_offsets, 3)
    gathered = experts.run(tokens, plan.expert_offsets, plan.row_slots, 3)
    assert_equal(gathered[:num_rows], experts.run(rows, plan.expert_offsets)[:num_rows])
    assert_agrees(gathered, rows, plan.expert_offsets, experts)


def test_a_row_depends_on_no_other() -> None:
    """Rows of NaN, infinity and zeros beside others, and other values in all other rows."""
    experts = Experts(2, 384, 192)
    rows = make_rows(90, 384)
    before = experts.run(rows, offsets_of([40, 50]))
    changed = rows.clone()
    changed[1:] = make_rows(89, 384)
    changed[3], changed[45] = torch.nan, 0.0
    changed[4, 7] = torch.inf
    after = experts.run(changed, offsets_of([40, 50]))
    assert_equal(after[0], before[0])
    assert after[3:5].isnan().all()
    assert (after[45] == 0).all()
    assert after[[*range(3), *range(5, 90)]].isfinite().all()


def test_a_graph_replays_with_other_tokens() -> None:
    layer = FusedMoE(16, 4, 256, 128, zero_expert_type="identity", zero_expert_num=8, params_dtype=torch.bfloat16,
                     quantization="fp8_block", device="cuda")  # fmt: skip
    hidden_states = make_rows(33, 256)
    router_logits = torch.randn(33, 24, device="cuda")
    with torch.inference_mode():
        layer(hidden_states, router_logits)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(hidden_states, router_logits)
        for _ in range(3):
            hidden_states.copy_(make_rows(33, 256))
            router_logits.normal_()
            graph.replay()
            assert_equal(out, layer(hidden_states, router_logits))
