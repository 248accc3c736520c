# SPDX-License-Identifier: Apache-2.0
"""A mixture-of-experts layer with identity experts in plain PyTorch: what zexpert.FusedMoE computes, written out.

The demo, the example and the benchmarks use it twice: in the data's own dtype as the thing to beat, and on float64
inputs as the reference. Weights are converted to the dtype of hidden_states one expert at a time, so the float64 run
needs no second copy of them. Experts are ordered [real | identity]; logits are finite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(
    router_logits: Tensor, bias: Tensor | None, top_k: int, num_real_experts: int, routed_scaling_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LongCat-Flash's routing: softmax over all experts, the bias decides who is chosen, the score is the weight.

    Returns topk_weights [T, K], topk_ids [T, K] (-1 and weight 0 where an identity expert was chosen) and
    zero_weight [T], the summed weight of the identity experts; float64 for float64 logits, else float32.
    """
    dtype = torch.float64 if router_logits.dtype == torch.float64 else torch.float32
    scores = router_logits.softmax(dim=-1, dtype=dtype)
    keys = scores if bias is None else scores + bias
    topk_ids = torch.topk(keys, top_k, dim=-1).indices
    topk_weights = scores.gather(1, topk_ids) * routed_scaling_factor
    is_zero = topk_ids >= num_real_experts
    zero_weight = torch.where(is_zero, topk_weights, 0.0).sum(dim=-1)
    return topk_weights.masked_fill(is_zero, 0.0), topk_ids.masked_fill(is_zero, -1), zero_weight


def experts_and_sum(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    zero_weight: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
) -> Tensor:
    """out[t] = sum_k topk_weights[t, k] * FFN_{topk_ids[t, k]}(x[t]) + zero_weight[t] * x[t], x = hidden_states.

    Slots are sorted by expert, so each expert runs once, on adjacent rows. hidden_states [T, H],
    w13_weight [R, 2F, H] (gate rows first), w2_weight [R, H, F]; returns [T, H].
    """
    dtype = hidden_states.dtype
    slot_experts = topk_ids.flatten()
    order = slot_experts.argsort(stable=True)
    order = order[(slot_experts < 0).sum() :]
    counts = torch.bincount(slot_experts[order], minlength=w13_weight.shape[0]).tolist()
    tokens = order // topk_ids.shape[1]

    out = zero_weight[:, None].to(dtype) * hidden_states
    # Indexed one by one, every expert's gradient would be written into one of all experts.
    unbound = w13_weight.requires_grad
    w13, w2 = (w13_weight.unbind(), w2_weight.unbind()) if unbound else (w13_weight, w2_weight)
    rows = []
    for expert, segment in enumerate(hidden_states[tokens].split(counts)):
        if segment.shape[0] > 0:
            gate, up = F.linear(segment, w13[expert].to(dtype)).chunk(2, dim=-1)
            rows.append(F.linear(F.silu(gate) * up, w2[expert].to(dtype)))
    if rows:
        weights = topk_weights.flatten()[order].to(dtype)
        out.index_add_(0, tokens, torch.cat(rows) * weights[:, None])
    return out


def moe(
    hidden_states: Tensor,
    router_logits: Tensor,
    bias: Tensor | None,
    w13_weight: Tensor,
    w2_weight: Tensor,
    top_k: int,
    routed_scaling_factor: float,
) -> Tensor:
    """The whole layer: [T, H] hidden states and [T, N] logits to [T, H]. Runs in float64 if both are float64."""
    routing = route(router_logits, bias, top_k, w13_weight.shape[0], routed_scaling_factor)
    return experts_and_sum(hidden_states, *routing, w13_weight, w2_weight)
