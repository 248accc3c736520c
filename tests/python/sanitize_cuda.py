# SPDX-License-Identifier: Apache-2.0
"""Runs every CUDA kernel once on small inputs. A program for compute-sanitizer: test_cuda_sanitizer.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from zexpert.ops import (
    biased_topk,
    biased_topk_and_plan,
    fused_moe,
    grouped_mlp,
    grouped_mlp_hopper,
    moe_combine,
    moe_dispatch,
    moe_finalize,
    moe_permute,
    moe_plan,
    rank_barrier,
    router_logits,
    silu_and_mul,
    zero_expert_accumulate,
)

WIDTHS = (128, 192, 256, 384, 512, 576, 768, 896, 1024)


def differentiate_routing(logits: Tensor, bias: Tensor | None, top_k: int, **routing: Any) -> None:
    result = biased_topk(logits.requires_grad_(), bias, top_k, **routing)
    weights = result.topk_weights, result.zero_weight, result.constant_weight
    torch.autograd.grad(weights, logits, [torch.ones_like(weight) for weight in weights])


def take_tokens_through(dtype: torch.dtype, hidden_size: int) -> None:
    """Everything between routing and output but the experts' products, forward and backward."""
    plan = moe_plan(torch.randint(-2, 5, (9, 4), device="cuda").clamp(min=-1), 5)
    hidden_states = torch.randn(9, hidden_size, device="cuda").to(dtype).requires_grad_()
    weights = torch.rand(9, 4, device="cuda", requires_grad=True)
    zero_weight = torch.rand(9, device="cuda", requires_grad=True)
    moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, 4)
    rows = moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, 4, plan.slot_rows)
    gate_up = torch.zeros(36, 2 * hidden_size, device="cuda", dtype=dtype)
    gate_up[:, :hidden_size] = gate_up[:, hidden_size:] = 1.0
    gate_up.requires_grad_()
    activation = silu_and_mul(gate_up, plan.expert_offsets)
    given = [hidden_states, weights, zero_weight]
    out = moe_finalize(rows, plan.slot_rows, weights, hidden_states, zero_weight, residual=hidden_states)
    torch.autograd.grad(out, given, torch.ones_like(out))
    torch.autograd.grad(activation, gate_up, torch.ones_like(activation))
    torch.autograd.grad(zero_expert_accumulate(hidden_states, zero_weight), given[::2], torch.ones_like(hidden_states))


def exchange_rows(dtype: torch.dtype, hidden_size: int) -> None:
    """Between two ranks on one GPU; the first one's barrier fails, for the second one does not come."""

    def of_ranks(*shape: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(shape, device="cuda", dtype=dtype) for _ in range(2)]

    rows, sums = (of_ranks(2, 9, hidden_size, dtype=dtype) for _ in range(2))
    ids, weights = of_ranks(2, 9, 4, dtype=torch.int32), of_ranks(2, 9, 4, dtype=torch.float32)
    hidden_states = torch.randn(7, hidden_size, device="cuda").to(dtype)
    topk_ids = torch.randint(-2, 10, (7, 4), device="cuda").clamp(min=-1)
    for most_multiprocessors in (0, 2):
        for rank in range(2):
            topk_weights = torch.rand(7, 4, device="cuda")
            moe_dispatch(hidden_states, topk_ids, topk_weights, rows, ids, weights, rank, 5, most_multiprocessors)
        for rank in range(2):
            plan = moe_plan(ids[rank].flatten(0, 1), 5)
            expert_rows = torch.randn(2 * 9 * 4, hidden_size, device="cuda").to(dtype)
            for given in (weights[rank].flatten(0, 1), None):
                moe_combine(expert_rows, plan.slot_rows, given, sums, rank, most_multiprocessors)
    signals = of_ranks(2, dtype=torch.int64)
    absent_rank = torch.full((1,), -1, dtype=torch.int32, pin_memory=True)
    state = torch.zeros(1, device="cuda", dtype=torch.int64), torch.ones(1, device="cuda"), absent_rank
    rank_barrier(signals, *state, rank=0, timeout_ms=10)
    torch.cuda.synchronize()
    assert int(absent_rank) == 1


