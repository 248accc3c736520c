# SPDX-License-Identifier: Apache-2.0
"""Route, plan, experts, epilogue."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zexpert._autocast import full_precision_linear
from zexpert.ops.types import DispatchPlan, RoutingResult
from zexpert.runner.moe_runner import MoERunner


class MoERunnerBase(MoERunner):
    """The path all runners share. See MoERunner for arguments and formula.

    Raises, from forward:
        ValueError: if hidden_states and the weights differ in dtype or hidden size, constant experts lack their
            weights, or shared_experts returns another shape than it was given.
    """

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        w13_weight: Tensor,
        w2_weight: Tensor,
        constant_gate_weight: Tensor | None = None,
        constant_vectors: Tensor | None = None,
    ) -> Tensor:
        self._check_hidden_states(hidden_states, w13_weight)
        routing, plan = self.router.select_experts_and_plan(hidden_states, router_logits, w13_weight.size(0))
        self._forget_routing()
        routing = self._in_dtype_for(hidden_states, routing)
        return self._run(hidden_states, routing, plan, w13_weight, w2_weight, constant_gate_weight, constant_vectors)

    def _route(self, hidden_states: Tensor, router_logits: Tensor, w13_weight: Tensor) -> RoutingResult:
        """The router's choice alone, for a runner that makes plans of its own."""
        self._check_hidden_states(hidden_states, w13_weight)
        routing = self.router.select_experts(hidden_states, router_logits)
        self._forget_routing()
        return self._in_dtype_for(hidden_states, routing)

    def _forget_routing(self) -> None:
        """A router would keep tensors, and their graph, for engines that add the zero part themselves."""
        if not torch.jit.is_scripting():
            self.router.forget_routing()

    def _check_hidden_states(self, hidden_states: Tensor, w13_weight: Tensor) -> None:
        if hidden_states.dtype != w13_weight.dtype:
            raise ValueError(
                f"hidden_states must be of the weights' dtype ({w13_weight.dtype}), got {hidden_states.dtype}"
            )
        if hidden_states.size(-1) != w13_weight.size(2):
            raise ValueError(
                f"hidden_states must have the weights' hidden size ({w13_weight.size(2)}), got {hidden_states.size(-1)}"
            )

    def _in_dtype_for(self, hidden_states: Tensor, routing: RoutingResult) -> RoutingResult:
        """The routing with weights in the dtype that the data's dtype goes with."""
        weight_dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        weights, ids, zero, constant = routing
        if weights.dtype == weight_dtype and zero.dtype == weight_dtype and constant.dtype == weight_dtype:
            return routing
        return RoutingResult(weights.to(weight_dtype), ids, zero.to(weight_dtype), constant.to(weight_dtype))

    def _run(
        self,
        hidden_states: Tensor,
        routing: RoutingResult,
        plan: DispatchPlan,
        w13_weight: Tensor,
        w2_weight: Tensor,
        constant_gate_weight: Tensor | None,
        constant_vectors: Tensor | None,
    ) -> Tensor:
        """Everything after routing and plan: [T, H]."""
        residual = self._shared_experts_output(hidden_states)
        routing = self._mix_constants(hidden_states, routing, constant_gate_weight, constant_vectors)
        if self.routing_stats is not None:
            self.routing_stats(routing.topk_ids, plan.expert_offsets)
        return self._experts_and_epilogue(
            hidden_states, routing, plan, w13_weight, w2_weight, residual, constant_vectors
        )

    def _experts_and_epilogue(
        self,
        hidden_states: Tensor,
        routing: RoutingResult,
        plan: DispatchPlan,
        w13_weight: Tensor,
        w2_weight: Tensor,
        residual: Tensor | None,
        constant_vectors: Tensor | None,
    ) -> Tensor:
        """Everything after the plan: [T, H]."""
        if not torch.jit.is_scripting():
            if self.recompute and torch.is_grad_enabled() and not torch.jit.is_tracing():
                output: Tensor = checkpoint(
                    self._compute_experts_and_epilogue,
                    hidden_states,
                    routing,
                    plan,
                    w13_weight,
                    w2_weight,
                    residual,
                    constant_vectors,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                return output
        return self._compute_experts_and_epilogue(
            hidden_states, routing, plan, w13_weight, w2_weight, residual, constant_vectors
        )

    def _compute_experts_and_epilogue(
        self,
        hidden_states: Tensor,
        routing: RoutingResult,
        plan: DispatchPlan,
        w13_weight: Tensor,
        w2_weight: Tensor,
        residual: Tensor | None,
        constant_vectors: Tensor | None,
    ) -> Tensor:
        constant_weight: Tensor | None = None
        if routing.constant_weight.size(1) > 0:
            constant_weight = routing.constant_weight
        else:
            constant_vectors = None
        if self.experts.fuses_epilogue_for(hidden_states, w13_weight, w2_weight):
            fused = torch.ops.zexpert.fused_moe(
                hidden_states,
                routing.topk_weights,
                routing.zero_weight,
                plan.expert_offsets,
                plan.row_slots,
                plan.slot_rows,
                w13_weight,
                w2_weight,
                residual,
                constant_weight,
                constant_vectors,
            )
            output: Tensor = fused[0]
            return output

        rows: Tensor = self.experts(hidden_states, routing, plan, w13_weight, w2_weight)

        if self.experts.reduces_for(hidden_states, w2_weight):
            out = self._maybe_add_zero_expert_output(rows, hidden_states, routing.zero_weight)
            if constant_weight is not None and constant_vectors is not None:
                constants = full_precision_linear(constant_weight, constant_vectors.to(constant_weight.dtype).t())
                out = out + constants.to(out.dtype)
            return out if residual is None else out + residual
        return self._finalize(
            rows, plan.slot_rows, routing.topk_weights, hidden_states, routing, residual, constant_vectors
        )

    def _finalize(
        self,
        rows: Tensor,
        slot_rows: Tensor,
        weights: Tensor,
        hidden_states: Tensor,
        routing: RoutingResult,
        residual: Tensor | None,
        constant_vectors: Tensor | None,
    ) -> Tensor:
        """The epilogue: [T, H], the rows that slot_rows names, times the weights, and the routing's other parts."""
        has_constants = routing.constant_weight.size(1) > 0
        finalized: Tensor = torch.ops.zexpert.moe_finalize(
            rows,
            slot_rows,
            weights,
            hidden_states,
            routing.zero_weight,
            residual=residual,
            constant_weight=routing.constant_weight if has_constants else None,
            constant_vectors=constant_vectors if has_constants else None,
        )
        return finalized

    def _maybe_add_zero_expert_output(self, summed: Tensor, hidden_states: Tensor, zero_weight: Tensor) -> Tensor:
        """The epilogue's zero part for a backend that returned the sum [T, H] of each token's rows: zero_weight *
        hidden_states is added, unless the router has no zero experts. For other backends moe_finalize adds it.

        It is added once per token whatever the parallelism: on the token's own rank, after any reduction.
        """
        if not self.router.has_zero_experts:
            return summed
        wants_gradients = summed.requires_grad or hidden_states.requires_grad or zero_weight.requires_grad
        if wants_gradients or torch.jit.is_tracing():
            output: Tensor = torch.ops.zexpert.zero_expert_accumulate(hidden_states, zero_weight)
            return summed + output
        # Without autograd nobody else holds the sum, and no second [T, H] tensor is needed.
        torch.ops.zexpert.zero_expert_accumulate(hidden_states, zero_weight, out=summed)
        return summed

    def _mix_constants(
        self,
        hidden_states: Tensor,
        routing: RoutingResult,
        constant_gate_weight: Tensor | None,
        constant_vectors: Tensor | None,
    ) -> RoutingResult:
        """Splits every constant expert's weight between the token and the constant, [a1, a2] = softmax(x @ Wc.T): a1's
        part joins zero_weight, a2's stays in constant_weight.
        """
        if routing.constant_weight.size(1) == 0:
            return routing
        if constant_gate_weight is None or constant_vectors is None:
            raise ValueError("constant_gate_weight and constant_vectors are required with constant experts")
        num_constants = routing.constant_weight.size(1)
        expected = [num_constants, 2, hidden_states.size(1)]
        if list(constant_gate_weight.shape) != expected:
            raise ValueError(f"constant_gate_weight must have shape {expected}, got {list(constant_gate_weight.shape)}")
        dtype = routing.constant_weight.dtype
        gates = full_precision_linear(hidden_states.to(dtype), constant_gate_weight.flatten(0, 1).to(dtype))
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
