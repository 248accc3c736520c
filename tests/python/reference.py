# SPDX-License-Identifier: Apache-2.0
"""What every op and the layer compute, as plain PyTorch that can be checked by eye.

`dtype` is the type the arithmetic runs in. float64, the default, gives the reference; the dtype of the data gives
"plain PyTorch at the same dtype", which the error rule of testing.py measures zexpert against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class RoutingResult(NamedTuple):
    topk_weights: Tensor  # [T, K]
    topk_ids: Tensor  # [T, K] int64, -1 for a slot without work
    zero_weight: Tensor  # [T], summed weight of the identity slots
    constant_weight: Tensor  # [T, C]


class DispatchPlan(NamedTuple):
    expert_offsets: Tensor  # [R + 1] int32
    row_slots: Tensor  # [T * K] int32
    slot_rows: Tensor  # [T, K] int32


def selection_dtype(logits: Tensor) -> torch.dtype:
    """The type keys are compared in: float32 for everything but float64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def expert_scores(logits: Tensor, scoring_func: str = "softmax", dtype: torch.dtype = torch.float64) -> Tensor:
    """[T, N] scores; a logit that is NaN or infinite has score 0 and no part in the softmax."""
    finite = torch.isfinite(logits)
    x = torch.where(finite, logits, 0).to(dtype)
    if scoring_func == "softmax":
        scores = torch.softmax(x.masked_fill(~finite, -torch.inf), dim=-1)
        scores = scores.nan_to_num(0.0)  # a row without a finite logit
    elif scoring_func == "sigmoid":
        scores = torch.sigmoid(x)
    elif scoring_func == "sqrtsoftplus":
        scores = torch.logaddexp(x, torch.zeros_like(x)).sqrt()
    else:
        raise ValueError(scoring_func)
    return scores.masked_fill(~finite, 0.0)


def selection_keys(logits: Tensor, bias: Tensor | None, scores: Tensor) -> Tensor:
    """[T, N] keys, score + bias, rounded to the type they are compared in."""
    keys = scores
    if bias is not None:
        keys = scores + bias.to(selection_dtype(logits)).to(scores.dtype)
    return keys.to(selection_dtype(logits))


def choosable_experts(logits: Tensor, keys: Tensor) -> Tensor:
    """[T, N] bool: a non-finite logit or a NaN key is never chosen."""
    return torch.isfinite(logits) & ~keys.isnan()


