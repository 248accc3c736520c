# SPDX-License-Identifier: Apache-2.0
"""LongCat-Flash's mixture of experts (arXiv 2509.01322): identity experts, a selection bias, a router in float32."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zexpert.layer import FusedMoE
from zexpert.models.checkpoint import SelectionBiasBlock, experts_of
from zexpert.models.config import LayerOptions, config_value, require_config, require_silu
from zexpert.models.float32_linear import Float32Linear

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class LongcatFlashConfig:
    """Sizes of one LongcatFlashMoE. Names and defaults are those of the published configuration.

    Attributes:
        hidden_size: H.
        expert_ffn_hidden_size: F, of one expert.
        n_routed_experts: R, real experts.
        zero_expert_num: zero experts; 0 for none.
        zero_expert_type: their kind, "identity" in all published models.
        moe_topk: K, experts per token, zero experts included.
        routed_scaling_factor: factor on every weight.
        norm_topk_prob: divide a token's weights by their sum.
    """

    hidden_size: int = 6144
    expert_ffn_hidden_size: int = 2048
    n_routed_experts: int = 512
    zero_expert_num: int = 256
    zero_expert_type: str = "identity"
    moe_topk: int = 12
    routed_scaling_factor: float = 6.0
    norm_topk_prob: bool = False

    @property
    def num_logits(self) -> int:
        """N, the width of the router's logits."""
        return self.n_routed_experts + self.zero_expert_num

    @property
    def num_experts(self) -> int:
        """The older name of num_logits, for one release."""
        return self.num_logits

    @staticmethod
    def from_hf(config: object) -> "LongcatFlashConfig":
        """From transformers' LongcatFlashConfig, or a config.json as a mapping.

        Raises:
            ValueError: if an entry is missing, or the block does not support its value.
        """
        require_silu(config)
        if config_value(config, "router_bias", False):
            raise ValueError("router_bias must be false: no published model has one, and transformers ignores it")
        return LongcatFlashConfig(
            hidden_size=config_value(config, "hidden_size"),
            expert_ffn_hidden_size=config_value(config, "expert_ffn_hidden_size"),
            n_routed_experts=config_value(config, "n_routed_experts"),
            zero_expert_num=config_value(config, "zero_expert_num", 0),
            zero_expert_type=config_value(config, "zero_expert_type", "identity"),
            moe_topk=config_value(config, "moe_topk"),
            routed_scaling_factor=float(config_value(config, "routed_scaling_factor")),
            norm_topk_prob=bool(config_value(config, "norm_topk_prob", False)),
        )


class LongcatFlashRouter(nn.Module):
    """The classifier. Logits are float32 for any dtype of hidden_states (float64 for float64).

    The selection bias, "router.e_score_correction_bias" in checkpoints, is in the router of the FusedMoE.
    """

    def __init__(self, hidden_size: int, num_logits: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.classifier = Float32Linear(hidden_size, num_logits, device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] -> router_logits [..., N]."""
        router_logits: Tensor = self.classifier(hidden_states)
        return router_logits


class LongcatFlashMoE(SelectionBiasBlock):
    """The MoE block of a LongCat-Flash decoder layer. It replaces transformers' LongcatFlashMoE:

        out = sum_k w_k * FFN_k(x) + (sum of the identity experts' w) * x,      w = scale * softmax(x @ classifier.T)

    for the K experts of largest softmax + bias. transformers adds the terms one by one in the dtype of x; here they are
    added in float32 and rounded once.

    load_state_dict accepts this block's own state dict and, under the same prefix, a checkpoint's names:

        router.classifier.weight [N, H], router.e_score_correction_bias [N]
        experts.gate_up_proj [R or N, 2F, H] and experts.down_proj [R or N, H, F], or
        experts.{i}.gate_proj.weight, experts.{i}.up_proj.weight and experts.{i}.down_proj.weight

    So a whole model with this block as its `mlp` modules loads a whole Hugging Face state dict.

    Args:
        config: the sizes.
        params_dtype: dtype of the experts, and so of hidden_states; None for torch's default dtype. The classifier and
            the selection bias are float32.
        chunk_size, recompute, experts_backend, expert_parallel_group, tensor_parallel_group, device: see FusedMoE.

    Raises:
        ValueError: if config is not a LongcatFlashConfig, or a size is out of range.
    """

    def __init__(self, config: LongcatFlashConfig, **options: "Unpack[LayerOptions]") -> None:
        super().__init__()
        require_config(config, LongcatFlashConfig)
        self.config = config
        device = options.get("device")
        self.router = LongcatFlashRouter(config.hidden_size, config.num_logits, device)
        self.experts = FusedMoE(
            config.n_routed_experts,
            config.moe_topk,
            config.hidden_size,
            config.expert_ffn_hidden_size,
            zero_expert_type=config.zero_expert_type if config.zero_expert_num > 0 else None,
            zero_expert_num=config.zero_expert_num or None,
            e_score_correction_bias=torch.zeros(config.num_logits, dtype=torch.float32, device=device),
            scoring_func="softmax",
            renormalize=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            **options,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] of the experts' dtype -> [..., H]."""
        out: Tensor = self.experts(hidden_states, self.router(hidden_states))
        return out

    def checkpoint_names(self) -> dict[str, str]:
        bias = f"{experts_of(self)[0]}.runner.router.e_score_correction_bias"
        return {"router.e_score_correction_bias": bias, **super().checkpoint_names()}

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """See CheckpointBlock. The layout is that of transformers' LongcatFlashMoE: experts.gate_up_proj has N expert
        rows, and those past the real experts are zero. Quantised experts are a module list, as they are published."""
        weights = super().checkpoint_state_dict()
        if experts_of(self)[1].quantization is not None:
            return weights
        gate_up_proj = weights["experts.gate_up_proj"]
        zero_experts = gate_up_proj.new_zeros(self.config.zero_expert_num, *gate_up_proj.shape[1:])
        weights["experts.gate_up_proj"] = torch.cat((gate_up_proj, zero_experts))
        return weights
