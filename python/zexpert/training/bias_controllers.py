# SPDX-License-Identifier: Apache-2.0
"""Controllers of the selection bias: they steer load and compute without a loss term.

A controller reads how many slots each real expert got and moves e_score_correction_bias, which affects the choice, not
the weights. The bias is in the layer's state dict; a controller's own state is its settings.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zexpert.router.base_router import check_tensor
from zexpert.telemetry import RoutingStats, is_distributed, moe_runners


class BiasController:
    """The base of the controllers. Subclasses define bias_change, by which the biases of real experts move.

    Zero experts' biases do not move, so a real expert's bias is its advantage over them.

    Args:
        update_rate: mu, the step size. It can be changed between updates, for a decay schedule.

    Attributes:
        num_updates: calls of update so far.

    Raises:
        ValueError: if update_rate is negative or not finite.
    """

    def __init__(self, update_rate: float) -> None:
        self.update_rate = update_rate
        self.num_updates = 0

    @property
    def update_rate(self) -> float:
        """mu, the step size."""
        return self._update_rate

    @update_rate.setter
    def update_rate(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"update_rate must be finite and at least 0, got {value}")
        self._update_rate = float(value)

    def bias_change(self, expert_load: Tensor, num_tokens: Tensor, top_k: int) -> Tensor:
        """[R], the change of the real experts' biases, update_rate included.

        Args:
            expert_load: [R] float64, slots per real expert.
            num_tokens: float64 scalar, the number of tokens that expert_load counts; at least 1.
            top_k: K.
        """
        raise NotImplementedError

    def check_layer(self, e_score_correction_bias: Tensor, expert_load: Tensor, top_k: int) -> None:
        """Raises ValueError unless update_bias can update the bias from the load."""
        check_tensor("e_score_correction_bias", e_score_correction_bias)
        check_tensor("expert_load", expert_load)
        if e_score_correction_bias.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "e_score_correction_bias must be float32 or float64, because small updates vanish in others, got "
                f"{e_score_correction_bias.dtype}"
            )
        if expert_load.dim() != 1 or not 1 <= expert_load.numel() <= e_score_correction_bias.numel():
            raise ValueError(
                f"expert_load must have one entry per real expert, at most {e_score_correction_bias.numel()}, "
                f"got shape {list(expert_load.shape)}"
            )

    @torch.no_grad()
    def update_bias(
        self, e_score_correction_bias: Tensor, expert_load: Tensor, num_tokens: Tensor | int, top_k: int
    ) -> None:
        """Moves one layer's bias in place. Without tokens nothing moves. It does not reduce over ranks or wait for the
        device.

        Args:
            e_score_correction_bias: [N], float32 or float64; the first R entries belong to real experts.
            expert_load: [R], any dtype, slots per real expert: the differences of moe_plan's expert_offsets.
            num_tokens: the number of tokens that expert_load counts.
            top_k: K, slots per token.

        Raises:
            ValueError: if the bias has a dtype that rounds small steps away, or is shorter than the load.
        """
        self.check_layer(e_score_correction_bias, expert_load, top_k)
        tokens = torch.as_tensor(num_tokens, dtype=torch.float64, device=expert_load.device)
        change = self.bias_change(expert_load.double(), tokens.clamp(min=1.0), top_k)
        change = torch.where(tokens > 0, change, torch.zeros_like(change))
        e_score_correction_bias[: expert_load.numel()].add_(change.to(e_score_correction_bias))

    @torch.no_grad()
    def update(
        self, model: nn.Module, *, process_group: dist.ProcessGroup | None = None, reset_stats: bool = True
    ) -> None:
        """Moves the bias of every tracked layer in `model` by the layer's counts since the last reset.

        Only forwards in training mode count: put the model into train() for steps and into eval() for validation.
        Tracked layers without a bias are left alone, with their counts.

        If torch.distributed is initialised, every rank must call this. One all_reduce sums the counts of all layers
        over the ranks, so that every rank makes the same update. With an expert map, an expert's load is the sum over
        its replicas.

        Args:
            model: a module that zexpert.telemetry.track_routing tracks.
            process_group: the data-parallel ranks; None: all ranks.
            reset_stats: set the layers' counts to 0, so that the next update uses new tokens only.

        Raises:
            ValueError: if no layer is tracked, no tracked layer has a bias, or a bias does not fit (update_bias).
        """
        layers = controlled_layers(model)
        for bias, load, stats in layers:
            self.check_layer(bias, load, stats.top_k)
        if not any(stats.training for _, _, stats in layers):
            warnings.warn(
                "the model is in eval mode, and only forwards in training mode count: call model.train() for training",
                stacklevel=3,  # past torch.no_grad's wrapper
            )
        device = layers[0][0].device
        counts = torch.cat([torch.cat((load, stats.num_training_tokens[None])).to(device) for _, load, stats in layers])
        if is_distributed():
            dist.all_reduce(counts, group=process_group)
        sizes = [load.numel() + 1 for _, load, _ in layers]
        for (bias, _, stats), count in zip(layers, counts.split(sizes), strict=True):
            self.update_bias(bias, count[:-1].to(bias.device), count[-1].to(bias.device), stats.top_k)
            if reset_stats:
                stats.reset()
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The settings that a resumed run needs. The biases are in the model's state dict."""
        return {"update_rate": self.update_rate, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the settings of `state_dict`.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if an entry is out of range.
        """
        self.update_rate = state_dict["update_rate"]
        self.num_updates = int(state_dict["num_updates"])

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.state_dict().items())
        return f"{type(self).__name__}({fields})"


class LongCatBiasController(BiasController):
    """LongCat-Flash's controller (arXiv 2509.01322, section 2.1). It keeps the mean number of real experts per token at
    K_e and the load on them even. For real expert i, which got T_i slots from T_all tokens,

        b_i += mu * (K_e / (K * R) - T_i / (K * T_all)).

    The step is proportional to the error, unlike the sign rule's.

    Args:
        update_rate: mu. The paper uses a decay schedule.
        target_ffn_experts: K_e, the target for the mean number of real experts per token; above 0 and at most K.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(self, update_rate: float, target_ffn_experts: float) -> None:
        super().__init__(update_rate)
        self.target_ffn_experts = target_ffn_experts

    @property
    def target_ffn_experts(self) -> float:
        """K_e."""
        return self._target_ffn_experts

    @target_ffn_experts.setter
    def target_ffn_experts(self, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"target_ffn_experts must be finite and above 0, got {value}")
        self._target_ffn_experts = float(value)

    def check_layer(self, e_score_correction_bias: Tensor, expert_load: Tensor, top_k: int) -> None:
        super().check_layer(e_score_correction_bias, expert_load, top_k)
        if self.target_ffn_experts > top_k:
            raise ValueError(f"target_ffn_experts must be at most top_k ({top_k}), got {self.target_ffn_experts}")

    def bias_change(self, expert_load: Tensor, num_tokens: Tensor, top_k: int) -> Tensor:
        wanted = self.target_ffn_experts / (top_k * expert_load.numel())
        return self.update_rate * (wanted - expert_load / (top_k * num_tokens))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "target_ffn_experts": self.target_ffn_experts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        target_ffn_experts = state_dict["target_ffn_experts"]
        super().load_state_dict(state_dict)
        self.target_ffn_experts = target_ffn_experts


class SignBiasController(BiasController):
    """DeepSeek-V3's rule (arXiv 2412.19437, section 2.1.2; arXiv 2408.15664). Every real expert's bias moves by mu
    towards even load,

        b_i += mu * sign(mean_j T_j - T_i),

    where T_i is the number of slots of real expert i. It evens the load of the real experts. The router alone decides
    how many slots go to zero experts.
    """

    def bias_change(self, expert_load: Tensor, num_tokens: Tensor, top_k: int) -> Tensor:
        return self.update_rate * torch.sign(expert_load.mean() - expert_load)


def controlled_layers(model: nn.Module) -> list[tuple[Tensor, Tensor, RoutingStats]]:
    """Selection bias, training load [R] of logical experts and stats of the tracked layers of `model` that have a bias.

    Raises:
        ValueError: if there is none, or the stats of one count the physical experts of a map that it no longer has.
    """
    layers, without_bias = [], []
    for name, runner in moe_runners(model).items():
        stats = runner.routing_stats
        if not isinstance(stats, RoutingStats):
            continue
        router: Any = runner.router
        if router.e_score_correction_bias is None:
            without_bias.append(name)
            continue
        load, expert_map = stats.training_load, router.logical_to_physical_map
        if expert_map is not None:
            load = torch.where(expert_map >= 0, load[expert_map], 0).sum(dim=1)
        elif stats.num_experts != router.num_real_experts:
            raise ValueError(
                f"layer {name!r} must count the load of its {router.num_real_experts} logical experts, got "
                f"{stats.num_experts} physical ones of an expert map"
            )
        layers.append((router.e_score_correction_bias, load, stats))
    if not layers and without_bias:
        raise ValueError(
            f"layer {without_bias[0]!r} must have an e_score_correction_bias to be controlled, got None, and no other "
            "tracked layer has one: give the layers a bias, or use a loss (group_loss, switch_loss)"
        )
    if not layers:
        raise ValueError("model must have a layer with routing stats (zexpert.telemetry.track_routing), got none")
    return layers
