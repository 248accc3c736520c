# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses that balance the routing, from a layer's router logits and the counts of its dispatch plan.

Gradients flow through the probabilities, not through the counts. Use the counts of RoutingStats, or the differences of
moe_plan's expert_offsets.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from zexpert.router.base_router import check_tensor
from zexpert.telemetry import is_distributed


def group_loss(
    router_logits: Tensor,
    expert_load: Tensor,
    num_tokens: Tensor | int,
    top_k: int,
    *,
    target_ffn_experts: float,
    num_groups: int = 1,
    scoring_func: str = "softmax",
    all_reduce: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """LongCat-Flash's load-balance loss over groups of experts (arXiv 2509.01322, section 2.1), without its factor
    alpha. The R real experts form D groups of neighbours, and all zero experts form one more group.

        L   = sum_{j=1}^{D+1} f_j * P_j
        P_j = 1/T * sum_t sum_{i in group j} p_{t,i}                 probabilities over all N experts, from T tokens
        f_j = D / (K_e * T') * slots of group j,          j <= D     slots from T' tokens (num_tokens)
        f_{D+1} = 1 / ((K - K_e) * T') * slots of the zero experts

    Every f is 1 if each real group gets K_e / D slots per token and the zero experts get the rest. So the loss pulls
    the mean number of real experts per token to K_e. It does not balance the experts inside a group.

    With D = 1 and K_e = K * R / (R + w * Z) it is ZEDA's group loss (arXiv 2605.18643) with zero-expert weight w.

    Args:
        router_logits: [T, N] or [..., N], floating; the first R columns are the real experts'. N > R.
        expert_load: [R], slots per real expert. T' * K minus its sum are the zero experts' slots.
        num_tokens: T', the number of tokens that expert_load counts. It can differ from T: counts over several
            micro-batches vary less.
        top_k: K.
        target_ffn_experts: K_e, between 0 and K, both excluded.
        num_groups: D, divides R. LongCat-Flash has one group per device.
        scoring_func: "softmax"; "sigmoid" and "sqrtsoftplus" scores are divided by their sum over the experts.
        all_reduce: sum the counts over ranks if torch.distributed is initialised, so that f is that of the global
            batch. Every rank must then call this. P is the rank's own: averaging gradients averages it.
        process_group: ranks to sum over; None: all.

    Returns:
        Scalar, float32 (float64 for float64 logits): 1 at the target, 0 without tokens.

    Raises:
        ValueError: if an argument is out of range or the sizes do not fit.
    """
    width, num_real_experts = check_sizes(router_logits, expert_load, top_k)
    if num_real_experts == width:
        raise ValueError(
            f"router_logits must have columns for zero experts after the {num_real_experts} real ones, got {width}"
        )
    if not 0 < target_ffn_experts < top_k:
        raise ValueError(f"target_ffn_experts must be above 0 and below top_k ({top_k}), got {target_ffn_experts}")
    if num_groups < 1 or num_real_experts % num_groups:
        raise ValueError(f"num_groups must divide the number of real experts ({num_real_experts}), got {num_groups}")
    load, tokens = reduced_counts(expert_load, num_tokens, all_reduce, process_group)
    probabilities = mean_probabilities(router_logits, scoring_func)

    group_slots = load.reshape(num_groups, -1).sum(dim=1)
    zero_slots = top_k * tokens - load.sum()
    real_frequency = num_groups / target_ffn_experts * group_slots / tokens.clamp(min=1)
    zero_frequency = zero_slots / ((top_k - target_ffn_experts) * tokens.clamp(min=1))
    real_probability = probabilities[:num_real_experts].reshape(num_groups, -1).sum(dim=1)
    zero_probability = probabilities[num_real_experts:].sum()
    real_part = (real_frequency.to(probabilities) * real_probability).sum()
    return real_part + zero_frequency.to(probabilities) * zero_probability


def switch_loss(
    router_logits: Tensor,
    expert_load: Tensor,
    num_tokens: Tensor | int,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    all_reduce: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The Switch Transformer's load-balance loss (Fedus et al., arXiv 2101.03961, equations 4 to 6), without its
    factor alpha:

        L   = N * sum_{i=1}^{N} f_i * P_i
        f_i = slots of expert i / (K * T')        share of the slots
        P_i = 1/T * sum_t p_{t,i}                 mean probability

    It is 1 if slots and probabilities are even over all N experts. With K = 1 it is the paper's; dividing by K keeps it
    comparable for other K. Zero experts are interchangeable, so their slots count as evenly shared among them.

    Arguments, result and errors are as in group_loss, but N may equal R.
    """
    width, num_real_experts = check_sizes(router_logits, expert_load, top_k)
    load, tokens = reduced_counts(expert_load, num_tokens, all_reduce, process_group)
    probabilities = mean_probabilities(router_logits, scoring_func)

    slots = top_k * tokens.clamp(min=1)
    loss = ((load / slots).to(probabilities) * probabilities[:num_real_experts]).sum()
    num_zero_experts = width - num_real_experts
    if num_zero_experts > 0:
        zero_frequency = (top_k * tokens - load.sum()) / (slots * num_zero_experts)
        loss = loss + zero_frequency.to(probabilities) * probabilities[num_real_experts:].sum()
    return width * loss


def check_sizes(router_logits: Tensor, expert_load: Tensor, top_k: int) -> tuple[int, int]:
    """(N, R). Raises ValueError unless the tensors fit each other."""
    check_tensor("router_logits", router_logits)
    check_tensor("expert_load", expert_load)
    if router_logits.dim() < 2 or not router_logits.is_floating_point():
        raise ValueError(
            f"router_logits must be floating point of shape [..., experts], got shape {list(router_logits.shape)} of "
            f"{router_logits.dtype}"
        )
    width = router_logits.size(-1)
    if expert_load.dim() != 1 or not 1 <= expert_load.numel() <= width:
        raise ValueError(
            f"expert_load must have one entry per real expert, at most {width}, got shape {list(expert_load.shape)}"
        )
    if not 1 <= top_k <= width:
        raise ValueError(f"top_k must be between 1 and the number of experts ({width}), got {top_k}")
    return width, expert_load.numel()


@torch.no_grad()
def reduced_counts(
    expert_load: Tensor, num_tokens: Tensor | int, all_reduce: bool, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(load [R], tokens), float64, summed over ranks if all_reduce."""
    tokens = torch.as_tensor(num_tokens, dtype=torch.float64, device=expert_load.device)
    counts = torch.cat((expert_load.double(), tokens.reshape(1)))
    if all_reduce and is_distributed():
        dist.all_reduce(counts, group=process_group)
    return counts[:-1], counts[-1]


def mean_probabilities(router_logits: Tensor, scoring_func: str) -> Tensor:
    """[N], the mean probability of every expert over the tokens, float32 or float64; 0 without tokens."""
    logits = router_logits.flatten(0, -2)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if scoring_func == "softmax":
        probabilities = torch.softmax(logits, dim=-1)
    elif scoring_func in ("sigmoid", "sqrtsoftplus"):
        tiny = torch.finfo(logits.dtype).tiny
        # A root of 0 has no finite derivative.
        scores = torch.sigmoid(logits) if scoring_func == "sigmoid" else F.softplus(logits).clamp(min=tiny).sqrt()
        probabilities = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    else:
        raise ValueError(f'scoring_func must be "softmax", "sigmoid" or "sqrtsoftplus", got {scoring_func!r}')
    return probabilities.sum(dim=0) / max(1, probabilities.size(0))
