# SPDX-License-Identifier: Apache-2.0
"""Routings composed of torch operations, as engines write them where they have no kernel, and the cases to time.

The composition in the logits' own dtype is the thing to beat; on float64 logits it is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RoutingCase:
    """One routing, experts ordered [real | identity | drop]."""

    name: str
    num_real_experts: int
    num_identity_experts: int
    num_drop_experts: int
    top_k: int
    scoring_func: str = "softmax"
    has_bias: bool = False
    renormalize: bool = False
    routed_scaling_factor: float = 1.0
    num_expert_group: int = 1
    topk_group: int = 1

    @property
    def num_experts(self) -> int:
        return self.num_real_experts + self.num_identity_experts + self.num_drop_experts


LONGCAT_FLASH = RoutingCase("LongCat-Flash", 512, 256, 0, 12, has_bias=True, routed_scaling_factor=6.0)

ZEDA_QWEN3 = RoutingCase("ZEDA Qwen3", 128, 0, 64, 8, renormalize=True)
ZEDA_GLM = RoutingCase("ZEDA GLM-4.7-Flash", 64, 0, 32, 4, "sigmoid", True, True, 1.8)
DEEPSEEK_V3 = RoutingCase("DeepSeek-V3", 256, 0, 0, 8, "sigmoid", True, True, 2.5, 8, 4)

CASES = [LONGCAT_FLASH, ZEDA_QWEN3, ZEDA_GLM, DEEPSEEK_V3]


def score(logits: Tensor, case: RoutingCase) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    if case.scoring_func == "softmax":
        return logits.softmax(dim=-1)
    if case.scoring_func == "sigmoid":
        return logits.sigmoid()
    if case.scoring_func == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    raise ValueError(f"scoring_func must be one that this module computes, got {case.scoring_func!r}")


def eligible_keys(scores: Tensor, bias: Tensor | None, case: RoutingCase) -> Tensor:
    """Selection keys, -inf for the experts of groups that were not chosen."""
    keys = scores if bias is None else scores + bias
    if case.num_expert_group == 1:
        return keys
    real = keys[:, : case.num_real_experts]
    groups = real.view(real.shape[0], case.num_expert_group, -1)
    group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
    chosen = group_scores.topk(case.topk_group, dim=-1, sorted=False).indices
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
    real = groups.masked_fill(closed[:, :, None], -torch.inf).flatten(1)
    return torch.cat([real, keys[:, case.num_real_experts :]], dim=1)


def route(logits: Tensor, bias: Tensor | None, case: RoutingCase) -> tuple[Tensor, Tensor, Tensor]:
    """(topk_weights [T, K], topk_ids [T, K] with -1 for zero experts, zero_weight [T])."""
    scores = score(logits, case)
    topk_ids = torch.topk(eligible_keys(scores, bias, case), case.top_k, dim=-1, sorted=False).indices
    topk_weights = scores.gather(1, topk_ids)
    if case.renormalize:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    topk_weights = topk_weights * case.routed_scaling_factor
    if case.num_experts == case.num_real_experts:
        return topk_weights, topk_ids, topk_weights.new_zeros(topk_weights.shape[0])
    is_identity = (topk_ids >= case.num_real_experts) & (topk_ids < case.num_real_experts + case.num_identity_experts)
    zero_weight = torch.where(is_identity, topk_weights, 0.0).sum(dim=-1)
    is_zero = topk_ids >= case.num_real_experts
    return topk_weights.masked_fill(is_zero, 0.0), topk_ids.masked_fill(is_zero, -1), zero_weight


def dense_weights(topk_weights: Tensor, topk_ids: Tensor, zero_weight: Tensor, case: RoutingCase) -> Tensor:
    """Weight of every real expert, and of the identity experts together, per token: [T, R + 1], order-free."""
    num_tokens, num_real = topk_ids.shape[0], case.num_real_experts
    columns = torch.where(topk_ids < 0, num_real, topk_ids).long()
    dense = topk_weights.new_zeros(num_tokens, num_real + 1).scatter_add_(1, columns, topk_weights)
    dense[:, num_real] = zero_weight
    return dense


def near_ties(logits: Tensor, bias: Tensor | None, case: RoutingCase, tolerance: float = 1e-5) -> Tensor:
    """[T] bool: True if float32 may choose otherwise, because the last chosen and the first unchosen key, or group, are
    nearly equal.

    The comparison with the float64 reference leaves out these few tokens.
    """
    keys = eligible_keys(score(logits.double(), case), None if bias is None else bias.double(), case)
    width = min(case.top_k + 1, keys.shape[1])
    largest = keys.topk(width, dim=-1).values
    close = torch.zeros(keys.shape[0], dtype=torch.bool)
    if width > case.top_k:
        close |= largest[:, -2] - largest[:, -1] <= tolerance * largest[:, -2].abs()
    if case.num_expert_group > case.topk_group:
        all_keys = score(logits.double(), case)
        if bias is not None:
            all_keys = all_keys + bias.double()
        groups = all_keys[:, : case.num_real_experts].view(keys.shape[0], case.num_expert_group, -1)
        ranked = groups.topk(2, dim=-1).values.sum(dim=-1).sort(dim=-1, descending=True).values
        last, following = ranked[:, case.topk_group - 1], ranked[:, case.topk_group]
        close |= last - following <= tolerance * last.abs()
    return close
