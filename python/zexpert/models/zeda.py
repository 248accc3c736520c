# SPDX-License-Identifier: Apache-2.0
"""ZEDA (arXiv 2605.18643): drop experts for trained models of the Qwen3 and GLM-4.7 families."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zexpert.layer import FusedMoE
from zexpert.models.checkpoint import CheckpointBlock, SelectionBiasBlock, experts_of
from zexpert.models.config import LayerOptions, config_value, require_config, require_silu
from zexpert.models.float32_linear import Float32Linear

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class ZedaQwen3Config:
    """Sizes of one ZedaQwen3MoE. Names and defaults are those of Qwen3-30B-A3B with ZEDA's 64 zero experts.

    Attributes:
        hidden_size: H.
        moe_intermediate_size: F, of one expert.
        num_experts: R, real experts.
        num_zero_experts: experts with output 0.
        num_experts_per_tok: K.
        norm_topk_prob: divide a token's weights by their sum, zero experts' weights included.
    """

    hidden_size: int = 2048
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_zero_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = True

    @staticmethod
    def from_hf(config: object) -> "ZedaQwen3Config":
        """From the configuration of a Qwen3 MoE model, as an object or a mapping. ZEDA's "zce_nums" count the zero
        experts; without that entry there are none.

        Raises:
            ValueError: if an entry is missing, or the block does not support its value.
        """
        require_silu(config)
        return ZedaQwen3Config(
            hidden_size=config_value(config, "hidden_size"),
            moe_intermediate_size=config_value(config, "moe_intermediate_size"),
            num_experts=config_value(config, "num_experts", other_name="num_local_experts"),
            num_zero_experts=count_zero_experts(config),
            num_experts_per_tok=config_value(config, "num_experts_per_tok"),
            norm_topk_prob=bool(config_value(config, "norm_topk_prob", False)),
        )


@dataclass(frozen=True)
class ZedaGlm4Config:
    """Sizes of one ZedaGlm4MoE. Names and defaults are those of GLM-4.7-Flash with ZEDA's 32 zero experts.

    Attributes:
        hidden_size: H.
        moe_intermediate_size: F, of one expert.
        n_routed_experts: R, real experts.
        num_zero_experts: experts with output 0.
        num_experts_per_tok: K.
        n_shared_experts: the shared expert's intermediate size is this times F; 0 for no shared expert.
        n_group, topk_group: a token chooses within the best topk_group of n_group groups of real experts.
        routed_scaling_factor: factor on every weight.
        norm_topk_prob: divide a token's weights by their sum, zero experts' weights included.
    """

    hidden_size: int = 2048
    moe_intermediate_size: int = 1536
    n_routed_experts: int = 64
    num_zero_experts: int = 32
    num_experts_per_tok: int = 4
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.8
    norm_topk_prob: bool = True

    @staticmethod
    def from_hf(config: object) -> "ZedaGlm4Config":
        """From the configuration of a GLM-4 MoE model; see ZedaQwen3Config.from_hf."""
        require_silu(config)
        return ZedaGlm4Config(
            hidden_size=config_value(config, "hidden_size"),
            moe_intermediate_size=config_value(config, "moe_intermediate_size"),
            n_routed_experts=config_value(config, "n_routed_experts"),
            num_zero_experts=count_zero_experts(config),
            num_experts_per_tok=config_value(config, "num_experts_per_tok"),
            n_shared_experts=config_value(config, "n_shared_experts", 0),
            n_group=config_value(config, "n_group", 1),
            topk_group=config_value(config, "topk_group", 1),
            routed_scaling_factor=float(config_value(config, "routed_scaling_factor", 1.0)),
            norm_topk_prob=bool(config_value(config, "norm_topk_prob", True)),
        )


def count_zero_experts(config: object) -> int:
    """The number of zero experts in ZEDA's "zce_nums"; ValueError if "zce_types" names another kind than "zero"."""
    types = config_value(config, "zce_types", [])
    if any(kind != "zero" for kind in types):
        raise ValueError(f'zce_types must be "zero" for every entry, got {list(types)}')
    return sum(config_value(config, "zce_nums", []))


