# SPDX-License-Identifier: Apache-2.0
"""RoutingSpecs from the names and counts of zero experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zexpert._C import RoutingSpec, ScoringFunc, ZeroExpertType, name, parse_zero_expert_type

#: A kind of zero expert, or its name.
ZeroExpertKind = str | ZeroExpertType
#: The one kind of zero expert there is, or the number of zero experts of each kind.
ZeroExperts = ZeroExpertKind | Mapping[str, int] | Mapping[ZeroExpertType, int] | Mapping[ZeroExpertKind, int]


def zero_expert_spec(
    *,
    top_k: int,
    num_real_experts: int,
    zero_expert_type: ZeroExperts | None,
    zero_expert_num: int | None = None,
    e_score_correction_bias: Tensor | None = None,
    scoring_func: str | ScoringFunc = "softmax",
    renormalize: bool = False,
    drop_before_renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
) -> RoutingSpec:
    """The spec of a routing with zero experts that are named by kind.

    Args:
        zero_expert_type: "identity" (or "copy"), "constant", "drop" (or "zero"), or the ZeroExpertType; or a mapping
            from these to counts, such as {"identity": 1, "constant": 2, "drop": 1}; or None for no zero experts.
            Whatever the mapping's order, the logits' is [real | identity | constant | drop].
        zero_expert_num: how many zero experts there are. None with a name: the length of the bias minus the
            real experts; without a bias, the width of each call's logits minus the real experts.
        The others are RoutingSpec's.

    Raises:
        ValueError: if a kind is unknown, a count is missing, not positive, or contradicts the mapping's or the bias'.
    """
    num_identity: int | None = 0
    num_constant = 0
    width: int | None = num_real_experts
    if zero_expert_type is None:
        if zero_expert_num is not None:
            raise ValueError(f"zero_expert_num is {zero_expert_num} but zero_expert_type is missing")
    elif isinstance(zero_expert_type, Mapping):
        counts = counts_of_mapping(zero_expert_type, zero_expert_num)
        num_identity = counts.get(ZeroExpertType.IDENTITY, 0)
        num_constant = counts.get(ZeroExpertType.CONSTANT, 0)
        width = num_real_experts + sum(counts.values())
    else:
        kind = parse_kind(zero_expert_type)
        count = zero_expert_num
        if count is None and isinstance(e_score_correction_bias, Tensor):
            count = e_score_correction_bias.numel() - num_real_experts
            if count < 1:
                raise ValueError(
                    f"e_score_correction_bias must have an entry per expert, more than the {num_real_experts} real "
                    f"ones, got {e_score_correction_bias.numel()}"
                )
        if count is None and kind == ZeroExpertType.CONSTANT:
            raise ValueError('zero_expert_num is required for zero_expert_type "constant" without a bias')
        if count is not None:
            check_count("zero_expert_num", count, minimum=1)
        width = None if count is None else num_real_experts + count
        if kind == ZeroExpertType.IDENTITY:
            num_identity = count
        elif kind == ZeroExpertType.CONSTANT and count is not None:
            num_constant = count

    return RoutingSpec(
        top_k=top_k,
        num_real_experts=num_real_experts,
        num_logits=width,
        num_identity_experts=num_identity,
        num_constant_experts=num_constant,
        scoring_func=scoring_func,
        renormalize=renormalize,
        drop_before_renormalize=drop_before_renormalize,
        routed_scaling_factor=routed_scaling_factor,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
    )


def counts_of_mapping(zero_expert_type: Mapping[Any, int], zero_expert_num: int | None) -> dict[ZeroExpertType, int]:
    """The mapping with its names parsed and its counts checked."""
    counts: dict[ZeroExpertType, int] = {}
    for given, count in zero_expert_type.items():
        kind = parse_kind(given)
        if kind in counts:
            raise ValueError(f"zero_expert_type must name each kind of zero expert once, got {dict(zero_expert_type)}")
        check_count(f'zero_expert_type["{kind_name(given)}"]', count, minimum=0)
        counts[kind] = count
    total = sum(counts.values())
    if total < 1:
        raise ValueError(f"zero_expert_type must count at least 1 zero expert, got {dict(zero_expert_type)}")
    if zero_expert_num is not None and zero_expert_num != total:
        raise ValueError(f"zero_expert_num must be {total}, the sum of zero_expert_type, got {zero_expert_num}")
    return counts


def parse_kind(kind: ZeroExpertKind) -> ZeroExpertType:
    if isinstance(kind, ZeroExpertType):
        return kind
    if not isinstance(kind, str):
        raise ValueError(f"zero_expert_type must be a name or a mapping from names to counts, got {kind!r}")
    return parse_zero_expert_type(kind)


def kind_name(kind: ZeroExpertKind) -> str:
    """The name of a kind as it was given."""
    return kind if isinstance(kind, str) else name(kind)


def check_count(argument: str, count: int, *, minimum: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < minimum:
        raise ValueError(f"{argument} must be an integer of at least {minimum}, got {count!r}")
