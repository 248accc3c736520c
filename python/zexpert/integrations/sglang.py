# SPDX-License-Identifier: Apache-2.0
"""zexpert in SGLang: routing and zero experts of LongCat-Flash.

SGLang calls `zexpert_plugins.sglang` in every process through the entry point "sglang.srt.plugins". It does nothing
unless the environment has ZEXPERT_SGLANG=1 (or true, yes, on); then it calls `register`: LongcatFlashMoE.forward takes
its float32 logits from router_logits, and its weights, ids and zero experts' output from biased_topk and
zero_expert_accumulate. SGLang's experts stay. Their kernels do not accept negative ids, so a slot that chose a zero
expert has id 0 and weight 0. Captured routed experts (`--enable-return-routed-experts`) are, as SGLang's own, the
choices among all experts.

Two results differ from SGLang's own:

- The identity experts' part is multiplied by routed_scaling_factor, as in transformers and vLLM. SGLang 0.5.23 scales
  only the experts' part.
- Every channel gets that part. SGLang's kernel omits the last hidden_size % 256 channels of a token.

Written for SGLang 0.5.23.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zexpert.integrations.engine_router import engine_router_logits
from zexpert.ops import biased_topk, biased_topk_choices, zero_expert_accumulate

_TARGET = "sglang.srt.models.longcat_flash.LongcatFlashMoE.forward"


def register() -> None:
    """Makes this process's SGLang use zexpert. Further calls do nothing.

    Raises:
        ImportError: if SGLang is not installed or has no plugins.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if all(hook is not _forward for _, hook, _ in HookRegistry._hooks.get(_TARGET, [])):
        HookRegistry.register(_TARGET, _forward, HookType.REPLACE)


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    """LongcatFlashMoE.forward: [T, H] -> [T, H]."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput, capture_routed_experts_if_allowed
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    router_logits = engine_router_logits(self.router.classifier, hidden_states)
    if router_logits is None:
        router_logits = self.router(hidden_states)
    bias = self.router.e_score_correction_bias.data
    routing_arguments: dict[str, Any] = {
        "num_real_experts": self.num_experts,
        "num_identity_experts": None if self.zero_expert_type == "identity" else 0,
    }
    choices: Tensor | None = None
    if get_global_experts_capturer() is not None:
        choices = biased_topk_choices(router_logits, bias, self.top_k, **routing_arguments)
        capture_routed_experts_if_allowed(self.topk.topk_config, self.layer_id, choices)
    routing = biased_topk(router_logits, bias, self.top_k, **routing_arguments, choices=choices)
    chosen = StandardTopKOutput(routing.topk_weights, routing.topk_ids.clamp_min(0), router_logits)
    out: Tensor = self.experts(hidden_states, chosen)
    out *= self.routed_scaling_factor
    return zero_expert_accumulate(hidden_states, routing.zero_weight * self.routed_scaling_factor, out=out)


def routed_experts(response: Mapping[str, Any], *, num_layers: int, top_k: int) -> Tensor:
    """The experts that a request's tokens chose, as zexpert.choices.record_of_routed_experts accepts them.

    Args:
        response: what SGLang's /generate returns for a request with return_routed_experts: its
            meta_info["routed_experts"] is base64 of int32.
        num_layers: L, the layers that SGLang counts, num_hidden_layers of the model's configuration.
        top_k: K.

    Returns:
        [tokens, L, K] int32: all tokens but the last, from the request's routed_experts_start_len on.

    Raises:
        ValueError: if the response has no such entry, or its numbers do not fill whole tokens.
    """
    text = response.get("meta_info", {}).get("routed_experts")
    if not isinstance(text, str):
        raise ValueError(
            f'response must have text in meta_info["routed_experts"], got {type(text).__name__}: '
            "start SGLang with --enable-return-routed-experts and send return_routed_experts"
        )
    numbers = torch.frombuffer(bytearray(b64decode(text)), dtype=torch.int32) if text else torch.empty(0).int()
    if numbers.numel() % (num_layers * top_k) != 0:
        raise ValueError(
            f"num_layers * top_k must divide the numbers of routed_experts ({numbers.numel()}), "
            f"got {num_layers} * {top_k}"
        )
    return numbers.view(-1, num_layers, top_k)