class ZedaQwen3MoE(CheckpointBlock):
    """Qwen3's MoE block with drop experts: softmax over all experts, no bias, the K weights divided by their sum, zero
    experts' included. Logits have the experts' dtype, as in the model.

        out = sum over the chosen real experts of p_k / (sum of the K chosen p) * FFN_k(x)

    load_state_dict accepts this block's own state dict and, under the same prefix, a checkpoint's names: "gate.weight"
    [N, H], and "experts.{i}.gate_proj.weight" ... or "experts.gate_up_proj" and "experts.down_proj".

    Args:
        config: the sizes.
        params_dtype: dtype of all parameters, and so of hidden_states; None for torch's default dtype.
        chunk_size, recompute, experts_backend, expert_parallel_group, tensor_parallel_group, device: see FusedMoE.

    Raises:
        ValueError: if config is not a ZedaQwen3Config, or a size is out of range.
    """

    __jit_ignored_attributes__ = ["config"]  # noqa: RUF012

    def __init__(self, config: ZedaQwen3Config, **options: "Unpack[LayerOptions]") -> None:
        super().__init__()
        require_config(config, ZedaQwen3Config)
        self.config = config
        width = config.num_experts + config.num_zero_experts
        dtype, device = options.get("params_dtype"), options.get("device")
        self.gate = nn.Linear(config.hidden_size, width, bias=False, dtype=dtype, device=device)
        self.experts = FusedMoE(
            config.num_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            zero_expert_type="drop" if config.num_zero_experts else None,
            zero_expert_num=config.num_zero_experts or None,
            scoring_func="softmax",
            renormalize=config.norm_topk_prob,
            **options,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] -> [..., H]."""
        out: Tensor = self.experts(hidden_states, self.gate(hidden_states))
        return out


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)): the shared expert."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, dtype=dtype, device=device)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, dtype=dtype, device=device)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, dtype=dtype, device=device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] -> [..., H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return out


class ZedaGlm4MoE(SelectionBiasBlock):
    """GLM-4's MoE block with drop experts: sigmoid scores, a selection bias, groups, a shared expert.

        out = sum over the chosen real experts of scale * s_k / (sum of the K chosen s) * FFN_k(x) + shared(x)

    The groups contain real experts; zero experts are always eligible. In ZEDA's code the groups contain both kinds,
    which is the same for its model's n_group = 1.

    load_state_dict accepts this block's own state dict and, under the same prefix, a checkpoint's names: "gate.weight"
    [N, H], "gate.e_score_correction_bias" [N], "shared_experts.*", and "experts.{i}.gate_proj.weight" ... or
    "experts.gate_up_proj" and "experts.down_proj".

    Args:
        config: the sizes.
        params_dtype: dtype of the experts, and so of hidden_states; None for torch's default dtype. The gate and the
            selection bias are float32.
        chunk_size, recompute, experts_backend, expert_parallel_group, tensor_parallel_group, device: see FusedMoE.

    Raises:
        ValueError: if config is not a ZedaGlm4Config, or a size is out of range.
    """

    def __init__(self, config: ZedaGlm4Config, **options: "Unpack[LayerOptions]") -> None:
        super().__init__()
        require_config(config, ZedaGlm4Config)
        self.config = config
        width = config.n_routed_experts + config.num_zero_experts
        device = options.get("device")
        self.gate = Float32Linear(config.hidden_size, width, device)
        shared_experts = None
        if config.n_shared_experts > 0:
            shared_size = config.n_shared_experts * config.moe_intermediate_size
            shared_experts = GatedMLP(config.hidden_size, shared_size, options.get("params_dtype"), device)
        self.experts = FusedMoE(
            config.n_routed_experts,
            config.num_experts_per_tok,
            config.hidden_size,
            config.moe_intermediate_size,
            zero_expert_type="drop" if config.num_zero_experts else None,
            zero_expert_num=config.num_zero_experts or None,
            e_score_correction_bias=torch.zeros(width, dtype=torch.float32, device=device),
            scoring_func="sigmoid",
            renormalize=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            use_grouped_topk=config.n_group > 1,
            num_expert_group=config.n_group,
            topk_group=config.topk_group,
            shared_experts=shared_experts,
            **options,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., H] -> [..., H]."""
        out: Tensor = self.experts(hidden_states, self.gate(hidden_states))
        return out

    def checkpoint_names(self) -> dict[str, str]:
        experts, _ = experts_of(self)
        names = super().checkpoint_names()
        names["gate.e_score_correction_bias"] = f"{experts}.runner.router.e_score_correction_bias"
        if self.config.n_shared_experts > 0:
            names["shared_experts."] = f"{experts}.runner.shared_experts."
        return names


def extend_router(parameter: Tensor, num_zero_experts: int, generator: torch.Generator | None = None) -> Tensor:
    """Adds rows for zero experts to the router of a trained model, as ZEDA does.

    Each entry of a new row is drawn from a normal distribution with the mean and the standard deviation of that entry
    in the trained rows, so zero experts start as likely as any other.

    Args:
        parameter: [R, H] gate weight, or [R] selection bias; R at least 2.
        num_zero_experts: rows to add.
        generator: for the draw, on the device of `parameter`.

    Returns:
        [R + num_zero_experts, H] or [R + num_zero_experts], a new tensor. Its first R rows are `parameter`'s.

    Raises:
        ValueError: if there are fewer than two trained rows, or num_zero_experts is negative.
    """
    if parameter.dim() < 1 or parameter.size(0) < 2:
        raise ValueError(f"parameter must have a row per trained expert, 2 or more, got shape {list(parameter.shape)}")
    if num_zero_experts < 0:
        raise ValueError(f"num_zero_experts must not be negative, got {num_zero_experts}")
    trained = parameter.detach()
    std, mean = torch.std_mean(trained.float(), dim=0)
    noise = torch.randn(num_zero_experts, *trained.shape[1:], generator=generator, device=trained.device)
    return torch.cat((trained, (noise * std + mean).to(trained.dtype)))