def train_experts(dtype: torch.dtype, hidden_size: int) -> None:
    """What zexpert's kernels do around PyTorch's products; an expert has no rows."""
    plan = moe_plan(torch.randint(-2, 4, (9, 4), device="cuda").clamp(min=-1), 5)
    given = [torch.randn(9, hidden_size, device="cuda").to(dtype), torch.rand(9, 4, device="cuda")]
    given += [torch.rand(9, device="cuda"), torch.randn(5, 2 * 24, hidden_size, device="cuda").to(dtype)]
    given += [torch.randn(5, hidden_size, 24, device="cuda").to(dtype)]
    hidden_states, topk_weights, zero_weight, w13_weight, w2_weight = (tensor.requires_grad_() for tensor in given)
    for keep_gate_up in (True, False):
        out, _ = fused_moe(
            hidden_states, topk_weights, zero_weight, *plan, w13_weight, w2_weight, keep_gate_up=keep_gate_up,
            implementation="torch",
        )  # fmt: skip
        torch.autograd.grad(out, given, torch.ones_like(out))
    rows = grouped_mlp(
        hidden_states, plan.expert_offsets, w13_weight, w2_weight, plan.row_slots, 4, implementation="torch"
    )
    torch.autograd.grad(rows, [hidden_states, w13_weight, w2_weight], torch.ones_like(rows))


def project_hidden_states(dtype: torch.dtype) -> None:
    """Every kernel of router_logits; the last width is no whole number of 16-byte accesses."""
    for hidden_size, scale in ((512, 0.02), (512, 1e3), (63, 1.0)):  # Hopper's kernels scale large weights otherwise
        weight = scale * torch.randn(130, hidden_size, device="cuda")
        for num_tokens in (1, 9, 20, 50, 100, 200, 5000):
            router_logits(torch.randn(num_tokens, hidden_size, device="cuda").to(dtype), weight)


def multiply_experts() -> None:
    """Every kernel of grouped_mlp on a Hopper GPU; the second time, the depth of tiles is split."""
    for dtype in (torch.bfloat16, torch.float16):
        for segments in ([9, 0, 330], [0, 2, 0]):
            expert_offsets = torch.tensor([0, *segments], device="cuda").cumsum(0).int()
            rows = torch.randn(sum(segments) + 1, 512, device="cuda").to(dtype)
            w13_weight = torch.randn(3, 2 * 320, 512, device="cuda").to(dtype)
            w2_weight = torch.randn(3, 512, 320, device="cuda").to(dtype)
            for tile_rows in (64, 160, 288):
                grouped_mlp_hopper(rows, expert_offsets, w13_weight, w2_weight, tile_rows=tile_rows)


def main(sees_plain_stores_only: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in WIDTHS:
            logits = torch.randn(9, width, device="cuda").to(dtype)
            logits[2, 5:50] = torch.nan
            logits[3] = 0.0
            bias = 0.01 * torch.randn(width, device="cuda")
            biased_topk(logits, bias, 12, num_real_experts=64, num_constant_experts=2, renormalize=True)
            biased_topk(logits, bias.to(dtype), 8, num_real_experts=64, num_expert_group=8, topk_group=3)
            differentiate_routing(logits, bias, 12, num_real_experts=64, num_constant_experts=2)
            for num_tokens in (3, 9, 200):  # a block, a cluster of blocks, one that not every GPU takes
                repeated = logits.repeat(23, 1)[:num_tokens]
                biased_topk_and_plan(repeated, bias, 12, num_real_experts=64, num_constant_experts=2)
                biased_topk_and_plan(repeated, bias.to(dtype), 8, num_real_experts=64, num_expert_group=8, topk_group=3)
        for width, top_k in ((5, 3), (200, 40), (1500, 12)):
            logits = torch.randn(9, width, device="cuda").to(dtype)
            biased_topk(logits, None, top_k, num_real_experts=width, scoring_func="sigmoid", indices_dtype=torch.int64)
            differentiate_routing(logits, None, top_k, num_real_experts=width)
        hidden_states = torch.randn(3, 1000, device="cuda").to(dtype)
        weight = torch.rand(3, device="cuda")
        zero_expert_accumulate(hidden_states, weight, zero_expert_accumulate(hidden_states, weight))
        zero_expert_accumulate(hidden_states[:, 1:], weight)
        project_hidden_states(dtype)
        for hidden_size in (24, 1000, 1001):
            take_tokens_through(dtype, hidden_size)
            exchange_rows(dtype, hidden_size)
            if not sees_plain_stores_only:
                train_experts(dtype, hidden_size)
    if torch.ops.zexpert.is_hopper(torch.zeros(1, device="cuda")):
        multiply_experts()
    for num_tokens in (1, 100, 2000):
        moe_plan(torch.randint(-1, 100, (num_tokens, 6), device="cuda"), 100)
    torch.cuda.synchronize()


if __name__ == "__main__":
    # initcheck does not see what a library's products store through the copy engine, and would report its readers.
    main(sees_plain_stores_only="initcheck" in sys.argv)
