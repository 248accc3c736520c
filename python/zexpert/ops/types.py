# SPDX-License-Identifier: Apache-2.0
"""What the ops return: a routing, and the plan made from it."""

from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple


class RoutingResult(NamedTuple):
    """What a router chose for T tokens with K slots each.

    A slot that chose a zero expert keeps its place in ``topk_ids`` with id -1 and weight 0. Its weight is in
    ``zero_weight`` (identity experts) or ``constant_weight`` (constant experts), or nowhere (drop experts).
    """

    topk_weights: Tensor
    """[T, K] float32 (float64 for float64 logits): weight of the slot's real expert, 0 beside id -1."""
    topk_ids: Tensor
    """[T, K] int32 or int64: the slot's real expert, or -1 for a slot that does no work."""
    zero_weight: Tensor
    """[T], type of ``topk_weights``: summed weight of the slots that chose an identity expert."""
    constant_weight: Tensor
    """[T, C], type of ``topk_weights``: weight of each of the C constant experts, 0 where not chosen."""


class DispatchPlan(NamedTuple):
    """The slots that do work in the order of their experts, R real experts in all.

    Rows of expert e are ``expert_offsets[e]`` up to ``expert_offsets[e + 1]``; the last offset is the number of rows.
    Shapes depend on T, K and R alone.
    """

    expert_offsets: Tensor
    """[R + 1] int32: where each expert's rows begin; differences are the load of each expert."""
    row_slots: Tensor
    """[T * K] int32: row r is slot ``row_slots[r]``, slot ``t * K + k``; -1 from the last offset on."""
    slot_rows: Tensor
    """[T, K] int32: the inverse, -1 for a slot that does no work."""


# So that an exported program that returns them can be saved.
_register_namedtuple(RoutingResult, serialized_type_name="zexpert.RoutingResult")
_register_namedtuple(DispatchPlan, serialized_type_name="zexpert.DispatchPlan")
