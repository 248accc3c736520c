# SPDX-License-Identifier: Apache-2.0
"""MoE++'s mixture of experts (arXiv 2410.07348): zero, copy and constant experts, gating residuals."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zexpert.layer import FusedMoE
from zexpert.models.checkpoint import CheckpointBlock, experts_of, rename
from zexpert.models.config import LayerOptions, config_value, require_config, require_silu
from zexpert.models.expert_tensors import ExpertTensor, module_list
from zexpert.models.float32_linear import Float32Linear

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class MoEPlusPlusConfig:
    """Sizes and switches of one MoEPlusPlusBlock. The defaults are the published 7B model's (16 FFN + 4 others).

    Attributes:
        hidden_size: H.
        intermediate_size: F, of one expert.
        num_ffn_experts: R, real experts.
        num_constant_experts: experts that return a1 * x + a2 * v, [a1, a2] = softmax(x @ Wc.T).
        num_copy_experts: experts that return x.
        num_zero_experts: experts that return 0.
        top_k: K.
        gating_residual: add the previous layer's logits, through a matrix, to this layer's. False for the first layer:
            its matrix would get no gradient, for which DistributedDataParallel stops.
        two_layer_gate: logits from tanh(x @ W1.T) @ W2.T, W1 [8N, H], instead of x @ W.T.
        logits_std: None, or: softmax gets each token's logits divided by their standard deviation over the experts and
            multiplied by this. The next layer's residual gets them undivided. Logits that are all the same are not
            divided.
        drop_before_renormalize: weights of zero experts become 0 before the K weights are divided by their sum. Without
            zero experts it has no effect.
        scale_input_by_top_k: the experts get K * x.
    """

    hidden_size: int = 1536
    intermediate_size: int = 4096
    num_ffn_experts: int = 16
    num_constant_experts: int = 2
    num_copy_experts: int = 1
    num_zero_experts: int = 1
    top_k: int = 2
    gating_residual: bool = True
    two_layer_gate: bool = False
    logits_std: float | None = 1.0
    drop_before_renormalize: bool = True
    scale_input_by_top_k: bool = False

    @property
    def num_logits(self) -> int:
        """N, the width of the logits."""
        return self.num_ffn_experts + self.num_constant_experts + self.num_copy_experts + self.num_zero_experts

    @property
    def num_experts(self) -> int:
        """The older name of num_logits, for one release."""
        return self.num_logits

    @staticmethod
    def from_hf(config: object) -> "MoEPlusPlusConfig":
        """From the configuration in the published code, or its config.json as a mapping. That code always has two
        constant experts, one copy expert, one zero expert, and two experts per token.

        Raises:
            ValueError: if an entry is missing, or the block does not support its value.
        """
        require_silu(config)
        num_experts = config_value(config, "num_experts")[0]
        plain_topk = bool(config_value(config, "moe_use_mixtral_gating", False))
        normed = bool(config_value(config, "moe_use_logits_norm", False))
        unscaled = plain_topk or bool(config_value(config, "moe_feature_no_mul_topk", False))
        return MoEPlusPlusConfig(
            hidden_size=config_value(config, "hidden_size"),
            intermediate_size=config_value(config, "intermediate_size"),
            num_ffn_experts=num_experts - 4,
            two_layer_gate=bool(config_value(config, "moe_2layer_gate", True)),
            logits_std=float(config_value(config, "moe_gate_norm_std", 1.0)) if normed else None,
            drop_before_renormalize=not plain_topk,
            scale_input_by_top_k=not unscaled,
        )


class MoEPlusPlusGate(nn.Module):
    """Logits in float32 (float64 for float64 hidden_states): G(x) = wg(x) + gate_map(G of the previous layer).

    The columns are in FusedMoE's order, [FFN | copy | constant | zero].
    """

    def __init__(self, config: MoEPlusPlusConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        size, width = config.hidden_size, config.num_logits
        self.wg: nn.Module
        if config.two_layer_gate:
            self.wg = nn.Sequential(
                Float32Linear(size, 8 * width, device),
                nn.Tanh(),
                Float32Linear(8 * width, width, device),
            )
        else:
            self.wg = Float32Linear(size, width, device)
        self.gate_map: nn.Module | None = None
        if config.gating_residual:
            self.gate_map = Float32Linear(width, width, device)

    def forward(self, hidden_states: Tensor, previous_logits: Tensor | None = None) -> Tensor:
        """hidden_states [..., H], previous_logits [..., N] or None -> logits [..., N]."""
        logits: Tensor = self.wg(hidden_states)
        if self.gate_map is not None:
            if previous_logits is not None:
                logits = logits + self.gate_map(previous_logits)
        return logits


class MoEPlusPlusBlock(CheckpointBlock):
    """The MoE block of an MoE++ decoder layer:

        out = sum_k w_k * E_k(x),    w = p_k / sum of the chosen p, the zero experts' p counting 0,
        p = softmax(G(x)), the K largest; E is a feed-forward network, x, a1 * x + a2 * v, or 0.

    forward returns the logits too, for the next layer's gating residual. The first layer has none:

        blocks = [MoEPlusPlusBlock(replace(config, gating_residual=layer > 0)) for layer in range(num_layers)]
        out, logits = blocks[0](x)
        out, logits = blocks[1](out, logits)

    load_state_dict accepts this block's own state dict and, under the same prefix, the published code's names
    ("moe.gate.wg.weight" or "moe.gate.wg.{0,2}.weight", "moe.gate.gate_map.weight", "moe.experts.experts.{i}.*"). That
    code orders the experts [FFN | constant | copy | zero]: the rows of the gate, and rows and columns of the residual's
    matrix, are permuted to FusedMoE's order. Without gating_residual the checkpoint's unused "gate_map" is ignored.

    Args:
        config: sizes and switches.
        params_dtype: dtype of the experts, and so of hidden_states; None for torch's default dtype. Gates are float32.
        chunk_size, recompute, experts_backend, expert_parallel_group, tensor_parallel_group, device: see FusedMoE.

    Raises:
        ValueError: if config is not a MoEPlusPlusConfig, or a size is out of range.
    """

    __jit_ignored_attributes__ = ["config"]  # noqa: RUF012

    def __init__(self, config: MoEPlusPlusConfig, **options: "Unpack[LayerOptions]") -> None:
        super().__init__()
        require_config(config, MoEPlusPlusConfig)
        self.config = config
        self.logits_std = config.logits_std if config.num_logits > 1 else None
        self.input_scale = float(config.top_k) if config.scale_input_by_top_k else 1.0
        zero_experts = {
            "identity": config.num_copy_experts,
            "constant": config.num_constant_experts,
            "drop": config.num_zero_experts,
        }
        has_zero_experts = any(zero_experts.values())
        self.gate = MoEPlusPlusGate(config, options.get("device"))
        self.experts = FusedMoE(
            config.num_ffn_experts,
            config.top_k,
            config.hidden_size,
            config.intermediate_size,
            zero_expert_type=zero_experts if has_zero_experts else None,
            scoring_func="softmax",
            renormalize=True,
            drop_before_renormalize=config.drop_before_renormalize and config.num_zero_experts > 0,
            **options,
        )

    def forward(self, hidden_states: Tensor, previous_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The block's output and its logits.

        Args:
            hidden_states: [..., H], of the experts' dtype.
            previous_logits: [..., N], the logits of the previous MoE++ block; None for the first. A block without
                gating_residual ignores them.

        Returns:
            [..., H] in the dtype of hidden_states, and logits [..., N] in float32 (float64 for float64).
        """
        logits: Tensor = self.gate(hidden_states, previous_logits)
        routed_logits = logits
        logits_std = self.logits_std
        if logits_std is not None:
            routed_logits = logits / (spread(logits, logits_std) / logits_std)
        if self.input_scale != 1.0:
            hidden_states = hidden_states * self.input_scale
        return self.experts(hidden_states, routed_logits), logits

    def checkpoint_names(self) -> dict[str, str]:
        return {"moe.gate.": "gate."}

    def expert_tensors(self) -> dict[str, ExpertTensor]:
        config, name = self.config, "moe.experts.experts.{}."
        places = module_list(experts_of(self)[1], name, gate_proj=False)
        for index in range(config.num_constant_experts):
            constant = name.format(config.num_ffn_experts + index)
            places[f"{constant}wg.weight"] = ExpertTensor("constant_gate_weight", index, None, [2, config.hidden_size])
            places[f"{constant}constant"] = ExpertTensor("constant_vectors", index, None, [config.hidden_size])
        return places

    def rename_checkpoint(self, state_dict: dict[str, Any], prefix: str) -> None:
        gate = prefix + "moe.gate."
        if not self.config.gating_residual:
            state_dict.pop(gate + "gate_map.weight", None)
        permute_gate(state_dict, gate, expert_order(self.config))
        rename(state_dict, prefix, self.checkpoint_names())

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """See CheckpointBlock. Names and order of experts are the published code's."""
        weights = super().checkpoint_state_dict()
        experts, _ = experts_of(self)
        order = expert_order(self.config)
        permute_gate(weights, "moe.gate.", [order.index(expert) for expert in range(len(order))])
        published = {name: tensor for name, tensor in weights.items() if name.startswith("moe.gate.")}
        for name, place in self.expert_tensors().items():
            published[name] = weights[f"{experts}.{place.weight}"][place.expert]
        return published


