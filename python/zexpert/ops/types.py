# SPDX-License-Identifier: Apache-2.0
"""The named tuples that operators, routers, runners and layers exchange."""

from typing import NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from zexpert._C import RoutingSpec, name


class RoutingResult(NamedTuple):
    """What a router chose for T tokens with K slots each.

    A slot that chose a zero expert keeps its place in ``topk_ids`` with id -1 and weight 0. Its weight is in
    ``zero_weight`` (identity experts) or ``constant_weight`` (constant experts), or nowhere (drop experts).
    """

    topk_weights: Tensor
    """[T, K] float32 (float64 for float64 logits): weight of the slot's real expert, 0 for id -1."""
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


class ConstantExperts(NamedTuple):
    """Weights of the C constant experts (MoE++, arXiv 2410.07348): expert c gives a1 * x + a2 * vectors[c], with
    [a1, a2] = softmax(x @ gate_weight[c].T)."""

    gate_weight: Tensor
    """[C, 2, H]."""
    vectors: Tensor
    """[C, H]."""


class ExpertWeights(NamedTuple):
    """Weights of a layer's R real experts and, if it has some, of its constant experts."""

    w13: Tensor
    """[R, 2F, H]: gate rows first, then up rows, of each expert. float8_e4m3fn with scales."""
    w2: Tensor
    """[R, H, F]: down projection of each expert. float8_e4m3fn with scales."""
    w13_scale_inv: Tensor | None = None
    """[R, 2 * ceil(F / 128), ceil(H / 128)] float32: a weight's value is itself times the scale of its block of 128 x
    128. Gate's blocks first, then up's. None for weights that are not quantised."""
    w2_scale_inv: Tensor | None = None
    """[R, ceil(H / 128), ceil(F / 128)] float32: the scales of ``w2``; with those of ``w13``."""
    constants: ConstantExperts | None = None
    """None without constant experts."""


class RoutingArguments(NamedTuple):
    """A RoutingSpec as the routing operators accept it, in plain values that scripts and graphs can read."""

    top_k: int
    num_real_experts: int
    num_identity_experts: int | None
    num_constant_experts: int
    scoring_func: str
    renormalize: bool
    drop_before_renormalize: bool
    routed_scaling_factor: float
    num_expert_group: int
    topk_group: int

    @classmethod
    def of(cls, spec: RoutingSpec) -> "RoutingArguments":
        """The arguments that a validated spec stands for."""
        values = {field: getattr(spec, field) for field in cls._fields}
        return cls(**{**values, "scoring_func": name(spec.scoring_func)})

    def keywords(self) -> dict[str, object]:
        """The operators' keyword arguments, without those that have the operators' defaults: PyTorch spends half a
        microsecond on each."""
        plain = RoutingArguments(self.top_k, self.num_real_experts, None, 0, "softmax", False, False, 1.0, 1, 1)
        return {
            field: value
            for field, value, default in zip(self._fields, self, plain, strict=True)
            if field == "num_real_experts" or value != default
        }


# So that an exported program that returns them can be saved.
for exported in (RoutingResult, DispatchPlan, ConstantExperts, ExpertWeights):
    _register_namedtuple(exported, serialized_type_name=f"zexpert.{exported.__name__}")
