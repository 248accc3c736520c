# SPDX-License-Identifier: Apache-2.0
"""zexpert in vLLM: one kernel routes zero experts, and no matrix product computes their slots.

vLLM calls `register` in every process through the entry point "vllm.general_plugins". It does nothing unless the
environment says ZEXPERT_VLLM=1. Then, for models with zero experts (LongCat-Flash):

- LongcatRouter gets its float32 logits from router_logits.
- ZeroExpertRouter gets its weights, ids and zero experts' output from biased_topk and zero_expert_accumulate. vLLM's
  contract holds: a slot that chose a zero expert has weight 0 and id 0, and `zero_expert_output` is there once.
- Its RoutedExperts run zexpert's experts if vLLM keeps plain weights for its Triton kernels (`--moe-backend triton`)
  and there is no expert parallelism. For those, such a slot has id -1 and no expert computes it.
- zero_experts_compute_triton is replaced. Its grid in vLLM 0.32 counts hidden_size // 256 blocks, so the last
  hidden_size % 256 channels of a token stay zero.

Written for vLLM 0.32.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zexpert.integrations.engine_router import engine_router_logits
from zexpert.integrations.given_routing import RUNNER
from zexpert.ops import biased_topk, zero_expert_accumulate


def register() -> None:
    """Makes this process's vLLM use zexpert if ZEXPERT_VLLM is "1". Further calls do nothing.

    Raises:
        ImportError: if vLLM is not installed, or lacks a class that zexpert changes.
    """
    if os.environ.get("ZEXPERT_VLLM") != "1":
        return
    from vllm.model_executor.layers.fused_moe import fused_moe
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.router import zero_expert_router
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.longcat_flash import LongcatRouter

    for module in (fused_moe, zero_expert_router):
        module.zero_experts_compute_triton = zero_experts_compute
    router = zero_expert_router.ZeroExpertRouter
    router._compute_routing = _compute_routing
    _replace(LongcatRouter, "forward", _router_forward)
    _replace(RoutedExperts, "forward_modular", _forward_modular)
    _replace(MoERunner, "__init__", functools.partial(_init_runner, router_class=router))


def _replace(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    """Makes owner.name(self, ...) call replacement(original, self, ...), once."""
    original = getattr(owner, name)
    if hasattr(original, "_replaced_by_zexpert"):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, self, *args, **kwargs)

    method._replaced_by_zexpert = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _init_runner(original: Callable[..., None], self: Any, *args: Any, router_class: type, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if isinstance(self.router, router_class):
        self.router._zexpert_routed_experts = self.routed_experts  # type: ignore[attr-defined]
        self.routed_experts._zexpert_has_zero_experts = True


def _router_forward(original: Callable[..., Tensor], self: Any, hidden_states: Tensor) -> Tensor:
    """LongcatRouter.forward: [T, H] -> logits [T, N]."""
    logits = engine_router_logits(self.classifier, hidden_states)
    return original(self, hidden_states) if logits is None else logits


def _compute_routing(
    self: Any,
    hidden_states: Tensor,
    router_logits: Tensor,
    indices_type: torch.dtype | None,
    *,
    input_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ZeroExpertRouter._compute_routing: topk_weights [T, K] float32 and topk_ids [T, K]."""
    is_identity = self.zero_expert_type == "identity"
    routing = biased_topk(
        router_logits,
        self.e_score_correction_bias.data,
        self.top_k,
        num_real_experts=self.num_logical_experts,
        num_identity_experts=None if is_identity else 0,
        scoring_func=self.scoring_func,
        renormalize=self.renormalize,
        routed_scaling_factor=self.routed_scaling_factor,
        indices_dtype=torch.int64 if indices_type == torch.int64 else torch.int32,
    )
    self._zero_expert_output = zero_expert_accumulate(hidden_states, routing.zero_weight)
    experts = getattr(self, "_zexpert_routed_experts", None)
    # A capture callback expects ids of experts.
    skips_ids = experts is not None and _serves(experts) and self.capture_fn is None
    return routing.topk_weights, routing.topk_ids if skips_ids else routing.topk_ids.clamp_min(0)


def _serves(experts: Any) -> bool:
    """True if zexpert's experts compute these RoutedExperts: a layer with zero experts, SwiGLU without extras,
    unquantized weights in vLLM's own layout, all experts on this rank. With tensor parallelism each may be a slice."""
    if not getattr(experts, "_zexpert_has_zero_experts", False):
        return False
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    backend = getattr(experts.quant_method, "unquantized_backend", None)
    return (
        backend == UnquantizedMoeBackend.TRITON
        and experts.activation == MoEActivation.SILU
        and experts.expert_map is None
        and not experts.apply_router_weight_on_input
        and not experts.moe_config.has_bias
        and not experts.moe_config.moe_parallel_config.use_all2all_kernels
        and (experts.swiglu_limit, experts.swiglu_alpha, experts.swiglu_beta) == (None, None, None)
    )


def _forward_modular(
    original: Callable[..., Any],
    self: Any,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_experts: Any = None,
    shared_experts_input: Tensor | None = None,
) -> Any:
    """RoutedExperts.forward_modular: the weighted sum [T, H] over the slots with id >= 0."""
    if not _serves(self):
        return original(self, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
    if shared_experts is not None:
        from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder

        shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
    return RUNNER.run(x, topk_weights, topk_ids, self.w13_weight, self.w2_weight)


def zero_experts_compute(
    expert_indices: Tensor,
    expert_scales: Tensor,
    num_experts: int,
    zero_expert_type: str,
    hidden_states: Tensor,
) -> Tensor:
    """Replaces vLLM's zero_experts_compute_triton, for every hidden size: the identity experts' output [T, H].

    Args:
        expert_indices: [T, K]; those of zero experts, num_experts and above, become 0.
        expert_scales: [T, K]; the weights of zero experts become 0.
        num_experts: real experts.
        zero_expert_type: "identity".
        hidden_states: [T, H].

    Raises:
        ValueError: for another zero_expert_type.
    """
    if zero_expert_type != "identity":
        raise ValueError(f'zero_expert_type must be "identity", got {zero_expert_type!r}')
    is_zero_expert = expert_indices >= num_experts
    zero_weight = torch.where(is_zero_expert, expert_scales, 0.0).sum(dim=-1, dtype=torch.float32)
    expert_indices.masked_fill_(is_zero_expert, 0)
    expert_scales.masked_fill_(is_zero_expert, 0.0)
    return zero_expert_accumulate(hidden_states, zero_weight)
