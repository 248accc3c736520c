# SPDX-License-Identifier: Apache-2.0
"""Experts on whichever backend suits the tokens."""

from torch import Tensor

from zexpert.experts.cpu import CpuExperts
from zexpert.experts.grouped_mm import GroupedMMExperts
from zexpert.experts.hopper import HopperExperts
from zexpert.experts.interface import MoEExperts
from zexpert.experts.torch_loop import TorchLoopExperts
from zexpert.ops.types import DispatchPlan, RoutingResult


class AutoExperts(MoEExperts):
    """Chooses at every call, so that the layer keeps working when it moves to another device or dtype: "cpu" for tokens
    on the CPU (and on the meta device, where its operators give shapes), "hopper", or else "grouped_mm", for those on a
    GPU that it supports, "torch" for the rest. "hopper" supports none where gradients are wanted.
    """

    def __init__(self) -> None:
        super().__init__("auto", reduces=False)
        self.cpu_experts = CpuExperts()
        self.grouped_mm_experts = GroupedMMExperts()
        self.hopper_experts = HopperExperts()
        self.torch_experts = TorchLoopExperts()

    def reduces_for(self, hidden_states: Tensor, w2_weight: Tensor) -> bool:
        return self.backend_for(hidden_states, w2_weight) == "torch"

    def fuses_epilogue_for(self, hidden_states: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> bool:
        if hidden_states.is_cpu or hidden_states.is_meta:
            return self.cpu_experts.fuses_epilogue_for(hidden_states, w13_weight, w2_weight)
        return False

    def backend_for(self, hidden_states: Tensor, w2_weight: Tensor) -> str:
        if hidden_states.is_cpu or hidden_states.is_meta:
            return "cpu"
        if hidden_states.is_cuda and self.hopper_experts.supports(hidden_states, w2_weight):
            return "hopper"
        if hidden_states.is_cuda and self.grouped_mm_experts.supports(hidden_states, w2_weight):
            return "grouped_mm"
        return "torch"

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, w13_weight: Tensor, w2_weight: Tensor
    ) -> Tensor:
        backend = self.backend_for(hidden_states, w2_weight)
        if backend == "cpu":
            rows: Tensor = self.cpu_experts(hidden_states, routing, plan, w13_weight, w2_weight)
        elif backend == "hopper":
            rows = self.hopper_experts(hidden_states, routing, plan, w13_weight, w2_weight)
        elif backend == "grouped_mm":
            rows = self.grouped_mm_experts(hidden_states, routing, plan, w13_weight, w2_weight)
        else:
            rows = self.torch_experts(hidden_states, routing, plan, w13_weight, w2_weight)
        return rows
