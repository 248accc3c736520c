# SPDX-License-Identifier: Apache-2.0
"""vLLM's own code for layers with zero experts, as a contender on a GPU. Written for vLLM 0.32.

Everything here raises ImportError if vLLM, or the part of it that is needed, cannot be imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zexpert_tools.benchmark.epilogue import Inputs
from zexpert_tools.benchmark.layer import Shape, Weights
from zexpert_tools.benchmark.torch_routing import RoutingCase


def zero_expert_router(case: RoutingCase, bias: Tensor | None) -> Any:
    """vLLM's ZeroExpertRouter of the case: `select_experts`, then `zero_expert_output`."""
    from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

    return ZeroExpertRouter(
        top_k=case.top_k,
        global_num_experts=case.num_real_experts,
        e_score_correction_bias=bias,
        num_logical_experts=case.num_real_experts,
        zero_expert_type="identity",
        scoring_func=case.scoring_func,
        renormalize=case.renormalize,
        routed_scaling_factor=case.routed_scaling_factor,
    )


def topk(case: RoutingCase, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(scores [T, K], ids [T, K] of all experts), what ZeroExpertRouter starts from."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import fused_topk_bias

    weights, ids = fused_topk_bias(
        hidden_states=logits,  # it reads the number of tokens alone
        gating_output=logits,
        scoring_func=case.scoring_func,
        e_score_correction_bias=bias,
        topk=case.top_k,
        renormalize=case.renormalize,
    )
    return weights, ids


def moe_sum(rows: Tensor) -> Tensor:
    """Rows [T, K, H], weighted already, summed to [T, H]."""
    from vllm import _custom_ops

    out = torch.empty_like(rows[:, 0])
    _custom_ops.moe_sum(rows, out)
    return out


def moe_sum_inputs(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What vLLM's experts and router leave to its epilogue: the weighted rows [T, K, H] in slot order, zeros for zero
    experts' slots, and the zero experts' output [T, H]."""
    rows = inputs.rows[inputs.slot_rows.clamp(min=0).long()]
    weights = inputs.topk_weights.masked_fill(inputs.slot_rows < 0, 0.0)
    rows = (rows * weights[:, :, None].to(rows.dtype)).contiguous()
    return rows, (inputs.zero_weight[:, None] * inputs.hidden_states).to(rows.dtype)


class VllmLayer(nn.Module):
    """ZeroExpertRouter, the Triton experts and the sum, around the same tensors. A slot of a zero expert is computed by
    expert 0, with weight 0. It has no backward."""

    def __init__(self, shape: Shape, weights: Weights, *, training: bool = False) -> None:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        super().__init__()
        self.router = zero_expert_router(shape.routing, weights.bias)
        self.fused_experts = fused_experts
        self.w13, self.w2 = weights.w13, weights.w2

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        topk_weights, topk_ids = self.router.select_experts(hidden_states, router_logits)
        out: Tensor = self.fused_experts(hidden_states, self.w13, self.w2, topk_weights, topk_ids)
        zero_expert_output: Tensor = self.router.zero_expert_output
        return out + zero_expert_output
