# SPDX-License-Identifier: Apache-2.0
"""The ops, one file each: a typed function over ``torch.ops.zexpert.<name>`` and its fake kernel.

Every op works for no tokens at all, for any strides, and raises a RuntimeError of one sentence, before anything is
written, for an argument of a wrong device, dtype, shape or range.
"""

from zexpert.ops.biased_topk import biased_topk
from zexpert.ops.biased_topk_and_plan import biased_topk_and_plan
from zexpert.ops.biased_topk_choices import biased_topk_choices
from zexpert.ops.dequantize_blockwise import dequantize_blockwise
from zexpert.ops.fused_moe import fused_moe
from zexpert.ops.grouped_mlp import grouped_mlp, grouped_mlp_with_gate_up
from zexpert.ops.grouped_mlp_hopper import grouped_mlp_hopper
from zexpert.ops.moe_combine import moe_combine
from zexpert.ops.moe_dispatch import moe_dispatch
from zexpert.ops.moe_finalize import moe_finalize
from zexpert.ops.moe_permute import moe_permute
from zexpert.ops.moe_plan import moe_plan
from zexpert.ops.quantize_blockwise import quantize_blockwise
from zexpert.ops.rank_barrier import rank_barrier
from zexpert.ops.route import route
from zexpert.ops.router_logits import router_logits
from zexpert.ops.silu_and_mul import silu_and_mul
from zexpert.ops.types import ConstantExperts, DispatchPlan, ExpertWeights, RoutingResult
from zexpert.ops.zero_expert_accumulate import zero_expert_accumulate

__all__ = [
    "ConstantExperts",
    "DispatchPlan",
    "ExpertWeights",
    "RoutingResult",
    "biased_topk",
    "biased_topk_and_plan",
    "biased_topk_choices",
    "dequantize_blockwise",
    "fused_moe",
    "grouped_mlp",
    "grouped_mlp_hopper",
    "grouped_mlp_with_gate_up",
    "moe_combine",
    "moe_dispatch",
    "moe_finalize",
    "moe_permute",
    "moe_plan",
    "quantize_blockwise",
    "rank_barrier",
    "route",
    "router_logits",
    "silu_and_mul",
    "zero_expert_accumulate",
]
