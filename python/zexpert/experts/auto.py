"""Experts on whichever backend suits the tokens' device."""

from torch import Tensor

from zexpert.experts.cpu import CpuExperts
from zexpert.experts.interface import MoEExperts
from zexpert.experts.torch_loop import TorchLoopExperts
from zexpert.ops.types import DispatchPlan, RoutingResult


class AutoExperts(MoEExperts):
    """Chooses at every call, so that the layer keeps working when it moves to another device: "cpu" for tokens on the
    CPU (and on the meta device, where its operators give shapes), "torch" elsewhere.
    """

    def __init__(self) -> None:
        super().__init__("auto", reduces=False)
        self.cpu_experts = CpuExperts()
        self.torch_experts = TorchLoopExperts()

    def reduces_for(self, hidden_states: Tensor) -> bool:
        if hidden_states.is_cpu or hidden_states.is_meta:
            return self.cpu_experts.reduces
        return self.torch_experts.reduces

    def fuses_epilogue_for(self, hidden_states: Tensor, w13_weight: Tensor, w2_weight: Tensor) -> bool:
        if hidden_states.is_cpu or hidden_states.is_meta:
            return self.cpu_experts.fuses_epilogue_for(hidden_states, w13_weight, w2_weight)
        return self.torch_experts.fuses_epilogue_for(hidden_states, w13_weight, w2_weight)

    def backend_for(self, hidden_states: Tensor) -> str:
        if hidden_states.is_cpu or hidden_states.is_meta:
            return self.cpu_experts.name
        return self.torch_experts.name

    def forward(
        self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, w13_weight: Tensor, w2_weight: Tensor
    ) -> Tensor:
        if hidden_states.is_cpu or hidden_states.is_meta:
            rows: Tensor = self.cpu_experts(hidden_states, routing, plan, w13_weight, w2_weight)
        else:
            rows = self.torch_experts(hidden_states, routing, plan, w13_weight, w2_weight)
        return rows
