# SPDX-License-Identifier: Apache-2.0
"""Route, plan, experts, epilogue."""

import torch
from torch import Tensor

from zexpert._autocast import full_precision_linear
from zexpert.ops.types import ConstantExperts, DispatchPlan, ExpertWeights, RoutingResult
from zexpert.runner.moe_runner import MoERunner


class MoERunnerBase(MoERunner):
    """The path that all runners share. See MoERunner for arguments and formula.

    Raises, from forward:
        ValueError: if hidden_states and the weights differ in hidden size or, without scales, in dtype, only one weight
            has scales, constant experts lack their weights, or shared_experts returns another shape than its
            argument's.
    """

    def forward(self, hidden_states: Tensor, router_logits: Tensor, weights: ExpertWeights) -> Tensor:
        routing, plan = self._route_and_plan(hidden_states, router_logits, weights)
        return self._run(hidden_states, routing, plan, weights)

    # ---- Route and plan ----

    def _route_and_plan(
        self, hidden_states: Tensor, router_logits: Tensor, weights: ExpertWeights
    ) -> tuple[RoutingResult, DispatchPlan]:
        """The choice and its plan, counted."""
        self._check_weights(hidden_states, weights)
        router = self.router
        routing, plan = router.select_experts_and_plan(hidden_states, router_logits, weights.w13.size(0))
        if not torch.jit.is_scripting():
            router.forget_routing()
        if self.routing_stats is not None:
            self.routing_stats(routing.topk_ids, plan.expert_offsets)
        return self._in_dtype_for(hidden_states, routing), plan

    def _route(self, hidden_states: Tensor, router_logits: Tensor, weights: ExpertWeights) -> RoutingResult:
        """The choice alone, for a runner that makes plans of its own and counts them."""
        self._check_weights(hidden_states, weights)
        router = self.router
        routing = router.select_experts(hidden_states, router_logits)
        if not torch.jit.is_scripting():
            router.forget_routing()
        return self._in_dtype_for(hidden_states, routing)

    def _check_weights(self, hidden_states: Tensor, weights: ExpertWeights) -> None:
        w13 = weights.w13
        is_quantised = weights.w13_scale_inv is not None
        if is_quantised:
            if not hidden_states.is_floating_point() or hidden_states.element_size() < 2:
                raise ValueError(
                    f"hidden_states must be float32, float64, bfloat16 or float16, got {hidden_states.dtype}"
                )
        elif w13.is_floating_point() and w13.element_size() < 2:
            raise ValueError(f"w13_scale_inv must be given with {w13.dtype} weights, whose values need a scale")
        elif hidden_states.dtype != w13.dtype:
            raise ValueError(f"hidden_states must be of the weights' dtype ({w13.dtype}), got {hidden_states.dtype}")
        if hidden_states.size(-1) != w13.size(2):
            raise ValueError(
                f"hidden_states must have the weights' hidden size ({w13.size(2)}), got {hidden_states.size(-1)}"
            )
        if is_quantised != (weights.w2_scale_inv is not None):
            raise ValueError("w13_scale_inv and w2_scale_inv must be given both or neither")

    def _in_dtype_for(self, hidden_states: Tensor, routing: RoutingResult) -> RoutingResult:
        """The routing with weights in the dtype that operators accept with hidden_states."""
        dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        weights, ids, zero, constant = routing
        if weights.dtype == dtype:
            return routing
        return RoutingResult(weights.to(dtype), ids, zero.to(dtype), constant.to(dtype))

    # ---- Experts and epilogue ----

    def _run(self, hidden_states: Tensor, routing: RoutingResult, plan: DispatchPlan, weights: ExpertWeights) -> Tensor:
        """Everything after route and plan: [T, H]."""
        residual = self._shared_experts_output(hidden_states)
        routing = self._mix_constants(hidden_states, routing, weights.constants)
        return self._experts_and_epilogue(hidden_states, routing, plan, weights, residual)

    def _experts_and_epilogue(
        self,
        hidden_states: Tensor,
        routing: RoutingResult,
        plan: DispatchPlan,
        weights: ExpertWeights,
        residual: Tensor | None,
    ) -> Tensor:
        experts = self.experts
        if experts.fuses_epilogue:
            keep_gate_up = self._wants_gradients(hidden_states, routing, weights) and not self.recompute
            return experts.with_epilogue(hidden_states, routing, plan, weights, residual, keep_gate_up)
        rows: Tensor = experts(hidden_states, routing, plan, weights)
        constants = weights.constants
        if not experts.reduces:
            return self._finalize(
                rows, plan.slot_rows, routing.topk_weights, hidden_states, routing, residual, constants
            )
        out = self._maybe_add_zero_expert_output(rows, hidden_states, routing.zero_weight)
        if constants is not None:
            weight = routing.constant_weight
            out = out + full_precision_linear(weight, constants.vectors.to(weight.dtype).t()).to(out.dtype)
        return out if residual is None else out + residual

    def _wants_gradients(self, hidden_states: Tensor, routing: RoutingResult, weights: ExpertWeights) -> bool:
        """True if the experts' backward will run. A trace serves calls with and without gradients: False."""
        if not torch.is_grad_enabled() or torch.jit.is_tracing():
            return False
        return (
            hidden_states.requires_grad
            or weights.w13.requires_grad
            or weights.w2.requires_grad
            or routing.topk_weights.requires_grad
        )

    def _finalize(
        self,
        rows: Tensor,
        slot_rows: Tensor,
        row_weights: Tensor,
        hidden_states: Tensor,
        routing: RoutingResult,
        residual: Tensor | None,
        constants: ConstantExperts | None,
    ) -> Tensor:
        """The epilogue: [T, H], the rows that slot_rows names, times their weights, and the other parts."""
        finalized: Tensor = torch.ops.zexpert.moe_finalize(
            rows,
            slot_rows,
            row_weights,
            hidden_states,
            routing.zero_weight,
            residual=residual,
            constant_weight=None if constants is None else routing.constant_weight,
            constant_vectors=None if constants is None else constants.vectors,
        )
        return finalized

    def _maybe_add_zero_expert_output(self, summed: Tensor, hidden_states: Tensor, zero_weight: Tensor) -> Tensor:
        """The epilogue's zero part for a backend that returned the sum [T, H] of each token's rows: zero_weight *
        hidden_states is added, unless the router has no zero experts. For other backends the fused epilogue adds it.

        It is added once per token whatever the parallelism: on the token's own rank, after any reduction.
        """
        if not self.router.has_zero_experts:
            return summed
        wants_gradients = summed.requires_grad or hidden_states.requires_grad or zero_weight.requires_grad
        if wants_gradients or torch.jit.is_tracing():
            output: Tensor = torch.ops.zexpert.zero_expert_accumulate(hidden_states, zero_weight)
            return summed + output
        # Without autograd no other tensor shares the sum, and no second [T, H] tensor is needed.
        torch.ops.zexpert.zero_expert_accumulate(hidden_states, zero_weight, out=summed)
        return summed

    def _mix_constants(
        self, hidden_states: Tensor, routing: RoutingResult, constants: ConstantExperts | None
    ) -> RoutingResult:
        """Splits every constant expert's weight between the token and the constant, [a1, a2] = softmax(x @ Wc.T): a1's
        part joins zero_weight, a2's stays in constant_weight.
        """
        num_constants = routing.constant_weight.size(1)
        if num_constants == 0:
            return routing
        if constants is None:
            raise ValueError("constant_gate_weight and constant_vectors are required with constant experts")
        expected = [num_constants, 2, hidden_states.size(1)]
        if list(constants.gate_weight.shape) != expected:
            raise ValueError(
                f"constant_gate_weight must have shape {expected}, got {list(constants.gate_weight.shape)}"
            )
        dtype = routing.constant_weight.dtype
        gates = full_precision_linear(hidden_states.to(dtype), constants.gate_weight.flatten(0, 1).to(dtype))
        mix = torch.softmax(gates.reshape(-1, num_constants, 2), dim=2)
        return RoutingResult(
            routing.topk_weights,
            routing.topk_ids,
            routing.zero_weight + (routing.constant_weight * mix[:, :, 0]).sum(dim=1),
            routing.constant_weight * mix[:, :, 1],
        )

    def _shared_experts_output(self, hidden_states: Tensor) -> Tensor | None:
        if self.shared_experts is None:
            return None
        residual: Tensor = self.shared_experts(hidden_states)
        if residual.shape != hidden_states.shape:
            raise ValueError(
                f"shared_experts must return the shape of hidden_states ({list(hidden_states.shape)}), "
                f"got {list(residual.shape)}"
            )
        return residual.to(hidden_states.dtype)
