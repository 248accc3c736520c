# SPDX-License-Identifier: Apache-2.0
"""Layers and their expected output, for the tests of routers, runners and the layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import reference
from zexpert import FusedMoE, RoutingSpec
from zexpert._C import name

HIDDEN = 24
INTERMEDIATE = 20
NUM_EXPERTS = 6
TOP_K = 3

#: Layer arguments beside the sizes, by the kinds of expert there are.
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "identity": {"zero_expert_type": "identity", "zero_expert_num": 3, "routed_scaling_factor": 6.0},
    "drop": {"zero_expert_type": "drop", "zero_expert_num": 3, "renormalize": True},
    "constant": {"zero_expert_type": "constant", "zero_expert_num": 2, "renormalize": True},
    "mixed": {
        "zero_expert_type": {"identity": 1, "constant": 2, "drop": 1},
        "renormalize": True,
        "drop_before_renormalize": True,
    },
    "grouped": {
        "zero_expert_type": "drop",
        "zero_expert_num": 3,
        "use_grouped_topk": True,
        "num_expert_group": 3,
        "topk_group": 2,
        "scoring_func": "sigmoid",
    },
}


class SharedExperts(nn.Module):
    """A feed-forward network over every token."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 8, dtype=dtype)
        self.down = nn.Linear(8, HIDDEN, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.down(torch.nn.functional.silu(self.up(hidden_states)))
        return out


def make_layer(kind: str = "identity", *, seed: int = 0, with_bias: bool = True, **arguments: Any) -> FusedMoE:
    """A small layer of one of LAYERS, with a bias unless told otherwise."""
    torch.manual_seed(seed)
    arguments = {**LAYERS[kind], **arguments}
    if with_bias:
        arguments.setdefault("e_score_correction_bias", 0.1 * torch.randn(num_columns(kind)))
    return FusedMoE(NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, **arguments)


def num_columns(kind: str) -> int:
    """N, the width of the logits of one of LAYERS."""
    zero_experts = LAYERS[kind].get("zero_expert_type")
    if isinstance(zero_experts, dict):
        return NUM_EXPERTS + sum(zero_experts.values())
    return NUM_EXPERTS + int(LAYERS[kind].get("zero_expert_num", 0))


def make_inputs(
    kind: str, num_tokens: int, dtype: torch.dtype = torch.float32, *, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """hidden_states [T, H] and router_logits [T, N]."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    router_logits = torch.randn(num_tokens, num_columns(kind), generator=generator, dtype=torch.float64)
    return hidden_states.to(dtype), router_logits.to(dtype)


def reference_arguments(spec: RoutingSpec) -> dict[str, Any]:
    """Keyword arguments of reference.biased_topk for a router's spec."""
    return {
        "num_real_experts": spec.num_real_experts,
        "num_identity_experts": spec.num_identity_experts,
        "num_constant_experts": spec.num_constant_experts,
        "scoring_func": name(spec.scoring_func),
        "renormalize": spec.renormalize,
        "drop_before_renormalize": spec.drop_before_renormalize,
        "routed_scaling_factor": spec.routed_scaling_factor,
        "num_expert_group": spec.num_expert_group,
        "topk_group": spec.topk_group,
    }


def expected_output(
    layer: FusedMoE, hidden_states: Tensor, router_logits: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The layer's output by plain PyTorch in `dtype`."""
    shared = None if layer.shared_experts is None else copy.deepcopy(layer.shared_experts).to(dtype)
    with torch.no_grad():
        return reference.layer(
            hidden_states,
            router_logits,
            layer.w13_weight,
            layer.w2_weight,
            top_k=layer.router.top_k,
            bias=layer.e_score_correction_bias,
            constant_gate_weight=layer.constant_gate_weight,
            constant_vectors=layer.constant_vectors,
            shared=shared,
            dtype=dtype,
            **reference_arguments(layer.router.spec),
        )
