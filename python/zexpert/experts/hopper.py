# SPDX-License-Identifier: Apache-2.0
"""Experts on zexpert's own kernels for Hopper GPUs."""

import functools

import torch
from torch import Tensor

from zexpert._loader import cuda_library_info, load_libraries
from zexpert.experts.grouped_mm import GroupedMMExperts
from zexpert.experts.interface import MoEExperts
from zexpert.ops.types import DispatchPlan, RoutingResult


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_hopper(device_index: int) -> bool:
    """Whether grouped_mlp_hopper runs on that GPU: one of compute capability 9.0, with code for 9.0a."""
    return find_out_is_hopper(device_index)


@functools.cache  # every call of a layer asks
def find_out_is_hopper(device_index: int) -> bool:
    if not load_libraries().cuda_loaded or not any(arch.startswith("9.0a") for arch in cuda_library_info()[1]):
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device_index) == (9, 0)


class HopperExperts(MoEExperts):
    """Gathers the tokens into one segment of rows per expert and runs all experts with grouped_mlp_hopper, on a GPU of
    compute capability 9.0. Slots of zero experts are in no segment. Nothing waits for the host, so a CUDA graph
    captures it. Where a gradient is wanted, GroupedMMExperts takes over, bfloat16 alone.

    Takes bfloat16 and float16, with hidden and intermediate sizes that are multiples of 64, and up to 1024 experts.

    Attributes:
        tile_rows: grouped_mlp_hopper's argument; 0 lets it choose.
    """

    def __init__(self, tile_rows: int = 0) -> None:
        super().__init__("hopper", reduces=False)
        self.tile_rows = tile_rows
        self.training_experts = GroupedMMExperts()

    def supports(self, hidden_states: Tensor, w2_weight: Tensor) -> bool:
        """Whether grouped_mlp_hopper takes these tokens and weights, on this GPU, and no gradients are wanted."""
        if w2_weight.size(0) > 1024 or w2_weight.size(1) % 64 != 0 or w2_weight.size(2) % 64 != 0:
            return False
        if hidden_states.dtype != torch.bfloat16 and hidden_states.dtype != torch.float16:
            return False
        if self.wants_gradient(hidden_states, w2_weight):
            return False
        if hidden_states.dtype == torch.float16 and torch.is_grad_enabled():
            return False  # w13 may want one, and grouped_mm does not take float16
        if torch.jit.is_scripting():
            runs: bool = torch.ops.zexpert.is_hopper(hidden_states)
            return runs
        known: bool = is_hopper(hidden_states.device.index)
        return known

    def wants_gradient(self, hidden_states: Tensor, weight: Tensor) -> bool:
        return torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, w13_weight: Tensor, w2_weight: Tensor
    ) -> Tensor:
        """[T * K, H] in the plan's order; rows past the last offset are unspecified."""
        if hidden_states.is_cpu:
            raise ValueError(
                f'hidden_states must be on a GPU of compute capability 9.0 for experts_backend "hopper", '
                f"got {hidden_states.device}"
            )
        if self.wants_gradient(hidden_states, w13_weight) or self.wants_gradient(hidden_states, w2_weight):
            trained: Tensor = self.training_experts(hidden_states, routing, plan, w13_weight, w2_weight)
            return trained
        top_k = routing.topk_ids.size(1)
        rows = torch.ops.zexpert.moe_permute(hidden_states, plan.row_slots, plan.expert_offsets, top_k, plan.slot_rows)
        output: Tensor = torch.ops.zexpert.grouped_mlp_hopper(
            rows, plan.expert_offsets, w13_weight, w2_weight, tile_rows=self.tile_rows
        )
        return output
