# SPDX-License-Identifier: Apache-2.0
"""Controllers of the selection bias: they hold load and compute where they are wanted, without a loss term.

A controller reads how many slots each real expert got, and moves e_score_correction_bias, which decides selection
only. The bias itself is the memory: it is in the layer's state dict, and a controller's own state is its settings.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zexpert.router.base_router import check_tensor
from zexpert.telemetry import RoutingStats, is_distributed, moe_runners


class BiasController:
    """What the controllers share. Subclasses say by how much the biases of real experts move.

    Zero experts' biases stay, so a real expert's bias is its advantage over them.

    Args:
        update_rate: mu, the step size; may be changed between updates, as a decay schedule does.

    Attributes:
        num_updates: updates of models so far.

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
        """[R], what one update adds to the biases of the real experts, update_rate included.

        Args:
            expert_load: [R] float64, slots per real expert.
            num_tokens: float64 scalar, tokens the load is of; at least 1.
            top_k: K.
        """
        raise NotImplementedError

    def check_layer(self, e_score_correction_bias: Tensor, expert_load: Tensor, top_k: int) -> None:
        """Raises ValueError unless update_bias can update the bias from the load."""
        check_tensor("e_score_correction_bias", e_score_correction_bias)
        check_tensor("expert_load", expert_load)
        if e_score_correction_bias.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "e_score_correction_bias must be float32 or float64, which small updates do not vanish in, got "
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
        """Moves one layer's bias in place. Without tokens nothing moves. No reduction over ranks, no host sync.

        Args:
            e_score_correction_bias: [N], float32 or float64; the first R entries belong to real experts.
            expert_load: [R], any dtype, slots per real expert: the differences of moe_plan's expert_offsets.
            num_tokens: tokens that the load is of.
            top_k: K, slots per token.

        Raises:
            ValueError: if the bias is of a dtype that rounds small steps away, or shorter than the load.
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
        """Moves the bias of every tracked layer in `model` by what the layer did since its stats were reset.

        Where torch.distributed is initialised, the counts are summed over the ranks first, all layers in one
        all_reduce, so that every rank makes the same update; every rank calls this. With an expert map, an expert's
        load is that of its replicas together.

        Args:
            model: a module whose layers zexpert.telemetry.track_routing tracks.
            process_group: the data-parallel ranks; None: all ranks.
            reset_stats: start the stats of the layers again, so that the next update sees new tokens only.

        Raises:
            ValueError: if no layer is tracked, a tracked layer has no bias, or its bias does not fit (update_bias).
        """
        layers = controlled_layers(model)
        for bias, load, stats in layers:
            self.check_layer(bias, load, stats.top_k)
        device = layers[0][0].device
        counts = torch.cat([torch.cat((load, stats.num_tokens[None])).to(device) for _, load, stats in layers])
        if is_distributed():
            dist.all_reduce(counts, group=process_group)
        sizes = [load.numel() + 1 for _, load, _ in layers]
        for (bias, _, stats), count in zip(layers, counts.split(sizes), strict=True):
            self.update_bias(bias, count[:-1].to(bias.device), count[-1].to(bias.device), stats.top_k)
            if reset_stats:
                stats.reset()
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's state dict, which holds the biases."""
        return {"update_rate": self.update_rate, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict`.

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
    """LongCat-Flash's controller (arXiv 2509.01322, section 2.1): holds the mean number of real experts per token at
    K_e and the load on them even, both at once. Per real expert i

        b_i += mu * (K_e / (K * R) - T_i / (K * T_all)),

    T_i the slots it got from T_all tokens. The step shrinks with the error, unlike the sign rule's.

    Args:
        update_rate: mu. The paper uses a decay schedule.
        target_ffn_experts: K_e, wanted mean number of real experts per token; above 0 and at most K.

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
    """DeepSeek-V3's rule (arXiv 2412.19437, section 2.1.2; arXiv 2408.15664): every real expert's bias takes a step of
    one size towards even load,

        b_i += mu * sign(mean_j T_j - T_i),

    T_i the slots that real expert i got. It evens the load among real experts; how many slots go to zero experts it
    leaves to the router.
    """

    def bias_change(self, expert_load: Tensor, num_tokens: Tensor, top_k: int) -> Tensor:
        return self.update_rate * torch.sign(expert_load.mean() - expert_load)


def controlled_layers(model: nn.Module) -> list[tuple[Tensor, Tensor, RoutingStats]]:
    """Selection bias, load [R] of logical experts and stats of the tracked layers of `model`; ValueError if there is
    none, or one whose router has no bias or whose stats count physical experts of a map it no longer has."""
    layers = []
    for name, runner in moe_runners(model).items():
        stats = runner.routing_stats
        if not isinstance(stats, RoutingStats):
            continue
        router: Any = runner.router
        if router.e_score_correction_bias is None:
            raise ValueError(f"layer {name!r} must have an e_score_correction_bias to be controlled, got None")
        load, expert_map = stats.expert_load, router.logical_to_physical_map
        if expert_map is not None:
            load = torch.where(expert_map >= 0, load[expert_map], 0).sum(dim=1)
        elif stats.num_experts != router.num_real_experts:
            raise ValueError(
                f"layer {name!r} must count the load of its {router.num_real_experts} logical experts, got "
                f"{stats.num_experts} physical ones of an expert map"
            )
        layers.append((router.e_score_correction_bias, load, stats))
    if not layers:
        raise ValueError("model must have a layer with routing stats (zexpert.telemetry.track_routing), got none")
    return layers
