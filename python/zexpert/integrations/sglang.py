# SPDX-License-Identifier: Apache-2.0
"""zexpert in SGLang: routing and zero experts of LongCat-Flash.

SGLang calls `register` in every process through the entry point "sglang.srt.plugins". It does nothing unless the
environment says ZEXPERT_SGLANG=1. Then LongcatFlashMoE.forward takes its float32 logits from router_logits, and its
weights, ids and zero experts' output from biased_topk and zero_expert_accumulate. SGLang's experts stay. Their kernels
do not accept negative ids, so a slot that chose a zero expert has id 0 and weight 0.

Two results differ from SGLang's own:

- The identity experts' part is multiplied by routed_scaling_factor, as in transformers and vLLM. SGLang 0.5.23 scales
  only the experts' part.
- Every channel gets that part. SGLang's kernel omits the last hidden_size % 256 channels of a token.

Written for SGLang 0.5.23.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from zexpert.integrations.engine_router import engine_router_logits
from zexpert.ops import biased_topk, zero_expert_accumulate

_TARGET = "sglang.srt.models.longcat_flash.LongcatFlashMoE.forward"


def register() -> None:
    """Makes this process's SGLang use zexpert if ZEXPERT_SGLANG is "1". Further calls do nothing.

    Raises:
        ImportError: if SGLang is not installed or has no plugins.
    """
    if os.environ.get("ZEXPERT_SGLANG") != "1":
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if all(hook is not _forward for _, hook, _ in HookRegistry._hooks.get(_TARGET, [])):
        HookRegistry.register(_TARGET, _forward, HookType.REPLACE)


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    """LongcatFlashMoE.forward: [T, H] -> [T, H]."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    router_logits = engine_router_logits(self.router.classifier, hidden_states)
    if router_logits is None:
        router_logits = self.router(hidden_states)
    routing = biased_topk(
        router_logits,
        self.router.e_score_correction_bias.data,
        self.top_k,
        num_real_experts=self.num_experts,
        num_identity_experts=None if self.zero_expert_type == "identity" else 0,
    )
    chosen = StandardTopKOutput(routing.topk_weights, routing.topk_ids.clamp_min(0), router_logits)
    out: Tensor = self.experts(hidden_states, chosen)
    out *= self.routed_scaling_factor
    return zero_expert_accumulate(hidden_states, routing.zero_weight * self.routed_scaling_factor, out=out)