def first_largest(keys: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The `count` candidates (indices) of largest key, descending, lower index first among equals."""
    order = torch.sort(keys[candidates], descending=True, stable=True).indices
    return candidates[order[:count]]


def group_scores(keys: Tensor, choosable: Tensor, num_expert_group: int) -> Tensor:
    """[G] scores of the groups that R experts with these keys are split into: the sum of the two largest keys among a
    group's choosable members (of the one, if there is but one); -inf without any, or if the sum is not a number."""
    scores = keys.new_full((num_expert_group,), -torch.inf)
    members = torch.arange(keys.shape[0]).reshape(num_expert_group, -1)
    for group in range(num_expert_group):
        candidates = members[group][choosable[members[group]]]
        if len(candidates) > 0:
            scores[group] = keys[first_largest(keys, candidates, 2)].sum()
    return scores.nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def eligible_experts(
    keys: Tensor, choosable: Tensor, num_real_experts: int, num_expert_group: int, topk_group: int
) -> Tensor:
    """[N] bool: choosable, and of one of the best groups if real. For one row."""
    eligible = choosable.clone()
    if num_expert_group > 1:
        scores = group_scores(keys[:num_real_experts], choosable[:num_real_experts], num_expert_group)
        best = first_largest(scores, torch.arange(num_expert_group), topk_group)
        group = torch.arange(num_real_experts) // (num_real_experts // num_expert_group)
        eligible[:num_real_experts] &= torch.isin(group, best)
    return eligible


def chosen_experts(
    keys: Tensor, choosable: Tensor, top_k: int, num_real_experts: int, num_expert_group: int = 1, topk_group: int = 1
) -> Tensor:
    """[T, K] int64 indices among all N experts, zero experts included; -1 where a row ran out of choosable experts."""
    chosen = torch.full((keys.shape[0], top_k), -1, dtype=torch.int64)
    for t in range(keys.shape[0]):
        eligible = eligible_experts(keys[t], choosable[t], num_real_experts, num_expert_group, topk_group)
        experts = first_largest(keys[t], eligible.nonzero().flatten(), top_k)
        chosen[t, : len(experts)] = experts
    return chosen


def biased_topk(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    num_real_experts: int,
    num_identity_experts: int | None = None,
    num_constant_experts: int = 0,
    scoring_func: str = "softmax",
    renormalize: bool = False,
    drop_before_renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
    indices_dtype: torch.dtype = torch.int64,
    choices: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> RoutingResult:
    """Experts are ordered [real | identity | constant | drop]; see docs/concepts.md. With `choices` [T, K] nothing is
    chosen, and a slot whose expert's logit is not finite is empty."""
    num_tokens, num_experts = logits.shape
    if num_identity_experts is None:
        num_identity_experts = num_experts - num_real_experts - num_constant_experts
    first_constant = num_real_experts + num_identity_experts
    first_drop = first_constant + num_constant_experts

    scores = expert_scores(logits, scoring_func, dtype)
    if choices is None:
        keys = selection_keys(logits, bias, scores)
        chosen = chosen_experts(
            keys, choosable_experts(logits, keys), top_k, num_real_experts, num_expert_group, topk_group
        )
    else:
        chosen = choices.long()
        masked = ~torch.isfinite(logits).gather(1, chosen.clamp(min=0))
        chosen = chosen.masked_fill(masked, -1)

    weights = scores.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0.0)
    if renormalize:
        if drop_before_renormalize:
            weights = weights.masked_fill(chosen >= first_drop, 0.0)
        total = weights.sum(dim=1, keepdim=True)
        weights = torch.where(total > 0, weights / total, 0.0)
    weights = weights * routed_scaling_factor

    is_real = (chosen >= 0) & (chosen < num_real_experts)
    is_identity = (chosen >= num_real_experts) & (chosen < first_constant)
    constant_weight = [
        torch.where(chosen == first_constant + c, weights, 0.0).sum(dim=1) for c in range(num_constant_experts)
    ]
    return RoutingResult(
        topk_weights=torch.where(is_real, weights, 0.0),
        topk_ids=torch.where(is_real, chosen, -1).to(indices_dtype),
        zero_weight=torch.where(is_identity, weights, 0.0).sum(dim=1),
        constant_weight=torch.stack(constant_weight, dim=1) if constant_weight else weights.new_zeros(num_tokens, 0),
    )


def key_bounds(logits: Tensor, bias: Tensor | None, scoring_func: str) -> tuple[Tensor, Tensor]:
    """Smallest and largest key that rounding in the selection dtype can lead to: scores to within a few units in the
    last place (more where a softmax's exponent is large), then one rounding of score + bias."""
    scores = expert_scores(logits, scoring_func)
    finfo = torch.finfo(selection_dtype(logits))
    units = torch.full_like(scores, 4.0)
    if scoring_func == "softmax":
        x = logits.double().masked_fill(~torch.isfinite(logits), -torch.inf)
        spread = x.amax(dim=1, keepdim=True) - x
        units = 4.0 * units + spread.nan_to_num(0.0, posinf=0.0)
    slack = scores * finfo.eps * units + finfo.tiny
    return selection_keys(logits, bias, scores - slack), selection_keys(logits, bias, scores + slack)


def decided_rows(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    num_real_experts: int,
    scoring_func: str = "softmax",
    num_expert_group: int = 1,
    topk_group: int = 1,
    **other_routing_arguments: object,
) -> Tensor:
    """[T] bool: rows whose choice, order included, no rounding in the selection dtype can change.

    Expert i surely precedes expert j if i's smallest possible key exceeds j's largest, or equals it and i < j, or if
    both have the very same logit and bias and i < j. The same holds between groups.
    """
    lower, upper = key_bounds(logits, bias, scoring_func)
    keys = selection_keys(logits, bias, expert_scores(logits, scoring_func))
    choosable = choosable_experts(logits, keys)
    groups = (num_real_experts, num_expert_group, topk_group)
    chosen = chosen_experts(keys, choosable, top_k, *groups)
    bias = torch.zeros(logits.shape[1]) if bias is None else bias
    decided = torch.ones(logits.shape[0], dtype=torch.bool)

    for t in range(logits.shape[0]):
        experts = chosen[t][chosen[t] >= 0]
        same_inputs = (logits[t] == logits[t, experts, None]) & (bias == bias[experts, None])
        precedes = surely_precedes(lower[t], upper[t], experts, same_inputs)
        # Each chosen expert must precede those chosen later and those eligible but not chosen.
        rank = torch.full_like(logits[t], top_k, dtype=torch.int64)
        rank[experts] = torch.arange(len(experts))
        later = rank > torch.arange(len(experts))[:, None]
        later &= eligible_experts(keys[t], choosable[t], *groups)
        decided[t] = bool((precedes | ~later).all()) and decided_groups(
            keys[t], lower[t], upper[t], choosable[t], *groups
        )
    return decided


def surely_precedes(lower: Tensor, upper: Tensor, firsts: Tensor, same_inputs: Tensor | None = None) -> Tensor:
    """[F, N] bool: whether each of the `firsts` comes before each of all N whatever rounding does within the bounds."""
    earlier = firsts[:, None] < torch.arange(len(upper))
    lowest = lower[firsts, None]
    precedes = (lowest > upper) | ((lowest == upper) & earlier)
    return precedes if same_inputs is None else precedes | (same_inputs & earlier)


def decided_groups(
    keys: Tensor,
    lower: Tensor,
    upper: Tensor,
    choosable: Tensor,
    num_real_experts: int,
    num_expert_group: int,
    topk_group: int,
) -> bool:
    """Whether the choice of one row's groups is beyond rounding. A group's score grows with its members' keys, so the
    keys' bounds give the scores' bounds."""
    if num_expert_group == 1:
        return True
    scores, lowest, highest = (
        group_scores(values[:num_real_experts], choosable[:num_real_experts], num_expert_group)
        for values in (keys, lower, upper)
    )
    best = first_largest(scores, torch.arange(num_expert_group), topk_group)
    is_best = torch.isin(torch.arange(num_expert_group), best)
    return bool((surely_precedes(lowest, highest, best) | is_best).all())


def moe_plan(topk_ids: Tensor, num_experts: int) -> DispatchPlan:
    """Stable counting sort of the slots that do work: expert by expert, in slot order."""
    ids = topk_ids.flatten().tolist()
    row_slots = [slot for expert in range(num_experts) for slot, chosen in enumerate(ids) if chosen == expert]
    slot_rows = [-1] * len(ids)
    for row, slot in enumerate(row_slots):
        slot_rows[slot] = row
    offsets = [sum(1 for chosen in ids if 0 <= chosen < expert) for expert in range(num_experts + 1)]
    return DispatchPlan(
        expert_offsets=torch.tensor(offsets, dtype=torch.int32),
        row_slots=torch.tensor(row_slots + [-1] * (len(ids) - len(row_slots)), dtype=torch.int32),
        slot_rows=torch.tensor(slot_rows, dtype=torch.int32).reshape(topk_ids.shape),
    )


def moe_permute(hidden_states: Tensor, row_slots: Tensor, expert_offsets: Tensor, top_k: int) -> Tensor:
    """[T * K, H]: row r is the token of slot row_slots[r]; rows past the last offset are 0 here."""
    rows = hidden_states.new_zeros(row_slots.shape[0], hidden_states.shape[1])
    for row in range(int(expert_offsets[-1])):
        rows[row] = hidden_states[int(row_slots[row]) // top_k]
    return rows


def silu_and_mul(
    gate_up: Tensor, expert_offsets: Tensor | None = None, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[M, F] = silu(gate) * up for gate_up [M, 2F]; with offsets, rows past the last one are 0 here."""
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    out = torch.nn.functional.silu(gate) * up
    if expert_offsets is not None:
        out[int(expert_offsets[-1]) :] = 0
    return out


def grouped_mlp(
    rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[M, H]: expert e's network over its segment of rows; rows past the last offset are 0 here."""
    out = rows.new_zeros(rows.shape, dtype=dtype)
    offsets = expert_offsets.tolist()
    for expert in range(w13_weight.shape[0]):
        segment = slice(offsets[expert], offsets[expert + 1])
        if segment.start == segment.stop:
            continue
        gate_up = rows[segment].to(dtype) @ w13_weight[expert].to(dtype).T
        out[segment] = silu_and_mul(gate_up, dtype=dtype) @ w2_weight[expert].to(dtype).T
    return out


def scales_of_elements(scale_inv: Tensor, rows: int, columns: int) -> Tensor:
    """[..., rows, columns]: each element's scale, of scale_inv [..., ceil(rows / 128), ceil(columns / 128)]."""
    return scale_inv.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]


def quantize_blockwise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn and float32 scales of blocks of 128 x 128: max / 448, at least 2^-126, 1 for zeros."""
    rows, columns = weight.shape[-2:]
    padding = (0, -columns % 128, 0, -rows % 128)
    blocks = torch.nn.functional.pad(weight.float(), padding).unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    largest = blocks.abs().amax((-1, -3))
    scale_inv = torch.where(largest == 0, 1.0, (largest / 448).clamp(min=2.0**-126))
    quantised = weight.float() / scales_of_elements(scale_inv, rows, columns)
    return quantised.clamp(-448, 448).to(torch.float8_e4m3fn), scale_inv


def dequantize_blockwise(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """weight * scale_inv in `dtype`."""
    return weight.to(dtype) * scales_of_elements(scale_inv, *weight.shape[-2:]).to(dtype)


def quantised_rows(rows: Tensor) -> Tensor:
    """rows, float64, as float8_e4m3fn with a scale for each row and 128 channels represents them: max / 448."""
    groups = torch.nn.functional.pad(rows.float(), (0, -rows.shape[1] % 128)).unflatten(1, (-1, 128))
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-10) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).double() * scale).flatten(1)[:, : rows.shape[1]]


def grouped_mlp_quantising_rows(rows: Tensor, expert_offsets: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> Tensor:
    """grouped_mlp whose rows and activations are quantised, products in float32."""
    out = rows.new_zeros(rows.shape, dtype=torch.float32)
    offsets = expert_offsets.tolist()
    for expert in range(w13_weight.shape[0]):
        segment = slice(offsets[expert], offsets[expert + 1])
        if segment.start == segment.stop:
            continue
        gate_up = quantised_rows(rows[segment]).float() @ w13_weight[expert].float().T
        activation = quantised_rows(silu_and_mul(gate_up, dtype=torch.float32))
        out[segment] = activation.float() @ w2_weight[expert].float().T
    return out


def moe_finalize(
    rows: Tensor,
    slot_rows: Tensor,
    topk_weights: Tensor,
    hidden_states: Tensor,
    zero_weight: Tensor,
    *,
    residual: Tensor | None = None,
    constant_weight: Tensor | None = None,
    constant_vectors: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[T, H]: weighted sum of each token's rows + zero part + constants + residual."""
    out = torch.zeros(hidden_states.shape, dtype=dtype)
    for t in range(hidden_states.shape[0]):
        for k in range(slot_rows.shape[1]):
            if slot_rows[t, k] >= 0:
                out[t] += topk_weights[t, k].to(dtype) * rows[int(slot_rows[t, k])].to(dtype)
    out += zero_weight.to(dtype)[:, None] * hidden_states.to(dtype)
    if constant_weight is not None and constant_vectors is not None:
        out += constant_weight.to(dtype) @ constant_vectors.to(dtype)
    if residual is not None:
        out += residual.to(dtype)
    return out


def zero_expert_accumulate(
    hidden_states: Tensor, zero_weight: Tensor, out: Tensor | None = None, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[T, H] = zero_weight[:, None] * hidden_states, plus `out` (which is left as it is here)."""
    part = zero_weight.to(dtype)[:, None] * hidden_states.to(dtype)
    return part if out is None else out.to(dtype) + part


def layer(
    hidden_states: Tensor,
    router_logits: Tensor,
    w13_weight: Tensor,
    w2_weight: Tensor,
    *,
    top_k: int,
    bias: Tensor | None = None,
    constant_gate_weight: Tensor | None = None,
    constant_vectors: Tensor | None = None,
    shared: Tensor | Callable[[Tensor], Tensor] | None = None,
    routing: RoutingResult | None = None,
    dtype: torch.dtype = torch.float64,
    **routing_arguments: object,
) -> Tensor:
    """[T, H], token by token and slot by slot:

    out[t] = sum_k topk_weights[t, k] * FFN_{topk_ids[t, k]}(x[t]) + zero_weight[t] * x[t] + constants[t] + shared[t]

    Constant expert c gives a1 * x + a2 * v_c, [a1, a2] = softmax(x @ constant_gate_weight[c].T). `shared` is the
    shared experts' output, or what computes it from hidden_states in `dtype`. num_real_experts defaults to
    w13_weight's length. `routing` replaces the choice made here.
    """
    x = hidden_states.to(dtype)
    if routing is None:
        routing_arguments.setdefault("num_real_experts", w13_weight.shape[0])
        routing_dtype = torch.promote_types(dtype, torch.float32)
        routing = biased_topk(router_logits, bias, top_k, dtype=routing_dtype, **routing_arguments)  # type: ignore[arg-type]
    topk_weights, zero_weight, constant_weight = (
        weight.to(dtype) for weight in (routing.topk_weights, routing.zero_weight, routing.constant_weight)
    )

    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for k in range(routing.topk_ids.shape[1]):
            expert = int(routing.topk_ids[t, k])
            if expert >= 0:
                gate_up = w13_weight[expert].to(dtype) @ x[t]
                row = w2_weight[expert].to(dtype) @ silu_and_mul(gate_up[None], dtype=dtype)[0]
                out[t] += topk_weights[t, k] * row
    out += zero_weight[:, None] * x
    if constant_gate_weight is not None and constant_vectors is not None:
        for c in range(constant_vectors.shape[0]):
            mix = torch.softmax(x @ constant_gate_weight[c].to(dtype).T, dim=1)
            constant = mix[:, :1] * x + mix[:, 1:] * constant_vectors[c].to(dtype)
            out += constant_weight[:, c, None] * constant
    if shared is not None:
        out += shared(x).to(dtype) if callable(shared) else shared.to(dtype)
    return out