def spread(logits: Tensor, otherwise: float) -> Tensor:
    """[..., 1], the standard deviation of each token's logits [..., N], or `otherwise` if they are all the same up to
    rounding: for padding, and for every token if the gate is 0."""
    std = logits.std(dim=-1, keepdim=True)
    eps = 2.0**-52 if logits.dtype == torch.float64 else 2.0**-23
    # Below 1e-12 the gradient of a division by it would overflow.
    smallest = (eps * logits.detach().abs().amax(dim=-1, keepdim=True)).clamp(min=1e-12)
    return torch.where(std > smallest, std, otherwise)


def permute_gate(state_dict: dict[str, Any], prefix: str, order: list[int]) -> None:
    """Permutes the experts of the gate under `prefix`, in place: the rows of its weights, and the columns of the
    residual's matrix too. Raises RuntimeError for another shape."""
    for name in ("wg.weight", "wg.2.weight", "gate_map.weight"):
        weight = state_dict.get(prefix + name)
        if weight is None:
            continue
        is_map = name == "gate_map.weight"
        columns = len(order) if is_map else weight.size(-1)
        if weight.shape != (len(order), columns):
            raise RuntimeError(f"{prefix}{name} must have shape {[len(order), columns]}, got {list(weight.shape)}")
        state_dict[prefix + name] = weight[order][:, order] if is_map else weight[order]


def expert_order(config: MoEPlusPlusConfig) -> list[int]:
    """Maps each column in FusedMoE's order, [FFN | copy | constant | zero], to the expert in the published order,
    [FFN | constant | copy | zero]."""
    first_copy = config.num_ffn_experts + config.num_constant_experts
    first_zero = first_copy + config.num_copy_experts
    return [
        *range(config.num_ffn_experts),
        *range(first_copy, first_zero),
        *range(config.num_ffn_experts, first_copy),
        *range(first_zero, config.num_logits),
    ]
